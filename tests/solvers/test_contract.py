"""What every native fixed-grid solver must keep: its orders, its counts, its precision, its seeds, its manners."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from catalogue import CASES, FLOW, NOISY

import sdeflow as sf
from sdeflow.measure import exact_moments
from sdeflow.problems.mixture import Mixture
from sdeflow.problems.problem import Problem
from sdeflow.solvers.base import FixedStep, Solver

F64 = torch.float64
VP = sf.VP(t_min=1e-2)
GAUSSIAN = sf.problems.gaussian(mean=[0.3, -1.0], std=[0.35, 1.5])
MIXTURE = Problem("wide", Mixture.of(torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]]), std=0.7))


@pytest.fixture(scope="module")
def truth():
    """Start, end of the flow, for both problems; the mixture's by a solver of another kind at 12 digits."""
    x = VP.prior((8, 2), dtype=F64)
    fine = sf.RungeKutta("dopri5", steps=600)
    end = sf.solve(sf.ProbabilityFlowODE(MIXTURE.prediction(VP)), fine, x).x
    return x, {"gaussian": (GAUSSIAN, GAUSSIAN.flow(x, VP, VP.t_max, VP.t_min)), "mixture": (MIXTURE, end)}


def slope(coarse: float, fine: float) -> float:
    return math.log2(coarse / fine)


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("problem", ["gaussian", "mixture"])
def test_global_order_on_the_flow(name, problem, truth):
    case, (x, problems) = FLOW[name], truth
    known, end = problems[problem]
    equation = sf.ProbabilityFlowODE(known.prediction(VP))
    errors = [(sf.solve(equation, case(n), x).x - end).square().mean().sqrt().item() for n in case.steps[1:]]
    assert errors[-1] > 3e-14, "too fine to see an order"
    claim = case.facts.order
    # surplus: a coefficient that happens to vanish on Gaussians; the mixture has no such luck
    assert claim - 0.2 <= slope(*errors) <= claim + (case.surplus if problem == "gaussian" else 0.2), errors


WEAK = sf.problems.gaussian(mean=[0.8, -0.5, 0.0], std=[0.25, 0.6, 1.5])


@pytest.mark.parametrize("name", NOISY)
def test_weak_order_by_exact_propagation(name):
    case = NOISY[name]
    mean, cov = WEAK.moments(VP, VP.t_max)
    if not case.own_noise:  # the law away from the marginals is the equation's only if the noise is
        mean, cov = mean + 0.3, 1.4 * cov
    exact_mean, exact_cov = WEAK.reverse_moments(VP, case.eta, mean=mean, cov=cov)
    equation, errors = sf.ReverseSDE(WEAK.prediction(VP), eta=case.eta), []
    for steps in case.steps[1:]:
        got = exact_moments(equation, case(steps), mean, cov)
        errors.append(torch.cat([got.mean - exact_mean, (got.cov - exact_cov).diag()]).norm().item())
    claim = case.facts.weak
    assert claim - 0.2 <= slope(*errors) <= claim + case.surplus, errors


STRONG = [name for name, case in NOISY.items() if case.facts.strong is not None and name != "sa-varying"]


@pytest.mark.parametrize("name", STRONG)
def test_strong_order_on_one_path(name):
    case, ring = NOISY[name], sf.problems.ring(std=0.4)
    equation = sf.ReverseSDE(ring.prediction(VP), eta=case.eta)
    x = VP.prior((128, 2), dtype=F64)
    fine = sf.solve(equation, case(2048), x, seed=1).x
    errors = [(sf.solve(equation, case(n), x, seed=1).x - fine).square().mean().sqrt().item() for n in (64, 128)]
    # 0.2 of order, and 0.1 for the finite sample and the finite reference
    assert abs(slope(*errors) - case.facts.strong) < 0.3, errors


@pytest.mark.parametrize("name", STRONG)
def test_two_solvers_with_one_seed_see_one_path(name):
    case = NOISY[name]
    if case.own_noise:
        pytest.skip("its noise is of another strength, so its path runs on another clock")
    ring, n = sf.problems.ring(std=0.4), 1000
    equation = sf.ReverseSDE(ring.prediction(VP), eta=case.eta)
    x = VP.prior((64, 2), dtype=F64)
    other = sf.SASolver(predictor=2, corrector=2, steps=n, grid=case.grid)
    a, b, c = (sf.solve(equation, s, x, seed=k).x for s, k in ((case(n), 1), (other, 1), (other, 2)))
    assert (a - b).square().mean() < 1e-4 < 0.1 < (c - b).square().mean()


@pytest.mark.parametrize("name", CASES)
def test_counted_evaluations_are_the_declared_ones(name):
    case = CASES[name]
    equation = (
        sf.ReverseSDE(GAUSSIAN.prediction(VP), eta=case.eta)
        if case.eta
        else sf.ProbabilityFlowODE(GAUSSIAN.prediction(VP))
    )
    if case.eta and "additive" not in case.facts.noise:
        pytest.skip("an ODE solver")
    x = VP.prior((3, 2), dtype=F64)
    runs = {n: sf.solve(equation, case(n), x) for n in (8, 16, 17)}
    for n, run in runs.items():
        assert run.evaluations.tolist() == [run.calls] * 3
        assert run.accepted.tolist() == [n + (name == "restart")] * 3
    if case.facts.evaluations is not None:
        assert runs[16].calls - runs[8].calls == 8 * case.facts.evaluations
        assert runs[17].calls - runs[16].calls == case.facts.evaluations
        assert runs[8].calls - 8 * case.facts.evaluations <= 8  # what the start-up costs


