"""Global error control on Brownian paths: no sample is lost beside a border of two modes."""

from __future__ import annotations

import pytest
import torch

import sdeflow as sf
from sdeflow.solution import Status

N = 64
TIMES = [1.0, 0.5, 0.2, 0.001]
C = sf.problems.ring().data_scale


@pytest.fixture(scope="module")
def ring():
    """(equation, start, path, end on that path) of the ring's reverse SDE."""
    process, problem = sf.VP(), sf.problems.ring()
    equation = sf.ReverseSDE(problem.prediction(process), eta=1.0)
    x = process.prior((N, 2), seed=5, dtype=torch.float64)
    path = sf.BrownianPath(sf.sample_seeds(5, N), (2,), dtype=torch.float64)
    fine = sf.ExponentialShARK(c=C, steps=2400)
    return equation, x, path, sf.solve(equation, fine, x, path=path, save_at=TIMES)


def shark(tolerance, **options):
    return sf.ExponentialShARK(c=C, rtol=0.0, atol=tolerance, **options)


def rms(x, truth):
    return (x - truth).square().mean().sqrt().item()


def test_samples_beside_a_border_are_found_again(ring):
    equation, x, path, fine = ring
    plain = sf.solve(equation, shark(1e-3), x, path=path)
    checked = sf.solve(equation, shark(1e-3, global_error=True), x, path=path)
    assert rms(plain.x, fine.x) > 2e-2  # one sample in another mode
    assert checked.success.all() and rms(checked.x, fine.x) < 1e-3
    # the others cost two solves
    assert checked.evaluations.double().median() < 4.0 * plain.evaluations.double().median()
    assert (checked.error_estimate > 0.0).all() and checked.error_estimate.square().mean().sqrt() < 1e-3


def test_a_sample_does_not_know_of_its_batch_mates(ring):
    equation, x, _, _ = ring
    seeds = sf.sample_seeds(9, N)
    solver = shark(1e-2, global_error=True)
    together = sf.solve(equation, solver, x, seed=seeds)
    for n in (0, 17):
        alone = sf.solve(equation, solver, x[n : n + 1], seed=seeds[n : n + 1])
        torch.testing.assert_close(alone.x[0], together.x[n], rtol=0, atol=1e-10)
        assert alone.evaluations[0] == together.evaluations[n]


def test_output_times_are_those_of_the_last_solve(ring):
    equation, x, path, fine = ring
    run = sf.solve(equation, shark(1e-2, global_error=True), x, path=path, save_at=TIMES)
    assert run.states.shape == (4, N, 2)
    torch.testing.assert_close(run.states[0], x, rtol=0, atol=1e-14)
    assert torch.equal(run.states[-1], run.x)
    assert rms(run.states[1], fine.states[1]) < 1e-2 and rms(run.states[2], fine.states[2]) < 2e-2


def test_it_holds_for_equations_of_ones_own():
    equation = sf.Equation(
        lambda t, x: -4.0 * x * (x**2 - 1.0), lambda t, x: 0.5 * torch.ones_like(x), noise="additive"
    )
    x = torch.linspace(-0.2, 0.2, 32, dtype=torch.float64)[:, None]
    path = sf.BrownianPath(sf.sample_seeds(2, 32), (1,), dtype=torch.float64)
    truth = sf.solve(equation, sf.ShARK(steps=4000), x, start=0.0, stop=2.0, path=path).x
    run = sf.solve(equation, sf.ShARK(rtol=0.0, atol=1e-3, global_error=True), x, start=0.0, stop=2.0, path=path)
    assert run.success.all() and rms(run.x, truth) < 2e-3


def test_where_solves_do_not_agree_it_says_so():
    rough = sf.Equation(
        lambda t, x: 3.0 * torch.sign(torch.sin(1e4 * x)), lambda t, x: 0.1 * torch.ones_like(x), noise="additive"
    )
    x = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)[:, None]
    solver = sf.ShARK(rtol=0.0, atol=1e-5, max_steps=300, global_error=True)
    run = sf.solve(rough, solver, x, start=0.0, stop=1.0, seed=1, on_failure="return")
    assert (run.status != Status.SUCCESS).all() and run.x.isfinite().all()


def test_fixed_steps_are_refused():
    with pytest.raises(sf.InvalidInput, match=r"needs tolerances: write SRA1\(rtol="):
        sf.SRA1(steps=10, global_error=True)
    with pytest.raises(sf.InvalidInput, match="it has none; leave it out"):
        sf.SEA(steps=10, global_error=True)
