"""Networks that predict the noise with an error, as trained ones do: the defaults do not carry it along."""

from __future__ import annotations

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import stochastic_adams_stepper as stepper

DELTA = 0.02


class Erring(torch.nn.Module):
    """The exact noise of a problem and a smooth error of DELTA (RMS), made of cosines in x and t."""

    def __init__(self, exact, d):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.exact = exact
        self.of_x = torch.randn(d, 32, generator=draw, dtype=torch.float64) / math.sqrt(d)
        self.out = torch.randn(32, d, generator=draw, dtype=torch.float64) / math.sqrt(32)
        self.phase = 2 * math.pi * torch.rand(32, generator=draw, dtype=torch.float64)
        self.of_t = 5.0 * torch.randn(32, generator=draw, dtype=torch.float64)

    def forward(self, x, t):
        waves = math.sqrt(2.0) * torch.cos(x @ self.of_x + self.phase + t[:, None] * self.of_t)
        return self.exact(x, t) + DELTA * waves @ self.out


@pytest.fixture(scope="module")
def digits():
    """(equation, start, end of its flow): 64-D digits under VP, where σ/α is 150 at the start."""
    problem, process = sf.problems.digits(), sf.VP()
    network = Erring(problem.prediction(process, kind="noise").network, problem.dim)
    equation = sf.ProbabilityFlowODE(sf.NoisePrediction(network, process))
    x = process.prior((64, problem.dim), seed=3, dtype=torch.float64)
    with torch.no_grad():
        truth = sf.solve(equation, sf.FixedAdams(order=4, steps=500, grid=sf.UniformLogSNR()), x).x
        again = sf.solve(equation, sf.Adams(rtol=1e-8, atol=1e-8), x).x
    assert error(again, truth) < 1e-5
    return equation, x, truth


def error(x, truth):
    """Median over samples: flips are not what is looked at."""
    return (x - truth).square().mean(1).sqrt().median().item()


@pytest.mark.parametrize(
    ("solver", "gain"),
    [
        (lambda bent: sf.StochasticAdams(steps=10, high=None if bent else 2.0), 4.0),
        (lambda bent: sf.FixedAdams(steps=10, chart=None if bent else sf.StraightLine()), 4.0),
        (lambda bent: sf.RungeKutta("heun", steps=6, chart=None if bent else sf.StraightLine()), 4.0),
        (lambda bent: sf.DPMSolverPP(order=2, steps=10, grid=None if bent else sf.InChart()), 4.0),
        (lambda bent: sf.DEIS(order=3, steps=10, grid=None if bent else sf.InChart()), 2.0),
    ],
    ids=["StochasticAdams", "FixedAdams", "Heun", "DPM-Solver++2M", "DEIS3"],
)
def test_default_grids_leave_pure_noise_in_short_steps(digits, solver, gain):
    equation, x, truth = digits
    default, straight = (error(sf.solve(equation, solver(bent), x).x, truth) for bent in (True, False))
    assert gain * default < straight, (default, straight)


def test_exponential_shark_leaves_pure_noise_in_short_steps(digits):
    equation, x, _ = digits
    sde, even, old = sf.ReverseSDE(equation.predict), sf.UniformLogSNR(), sf.InChart(sf.StraightLine(0.25))
    fine = sf.solve(sde, sf.ExponentialShARK(steps=300, grid=even), x, seed=1).x
    default, long = (
        error(sf.solve(sde, sf.ExponentialShARK(steps=10, grid=grid), x, seed=1).x, fine) for grid in (None, old)
    )
    assert 4.0 * default < long, (default, long)


def test_adams_with_noise_takes_fewer_steps_out_of_pure_noise(digits, monkeypatch):
    equation, x, _ = digits
    solver, sde = sf.Adams(rtol=0.1, atol=0.1), sf.ReverseSDE(equation.predict)
    spent = sf.solve(sde, solver, x, seed=1).evaluations.double().mean()
    monkeypatch.setattr(stepper, "LARGEST_SCALE", (10.0, 10.0))
    assert spent < 0.85 * sf.solve(sde, solver, x, seed=1).evaluations.double().mean()


def test_adams_keeps_its_tolerance_at_fewer_evaluations(digits):
    equation, x, truth = digits
    for tolerance in (3e-2, 1e-2, 1e-3):
        default, line = (
            sf.solve(equation, sf.Adams(rtol=tolerance, atol=tolerance, chart=chart), x)
            for chart in (None, sf.StraightLine())
        )
        assert error(default.x, truth) < 1.5 * tolerance
        assert default.evaluations.double().mean() < 0.9 * line.evaluations.double().mean()
