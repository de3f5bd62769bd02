"""Fixed-grid Adams and the budget mode built on it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.counting import Counter
from sdeflow.solvers.fixed_adams import FittedAdams, FixedAdams, adams_weights, data_weights, integrals
from sdeflow.tune import RUNS, search
from sdeflow.tune import fit as fitting
from sdeflow.tune.borders import NEAR, Borders
from sdeflow.tune.candidates import PLAIN, UNFITTED, Candidate, draw
from sdeflow.tune.paths import Paths
from sdeflow.tune.trial import MOST_SOLVES, Result, Trial

F64 = torch.float64


def test_weights_integrate_polynomials_exactly_on_any_grid():
    u = np.sort(np.random.default_rng(0).uniform(0.0, 1.0, 9))[::-1].copy()
    for ahead in (0, 1):
        for k in (1, 2, 3, 5):
            rows = integrals(u, k, ahead)
            nodes = u[: rows.shape[1]]
            for power in range(k):
                exact = (u[1:] ** (power + 1) - u[:-1] ** (power + 1)) / (power + 1)
                full = np.arange(len(rows)) + ahead + 1 >= max(k, power + 1)
                assert np.abs(rows @ nodes**power - exact)[full].max() < 1e-9


def test_classical_coefficients():
    even = np.arange(6.0)
    assert np.allclose(integrals(even, 3, 0)[4, 2:5], [5 / 12, -16 / 12, 23 / 12])
    assert np.allclose(integrals(even, 3, 1)[4, 3:6], [-1 / 12, 8 / 12, 5 / 12])


def test_weights_are_those_of_predict_evaluate_correct():
    # the loop written out, against the compiled weights, on x' = cos(3u)·x
    u = np.array([0.0, 0.1, 0.25, 0.3, 0.55, 0.7])
    predict, correct = integrals(u, 3, 0), integrals(u, 3, 1)
    z = p = 1.0
    slopes: list[float] = []
    for n in range(5):
        slopes.append(np.cos(3 * u[n]) * p)
        if n:
            z = z + correct[n - 1, : n + 1] @ slopes
        p = z + predict[n, : n + 1] @ slopes
    equation = sf.Equation(lambda t, x: torch.cos(3 * t) * x)
    x = torch.ones(1, 1, dtype=F64)
    got = sf.solve(equation, FixedAdams(order=3, grid=u.tolist()), x, start=0.0, stop=0.7)
    assert got.x.item() == pytest.approx(p, rel=1e-14) and got.calls == 5
    assert np.allclose(np.triu(adams_weights(u, 3, 3), 1), 0)


@pytest.fixture(scope="module")
def ring():
    process = sf.EDM()
    equation = sf.ProbabilityFlowODE(sf.problems.ring().prediction(process))
    tight = sf.Adams(rtol=1e-9, atol=1e-9)
    x = process.prior((128, 2), seed=1, dtype=F64)
    return process, equation, x, sf.solve(equation, tight, x).x


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


def test_tuned_beats_every_untuned_grid_on_other_samples(ring):
    process, equation, x, end = ring
    solver = sf.tune(equation, budget=15, pilot=process.prior((24, 2), seed=99, dtype=F64))
    solution = sf.solve(equation, solver, x)
    assert (solution.evaluations == 15).all()
    plain = [
        rms(sf.solve(equation, FixedAdams(order=k, steps=15, grid=grid), x).x, end)
        for k in (1, 2, 3, 4)
        for grid in (None, sf.UniformLogSNR(), sf.Karras())
    ]
    plain.append(rms(sf.solve(equation, sf.DPMSolverPP(order=2, steps=15, grid=sf.UniformLogSNR()), x).x, end))
    plain.append(rms(sf.solve(equation, sf.DPMSolverPP(order=2, steps=15, grid=sf.Karras()), x).x, end))
    assert rms(solution.x, end) < 0.35 * min(plain), plain


def test_cost_is_bounded_and_the_error_it_expects_is_that_of_other_samples(ring):
    process, equation, _, _ = ring
    seen = []

    class Counted(sf.DataPrediction):
        def call(self, x, network_time):
            seen.append(x.shape[0])
            return super().call(x, network_time)

    problem = sf.problems.ring()
    counted = sf.ProbabilityFlowODE(Counted(problem.network(process, "data"), process))
    pilot = process.prior((40, 2), seed=5, dtype=F64)
    fractions: list[float] = []
    tuning = search(counted, 8, pilot, progress=fractions.append)
    assert set(seen) == {32} and len(seen) == tuning.evaluations <= 100 * 8
    assert MOST_SOLVES == 100 and 30 <= len(tuning.candidates) <= RUNS
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    # what it expects of other samples it meets on other samples
    x = process.prior((512, 2), seed=6, dtype=F64)
    end = sf.solve(equation, sf.Adams(rtol=1e-9, atol=1e-9), x).x
    assert 0.2 < rms(sf.solve(equation, tuning.solver, x).x, end) / tuning.candidates[0][1] < 5
    assert tuning.candidates[0][0] == tuning.solver


@pytest.mark.parametrize("budget", [2, 5, 50])
def test_cost_is_bounded_at_every_budget(budget):
    process = sf.VP()
    problem = sf.problems.ring()
    seen = []

    def network(x, t):
        seen.append(x.shape[0])
        return problem.denoise(x, process, t[0])

    equation = sf.ProbabilityFlowODE(sf.DataPrediction(network, process))
    tuning = search(equation, budget, process.prior((32, 2), seed=5, dtype=F64))
    assert set(seen) == {32} and len(seen) == tuning.evaluations <= 100 * budget
    assert (tuning.flip_error > 0) == (budget > 2)  # 2 evaluations leave none to look for borders


@pytest.fixture(scope="module")
def two_modes():
    """Modes at ±(1, 0): the border is the axis x₀ = 0 at every time."""
    process = sf.EDM()
    problem = sf.problems.from_points([[1.0, 0.0], [-1.0, 0.0]], std=0.1)
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    pilot = process.prior((16, 2), seed=3, dtype=F64)
    return process, equation, pilot, Borders.found(equation, pilot, 40, 60, torch.arange(2))


def angle_on_arc(pilot, x):
    """θ of x = cos θ a + sin θ b, a and b neighbours in the pilot."""
    cos, sin = torch.linalg.solve(torch.stack([pilot, pilot.roll(-1, 0)], 2), x[:, :, None])[:, :, 0].T
    return torch.atan2(sin, cos)


def test_bisection_finds_the_border(two_modes):
    process, _, pilot, borders = two_modes
    crosses = (pilot[:, 0] > 0) != (pilot.roll(-1, 0)[:, 0] > 0)
    assert 4 < crosses.sum() < 14
    angle = borders.start[:, 0].abs() / process.t_max  # EDM's noise starts at σ = t_max
    found = angle < 0.006  # ten halvings of a quarter circle, times a few standard deviations
    # where an end lies beside the border the tails of its own mode may jump more, in the other half of the arc
    away = (pilot[:, 0] / pilot.norm(dim=1)).abs() > 0.3
    clear = crosses & away & away.roll(-1, 0)
    assert clear.sum() >= 4 and found[clear].all() and not (found & ~crosses).any()
    # 0.02 radians beside the border samples end in the tails between the modes, which are 2 apart
    assert borders.jump[found.numpy()].min() > 1.0 and borders.jump[~found.numpy()].max() < 0.1
    assert borders.others == 0.0  # a circle meets the axis once
    # `near` lies on the arc of the border, on both sides, as far as it says
    turned = angle_on_arc(pilot, borders.near) - angle_on_arc(pilot, borders.start)
    assert (turned.abs() < NEAR[1]).all() and (turned.abs() > NEAR[0]).all()
    assert (turned[::2] < 0).all() and (turned[1::2] > 0).all()


def test_other_borders_are_counted():
    process = sf.VP()
    seen = {}
    for name, problem in (("ring", sf.problems.ring()), ("digits", sf.problems.digits())):
        equation = sf.ProbabilityFlowODE(problem.prediction(process))
        pilot = process.prior((32, problem.dim), seed=3, dtype=F64)
        seen[name] = Borders.found(equation, pilot, 30, 30, torch.arange(problem.dim)).others
    # eight modes round a circle, of which a quarter of it meets two or three; 1797 digits
    assert 0.5 < seen["ring"] < 3 < seen["digits"] < 20


def test_flips_measure_how_far_the_border_moved(two_modes):
    process, equation, pilot, borders = two_modes
    times = sf.UniformLogSNR().times(process, process.t_max, process.t_min, 24)
    every = torch.arange(2)
    centre = Paths.along(equation, borders.start, 200, every).states(times)[0]
    # θ* of C = cos θ* a + sin θ* b, and the way C moves along its arc
    theta = angle_on_arc(pilot, borders.start)[:, None]
    tangent = -theta.sin() * pilot + theta.cos() * pilot.roll(-1, 0)
    crosses = ((pilot[:, 0] > 0) != (pilot.roll(-1, 0)[:, 0] > 0)).nonzero().flatten()
    rows = slice(int(crosses[0]), int(crosses[0]) + 1)
    for shift in (0.0, 0.002, -0.005):
        moved = Paths.along(equation, borders.start + shift * tangent, 200, every).states(times)[0]
        node, across = borders.displacement(times, rows)
        s = ((moved - centre)[node, [rows.start]] * across[node, [0]]).sum(1)
        assert s == pytest.approx(shift, rel=0.15, abs=1e-9)
        often, flips = borders.flips(s, rows)
        assert often == pytest.approx(2 / np.pi * abs(shift), rel=0.15, abs=1e-9)
        assert flips == pytest.approx(2 / np.pi * abs(shift) * borders.jump[rows].item() ** 2, rel=0.25, abs=1e-9)


def test_tails_integrate_the_error_near_borders(two_modes):
    _, _, _, borders = two_modes
    # e = 1/θ on 16 rows: (4/π) ∫ θ^{-2} dθ between the bounds, and e = 1: the share of samples there
    rows = slice(0, 16)
    apart = np.exp(np.log(NEAR[0]) + np.log(NEAR[1] / NEAR[0]) * (np.arange(16) % 8 * 5 % 8 + 0.5) / 8)
    assert borders.tails(np.ones(16), rows) == pytest.approx(4 / np.pi * (NEAR[1] - NEAR[0]), rel=0.05)
    assert borders.tails(1 / apart, rows) == pytest.approx(4 / np.pi * (1 / NEAR[0] - 1 / NEAR[1]), rel=0.05)


def test_the_error_it_expects_ranks_candidates_on_other_samples():
    # with 8 evaluations one digit in thirty becomes another, and none of the pilot need do so
    process, problem = sf.VP(), sf.problems.digits()
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    rng = np.random.default_rng(0)
    x = process.prior((192, 64), seed=7, dtype=F64)
    end = sf.solve(equation, sf.Adams(rtol=1e-6, atol=1e-6), x).x
    with torch.no_grad():
        trial = Trial.prepared(equation, 8, process.prior((32, 64), seed=99, dtype=F64), Counter(32, "cpu"), rng)
        results = [trial.run(draw(rng)) for _ in range(25)]
        error = [rms(sf.solve(equation, result.solver, x).x, end) for result in results]
    expected = [result.expected for result in results]
    assert np.corrcoef(np.log(expected), np.log(error))[0, 1] > 0.7, (expected, error)
    assert min(result.flips for result in results) > 0


@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(), sf.RectifiedFlow()], ids=["VP", "EDM", "RectifiedFlow"])
def test_adams_in_data_weights_is_adams(process):
    problem = sf.problems.ring()
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    x = process.prior((4, 2), seed=1, dtype=F64)
    times = PLAIN.times(process, process.t_max, process.t_min, 9, 1.0)
    chart = sf.StraightLine(c=0.7)
    rows = data_weights(process, times, chart, 3, 4)
    weights = tuple(tuple(row[: n + 1]) for n, row in enumerate(rows))
    plain = FixedAdams(order=3, corrector=4, chart=chart, grid=times)
    fitted = FittedAdams(order=3, corrector=4, chart=chart, grid=times, weights=weights)
    solution = sf.solve(equation, fitted, x)
    assert (solution.evaluations == 9).all()
    assert torch.allclose(solution.x, sf.solve(equation, plain, x).x, rtol=1e-11, atol=1e-11)
    outputs = sf.solve(equation, fitted, x, save_at=times[[3, 9]])
    assert torch.equal(outputs.x, solution.x) and torch.equal(outputs.states[1], solution.x)
    between = float(0.3 * times[3] + 0.7 * times[4])
    with pytest.raises(sf.InvalidInput, match="save_at=.* none of them"):
        sf.solve(equation, fitted, x, save_at=[between])
    other = sf.ProbabilityFlowODE(problem.prediction(sf.VP(beta_max=15.0) if isinstance(process, sf.VP) else sf.VP()))
    grid = PLAIN.times(other.process, other.process.t_max, other.process.t_min, 9, 1.0)
    with pytest.raises(sf.InvalidInput, match="another process"):
        sf.solve(other, FittedAdams(grid=grid, weights=weights), x)
    with pytest.raises(sf.InvalidInput, match="one row a step"):
        FittedAdams(grid=times, weights=weights[:-1])


def fitted(budget, exact, problem, seed=3):
    """A fit on the plain grid: its times, clock, Adams's weights, what was found, and the process and equation."""
    process = sf.VP()
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    pilot = process.prior((32, problem.dim), seed=seed, dtype=F64)
    paths = Paths.along(equation, pilot, 200, torch.arange(problem.dim))
    candidate = Candidate(4, 4, 0.0, math.log(0.3), 0.5, math.log(1.5), math.log(30.0))
    times = candidate.times(process, process.t_max, process.t_min, budget, paths.scale)
    adams = data_weights(process, times, sf.StraightLine(), 4, 4)
    clock = sf.StraightLine().bind(process).u(times).numpy()
    given = fitting.Pilot(pilot, torch.arange(problem.dim), paths, None, 32, 32)
    with torch.no_grad():
        found = fitting.fit(*fitting.solved(equation, times, given), times, clock, adams, exact, given)
    return times, clock, adams, found, process, equation


