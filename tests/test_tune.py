"""Fixed-grid Adams and the budget mode built on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.grids import Nodes
from sdeflow.solvers.fixed_adams import FixedAdams, adams_weights, integrals
from sdeflow.tune import MOST_SOLVES, RUNS, search
from sdeflow.tune.borders import Borders
from sdeflow.tune.paths import Paths

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


def test_cost_is_bounded_and_the_pilot_error_is_a_true_error(ring):
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
    own = pilot[:24]  # the last quarter of the rows starts on borders
    end = sf.solve(equation, sf.Adams(rtol=1e-9, atol=1e-9), own).x
    assert rms(sf.solve(equation, tuning.solver, own).x, end) == pytest.approx(tuning.pilot_error, rel=1e-3)


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
    # 2 evaluations leave none to look for borders, 50 move them less than can be seen
    assert (tuning.flip_error > 0) == (budget == 5)


@pytest.fixture(scope="module")
def two_modes():
    """Modes at ±(1, 0): the border is the axis x₀ = 0 at every time."""
    process = sf.EDM()
    problem = sf.problems.from_points([[1.0, 0.0], [-1.0, 0.0]], std=0.1)
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    pilot = process.prior((16, 2), seed=3, dtype=F64)
    return process, equation, pilot, Borders.found(equation, pilot, 40, 60)


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


def test_flips_measure_how_far_the_border_moved(two_modes):
    process, equation, pilot, borders = two_modes
    times = sf.UniformLogSNR().times(process, process.t_max, process.t_min, 24)
    solver = FixedAdams(order=4, chart=sf.StraightLine(), grid=Nodes(times))
    centre = Paths.along(equation, borders.start, 200)
    # θ* of C = cos θ* a + sin θ* b, and the way C moves along its arc
    pair = torch.stack([pilot, pilot.roll(-1, 0)], 2)
    cos, sin = torch.linalg.solve(pair, borders.start[:, :, None])[:, :, 0].T[:, :, None]
    tangent = -sin * pair[:, :, 0] + cos * pair[:, :, 1]
    crosses = ((pilot[:, 0] > 0) != (pilot.roll(-1, 0)[:, 0] > 0)).nonzero().flatten()
    rows = slice(int(crosses[0]), int(crosses[0]) + 1)
    for shift in (0.0, 0.002, -0.005):
        moved = Paths.along(equation, borders.start + shift * tangent, 200)
        nodes = list(moved.states(sf.StraightLine().bind(process), times[1:])[0])
        got = borders.flips(nodes, centre, solver, rows)
        assert got == pytest.approx(2 / np.pi * abs(shift) * borders.jump[rows].item() ** 2, rel=0.15, abs=1e-9)


def test_the_error_it_expects_ranks_candidates_on_other_samples():
    # with 8 evaluations one digit in thirty becomes another, and none of the pilot need do so
    process, problem = sf.VP(), sf.problems.digits()
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    tuning = search(equation, 8, process.prior((32, 64), seed=99, dtype=F64))
    x = process.prior((192, 64), seed=7, dtype=F64)
    end = sf.solve(equation, sf.Adams(rtol=1e-6, atol=1e-6), x).x
    tried = tuning.candidates[::3]
    error = [rms(sf.solve(equation, solver, x).x, end) for solver, _ in tried]
    expected = [value for _, value in tried]
    assert np.corrcoef(np.log(expected), np.log(error))[0, 1] > 0.7, (expected, error)
    assert error[0] < 0.1 and error[0] > 3 * tuning.pilot_error
    assert tuning.candidates[0][1] == pytest.approx(np.hypot(tuning.pilot_error, tuning.flip_error))


def test_alpha_zero_float32_images_and_files(tmp_path):
    process = sf.RectifiedFlow()
    problem = sf.problems.from_points(torch.tensor([[0.5, -0.5, 0.1, 0.2], [-0.4, 0.3, 0.0, 0.6]]), std=0.2)
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    solver = sf.tune(equation, 6, process.prior((8, 1, 2, 2), seed=3))
    x = process.prior((5, 1, 2, 2), seed=4)
    first = sf.solve(equation, solver, x).x
    solver.save(tmp_path / "solver.json")
    again = FixedAdams.load(tmp_path / "solver.json")
    assert again == solver or torch.equal(sf.solve(equation, again, x).x, first)
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
