"""Intervals that cover, floors that mean what they say, references that know their error, records that survive."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import sdeflow as sf
from sdeflow import measure as me
from sdeflow.measure import run, statistics
from sdeflow.measure.errors import _energy, _potentials
from sdeflow.random import standard_normal
from sdeflow.solvers.base import Facts, FixedStep, Task

F64 = torch.float64
FINEST = 512


@dataclass(frozen=True, kw_only=True)
class Euler(FixedStep):
    """Euler–Maruyama on the path of FINEST fine increments of the seed, so that solves of any `steps` share it."""

    spoil: int = 0

    @property
    def facts(self) -> Facts:
        return Facts("euler", 1, 0.5, 1, 1, False, ("none", "additive", "diagonal"), "drift", "test")

    def init(self, task: Task, times: Tensor):
        if task.seeds is None:
            return task, times, None
        steps, shape = len(times) - 1, task.x.shape[1:]
        fine = standard_normal(task.seeds, (FINEST, *shape), stream=7)
        dw = fine.reshape(task.batch, steps, FINEST // steps, *shape).sum(2)
        return task, times, dw * (abs(float(times[-1] - times[0])) / FINEST) ** 0.5

    def step(self, task: Task, state, n: int, x: Tensor):
        _, times, dw = state
        x_new = x + float(times[n + 1] - times[n]) * task.equation.drift(times[n], x)
        if dw is not None:
            x_new = x_new + task.equation.diffusion(times[n], x) * dw[:, n]
        if self.spoil and n == 0:
            x_new[: self.spoil] = math.nan
        return x_new, state


def gaussian_rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def covers(estimate: me.Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def coverage_is(hits: list[bool], level: float, shortfall: float) -> bool:
    """True unless the hits are too few or too many for a coverage in [level − shortfall, level + shortfall]; each side errs once in 1e4."""
    n, k = len(hits), sum(hits)
    return bool(
        stats.binom.cdf(k, n, level - shortfall) > 1e-4 and stats.binom.sf(k - 1, n, min(1.0, level + shortfall)) > 1e-4
    )


# --- intervals


@pytest.mark.parametrize("law", ["normal", "heavy"])
def test_bootstrap_interval_of_an_rmse_covers(law):
    """400 experiments of 100 samples; nominal 90 %. Normal errors: within 3 points; squares of Student-5 errors, as a few hard
    samples give: within 7 points, BCa being only second-order correct."""
    hits = []
    for seed in range(400):
        z = gaussian_rows(100, 4, seed)
        if law == "heavy":
            chi = (
                torch.randn(100, 5, dtype=F64, generator=torch.Generator().manual_seed(10_000 + seed))
                .square()
                .sum(1, keepdim=True)
            )
            z = z / (chi / 5).sqrt()
        truth = 1.0 if law == "normal" else math.sqrt(5 / 3)
        hits.append(covers(me.rmse(z, torch.zeros_like(z), level=0.9, resamples=400, seed=seed), truth))
    assert coverage_is(hits, 0.9, 0.03 if law == "normal" else 0.07)


def test_bootstrap_interval_of_the_sliced_distance_covers():
    """200 pairs of 200 samples of N(0, I) and N(δ, I) in 3-D, where SW₂² = mean (θ·δ)²; nominal 90 %, within 5 points."""
    delta = torch.tensor([1.0, 0.5, -0.5], dtype=F64)
    directions = me.projections(3, 32)
    truth = (delta @ directions).square().mean().sqrt().item()
    hits = [
        covers(
            me.sliced_wasserstein_estimate(
                gaussian_rows(200, 3, s), gaussian_rows(200, 3, 9000 + s) + delta, 0.0, directions, 0.9, 300, s
            ),
            truth,
        )
        for s in range(200)
    ]
    assert coverage_is(hits, 0.9, 0.05)


def test_bootstrap_interval_of_the_energy_distance_covers():
    """200 pairs of 200 samples of N(0, 1) and N(1, 1), whose energy distance is known; nominal 90 %, within 5 points."""

    def folded(mu: float) -> float:  # E|N(mu, 2)|
        return 2 / math.sqrt(math.pi) * math.exp(-(mu**2) / 4) + mu * math.erf(mu / 2)

    truth = math.sqrt(2 * folded(1.0) - 2 * folded(0.0))
    hits = [
        covers(
            me.energy_distance_estimate(
                gaussian_rows(200, 1, s), gaussian_rows(200, 1, 9000 + s) + 1.0, 0.0, 0.9, 300, s
            ),
            truth,
        )
        for s in range(200)
    ]
    assert coverage_is(hits, 0.9, 0.05)


def test_the_unbiased_energy_distance_is_zero_on_average_for_equal_laws():
    """Mean square of 200 pairs in 20-D against its standard error, false-alarm rate 1e-4; the biased one fails at once."""

    def squares(unbiased: bool) -> Tensor:
        pairs = [(gaussian_rows(20, 20, s), gaussian_rows(20, 20, 5000 + s)) for s in range(200)]
        return torch.tensor([_energy(x, y, unbiased)[0] for x, y in pairs])

    def z(v: Tensor) -> float:
        return abs(float(v.mean() / (v.std() / len(v) ** 0.5)))

    assert z(squares(True)) < stats.norm.isf(0.5e-4) < 50 < z(squares(False))


def test_bootstrap_is_seeded_monotone_and_narrows():
    x = gaussian_rows(400, 1, 0)[:, 0]

    def mean(m):
        return m[:, 0]

    low, high = me.bootstrap([x], mean, seed=1)
    assert (low, high) == me.bootstrap([x], mean, seed=1) != me.bootstrap([x], mean, seed=2)
    wide = me.bootstrap([x], mean, level=0.99, seed=1)
    assert wide[0] < low < float(x.mean()) < high < wide[1]
    quarter = me.bootstrap([x[:100]], mean, seed=1)
    assert 1.5 < (quarter[1] - quarter[0]) / (high - low) < 2.7
    assert me.bootstrap([torch.full((9,), 2.0)], mean) == (2.0, 2.0)


def test_bootstrap_does_not_depend_on_its_chunks(monkeypatch):
    x = gaussian_rows(50, 1, 0)[:, 0]
    whole = me.bootstrap([x, 2 * x], lambda a, b: a[:, 0] + b[:, 0])
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 1000)
    assert me.bootstrap([x, 2 * x], lambda a, b: a[:, 0] + b[:, 0]) == pytest.approx(whole, rel=1e-12)


# --- errors


def test_rmse_is_the_root_of_the_mean_square():
    x, ref = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert me.sample_rmse(x, ref).tolist() == [pytest.approx(math.sqrt(12.5)), 0.0]
    assert me.rmse(x, ref).value == pytest.approx(2.5)


@pytest.mark.parametrize(("size", "resolved"), [(1e-3, True), (3.1e-8, True), (2.9e-8, False), (0.0, False)])
def test_an_error_below_three_reference_uncertainties_is_unresolved(size, resolved):
    estimate = me.rmse(torch.full((5, 2), size, dtype=F64), torch.zeros(5, 2), torch.full((5,), 1e-8))
    assert estimate.resolved is resolved and estimate.floor == pytest.approx(3e-8)


def test_sliced_distance_of_a_shift_is_its_projected_length():
    x, delta = gaussian_rows(100, 5, 0), torch.arange(5, dtype=F64)
    directions = me.projections(5)
    expected = (delta @ directions).square().mean().sqrt().item()
    assert me.sliced_wasserstein(x, (x + delta)[torch.randperm(100)], directions) == pytest.approx(expected, rel=1e-12)
    # over all directions the mean of (θ·δ)² is |δ|²/d
    many = me.projections(5, 20000)
    assert (delta @ many).square().mean().item() == pytest.approx(delta.square().sum().item() / 5, rel=0.05)


def test_potentials_are_the_gradient_of_the_sliced_distance():
    """Adding mass at a point changes SW₂² by its potential: exact derivative by unequal weights, through POT."""
    import ot

    x, y = gaussian_rows(40, 2, 1), gaussian_rows(40, 2, 2) + 1.0
    directions = me.projections(2, 16)
    phi, psi = _potentials(x @ directions, y @ directions)
    uniform, step = torch.full((40,), 1 / 40, dtype=F64), 1e-5
    for rows, potential, first in ((x, phi, True), (y, psi, False)):
        w = uniform.clone()
        w[3] += step
        w[17] -= step
        a, b = (w, uniform) if first else (uniform, w)
        base = me.sliced_wasserstein(x, y, directions) ** 2
        moved: Any = ot.sliced_wasserstein_distance(x, y, a, b, projections=directions)
        # one-sided derivative of a piecewise linear function: equal up to the gaps between neighbouring points
        assert (float(moved) ** 2 - base) / step == pytest.approx(float(potential[3] - potential[17]), rel=0.1), len(
            rows
        )


def test_moment_error_counts_relative_deviations():
    problem = sf.problems.gaussian(mean=[1.0, -2.0, 0.0], cov=[[2.0, 0.5, 0.0], [0.5, 1.0, 0.1], [0.0, 0.1, 0.3]])
    mean, cov = problem.moments()
    z = gaussian_rows(500, 3, 0)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / 500)).T
    L = torch.linalg.cholesky(cov)
    assert me.moment_error(mean + z @ L.T, mean, cov) < 1e-12
    assert me.moment_error(mean + 1.1 * z @ L.T, mean, cov) == pytest.approx(0.1)
    shift = L @ torch.tensor([0.3, 0.0, 0.0], dtype=F64)
    assert me.moment_error(mean + shift + z @ L.T, mean, cov) == pytest.approx(0.3 / math.sqrt(3))


def test_moment_deviation_keeps_its_false_alarm_rate():
    """200 exact samples at a rate of 5 %: between 0 and 24 alarms with probability above 1 − 1e-4; a wrong one is always caught."""
    problem = sf.problems.gaussian(dim=4)
    mean, cov = problem.moments()
    alarms = 0
    for seed in range(200):
        z, comparisons = me.moment_deviation(problem.sample(500, seed, F64), mean, cov)
        alarms += z > stats.norm.isf(0.025 / comparisons)
    assert comparisons == 14 and alarms <= stats.binom.isf(1e-4, 200, 0.06)
    z, _ = me.moment_deviation(problem.sample(5000, 0, F64) * 1.1, mean, cov)
    assert z > 5


def test_a_perfect_solver_passes_the_floor_as_often_as_promised():
    """400 floors from 19 pairs each: passed with probability 1/20; the count stays inside its 1e-4 limits."""
    passed, g = 0, torch.Generator().manual_seed(0)
    for _ in range(400):
        draws = torch.randn(20, 2, 20, 1, generator=g, dtype=F64)
        values = [me.energy_distance(a, b) for a, b in draws]
        passed += values[0] > me.monte_carlo_floor(lambda r, v=values: v[1 + r], 19)
    assert stats.binom.ppf(1e-4, 400, 0.05) <= passed <= stats.binom.isf(1e-4, 400, 0.05)


# --- references


@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(), sf.RectifiedFlow()], ids=repr)
def test_reference_by_two_solvers_knows_its_error(process):
    problem = sf.problems.gaussian(dim=3)
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    x = process.prior((4, 3), dtype=F64)
    exact = me.reference(equation, x, problem=problem)
    assert exact.method == "closed form" and exact.uncertainty.max() < 1e-12
    for tolerance in (1e-6, 1e-11):
        solved = me.reference(equation, x, tolerance=tolerance)
        error = me.sample_rmse(solved.x, exact.x)
        assert bool((error < 10 * tolerance).all())
        # two solvers of one order: the error is not much larger than their disagreement
        assert error.square().mean().sqrt() < 3 * solved.uncertainty.square().mean().sqrt() + 1e-13


def test_reference_on_a_ring_is_certain():
    process, problem = sf.VP(), sf.problems.ring()
    result = me.reference(sf.ProbabilityFlowODE(problem.prediction(process)), process.prior((16, 2)), problem=problem)
    assert result.x.dtype == F64 and result.uncertainty.max() < 1e-9
    assert "dopri8 in StraightLine" in result.method and "DOP853 in LogSNR" in result.method


def test_reference_of_an_equation_of_ones_own():
    bank = sf.Equation(lambda t, x: 0.04 * x, start=0.0, stop=10.0)
    result = me.reference(bank, torch.tensor([[100.0], [1.0]]))
    torch.testing.assert_close(
        result.x[:, 0], torch.tensor([100.0, 1.0], dtype=F64) * math.exp(0.4), rtol=1e-10, atol=0
    )
    back = me.reference(bank, result.x, start=10.0, stop=0.0)
    torch.testing.assert_close(back.x[:, 0], torch.tensor([100.0, 1.0], dtype=F64), rtol=1e-9, atol=0)


def test_reference_refuses_what_it_cannot_solve():
    process, problem = sf.VP(), sf.problems.ring()
    with pytest.raises(sf.InvalidInput, match="no end state"):
        me.reference(sf.ReverseSDE(problem.prediction(process)), process.prior((2, 2)))
    with pytest.raises(sf.InvalidInput, match=r"start=0\.0, stop=1\.0"):
        me.reference(sf.Equation(lambda t, x: x), torch.ones(2, 2))
    with pytest.raises(sf.InvalidInput, match="reference solver torchdiffeq dopri8 failed"):
        me.reference(sf.Equation(lambda t, x: x**2), torch.ones(2, 2), start=0.0, stop=2.0)


# --- records


def example(**changes) -> me.Record:
    process, problem = sf.VP(), sf.problems.ring()
    settings: dict[str, Any] = {"samples": 8} | changes
    return me.measure(problem, process, sf.ProbabilityFlowODE(problem.prediction(process)), Euler(steps=4), **settings)


def test_a_record_survives_json():
    record = example()
    line = record.to_json()
    assert "\n" not in line and me.Record.from_json(line).to_json() == line
    back = me.Record.from_json(line)
    assert back.key == record.key and back.error == record.error and back.solver["steps"] == 4
    assert math.isnan(back.others[0].low) and json.loads(line)["others"][0]["low"] is None
    assert record.process == {"type": "VP", "beta_min": 0.1, "beta_max": 20.0, "t_min": 0.001, "t_max": 1.0}
    assert record.problem["name"] == "ring" and record.equation["type"] == "ProbabilityFlowODE"
    assert {"python", "torch", "torchdiffeq", "numpy"} <= set(record.versions)
    assert record.dtype == "float64" and record.device == "cpu" and record.complete


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 1}', '{"format": 1, "error": 3, "others": []}', "nonsense"]
)
def test_what_is_no_record_is_refused(text):
    with pytest.raises(sf.InvalidInput, match="not a record"):
        me.Record.from_json(text)


def test_a_record_of_another_format_is_refused():
    data = json.loads(example().to_json()) | {"format": 99}
    with pytest.raises(sf.InvalidInput, match="format 99"):
        me.Record.from_json(json.dumps(data))


def test_the_key_tells_every_setting_apart_and_nothing_else():
    def key(
        problem=None,
        process=None,
        solver=None,
        make: Callable[[sf.Prediction], sf.Equation] = sf.ProbabilityFlowODE,
        kind="data",
        samples=8,
        seed=0,
        initial="prior",
        dtype=F64,
    ):
        problem, process = problem or sf.problems.ring(), process or sf.VP()
        equation = make(problem.prediction(process, kind))
        return me.run_key(problem, equation, solver or Euler(steps=4), samples, seed, 1.0, 0.1, initial, dtype, "cpu")

    table = sf.DiscreteVP.linear().alphas_cumprod
    others = [
        key(problem=sf.problems.ring(std=0.06)),
        key(problem=sf.problems.ring(modes=7)),
        key(process=sf.VP(beta_max=19.0)),
        key(process=sf.SubVP()),
        key(process=sf.DiscreteVP(table)),
        key(process=sf.DiscreteVP(table[:999])),
        key(process=sf.Process(lambda t: 1.0, lambda t: t, 0.1, 1.0)),
        key(process=sf.Process(lambda t: 1.0, lambda t: t**2, 0.1, 1.0)),
        key(solver=Euler(steps=5)),
        key(solver=Euler(steps=4, grid=sf.Quadratic())),
        key(solver=Euler(grid=torch.tensor([1.0, 0.4, 0.1]))),
        key(solver=Euler(grid=torch.tensor([1.0, 0.5, 0.1]))),
        key(make=sf.ReverseSDE),
        key(make=lambda p: sf.ReverseSDE(p, eta=0.5)),
        key(kind="noise"),
        key(samples=9),
        key(seed=1),
        key(initial="marginal"),
        key(dtype=torch.float32),
    ]
    assert len({key(), *others}) == len(others) + 1
    assert key() == key(problem=sf.problems.ring(), process=sf.VP(), solver=Euler(steps=4))
    assert key() == example(start=1.0, stop=0.1).key


def test_the_key_knows_a_networks_parameters():
    def key(scale: float) -> str:
        network = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(network.weight, scale)
        torch.nn.init.zeros_(network.bias)
        equation = sf.ProbabilityFlowODE(sf.DataPrediction(lambda x, t: network(x), sf.VP()))
        assert equation.predict is not None
        equation.predict.network = network
        return me.run_key(sf.problems.ring(), equation, Euler(steps=4), 8, 0, 1.0, 0.1, "prior", F64, "cpu")

    assert key(1.0) == key(1.0) != key(2.0)


# --- measure


def test_measure_sees_the_order_of_a_solver_and_counts_its_calls():
    process, problem = sf.VP(), sf.problems.gaussian(dim=3)
    calls = []
    network = problem.network(process)

    def counted(x, t):
        calls.append(len(x))
        return network(x, t)

    equation = sf.ProbabilityFlowODE(sf.DataPrediction(counted, process))
    truth = me.prepare(problem, process, equation, samples=32)
    records = []
    for steps in (64, 128, 256):
        calls.clear()
        records.append(me.measure(problem, process, equation, Euler(steps=steps), samples=32, truth=truth))
        assert sum(calls) == 32 * steps
        assert records[-1].calls == len(calls) == records[-1].evaluations_mean == records[-1].evaluations_max == steps
        assert records[-1].accepted_mean == steps and records[-1].rejected_mean == 0
    errors = [r.error.value for r in records]
    assert 0.8 < math.log2(errors[1] / errors[2]) < 1.2
    assert all(r.error.resolved and r.error.low < r.error.value < r.error.high for r in records)
    worst = records[0].others[0]
    assert worst.name == "worst_sample" and worst.value > errors[0]


def test_samples_that_fail_are_reported_and_left_out():
    process, problem = sf.VP(), sf.problems.ring()
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    record = me.measure(problem, process, equation, Euler(steps=8, spoil=3), samples=10)
    assert record.status == {"SUCCESS": 7, "NON_FINITE": 3} and not record.complete
    assert math.isfinite(record.error.value)
    lost = me.measure(problem, process, equation, Euler(steps=8, spoil=10), samples=10)
    assert lost.status == {"NON_FINITE": 10} and math.isnan(lost.error.value) and not lost.error.resolved
    assert math.isnan(me.Record.from_json(lost.to_json()).error.value)


def test_an_sde_is_judged_by_its_law():
    """Coarse Euler–Maruyama is told from exact samples; exact samples themselves are not."""
    process, problem = sf.VP(), sf.problems.ring()
    equation = sf.ReverseSDE(problem.prediction(process))
    coarse = me.measure(problem, process, equation, Euler(steps=8), samples=200)
    assert [e.name for e in (coarse.error, *coarse.others)] == ["sliced_wasserstein", "energy_distance"]
    assert coarse.initial == "marginal" and coarse.reference == "exact samples"
    assert coarse.error.resolved and coarse.others[0].resolved
    truth = me.prepare(problem, process, equation, samples=200)
    x = me.exact_samples(problem, process, process.t_min, 200, seed=77)
    solved = sf.solve(equation, Euler(steps=1), truth.x)
    perfect = me.compare(dataclasses.replace(solved, x=x), truth)
    assert not any(e.resolved for e in perfect)


@pytest.mark.parametrize("initial", ["prior", "marginal"])
def test_an_sde_on_the_gaussian_is_judged_by_its_moments(initial):
    process, problem = sf.VP(), sf.problems.gaussian(std=[0.5, 2.0])
    equation = sf.ReverseSDE(problem.prediction(process), eta=1.0)
    fine, coarse = (
        me.measure(problem, process, equation, Euler(steps=n), samples=400, initial=initial, seed=3) for n in (512, 8)
    )
    assert fine.error.name == "moments" and fine.reference == "exact samples and exact moments"
    assert coarse.error.resolved and coarse.error.value > 2 * fine.error.value
    assert fine.error.floor < 0.2


def test_the_truth_of_one_setting_is_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(run, "prepare", lambda *a: made.append(a) or me.prepare(*a))
    monkeypatch.setattr(run, "_TRUTHS", type(run._TRUTHS)())
    first, second = example(), example()
    assert len(made) == 1 and first.error == second.error
    example(seed=1)
    assert len(made) == 2


def test_start_states_and_the_samples_they_are_judged_by_are_unrelated():
    """Correlation of 4000 pairs of numbers, false-alarm rate 1e-6: shared noise would make a wrong law look right."""
    process, problem = sf.VP(), sf.problems.gaussian(mean=0.0, std=1.0, dim=2)
    truth = me.prepare(problem, process, sf.ReverseSDE(problem.prediction(process)), 2000, start=0.4, stop=0.3)
    assert truth.exact is not None
    assert abs(float((truth.x * truth.exact).mean())) < stats.norm.isf(0.5e-6) / math.sqrt(4000)


def test_runs_of_one_seed_are_the_same_to_the_last_bit():
    process, problem = sf.VP(), sf.problems.ring()
    equation = sf.ReverseSDE(problem.prediction(process))

    def once(seed: int) -> me.Record:
        truth = me.prepare(problem, process, equation, samples=50, seed=seed)
        return me.measure(problem, process, equation, Euler(steps=16), samples=50, seed=seed, truth=truth)

    one, two, other = once(0), once(0), once(1)
    assert (one.error, one.others) == (two.error, two.others) and one.error != other.error


def test_strong_error_of_euler_on_geometric_brownian_motion_is_of_order_one_half():
    """Order from 4 to 32 steps on 1000 shared paths, within 0.1 of ½; the exact solution confirms the reference."""
    equation = sf.Equation(lambda t, x: 0.2 * x, lambda t, x: 0.5 * x, start=0.0, stop=1.0)
    x = torch.ones(1000, 1, dtype=F64)
    errors = [me.strong_error(equation, Euler(steps=n), Euler(steps=256), Euler(steps=512), x, seed=1) for n in (4, 32)]
    assert errors[0].name == "strong" and errors[0].resolved
    assert 0.4 < math.log(errors[0].value / errors[1].value) / math.log(8) < 0.6
    w = standard_normal(sf.sample_seeds(1, 1000), (FINEST, 1), stream=7).sum(1) / FINEST**0.5
    exact = (0.2 - 0.125 + 0.5 * w).exp()
    direct = me.rmse(sf.solve(equation, Euler(steps=4), x, seed=1).x, exact)
    assert direct.value == pytest.approx(errors[0].value, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process": sf.EDM()}, "the equation's process is VP"),
        ({"samples": 1}, "at least 2"),
        ({"start": 0.5}, 'initial="marginal"'),
        ({"initial": "data"}, 'must be "prior" or "marginal"'),
    ],
)
def test_bad_input_says_what_to_write(change, message):
    problem, process = sf.problems.ring(), sf.VP()
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    settings: dict[str, Any] = {
        "problem": problem,
        "process": process,
        "equation": equation,
        "solver": Euler(steps=2),
        "samples": 4,
    }
    with pytest.raises(sf.InvalidInput, match=message):
        me.measure(**(settings | change))


def test_a_missing_library_names_its_install_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(sf.MissingDependency, match="pip install POT"):
        me.sliced_wasserstein(torch.zeros(3, 2), torch.ones(3, 2))
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(sf.MissingDependency, match="pip install scipy"):
        me.reference(sf.Equation(lambda t, x: -x), torch.ones(2, 1), 0.0, 1.0)