def with_weights(times, rows):
    return FittedAdams(order=4, grid=times, weights=tuple(tuple(row[: n + 1]) for n, row in enumerate(rows)))


def test_fitted_weights_beat_adams_on_other_samples_and_say_by_how_much():
    for problem in (sf.problems.gaussian(), sf.problems.ring()):
        times, _, adams, found, process, equation = fitted(14, 1, problem)
        x = process.prior((256, problem.dim), seed=8, dtype=F64)
        end = sf.solve(equation, sf.Adams(rtol=1e-9, atol=1e-9), x).x
        # single samples beside a border decide the RMS of the ring, so the median is compared
        own, plain = (
            (sf.solve(equation, with_weights(times, rows), x).x - end).square().mean(1).sqrt().median().item()
            for rows in (found.weights, adams)
        )
        assert own < 0.3 * plain
        assert 0.5 < own / np.median(found.error) < 2.0


@pytest.mark.parametrize("exact", [1, 2, 4, UNFITTED])
def test_fitted_weights_stay_exact_on_polynomials(exact):
    _, clock, adams, found, *_ = fitted(10, exact, sf.problems.ring())
    change = found.weights - adams
    for power in range(min(exact, 10)):
        assert np.abs(change @ clock[:-1] ** power).max() < 1e-9
    if exact < UNFITTED:
        assert np.abs(change @ clock[:-1] ** exact).max() > 1e-4
    else:
        assert not change.any()


