"""Stochastic Adams: its variance errors fall with the order claimed, and where it looks has the law of where it is."""

import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.measure import exact_moments
from sdeflow.solvers.exponential_steps import LOOK, _looks
from sdeflow.solvers.exponential_weights import Linear
from sdeflow.solvers.fitted_weights import Linearised

F64 = torch.float64
VP = sf.VP(t_min=1e-2)
# an axis at every place of the transition, so that no sign change of one axis's error passes for an order
SPREAD = sf.problems.gaussian(mean=0.0, std=torch.logspace(-0.6, 0.2, 8, dtype=F64))


def variance_errors(solver, eta=1.0, problem=SPREAD, process=VP):
    mean, cov = problem.moments(process, process.t_max)
    law = exact_moments(sf.ReverseSDE(problem.prediction(process), eta=eta), solver, mean, cov)
    return law.variance_errors(problem.moments(process, process.t_min)[1])


def graded(n):
    """A smooth grid in λ of uneven steps, finer at the end, where the boundary term is made."""
    s = torch.linspace(0.0, 1.0, n + 1, dtype=F64)
    first, last = VP.half_log_snr(torch.tensor([1.0, 1e-2], dtype=F64)).tolist()
    times = VP.time(first + (last - first) * (1.0 - (1.0 - s) ** 2.5))
    times[0], times[-1] = 1.0, 1e-2
    return times


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
def test_looking_ahead_raises_the_weak_order_on_linear_equations(eta):
    orders = {}
    for look in (True, False):
        size = [
            variance_errors(sf.StochasticAdams(grid=graded(n), look_ahead=look, corrector=3), eta).norm().item()
            for n in (80, 160, 320)
        ]
        orders[look] = math.log2(size[1] / size[2])
    assert abs(orders[False] - 2.0) < 0.2, orders
    assert orders[True] > 2.8, orders


def test_the_h2_term_is_the_derived_one():
    # scales log-uniform over far more than a step, even steps: relative variance error h²/9 (η = 1) and 0
    h, process = 0.1, sf.EDM(t_min=1e-3, t_max=1e3)
    problem = sf.problems.gaussian(mean=[0.0], std=[1.0])
    lam = torch.arange(-6.0, 6.5, h, dtype=F64)
    times = (-lam).exp()
    equation = sf.ReverseSDE(problem.prediction(process))
    ends = {"start": times[0].item(), "stop": times[-1].item()}
    for look, expected in ((False, h**2 / 9.0), (True, 0.0)):
        solver = sf.StochasticAdams(grid=times, corrector=3, look_ahead=look)
        law = exact_moments(equation, solver, *problem.moments(process, ends["start"]), **ends)
        error = law.variance_errors(problem.moments(process, ends["stop"])[1]).item()
        assert abs(error - expected) < 0.1 * h**2 / 9.0, (look, error, expected)


def test_the_point_looked_at_has_the_law_of_the_state():
    rng = np.random.default_rng(0)
    A, s = rng.uniform(0.3, 0.9, 9), rng.uniform(0.5, 1.5, 9)
    for n, row in enumerate(_looks(Linear(A, A, s), LOOK)[1:], 1):
        c = {k: weight for weight, k in row}
        assert set(c) == {2 * n - 2, 2 * n, 2 * n + 1}
        law = (s[n - 1] + c[2 * n - 2]) ** 2 + c[2 * n] ** 2 + c[2 * n + 1] ** 2
        assert law == pytest.approx(s[n - 1] ** 2, rel=1e-12)
        assert c[2 * n - 2] < 0 < c[2 * n]


def test_steps_that_change_abruptly_keep_the_law():
    A, s = np.array([0.5, 1e-3, 0.9, 0.2]), np.array([1.0, 1e-4, 2.0, 0.5])
    for n, row in enumerate(_looks(Linear(A, A, s), LOOK)[1:], 1):
        c = {k: weight for weight, k in row}
        law = (s[n - 1] + c.get(2 * n - 2, 0.0)) ** 2 + c.get(2 * n, 0.0) ** 2 + c.get(2 * n + 1, 0.0) ** 2
        assert law == pytest.approx(s[n - 1] ** 2, rel=1e-12)


@pytest.mark.parametrize("process", [sf.RectifiedFlow(t_min=1e-4), sf.EDM(), sf.VP(), sf.CosineVP()], ids=repr)
def test_few_steps_do_on_every_process(process):
    problem = sf.problems.gaussian()
    assert variance_errors(sf.StochasticAdams(steps=22), 1.0, problem, process).square().mean().sqrt() < 1e-2
    assert variance_errors(sf.StochasticAdams(steps=22), 0.3, problem, process).square().mean().sqrt() < 1e-2


