"""The mixture's closed forms against autograd, quadrature, brute force and torch.distributions."""

import math

import pytest
import torch

from sdeflow import InvalidInput
from sdeflow.problems import Mixture
from sdeflow.problems import mixture as mixture_module

F64 = torch.float64


def random_cov(k: int, d: int, seed: int) -> torch.Tensor:
    a = torch.randn(k, d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return a @ a.mT / d + 0.05 * torch.eye(d, dtype=F64)


def make(form: str, k: int = 5, d: int = 3) -> Mixture:
    g = torch.Generator().manual_seed(1)
    means = torch.randn(k, d, dtype=F64, generator=g)
    weights = 0.2 + torch.rand(k, dtype=F64, generator=g)
    std = 0.1 + torch.rand(k, d, dtype=F64, generator=g)
    return {
        "shared isotropic": lambda: Mixture.of(means, std=0.3, weights=weights),
        "isotropic": lambda: Mixture.of(means, std=std[:, 0], weights=weights),
        "shared diagonal": lambda: Mixture.of(means, std=std[:1], weights=weights),
        "diagonal": lambda: Mixture.of(means, std=std, weights=weights),
        "shared full": lambda: Mixture.of(means, cov=random_cov(1, d, 2)[0], weights=weights),
        "full": lambda: Mixture.of(means, cov=random_cov(k, d, 3), weights=weights),
    }[form]()


FORMS = ["shared isotropic", "isotropic", "shared diagonal", "diagonal", "shared full", "full"]
LEVELS = [(1.0, 0.0), (1.0, 1e-3), (0.9, 0.4), (0.5, 0.5), (0.3, 0.9), (1e-6, 1.0), (0.0, 1.0), (1.0, 80.0)]


def scalars(alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(alpha, dtype=F64), torch.tensor(sigma, dtype=F64)


def covariances(m: Mixture) -> torch.Tensor:
    v = torch.diag_embed(m.variances.expand(m.components, m.dim))
    return v if m.axes is None else m.axes @ v @ m.axes.mT


def states(m: Mixture, alpha: float, sigma: float, n: int = 40) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    k = torch.randint(m.components, (n,), generator=g)
    x0 = m.scale(torch.randn(n, m.dim, dtype=F64, generator=g), k)
    return alpha * x0 + sigma * torch.randn(n, m.dim, dtype=F64, generator=g)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_density_score_and_denoiser_equal_brute_force(form, level):
    m, (alpha, sigma) = make(form), level
    x = states(m, alpha, sigma)
    cov = covariances(m)
    V = alpha**2 * cov + sigma**2 * torch.eye(m.dim, dtype=F64)
    parts = torch.distributions.MultivariateNormal(alpha * m.means, V)
    joint = parts.log_prob(x[:, None, :]) + m.weights.log()
    gamma = joint.softmax(1)
    r = x[:, None, :] - alpha * m.means
    solved = torch.linalg.solve(V, r[..., None])[..., 0]
    score = -(gamma[:, :, None] * solved).sum(1)
    data = (gamma[:, :, None] * (m.means + alpha * (cov @ solved[..., None])[..., 0])).sum(1)
    got = m.posterior(x, *scalars(alpha, sigma))
    torch.testing.assert_close(got.log_prob, joint.logsumexp(1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.score, score, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.data, data, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_score_is_the_gradient_of_log_density_and_tweedie_holds(form, level):
    m, (alpha, sigma) = make(form), level
    x = states(m, alpha, sigma).requires_grad_()
    p = m.posterior(x, *scalars(alpha, sigma))
    (gradient,) = torch.autograd.grad(p.log_prob.sum(), x)
    torch.testing.assert_close(p.score, gradient, rtol=1e-10, atol=1e-10)
    # Tweedie: x + σ² ∇log p = α D
    torch.testing.assert_close(x + sigma**2 * gradient, alpha * p.data, rtol=1e-10, atol=1e-10 * max(1.0, sigma))


@pytest.mark.parametrize("form", FORMS)
def test_jacobian_of_the_score_is_the_hessian(form):
    m = make(form)
    x = states(m, 0.8, 0.5, n=3)

    def score(x):
        return m.posterior(x, *scalars(0.8, 0.5)).score

    assert torch.autograd.gradcheck(score, x.clone().requires_grad_(), atol=1e-6)
    J = torch.autograd.functional.jacobian(lambda row: score(row[None])[0], x[0])
    torch.testing.assert_close(J, J.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("level", [(1.0, 0.0), (0.7, 0.5), (0.0, 1.0)])
def test_density_integrates_to_one(form, level):
    m, (alpha, sigma) = make(form, k=4, d=2), level
    # the trapezoidal rule converges geometrically for smooth functions that vanish at the ends
    grid = torch.linspace(-9.0, 9.0, 1201, dtype=F64)
    x = torch.cartesian_prod(grid, grid)
    total = m.posterior(x, *scalars(alpha, sigma)).log_prob.exp().sum() * (grid[1] - grid[0]) ** 2
    assert abs(total.item() - 1.0) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_times_by_row_equal_one_time_for_all(form):
    m = make(form)
    x = states(m, 0.8, 0.6, n=6)
    alpha = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.0, 1.0], dtype=F64)
    sigma = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0, 50.0], dtype=F64)
    together = m.posterior(x, alpha, sigma)
    for i in range(6):
        alone = m.posterior(x[i : i + 1], alpha[i], sigma[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_equal_the_whole(form, monkeypatch):
    m = make(form)
    x = states(m, 0.8, 0.6)
    alpha = torch.linspace(0.1, 1.0, len(x), dtype=F64)
    allowed = torch.arange(len(x))[:, None] % 2 == torch.arange(5) % 2
    whole = m.posterior(x, alpha, 1.0 - 0.5 * alpha, allowed)
    monkeypatch.setattr(mixture_module, "CHUNK_ELEMENTS", 60)
    for a, b in zip(m.posterior(x, alpha, 1.0 - 0.5 * alpha, allowed), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_limits(form):
    m = make(form)
    x = states(m, 1.0, 0.0)
    prior = m.posterior(x, *scalars(0.0, 2.0))
    # α = 0: x says nothing of the data
    torch.testing.assert_close(prior.data, (m.weights @ m.means).expand_as(x))
    torch.testing.assert_close(prior.score, -x / 4.0)
    # σ = 0: x is the data
    torch.testing.assert_close(m.posterior(x, *scalars(1.0, 0.0)).data, x)
    # continuity at both ends, first order in the small coefficient
    for end, beside in (((1.0, 0.0), (1.0, 1e-9)), ((0.0, 1.0), (1e-9, 1.0))):
        for a, b in zip(m.posterior(x, *scalars(*end)), m.posterior(x, *scalars(*beside)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_are_finite_at_the_ends(form, level):
    m, (alpha, sigma) = make(form), level
    x = states(m, alpha, sigma).requires_grad_()
    a, s = (c.requires_grad_() for c in scalars(alpha, sigma))
    p = m.posterior(x, a, s)
    (p.data.sum() + p.score.sum() + p.log_prob.sum()).backward()
    for v in (x, a, s):
        assert v.grad is not None and bool(v.grad.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_float32_work_agrees_with_float64(form, monkeypatch):
    """As on a device without float64; errors stay at rounding level where the posterior is well conditioned."""
    m = make(form)
    for alpha, sigma in [(1.0, 0.02), (0.8, 0.6), (0.01, 1.0), (0.0, 1.0), (1.0, 80.0)]:
        x = states(m, alpha, sigma).float()
        exact = m.posterior(x, *scalars(alpha, sigma))
        with monkeypatch.context() as patch:
            patch.setattr(mixture_module, "work_dtype", lambda device: torch.float32)
            single = make(form).posterior(x, *scalars(alpha, sigma))
        assert single.data.dtype == torch.float32
        torch.testing.assert_close(single.data.double(), exact.data, rtol=3e-5, atol=3e-5)
        torch.testing.assert_close(single.score.double(), exact.score, rtol=3e-5, atol=3e-5 / min(1.0, sigma) ** 0.5)


def test_far_away_states_give_finite_numbers():
    m = make("isotropic")
    x = torch.full((1, 3), 1e6, dtype=F64)
    for level in LEVELS:
        p = m.posterior(x, *scalars(*level))
        assert all(bool(v.isfinite().all()) for v in p)


def test_a_nan_row_leaves_the_others():
    for form in FORMS:
        m = make(form)
        x = states(m, 0.8, 0.6, n=4)
        clean = m.posterior(x, *scalars(0.8, 0.6))
        x[2] = math.nan
        spoilt = m.posterior(x, *scalars(0.8, 0.6))
        keep = torch.tensor([0, 1, 3])
        for a, b in zip(spoilt, clean, strict=True):
            assert torch.equal(a[keep], b[keep])
            assert bool(a[2].isnan().all())


@pytest.mark.parametrize("form", FORMS)
def test_moments_are_those_of_the_mixture(form):
    m = make(form)
    mean, cov = m.moments()
    second = covariances(m) + m.means[:, :, None] * m.means[:, None, :]
    torch.testing.assert_close(mean, (m.weights[:, None] * m.means).sum(0))
    torch.testing.assert_close(cov, (m.weights[:, None, None] * second).sum(0) - mean[:, None] * mean)


@pytest.mark.parametrize("form", FORMS)
def test_restricting_keeps_relative_weights_and_covariances(form):
    m = make(form)
    keep = torch.tensor([True, False, True, True, False])
    kept, x = m.restricted(keep), states(m, 0.8, 0.6)
    torch.testing.assert_close(kept.weights, m.weights[keep] / m.weights[keep].sum())
    whole = m.posterior(x, *scalars(0.8, 0.6), allowed=keep.expand(len(x), -1))
    part = kept.posterior(x, *scalars(0.8, 0.6))
    torch.testing.assert_close(part.data, whole.data, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part.log_prob + m.weights[keep].sum().log(), whole.log_prob, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"means": torch.zeros(3), "std": 0.1}, "components, dimensions"),
        ({"means": torch.zeros(3, 2)}, "exactly one of std and cov"),
        ({"means": torch.zeros(3, 2), "std": 0.0}, "positive"),
        ({"means": torch.zeros(3, 2), "std": [0.1, 0.2]}, "one value a component"),
        ({"means": torch.zeros(3, 2), "cov": torch.eye(3)}, "cov must have shape"),
        ({"means": torch.zeros(3, 2), "cov": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "symmetric"),
        ({"means": torch.zeros(3, 2), "cov": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "positive definite"),
        ({"means": torch.zeros(3, 2), "std": 0.1, "weights": [1.0, -1.0, 1.0]}, "weights must be 3 positive"),
        ({"means": torch.full((3, 2), math.nan), "std": 0.1}, "finite"),
    ],
)
def test_bad_input_says_what_to_write(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        Mixture.of(**arguments)