def test_fitted_weights_do_not_amplify_errors_of_the_network():
    for problem in (sf.problems.gaussian(), sf.problems.ring()):
        _, _, adams, found, *_ = fitted(12, 1, problem)
        loud = np.abs(found.weights - adams).sum(1) / np.abs(adams.sum(1))
        assert loud.max() <= fitting.LOUDEST


def test_groups_do_not_see_their_own_samples(monkeypatch):
    monkeypatch.setattr(fitting, "PENALTIES", np.array([1e-6]))
    rng = np.random.default_rng(0)
    basis, group = fitting._differences(np.linspace(0.9, 0.1, 5), 1), np.arange(16) % fitting.GROUPS
    data, left, live = rng.standard_normal((5, 16, 3)), rng.standard_normal((16, 3)), np.ones(16, bool)

    def shifts(left):
        system = fitting._System(basis, group)
        system.add(data, left, live)
        return system.solved(math.inf)

    _, first = shifts(left + np.tensordot(basis[0], data, 1))
    left[group == 2] += 5.0
    _, second = shifts(left + np.tensordot(basis[0], data, 1))
    same = np.abs(first - second).max(1) < 1e-9
    assert same[2] and not same[np.arange(fitting.GROUPS) != 2].any()


def test_the_model_ranks_candidates_without_the_network():
    process, problem = sf.VP(), sf.problems.ring()
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    rng = np.random.default_rng(0)
    counter = Counter(32, "cpu")
    with torch.no_grad():
        trial = Trial.prepared(equation, 10, process.prior((32, 2), seed=9, dtype=F64), counter, rng)
        drawn = [draw(rng) for _ in range(60)]
        spent = counter.evaluations.clone()
        modelled = [trial.modelled(candidate).expected for candidate in drawn]
        assert torch.equal(counter.evaluations, spent)
        run = [trial.run(candidate).expected for candidate in drawn]
    assert np.corrcoef(np.log(modelled), np.log(run))[0, 1] > 0.5


