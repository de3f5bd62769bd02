"""Adams(global_error=True): no sample is lost, the rest of a solve stays what it is, and what cannot agree says so."""

from __future__ import annotations

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import global_error

f64 = torch.float64
VP = sf.VP()


def cell(make, n, seed=2):
    problem = make()
    ode = sf.ProbabilityFlowODE(problem.prediction(VP))
    return ode, VP.prior((n, problem.dim), seed=seed, dtype=f64)


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("make", "tol", "n"),
    [(sf.problems.ring, 1e-4, 256), (sf.problems.mixture64, 1e-2, 256), (sf.problems.mixture64, 1e-3, 256),
     (sf.problems.digits, 1e-3, 64)],
    ids=["ring", "mixture64 1e-2", "mixture64 1e-3", "digits"],
)  # fmt: skip
def test_the_error_of_a_batch_with_lost_samples_becomes_that_of_the_tolerance(make, tol, n):
    ode, x = cell(make, n)
    truth = sf.solve(ode, sf.Adams(rtol=1e-10, atol=1e-10), x).x
    plain = sf.solve(ode, sf.Adams(rtol=tol, atol=tol), x)
    assert rmse(plain.x, truth) > 3.0 * tol, "nothing to mend: the test shows nothing"
    s = sf.solve(ode, sf.Adams(rtol=tol, atol=tol, global_error=True), x)
    assert rmse(s.x, truth) < 3.0 * tol
    assert s.evaluations.sum() < 6 * plain.evaluations.sum()
    assert s.error_estimate is not None and s.error_estimate.square().mean().sqrt() < tol


def test_the_estimate_is_of_the_last_two_solves_of_every_sample():
    ode, x = cell(sf.problems.ring, 128)
    truth = sf.solve(ode, sf.Adams(rtol=1e-10, atol=1e-10), x).x
    s = sf.solve(ode, sf.Adams(rtol=1e-4, atol=1e-4, global_error=True), x)
    assert s.error_estimate is not None
    assert (s.error_estimate > 0).all()
    more = s.evaluations > s.evaluations.median()
    for some in (more, ~more):
        error = (s.x - truth)[some].square().mean().sqrt()
        assert 1 / 3 < s.error_estimate[some].square().mean().sqrt() / error < 3


def test_ends_alone_do_not_show_what_both_solves_have_lost(monkeypatch):
    ode, x = cell(sf.problems.digits, 128)
    truth = sf.solve(ode, sf.Adams(rtol=1e-8, atol=1e-8), x).x
    solver = sf.Adams(rtol=1e-2, atol=1e-2, global_error=True)
    along = rmse(sf.solve(ode, solver, x).x, truth)
    monkeypatch.setattr(global_error, "PLACES", 1)
    alone = rmse(sf.solve(ode, solver, x).x, truth)
    assert along < 3e-2 < alone


def test_a_sample_does_not_know_of_the_others():
    ode, x = cell(sf.problems.ring, 64)
    solver = sf.Adams(rtol=1e-3, atol=1e-3, global_error=True)
    whole = sf.solve(ode, solver, x)
    for rows in (slice(0, 1), slice(30, 37)):
        some = sf.solve(ode, solver, x[rows])
        assert (some.x - whole.x[rows]).abs().max() < 1e-10
        assert torch.equal(some.evaluations, whole.evaluations[rows])


def test_evaluations_are_those_made():
    exact, seen = sf.problems.ring().prediction(VP), []

    def data(x, t):
        seen.append(len(x))
        return exact.network(x, t)

    ode = sf.ProbabilityFlowODE(sf.DataPrediction(data, VP))
    s = sf.solve(ode, sf.Adams(rtol=1e-2, atol=1e-2, global_error=True), VP.prior((32, 2), seed=0))
    assert s.calls == len(seen) and int(s.evaluations.sum()) == sum(seen)
    assert s.evaluations.min() < s.evaluations.max()


def test_conditions_follow_their_samples():
    def network(x, t, label):
        """E[x_0 | x] of data at ±m, m = 1 + label/5, less sharp than its noise would have it near the end."""
        m, sigma2 = (1.0 + 0.2 * label)[:, None], (VP.sigma(t) ** 2 + 0.01)[:, None]
        return m * torch.tanh(m * VP.alpha(t)[:, None] * x / sigma2)

    labels = torch.arange(6).repeat(8)
    x = VP.prior((48, 2), seed=3, dtype=f64)
    solver = sf.Adams(rtol=1e-3, atol=1e-3, global_error=True)

    def solved(rows):
        predict = sf.DataPrediction(sf.Conditioned(network, label=labels[rows]), VP)
        return sf.solve(sf.ProbabilityFlowODE(predict), solver, x[rows])

    whole = solved(slice(None))
    assert len(whole.evaluations.unique()) > 2, "no sample was solved again: the test shows nothing"
    for n in range(6):
        assert (solved(slice(n, n + 1)).x - whole.x[n]).abs().max() < 1e-10


