"""Coupled weak errors: right, far sharper than independent runs, and honest about their references."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.measure import exact_moments, mean_square, weak_errors

F64 = torch.float64
VP = sf.VP(t_min=1e-2)
LINE = sf.problems.gaussian(mean=[0.0], std=[0.5])


def sa(steps):
    return sf.SASolver(predictor=2, corrector=1, steps=steps)


def start(problem, n, seed=0):
    mean, cov = problem.moments(VP, VP.t_max)
    z = torch.randn(n, problem.dim, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return mean + z @ torch.linalg.cholesky(cov).T


def test_the_interval_holds_the_exact_error_and_is_far_narrower_than_without_coupling():
    equation, n = sf.ReverseSDE(LINE.prediction(VP)), 1000
    moments = LINE.moments(VP, VP.t_max)
    law = [exact_moments(equation, s, *moments).cov.item() for s in (sa(12), sa(400))]
    truth, inside = law[0] - law[1], 0
    for seed in range(5):
        got = weak_errors(equation, sa(12), sa(200), sa(400), start(LINE, n, seed), seed=seed, level=0.99)[
            "mean_square"
        ]
        inside += got.low <= truth <= got.high
        independent = (
            2 * 2.6 * law[1] * math.sqrt(2 * 2 / n)
        )  # width of a 99 % interval of the difference of two variances
        assert got.high - got.low < 0.5 * independent
        assert got.low <= got.value <= got.high
    assert inside >= 4  # two misses or more of five at 1 % each: once in a thousand


def test_the_sign_is_that_of_the_solver_minus_the_reference():
    equation = sf.ReverseSDE(LINE.prediction(VP))
    noisy = sf.DDPM(variance="large", steps=10)  # "large" has too much noise
    got = weak_errors(equation, noisy, sa(200), sa(400), start(LINE, 2000), {"square": mean_square}, level=0.999)[
        "square"
    ]
    moments = LINE.moments(VP, VP.t_max)
    exact = exact_moments(equation, noisy, *moments).cov.item() - exact_moments(equation, sa(400), *moments).cov.item()
    assert 0 < got.low <= exact <= got.high and got.resolved


def test_references_that_differ_raise_the_floor():
    equation, x = sf.ReverseSDE(LINE.prediction(VP)), start(LINE, 500)
    good, bad = (weak_errors(equation, sa(30), s, sa(400), x)["mean_square"] for s in (sa(200), sa(20)))
    assert bad.floor > 5 * good.floor
    assert not bad.resolved


def test_weak_order_two_on_a_nonlinear_problem():
    ring = sf.problems.ring(std=0.3)
    equation = sf.ReverseSDE(ring.prediction(VP))
    x = VP.prior((2000, 2), dtype=F64)
    functions = {"fourth": lambda x: x.square().sum(1).square()}
    grid = sf.Multiscale(0.05, 1.0)

    def solver(n):
        return sf.StochasticAdams(steps=n, grid=grid, low=0.05, high=1.0)

    errors = [weak_errors(equation, solver(n), solver(160), solver(320), x, functions)["fourth"] for n in (8, 16)]
    assert errors[0].resolved
    # of order 1 the finer error would be half the coarser
    assert max(abs(errors[1].low), abs(errors[1].high)) < 0.35 * abs(errors[0].value), errors


def test_a_function_of_another_shape_is_refused():
    equation = sf.ReverseSDE(LINE.prediction(VP))
    with pytest.raises(sf.InvalidInput, match="one number a sample"):
        weak_errors(equation, sa(3), sa(4), sa(5), start(LINE, 4), {"x": lambda x: x})