def test_a_network_that_returns_nan_is_named():
    process = sf.VP()
    equation = sf.ProbabilityFlowODE(sf.DataPrediction(lambda x, t: x * math.nan, process))
    with pytest.raises(sf.InvalidInput, match="NaN or infinity"):
        sf.tune(equation, 5, process.prior((8, 2), seed=1, dtype=F64))


def test_alpha_zero_float32_images_and_files(tmp_path):
    process = sf.RectifiedFlow()
    problem = sf.problems.from_points(torch.tensor([[0.5, -0.5, 0.1, 0.2], [-0.4, 0.3, 0.0, 0.6]]), std=0.2)
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    solver = sf.tune(equation, 6, process.prior((8, 1, 2, 2), seed=3))
    x = process.prior((5, 1, 2, 2), seed=4)
    first = sf.solve(equation, solver, x).x
    solver.save(tmp_path / "solver.json")
    again = FixedAdams.load(tmp_path / "solver.json")
    assert again == solver and again != sf.tune(equation, 5, process.prior((8, 1, 2, 2), seed=3))
    assert torch.equal(sf.solve(equation, again, x).x, first)
    assert first.dtype == torch.float32 and first.isfinite().all()
    (tmp_path / "other.json").write_text('{"solver": "Euler"}')
    with pytest.raises(sf.InvalidInput, match=r"other\.json"):
        FixedAdams.load(tmp_path / "other.json")
    with pytest.raises(sf.InvalidInput, match="can be saved"):
        FixedAdams(steps=3).save(tmp_path / "no.json")