def test_outputs_and_dense_states_are_of_the_solve_that_is_returned():
    ode, x = cell(sf.problems.ring, 128)
    when = [0.7, 0.4, 0.1]
    solver = sf.Adams(rtol=1e-3, atol=1e-3, global_error=True, dense=True)
    s = sf.solve(ode, solver, x, save_at=[*when, VP.t_min])
    assert torch.equal(s.states[-1], s.x)
    for t, state in zip(when, s.states, strict=False):
        assert torch.allclose(s.at(t), state, atol=1e-12)
    with pytest.raises(sf.InvalidInput, match="interpolant"):
        sf.solve(ode, sf.Adams(rtol=1e-2, atol=1e-2, global_error=True), x[:2]).at(0.5)


def test_solves_that_do_not_agree_say_so_and_keep_what_they_have():
    def noisy(x, t):
        return 0.2 * torch.tanh(x) + 1e-2 * torch.sin(1e5 * (x + 7.0 * t[:, None]))

    ode = sf.ProbabilityFlowODE(sf.DataPrediction(noisy, VP))
    x = VP.prior((8, 4), seed=0, dtype=f64)
    solver = sf.Adams(rtol=1e-6, atol=1e-6, max_steps=400, global_error=True)
    with pytest.raises(sf.SolveFailed, match="NOT_CONVERGED|MAX_STEPS"):
        sf.solve(ode, solver, x)
    s = sf.solve(ode, solver, x, on_failure="return")
    assert not s.success.any()
    assert s.x.isfinite().all()


def test_a_tighter_solve_that_fails_loses_nothing():
    ode, x = cell(sf.problems.ring, 128)
    tol = 1e-4
    truth = sf.solve(ode, sf.Adams(rtol=1e-10, atol=1e-10), x).x
    solver = sf.Adams(rtol=tol, atol=tol, max_steps=40, dense=True, global_error=True)
    s = sf.solve(ode, solver, x, save_at=[0.5, VP.t_min], on_failure="return")
    failed = s.status == sf.Status.MAX_STEPS
    assert 0 < failed.sum() < 128
    assert rmse(s.x[failed], truth[failed]) < 0.05 and torch.equal(s.states[-1], s.x)
    assert torch.allclose(s.at(0.5), s.states[0], atol=1e-12)


def test_a_network_without_a_finite_value_fails_as_elsewhere():
    ode = sf.ProbabilityFlowODE(sf.DataPrediction(lambda x, t: x * math.nan, VP))
    s = sf.solve(ode, sf.Adams(global_error=True), VP.prior((4, 2)), on_failure="return")
    assert (s.status == sf.Status.NON_FINITE).all()


def test_a_sample_that_fails_leaves_the_others():
    process, x = sf.VP(), VP.prior((16, 2), seed=1, dtype=f64)
    bad = torch.zeros(16, dtype=torch.bool)
    bad[5] = True

    def network(x, t, broken):
        return torch.where(broken[:, None] & (t[:, None] < 0.5), math.nan, 0.5 * torch.tanh(2.0 * x))

    def solved(rows, flags):
        predict = sf.DataPrediction(sf.Conditioned(network, broken=flags), process)
        solver = sf.Adams(rtol=1e-3, atol=1e-3, global_error=True)
        return sf.solve(sf.ProbabilityFlowODE(predict), solver, x[rows], on_failure="return")

    s = solved(slice(None), bad)
    assert s.status.tolist() == [int(sf.Status.NON_FINITE) if b else 0 for b in bad.tolist()]
    assert (solved(~bad, bad[~bad]).x - s.x[~bad]).abs().max() < 1e-10


def test_any_ode_and_its_gradients():
    """x″ = −x, and the gradient of its end to its start: a rotation."""
    ode = sf.Equation(lambda t, x: torch.stack([x[:, 1], -x[:, 0]], 1))
    x = torch.randn(5, 2, dtype=f64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    solver = sf.Adams(rtol=1e-6, atol=1e-6, global_error=True)
    s = sf.solve(ode, solver, x, start=0.0, stop=3.0, gradients=True)
    turn = torch.tensor([[math.cos(3.0), math.sin(3.0)], [-math.sin(3.0), math.cos(3.0)]], dtype=f64)
    assert (s.x - x @ turn.T).abs().max() < 3e-6
    (grad,) = torch.autograd.grad(s.x[:, 0].sum(), x)
    assert (grad - turn[0]).abs().max() < 1e-4