PROCESSES = {
    "vp": sf.VP(t_min=1e-5),
    "subvp": sf.SubVP(),
    "cosine": sf.CosineVP(t_max=1.0),
    "ve": sf.VE(),
    "edm": sf.EDM(),
    "flow": sf.RectifiedFlow(t_min=1e-5),
    "discrete": sf.DiscreteVP.scaled_linear(),
}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", CASES)
def test_float32_follows_float64_down_to_t_min(name, process):
    case, process = CASES[name], PROCESSES[process]
    predict = GAUSSIAN.prediction(process, "flow")
    equation = sf.ReverseSDE(predict, eta=case.eta) if case.eta else sf.ProbabilityFlowODE(predict)
    x = process.prior((8, 2), dtype=F64)
    solver = case(25, grid=sf.InChart())
    wide, narrow = (sf.solve(equation, solver, start, seed=3).x for start in (x, x.float()))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NOISY)
def test_a_sample_depends_on_its_own_seed_alone(name):
    case = NOISY[name]
    equation = sf.ReverseSDE(GAUSSIAN.prediction(VP), eta=case.eta)
    x = VP.prior((5, 2), dtype=F64)
    together = sf.solve(equation, case(6), x, seed=[5, 6, 7, 8, 9]).x
    alone = sf.solve(equation, case(6), x[2:3], seed=[7]).x
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-12)
    other = sf.solve(equation, case(6), x, seed=[5, 6, 17, 8, 9]).x
    assert not torch.equal(other[2], together[2]) and torch.equal(other[:2], together[:2])


@pytest.mark.parametrize("name", [*NOISY, "adams"])
def test_noise_is_not_left_out_on_the_way_up(name):
    """From data to noise q = e^{−∫η²dλ} is above 1 and the variance σ²(1 − q²) of the steps' noise would be cut to 0."""
    solver, eta = (NOISY[name](20), NOISY[name].eta) if name in NOISY else (sf.Adams(rtol=1e-2, atol=1e-2), 1.0)
    x = GAUSSIAN.sample(4, dtype=F64)
    with pytest.raises(sf.InvalidInput, match="towards noise|loops restart"):
        sf.solve(sf.ReverseSDE(GAUSSIAN.prediction(VP), eta=eta), solver, x, start=0.3, stop=0.6)


@pytest.mark.parametrize("name", CASES)
def test_outputs_in_between_are_nodes_and_the_last_is_the_end(name):
    case = CASES[name]
    predict = GAUSSIAN.prediction(VP)
    equation = sf.ReverseSDE(predict, eta=case.eta) if case.eta else sf.ProbabilityFlowODE(predict)
    x = VP.prior((2, 2), dtype=F64)
    run = sf.solve(equation, case(9), x, save_at=[VP.t_max, 0.5, VP.t_min], seed=1)
    assert torch.equal(run.states[0], x) and torch.equal(run.states[-1], run.x)
    assert bool(run.states[1].isfinite().all()) and not torch.equal(run.states[1], run.x)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_start(name):
    case = CASES[name]
    predict = GAUSSIAN.prediction(VP)
    equation = sf.ReverseSDE(predict, eta=case.eta) if case.eta else sf.ProbabilityFlowODE(predict)
    x = VP.prior((2, 2), dtype=F64).requires_grad_()
    step = torch.tensor([[1.0, -2.0], [0.5, 1.0]], dtype=F64)
    y = sf.solve(equation, case(5), x, seed=1, gradients=True).x
    (slope_,) = torch.autograd.grad(y.sum(), x)
    low, high = (sf.solve(equation, case(5), x.detach() + e * step, seed=1).x.sum() for e in (-1e-5, 1e-5))
    torch.testing.assert_close((slope_ * step).sum(), (high - low) / 2e-5, rtol=1e-5, atol=1e-7)
    assert not sf.solve(equation, case(5), x, seed=1).x.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_manners(name):
    case = CASES[name]
    solver, facts = case(7), case.facts
    assert dataclasses.is_dataclass(solver) and isinstance(solver, FixedStep)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.steps = 8
    assert facts.name and facts.reference and not facts.adaptive
    assert (facts.order is not None) == ("none" in facts.noise)
    assert (facts.weak is not None) == ("additive" in facts.noise)
    predict = GAUSSIAN.prediction(VP)
    x = VP.prior((2, 2))
    if "additive" not in facts.noise:
        with pytest.raises(sf.InvalidInput, match="additive noise"):
            sf.solve(sf.ReverseSDE(predict), solver, x)
    if "none" not in facts.noise:
        with pytest.raises(sf.InvalidInput, match="an ODE"):
            sf.solve(sf.ProbabilityFlowODE(predict), solver, x)
    if facts.face == "diffusion":
        with pytest.raises(sf.InvalidInput, match="needs the process"):
            sf.solve(sf.Equation(lambda t, x: -x, start=1.0, stop=0.0), solver, x)
    with pytest.raises(sf.InvalidInput, match="steps"):
        case(0)


def test_every_native_fixed_grid_solver_is_in_the_catalogue():
    exported = {getattr(sf, name) for name in sf.__all__}
    solvers = {c for c in exported if inspect.isclass(c) and issubclass(c, Solver) and issubclass(c, FixedStep)}
    elsewhere = {c for c in solvers if c.__module__ == "sdeflow.solvers.stochastic"}  # for any SDE: test_stochastic.py
    assert solvers - elsewhere == {type(case(8)) for case in CASES.values()}
