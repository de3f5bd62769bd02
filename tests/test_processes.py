"""Processes: the forward SDE follows from α and σ, the inverse inverts, the discrete table is met and smooth."""

import math

import numpy as np
import pytest
import torch

import sdeflow as sf

NAMED = [sf.VP(), sf.CosineVP(), sf.SubVP(), sf.VE(), sf.EDM(), sf.RectifiedFlow()]
TABLES = [sf.DiscreteVP.linear(), sf.DiscreteVP.scaled_linear(), sf.DiscreteVP.cosine(), sf.DiscreteVP.sigmoid()]
OWN = [
    sf.Process(alpha=lambda t: 1.0, sigma=lambda t: t.sqrt(), t_min=1e-4, t_max=4.0),
    sf.Process(
        alpha=lambda t: (math.pi / 2 * t).cos(), sigma=lambda t: (math.pi / 2 * t).sin(), t_min=1e-3, t_max=0.99
    ),
]
ALL = NAMED + TABLES + OWN


def inside(process: sf.Process, n: int = 201) -> torch.Tensor:
    return torch.linspace(process.t_min, process.t_max, n + 2, dtype=torch.float64)[1:-1]


@pytest.mark.parametrize("process", ALL, ids=repr)
def test_derivatives_are_those_of_alpha_and_sigma(process):
    # central differences, h³ error: the analytic or autograd derivative against the functions themselves
    t = inside(process)
    h = 1e-5 * (process.t_max - process.t_min)
    t = t[(t - process.t_min > 2 * h) & (process.t_max - t > 2 * h)]
    for value, slope in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        numeric = (8 * (value(t + h) - value(t - h)) - (value(t + 2 * h) - value(t - 2 * h))) / (12 * h)
        assert torch.allclose(slope(t), numeric, rtol=2e-6, atol=1e-7 * slope(t).abs().max().item())


@pytest.mark.parametrize("process", ALL, ids=repr)
def test_time_inverts_half_log_snr_and_rho(process):
    t = inside(process)
    assert ((process.time(process.half_log_snr(t)) - t).abs() <= 1e-12 * t.abs().clamp_min(1e-3)).all()
    assert ((process.time_of_rho(process.rho(t)) - t).abs() <= 1e-12 * t.abs().clamp_min(1e-3)).all()


@pytest.mark.parametrize("process", ALL, ids=repr)
def test_forward_sde_has_the_marginals(process):
    # d(α)/dt = fα and d(σ²)/dt = 2fσ² + g²: the moment equations of dx = f x dt + g dw
    t = inside(process)
    alpha, sigma, da, ds = process.coefficients(t)
    assert torch.allclose(process.f(t) * alpha, da, rtol=1e-10, atol=1e-14)
    assert torch.allclose(2 * process.f(t) * sigma**2 + process.g2(t), 2 * sigma * ds, rtol=1e-10, atol=1e-12)
    assert (process.g2(t) > 0).all()
    # g² = −2σ²λ̇
    numeric = torch.func.vmap(torch.func.grad(lambda s: process.half_log_snr(s).sum()))(t) if process in NAMED else None
    if numeric is not None:
        assert torch.allclose(process.g2(t), -2 * sigma**2 * numeric, rtol=1e-8)


def test_published_forms():
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    vp, sub, ve = sf.VP(), sf.SubVP(), sf.VE()
    beta = 0.1 + 19.9 * t
    assert torch.allclose(vp.g2(t), beta, rtol=1e-10)
    assert torch.allclose(vp.f(t), -beta / 2, rtol=1e-12)
    assert torch.allclose(sub.g2(t), beta * (1 - torch.exp(-0.2 * t - 19.9 * t**2)), rtol=1e-10)
    assert torch.allclose(ve.g(t), ve.sigma(t) * math.sqrt(2 * math.log(5000)), rtol=1e-12)
    assert torch.allclose(sf.EDM().g2(t), 2 * t, rtol=1e-12)
    wiener = OWN[0]
    assert torch.allclose(wiener.g(t), torch.ones_like(t), rtol=1e-12)
    assert (wiener.f(t) == 0).all()


def test_rectified_flow_reaches_alpha_zero():
    process = sf.RectifiedFlow()
    assert process.alpha(1.0) == 0 and process.sigma(1.0) == 1
    assert process.half_log_snr(1.0) == -math.inf and process.rho(1.0) == math.inf
    assert process.time(-math.inf) == 1 and process.time_of_rho(math.inf) == 1


@pytest.mark.parametrize("process", TABLES, ids=repr)
def test_table_is_met_at_integers_and_smooth_between(process):
    table = torch.as_tensor(process.alphas_cumprod, dtype=torch.float64)
    k = torch.arange(table.numel(), dtype=torch.float64)
    assert process.smooth and process.t_max == 999
    assert torch.allclose(process.alpha(k) ** 2, table, rtol=1e-11, atol=1e-14)
    # C²: the second difference of θ across a knot is continuous up to O(h) times the third derivative's jump
    knots, h = k[100:900:50], 1e-3
    left = process.theta(knots - 2 * h) - 2 * process.theta(knots - h) + process.theta(knots)
    right = process.theta(knots + 2 * h) - 2 * process.theta(knots + h) + process.theta(knots)
    assert ((left - right).abs() / h**2 < 1e-5).all()


