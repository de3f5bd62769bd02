"""Adaptive pairs: order conditions, steps of one's own, dense output."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.solvers.adaptive_rk import Dopri5, Tsit5, middle

f64 = torch.float64
PAIRS = [Dopri5, Tsit5]


def stages(tableau):
    a = np.zeros((tableau.stages + 1,) * 2)
    for i, row in enumerate((*tableau.a, tableau.b)):
        a[i, : len(row)] = row
    return a, a.sum(1)


def trees(a, c):
    """(tree, 1/γ, order) of the eight trees up to order 4."""
    return [
        (c**0, 1, 1),
        (c, 1 / 2, 2),
        (c**2, 1 / 3, 3),
        (a @ c, 1 / 6, 3),
        (c**3, 1 / 4, 4),
        (c * (a @ c), 1 / 8, 4),
        (a @ c**2, 1 / 12, 4),
        (a @ a @ c, 1 / 24, 4),
    ]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_error_weights_vanish_to_order_four_and_not_beyond(pair):
    a, c = stages(pair.tableau)
    e = np.array(pair.embedded)
    for tree, _, _ in trees(a, c):
        assert e @ tree == pytest.approx(0.0, abs=1e-12)
    assert abs(e @ c**4) > 1e-4


@pytest.mark.parametrize("pair", PAIRS)
def test_the_middle_has_order_four(pair):
    a, c = stages(pair.tableau)
    w = np.array(middle(pair.tableau))
    for tree, value, order in trees(a, c):
        assert w @ tree == pytest.approx(value * 0.5**order, abs=1e-10)


def wave():
    """x″ = −w²x, a frequency of its own for every sample."""
    w = torch.tensor([1.0, 3.0, 9.0], dtype=f64)

    def drift(t, x):
        return torch.stack([x[:, 1], -x[:, 2].square() * x[:, 0], 0.0 * x[:, 2]], 1)

    x = torch.stack([torch.ones(3, dtype=f64), torch.zeros(3, dtype=f64), w], 1)
    return sf.Equation(drift, start=0.0, stop=3.0), x, lambda t: (w * t).cos()


@pytest.mark.parametrize("solver", [*PAIRS, sf.Adams])
def test_every_sample_steps_at_its_own_pace(solver):
    ode, x, truth = wave()
    s = sf.solve(ode, solver(rtol=0.0, atol=1e-6), x)
    assert (s.x[:, 0] - truth(3.0)).abs().max() < 1e-4
    assert s.accepted[0] < s.accepted[1] < s.accepted[2]
    for i in range(3):
        alone = sf.solve(ode, solver(rtol=0.0, atol=1e-6), x[i : i + 1])
        assert (alone.x[0] - s.x[i]).abs().max() < 1e-10


@pytest.mark.parametrize("pair", PAIRS)
def test_evaluations_are_six_a_try_and_two_to_begin(pair):
    ode, x, _ = wave()
    s = sf.solve(ode, pair(), x)
    assert (s.evaluations == 1 + 6 * (s.accepted + s.rejected)).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_work_grows_as_order_five(pair):
    ode, x, _ = wave()
    n = [sf.solve(ode, pair(rtol=0.0, atol=a), x).accepted[2].item() for a in (1e-6, 1e-11)]
    assert math.log10(n[1] / n[0]) / 5.0 == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("solver", [*PAIRS, sf.Adams])
def test_dense_output_is_as_good_as_the_steps(solver):
    ode, x, truth = wave()
    s = sf.solve(ode, solver(rtol=0.0, atol=1e-8, dense=True), x)
    times = torch.linspace(0.0, 3.0, 41, dtype=f64)
    ends = (s.x[:, 0] - truth(3.0)).abs().max().item()
    for t in times:
        assert (s.at(t.item())[:, 0] - truth(t)).abs().max() < 10.0 * ends + 1e-7
    assert torch.equal(s.at(0.0), x)
    assert (s.at(3.0) - s.x).abs().max() < 1e-12
    with pytest.raises(sf.InvalidInput, match="outside"):
        s.at(3.1)


@pytest.mark.parametrize("solver", [*PAIRS, sf.Adams])
def test_dense_output_of_a_diffusion(solver):
    process = sf.VP()
    problem = sf.problems.gaussian()
    x = process.prior((16, problem.dim), seed=0, dtype=f64)
    ode = sf.ProbabilityFlowODE(problem.prediction(process))
    s = sf.solve(ode, solver(rtol=1e-6, atol=1e-6, dense=True), x)
    for t in (0.9, 0.4, 0.05):
        assert (s.at(t) - problem.flow(x, process, 1.0, t)).square().mean().sqrt() < 3e-5


@pytest.mark.parametrize("pair", PAIRS)
def test_a_discontinuity_is_stepped_over_and_nan_is_a_status(pair):
    jump = sf.Equation(lambda t, x: torch.where(t[:, None] < 0.3, 1.0, -1.0) * torch.ones_like(x), start=0.0, stop=1.0)
    s = sf.solve(jump, pair(rtol=0.0, atol=1e-6), torch.zeros(2, 1, dtype=f64))
    # the last stage, the first beyond the jump, weighs as little as 1/66 in the estimate
    assert (s.x - (0.3 - 0.7)).abs().max() < 2 * 66e-6
    broken = sf.Equation(lambda t, x: torch.where(x > 0.0, torch.nan, 1.0), start=0.0, stop=1.0)
    s = sf.solve(broken, pair(), torch.tensor([[-0.5], [-3.0], [1.0]], dtype=f64), on_failure="return")
    assert s.status.tolist() == [sf.Status.NON_FINITE, sf.Status.SUCCESS, sf.Status.NON_FINITE]
    assert s.x[1].item() == pytest.approx(-2.0)
