"""The Gaussian's closed forms against numerical integration of independent equations."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import sdeflow as sf

F64 = torch.float64
PROCESSES = [sf.VP(), sf.CosineVP(), sf.SubVP(), sf.VE(), sf.EDM(), sf.RectifiedFlow()]


def full(d: int = 4):
    a = torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(0))
    return sf.problems.gaussian(mean=torch.linspace(-1.0, 2.0, d), cov=a @ a.T + 0.01 * torch.eye(d, dtype=F64))


def integrate(field, x: np.ndarray, start: float, stop: float) -> np.ndarray:
    run = solve_ivp(field, (start, stop), x, method="DOP853", rtol=1e-12, atol=1e-13)
    assert run.success
    return run.y[:, -1]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("problem", [sf.problems.gaussian(), full()], ids=["axes", "full"])
def test_flow_is_the_integral_of_the_score(problem, process):
    """DOP853 in u = ln(1 + ρ²) — a clock of its own, on y = x/α — of dy/du = −½(1 + ρ²) α s, to 1e-9."""
    start, stop = (0.98 if isinstance(process, sf.RectifiedFlow) else process.t_max), process.t_min
    x = process.prior((3, problem.dim), seed=1, dtype=F64)
    a, b = (np.log1p(process.rho(t).item() ** 2) for t in (start, stop))

    def field(u: float, y: np.ndarray) -> np.ndarray:
        t = process.time_of_rho(np.sqrt(np.expm1(u)))
        alpha = process.alpha(t)
        score = problem.score(alpha * torch.from_numpy(y).reshape(3, -1), process, t)
        return -0.5 * np.exp(u) * (alpha * score).numpy().ravel()

    y = integrate(field, (x / process.alpha(start)).numpy().ravel(), a, b)
    expected = process.alpha(stop) * torch.from_numpy(y).reshape(3, -1)
    got = problem.flow(x, process, start, stop)
    assert (got - expected).abs().max().item() < 1e-9
    torch.testing.assert_close(problem.flow(got, process, stop, start), x, rtol=1e-9, atol=1e-9)


def test_flow_from_alpha_zero_and_in_float32():
    process, problem = sf.RectifiedFlow(), full()
    x = process.prior((3, 4), dtype=F64)
    near = problem.flow(problem.flow(x, process, 1.0, 1.0 - 1e-7), process, 1.0 - 1e-7, 0.001)
    torch.testing.assert_close(problem.flow(x, process, 1.0, 0.001), near, rtol=1e-9, atol=1e-9)
    single = problem.flow(x.float(), process, 1.0, 0.001)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), near, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(t_max=5.0), sf.RectifiedFlow(t_max=0.95)], ids=repr)
def test_reverse_moments_solve_the_moment_equations(process, eta):
    """ṁ = Fm + b, Ṗ = FP + PFᵀ − η²g² with F and b read off the drift of `ReverseSDE` at basis vectors."""
    problem = full()
    d = problem.dim
    sde = sf.ReverseSDE(problem.prediction(process, "noise"), eta=eta)
    probe = torch.cat([torch.zeros(1, d, dtype=F64), torch.eye(d, dtype=F64)])
    # the interval's lower end moved up: F is stiff near the data and DOP853 slow there
    start, stop = process.t_max, process.t_min + 0.1 * (process.t_max - process.t_min)

    def field(t: float, state: np.ndarray) -> np.ndarray:
        value = sde.drift(t, probe).numpy()
        b, F = value[0], (value[1:] - value[0]).T
        noise = float(torch.as_tensor(sde.diffusion(t, probe)).flatten()[0]) ** 2
        m, P = state[:d], state[d:].reshape(d, d)
        return np.concatenate([F @ m + b, (F @ P + P @ F.T - noise * np.eye(d)).ravel()])

    sigma = process.sigma(start).item()
    end = integrate(field, np.concatenate([np.zeros(d), sigma**2 * np.eye(d).ravel()]), start, stop)
    mean, cov = problem.reverse_moments(process, eta, start, stop)
    np.testing.assert_allclose(mean, end[:d], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(cov, end[d:].reshape(d, d), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_from_the_exact_marginal_every_eta_keeps_the_marginals(process, eta):
    problem = full()
    start, stop = process.t_max, process.t_min
    mean, cov = problem.reverse_moments(process, eta, start, stop, *problem.moments(process, start))
    expected = problem.moments(process, stop)
    torch.testing.assert_close(mean, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cov, expected[1], rtol=1e-9, atol=1e-9)


def test_eta_zero_moments_are_those_of_the_flow():
    process, problem = sf.VP(), full()
    d = problem.dim
    ends = problem.flow(torch.cat([torch.zeros(1, d, dtype=F64), torch.eye(d, dtype=F64)]), process, 1.0, 1e-3)
    A = (ends[1:] - ends[0]).T
    mean, cov = problem.reverse_moments(process, eta=0.0)
    torch.testing.assert_close(mean, ends[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cov, process.sigma(1.0) ** 2 * A @ A.T, rtol=1e-11, atol=1e-12)


def test_default_is_anisotropic():
    problem = sf.problems.gaussian()
    mean, cov = problem.moments()
    std = cov.diagonal().sqrt()
    assert problem.dim == 16 and mean[0] == -1.0 and mean[-1] == 1.0
    torch.testing.assert_close(std[[0, -1]], torch.tensor([0.05, 2.0], dtype=F64))
    ratios = std[1:] / std[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(15))


def test_arguments_set_the_gaussian():
    problem = sf.problems.gaussian(mean=2.0, std=0.5, dim=3)
    mean, cov = problem.moments()
    assert mean.tolist() == [2.0] * 3 and torch.equal(cov, 0.25 * torch.eye(3, dtype=F64))
    assert problem.data_scale == 0.5
    assert sf.problems.gaussian(mean=[0.0, 1.0]).dim == 2
    with pytest.raises(sf.InvalidInput, match="eta must be"):
        problem.reverse_moments(sf.VP(), eta=-1.0)
    with pytest.raises(sf.InvalidInput, match="from noise to data"):
        problem.reverse_moments(sf.VP(), start=0.1, stop=0.9)