def test_monte_carlo_agrees_with_the_exact_moments():
    problem = sf.problems.gaussian(mean=[0.5], std=[0.5])
    equation = sf.ReverseSDE(problem.prediction(VP))
    solver = sf.StochasticAdams(steps=4, predictor=2)  # coarse, so that its error shows
    mean, cov = problem.moments(VP, VP.t_max)
    law = exact_moments(equation, solver, mean, cov)
    n = 100_000
    x = mean + cov.sqrt() * torch.randn(n, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = sf.solve(equation, solver, x, seed=1).x
    variance = y.var(0).item()
    right = problem.moments(VP, VP.t_min)[1].item()
    deviation = variance * math.sqrt(2.0 / n)
    assert abs(variance - law.cov.item()) < 4 * deviation < abs(law.cov.item() - right)
    assert abs(y.mean().item() - law.mean.item()) < 4 * math.sqrt(variance / n)


def test_the_noise_is_the_paths_whatever_the_batch_and_the_memory():
    problem = sf.problems.ring()
    equation = sf.ReverseSDE(problem.prediction(VP))
    x = VP.prior((600, 2), seed=0, dtype=F64)
    seeds = sf.sample_seeds(3, 600)
    solver = sf.StochasticAdams(steps=300)  # more draws than are made at once
    many = sf.solve(equation, solver, x, seed=seeds).x
    few = sf.solve(equation, solver, x[:3], seed=seeds[:3]).x
    torch.testing.assert_close(many[:3], few, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "settings", [{"predictor": 0}, {"predictor": 5}, {"corrector": 5}, {"low": 0.0}, {"low": 3.0}, {"high": math.inf}]
)
def test_settings_are_checked(settings):
    with pytest.raises(sf.InvalidInput):
        sf.StochasticAdams(steps=4, **settings)


def test_a_step_to_clean_data_draws_nothing():
    problem = sf.problems.gaussian(mean=[0.0], std=[0.5])
    equation = sf.ReverseSDE(problem.prediction(VP))
    x = VP.prior((4, 1), dtype=F64)
    run = sf.solve(equation, sf.StochasticAdams(steps=12, denoise=True), x, seed=0)
    assert run.evaluations.tolist() == [13] * 4 and bool(run.x.isfinite().all())


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fitting_makes_long_steps_right_at_every_scale(eta):
    # off the scales that were fitted, with the plain method beside it
    problem = sf.problems.gaussian(mean=0.0, std=torch.logspace(math.log10(0.04), 0.0, 11, dtype=F64))
    errors = {
        fitted: variance_errors(sf.StochasticAdams(steps=9, fitted=fitted), eta, problem, sf.EDM()).abs().max().item()
        for fitted in (True, False)
    }
    assert errors[True] < 0.02 < 0.1 < errors[False], errors


@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(), sf.RectifiedFlow()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize(
    ("problem", "gain"), [(sf.problems.gaussian(), 4.0), (sf.problems.ring(), 3.0)], ids=["gaussian", "ring"]
)
def test_fitting_makes_long_steps_right_on_the_flow_too(problem, gain, process):
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    x = process.prior((200, problem.dim), seed=2, dtype=F64)
    end = sf.solve(equation, sf.Adams(rtol=1e-8, atol=1e-8), x).x
    errors = {}
    for fitted in (True, False):
        run = sf.solve(equation, sf.StochasticAdams(steps=6, fitted=fitted), x)
        assert run.evaluations.unique().item() == 6
        errors[fitted] = (run.x - end).square().mean().sqrt().item()
    assert gain * errors[True] < errors[False], errors


def test_more_steps_look_after_smaller_scales():
    low = [sf.StochasticAdams(steps=n)._between(2.0).low for n in (3, 6, 13, 26, 100)]
    assert low == pytest.approx([0.03, 0.13 / 6, 0.01, 0.005, 0.004])
    assert sf.StochasticAdams(steps=6, low=0.05)._between(2.0).low == 0.05


def test_the_derivatives_of_the_variance_are_right():
    rng = np.random.default_rng(1)
    N, scales = 5, np.array([0.1, 0.5, 1.5])
    method = Linearised(
        alpha=tuple(np.linspace(0.1, 1.0, N + 1)), sigma=tuple(np.linspace(1.0, 0.05, N + 1)),
        A=tuple(rng.uniform(0.2, 0.8, N)), noise=tuple(rng.uniform(0.1, 0.3, N)),
        predict=tuple(tuple(rng.uniform(-0.3, 0.6, min(n + 1, 3))) for n in range(N)),
        correct=((), *(tuple(rng.uniform(-0.3, 0.6, min(n + 1, 3))) for n in range(1, N))),
        slope=(0.0, *rng.uniform(0.1, 0.4, N - 1)),
        looks=((), *(((-0.1, 2 * n - 2), (0.2, 2 * n), (0.05, 2 * n + 1)) for n in range(1, N))), draws=2,
    )  # fmt: skip
    delta = rng.uniform(-0.5, 0.5, N)
    J = method.variance(scales, delta)[1]
    for n in range(N):
        e = 1e-5 * np.eye(N)[n]
        difference = (method.variance(scales, delta + e)[0] - method.variance(scales, delta - e)[0]) / 2e-5
        np.testing.assert_allclose(J[:, n], difference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_is_fitted_is_the_variance_of_the_solver(denoise, eta):
    # the solver's own law, by unit vectors, against the linearised plan it was fitted with
    kept = []
    original = Linearised.fitted
    try:
        Linearised.fitted = lambda self, low, high: kept.append((self, original(self, low, high))) or kept[-1][1]
        problem = sf.problems.gaussian(mean=0.0, std=[0.1, 0.7])
        equation = sf.ReverseSDE(problem.prediction(VP), eta=eta)
        solver = sf.StochasticAdams(steps=8, denoise=denoise)
        law = exact_moments(equation, solver, *problem.moments(VP, VP.t_max))
    finally:
        Linearised.fitted = original
    method, delta = kept[0]
    assert np.abs(delta).max() > 0.05
    relative = method.variance(np.array([0.1, 0.7]), delta)[0] + 1.0
    alpha, sigma = method.alpha[-1 - denoise], method.sigma[-1 - denoise]
    s2 = np.array([0.1, 0.7]) ** 2
    exact = alpha**2 * s2 + sigma**2
    if denoise:
        exact = (alpha * s2 / exact) ** 2 * exact
    np.testing.assert_allclose(np.diag(law.cov.numpy()), relative * exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("h", "errors"),
    [(0.3, (-0.11, 0.02, 0.0)), (0.5, (-0.25, 0.11, 0.02)), (0.7, (-0.39, 0.27, 0.10)), (1.0, (-0.54, 0.64, 0.43))],
)
def test_one_node_leaves_noise_out_and_more_bring_too_much_in(h, errors):
    # the table in docs/weak.md
    process = sf.EDM(t_min=1e-6, t_max=1e6)
    problem = sf.problems.gaussian(mean=0.0, std=torch.linspace(-0.5 * h, 0.5 * h, 9, dtype=F64)[:-1].exp())
    n = round(12.0 / h)
    times = (-h * torch.arange(-n, n + 1, dtype=F64)).exp()
    ends = {"start": times[0].item(), "stop": times[-1].item()}
    for (predictor, corrector), expected in zip(((1, 1), (2, 1), (3, 2)), errors, strict=True):
        solver = sf.StochasticAdams(
            grid=times, predictor=predictor, corrector=corrector, fitted=False, low=1e-7, high=1e7
        )
        mean, cov = problem.moments(process, ends["start"])
        law = exact_moments(sf.ReverseSDE(problem.prediction(process)), solver, mean, cov, **ends)
        error = law.variance_errors(problem.moments(process, ends["stop"])[1]).mean().item()
        assert abs(error - expected) < 0.01, (predictor, error)


@pytest.mark.parametrize(("h", "share"), [(0.15, 0.95), (0.3, 0.85), (0.5, 0.76), (0.7, 0.72)])
def test_far_from_the_ends_the_share_of_the_slope_depends_on_the_step_alone(h, share, monkeypatch):
    # the figures in docs/weak.md
    found, original = [], Linearised.fitted
    monkeypatch.setattr(Linearised, "fitted", lambda self, *scales: found.append(original(self, *scales)) or found[-1])
    process, n = sf.EDM(t_min=1e-3, t_max=1e3), round(6.0 / h)
    times = (-h * torch.arange(-n, n + 1, dtype=F64)).exp()
    ends = {"start": times[0].item(), "stop": times[-1].item()}
    problem = sf.problems.gaussian(mean=0.0, std=[0.5])
    solver = sf.StochasticAdams(grid=times, predictor=2, corrector=1, low=1e-2, high=10.0)
    equation = sf.ReverseSDE(problem.prediction(process))
    exact_moments(equation, solver, *problem.moments(process, ends["start"]), **ends)
    middle = 1.0 + found[0][n - 1 : n + 2]
    assert np.abs(middle - share).max() < 0.03, middle