def test_bad_input_is_named(ring):
    _, equation, x, _ = ring
    for call, word in (
        (lambda: sf.tune(sf.Equation(lambda t, x: x), 5, x), "ProbabilityFlowODE"),
        (lambda: sf.tune(sf.ReverseSDE(equation.predict), 5, x), "ProbabilityFlowODE"),
        (lambda: sf.tune(equation, 1, x), "budget"),
        (lambda: sf.tune(equation, 5, x[:1]), "pilot"),
        (lambda: sf.tune(equation, 5, 24), "pilot"),
        (lambda: FixedAdams(order=0, steps=3), "order"),
        (lambda: FixedAdams(corrector=1, steps=3), "corrector"),
    ):
        with pytest.raises(sf.InvalidInput, match=word):
            call()


def test_errors_are_those_of_samples_not_fitted_to():
    times, _, _, found, process, equation = fitted(10, 1, sf.problems.ring())
    pilot = process.prior((32, 2), seed=3, dtype=F64)
    end = sf.solve(equation, sf.Adams(rtol=1e-9, atol=1e-9), pilot).x
    seen = (sf.solve(equation, with_weights(times, found.weights), pilot).x - end).square().mean(1).sqrt().numpy()
    # fitted to 64 numbers with up to nine weights a row, samples are flattered when they were among them
    assert np.sqrt(np.square(seen).mean()) < 0.97 * np.sqrt(np.square(found.error).mean())


def test_the_error_expected_of_a_batch():
    def expected(pilot, rate, flips):
        return Result(None, pilot, rate, flips).expected  # type: ignore[arg-type]

    assert expected(1e-3, 0.0, 0.0) == pytest.approx(1e-3)
    assert expected(1e-3, 1.0, 0.04) == pytest.approx(math.hypot(1e-3, 0.2))
    # half of the batches have a flip: the geometric mean of a batch without and one with
    often = math.log(2.0) / 256
    assert expected(1e-3, often, 1e-2) == pytest.approx(math.sqrt(1e-3 * math.hypot(1e-3, math.sqrt(2e-2))))
    assert expected(math.nan, 0.0, 0.0) == math.inf


def test_the_model_is_the_run_on_data_of_one_scale():
    process = sf.VP()
    problem = sf.problems.from_points(torch.zeros(1, 6), std=0.7)
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    rng = np.random.default_rng(0)
    candidate = Candidate(2, 2, 0.0, math.log(0.3), 0.5, math.log(1.5), math.log(30.0), UNFITTED)
    with torch.no_grad():
        trial = Trial.prepared(equation, 6, process.prior((7, 6), seed=9, dtype=F64), Counter(7, "cpu"), rng)
        exact = replace(trial, pilot=trial.pilot._replace(paths=replace(trial.pilot.paths, scale=0.7)))
        assert exact.modelled(candidate).pilot == pytest.approx(exact.run(candidate).pilot, rel=1e-6)