def test_spline_is_the_not_a_knot_spline():
    interpolate = pytest.importorskip("scipy.interpolate")
    process = sf.DiscreteVP.scaled_linear()
    theta = process.theta(torch.arange(1000)).numpy()
    t = torch.linspace(0, 999, 4321, dtype=torch.float64)
    reference = interpolate.CubicSpline(np.arange(1000), theta, bc_type="not-a-knot")
    assert np.abs(process.theta(t).numpy() - reference(t.numpy())).max() < 1e-13


def test_zero_terminal_snr_and_rough_tables():
    table = sf.DiscreteVP.scaled_linear().alpha(torch.arange(1000))
    rescaled = ((table - table[-1]) * table[0] / (table[0] - table[-1])) ** 2
    process = sf.DiscreteVP(rescaled)
    assert process.alpha(999) == pytest.approx(0, abs=1e-15) and process.time_of_rho(math.inf) == 999
    rough = sf.DiscreteVP([0.99, 0.98, 0.3, 0.29, 0.05])
    assert not rough.smooth
    assert (rough.half_log_snr(torch.linspace(0, 4, 500, dtype=torch.float64)).diff() < 0).all()


@pytest.mark.parametrize("process", ALL, ids=repr)
def test_perturb_and_marginal(process):
    x0, noise = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    t = inside(process, 5)
    mean, std = process.marginal(x0, t)
    alpha, sigma = process.alpha(t)[:, None, None], process.sigma(t)[:, None, None]
    assert torch.allclose(mean, alpha * x0) and torch.allclose(
        process.perturb(x0, t, noise), alpha * x0 + sigma * noise
    )
    assert std.shape == (5, 1, 1)
    assert process.perturb(x0.float(), t, noise.float()).dtype == torch.float32


def test_prior_and_its_density():
    process = sf.EDM()
    x = process.prior((4096, 3), seed=1, dtype=torch.float64)
    # 12288 normals of std 80: five-sigma bounds (false alarm 1e-6)
    assert abs(x.mean().item()) < 5 * 80 / math.sqrt(x.numel())
    assert abs(x.var().item() / 6400 - 1) < 5 * math.sqrt(2 / x.numel())
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.tensor(80.0, dtype=torch.float64))
    assert torch.allclose(process.prior_log_prob(x), normal.log_prob(x).sum(1))
    assert torch.equal(process.prior((7, 3), seed=1, dtype=torch.float64), x[:7])
    assert not torch.equal(process.prior((7, 3), seed=2, dtype=torch.float64), x[:7])
    with pytest.raises(sf.InvalidInput, match=r"none negative; got \(-7, 3\)"):
        process.prior((-7, 3))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: sf.VP(t_min=1.0, t_max=0.5), "t_min < t_max"),
        (lambda: sf.VP(beta_min=-1.0), "beta_min"),
        (lambda: sf.Process(torch.cos, torch.sin, 0.01, 2.2), r"alpha\(1.57.* t_max=1.56"),
        (lambda: sf.Process(lambda t: -torch.cos(t), torch.sin, 0.01, 1.0), "not negative.*alpha.*no such time"),
        (lambda: sf.Process(torch.cos, lambda t: (t - 0.2).sqrt(), 0.01, 1.0), "finite.*sigma.*t_min=0.2"),
        (lambda: sf.Process(lambda t: torch.ones(3), torch.sin, 0.01, 1.0), r"alpha must return.*\(3,\)"),
        (lambda: sf.Process(lambda t: torch.cos(t) - 0.1 * t.detach(), torch.sin, 0.01, 1.0), "autograd's derivative"),
        (lambda: sf.Process(lambda t: t, lambda t: 1 - t, 0.1, 0.9), "grow with t"),
        (lambda: sf.DiscreteVP([0.1, 0.5, 0.9, 0.95]), "decreasing"),
        (lambda: sf.RectifiedFlow(t_max=2.0), "0 ≤ t ≤ 1"),
    ],
)
def test_bad_processes_are_refused(make, word):
    with pytest.raises(sf.InvalidInput, match=word):
        make()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("alpha", [lambda t: np.cos(t.detach().numpy()), lambda t: math.cos(t)])
def test_functions_that_autograd_cannot_follow_are_refused(alpha):
    with pytest.raises(sf.InvalidInput, match="alpha.*torch.*lambda t: torch.cos"):
        sf.Process(alpha=lambda t: torch.as_tensor(alpha(t)), sigma=lambda t: t, t_min=0.1, t_max=1.0)
