"""Gaussian diffusion processes: x_t = α(t) x_0 + σ(t) ε, data at the small end of t, noise at the large end.

Any differentiable pair gives the forward SDE dx = f x dt + g dw with f = α̇/α and g² = (σ²)˙ − 2 f σ² = −2 σ² λ̇,
λ = log(α/σ) the half log-SNR. Coefficients are float64 whatever the state is (float32 on devices without float64).

Sources: Song et al. 2021 (VP, sub-VP, VE), Nichol & Dhariwal 2021 (cosine), Karras et al. 2022 (EDM),
Liu et al. 2023 and Lipman et al. 2023 (rectified flow), Ho et al. 2020 (discrete tables).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.random import sample_seeds, standard_normal

Time = float | Tensor
PRIOR_STREAM = 1
"""Random stream of `Process.prior`, so that a solve with the same seed sees other numbers."""


def as_time(t: Time, device: torch.device | None = None) -> Tensor:
    """t as a floating tensor: float64, or float32 on devices that have no float64; integers are converted."""
    device = t.device if isinstance(t, Tensor) and device is None else torch.device(device or "cpu")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.as_tensor(t, dtype=dtype, device=device)


class Process:
    """A process of the user's own: x_t = α(t) x_0 + σ(t) ε, derivatives by autograd, inverse by safeguarded Newton.

    Args:
        alpha: α(t), a function of a float64 tensor, differentiable by autograd, positive below t_max.
        sigma: σ(t), likewise; σ/α must grow with t.
        t_min: the data end of the interval on which a network was trained or the score exists.
        t_max: the noise end.

    Every coefficient method takes a float or a tensor of any shape and returns a float64 tensor of that shape on its device.

    Raises:
        InvalidInput: the interval is empty or σ/α does not grow with t.

    Example:
        >>> Process(alpha=lambda t: 1.0, sigma=lambda t: t.sqrt(), t_min=1e-4, t_max=4.0)   # dx = dw
    """

    t_min: float
    t_max: float

    def __init__(self, alpha: Callable[[Tensor], Tensor | float], sigma: Callable[[Tensor], Tensor | float], t_min: float, t_max: float):
        _check_interval(t_min, t_max)
        self.t_min, self.t_max = float(t_min), float(t_max)
        self._alpha, self._sigma = alpha, sigma
        share = self._noise_share(torch.linspace(self.t_min, self.t_max, 257, dtype=torch.float64))
        if not bool((share.diff() > 0).all()):
            raise InvalidInput(
                f"{self!r}: σ/α must grow with t on [t_min, t_max] (data at t_min, noise at t_max), but it does not. If your time runs the "
                "other way, write Process(alpha=lambda t: a(1 - t), sigma=lambda t: s(1 - t), ...)"
            )

    def __repr__(self) -> str:
        return f"Process(t_min={self.t_min}, t_max={self.t_max})"

    # --- the two functions everything else follows from

    def alpha(self, t: Time) -> Tensor:
        """α(t), the scale of the data."""
        t = as_time(t)
        return torch.as_tensor(self._alpha(t), dtype=t.dtype, device=t.device).expand(t.shape)

    def sigma(self, t: Time) -> Tensor:
        """σ(t), the standard deviation of the noise."""
        t = as_time(t)
        return torch.as_tensor(self._sigma(t), dtype=t.dtype, device=t.device).expand(t.shape)

    def alpha_dot(self, t: Time) -> Tensor:
        """dα/dt."""
        return _derivative(self.alpha, as_time(t))

    def sigma_dot(self, t: Time) -> Tensor:
        """dσ/dt."""
        return _derivative(self.sigma, as_time(t))

    def time(self, half_log_snr: Time) -> Tensor:
        """t with λ(t) = half_log_snr, inside [t_min, t_max]; λ = −∞ is reached where α is 0.

        Bracketed Newton on w = σ/(α+σ), which is finite at both ends, to the last bits of float64.
        """
        lam = as_time(half_log_snr)
        w = torch.sigmoid(-lam)
        low, high = torch.full_like(w, self.t_min), torch.full_like(w, self.t_max)
        t = 0.5 * (low + high)
        for _ in range(80):
            gap = self._noise_share(t) - w
            low, high = torch.where(gap <= 0, t, low), torch.where(gap >= 0, t, high)
            alpha, sigma, da, ds = self.coefficients(t)
            newton = t - gap * (alpha + sigma) ** 2 / (ds * alpha - sigma * da)
            inside = (newton > low) & (newton < high)
            previous, t = t, torch.where(inside, newton, 0.5 * (low + high))
            if bool(((t - previous).abs() <= 4e-16 * t.abs()).all()):
                break
        return t

    # --- what follows

    def coefficients(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(α, σ, α̇, σ̇) at t."""
        return self.alpha(t), self.sigma(t), self.alpha_dot(t), self.sigma_dot(t)

    def half_log_snr(self, t: Time) -> Tensor:
        """λ(t) = log(α/σ); −∞ where α = 0."""
        return self.alpha(t).log() - self.sigma(t).log()

    def rho(self, t: Time) -> Tensor:
        """ρ(t) = σ/α = e^{−λ}; ∞ where α = 0."""
        return self.sigma(t) / self.alpha(t)

    def time_of_rho(self, rho: Time) -> Tensor:
        """t with σ/α = rho; the inverse of `rho`."""
        return self.time(-as_time(rho).log())

    def f(self, t: Time) -> Tensor:
        """f(t) = α̇/α, the linear drift of the forward SDE."""
        return self.alpha_dot(t) / self.alpha(t)

    def g2(self, t: Time) -> Tensor:
        """g(t)² = 2σ(σ̇ − fσ), the squared noise amplitude of the forward SDE."""
        alpha, sigma, da, ds = self.coefficients(t)
        return 2.0 * sigma * (ds - sigma * da / alpha)

    def g(self, t: Time) -> Tensor:
        """g(t), the noise amplitude of the forward SDE."""
        return self.g2(t).sqrt()

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean α x_0, shaped as x0, and standard deviation σ, broadcastable to it, of x_t given x_0 (batch, *event)."""
        t = as_time(t, x0.device)
        return expand(self.alpha(t), x0) * x0, expand(self.sigma(t), x0)

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """x_t = α x_0 + σ·noise, shaped as x0."""
        mean, std = self.marginal(x0, t)
        return mean + std * noise

    def prior(
        self, shape: Sequence[int], seed: int | Sequence[int] | Tensor = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """A sample of N(0, σ(t_max)²) of the given shape (batch, *event); row i depends on the seed and i alone."""
        batch, *event = (int(n) for n in shape)
        seeds = sample_seeds(seed, batch, device)
        noise = standard_normal(seeds, tuple(event), stream=PRIOR_STREAM, dtype=dtype, device=device)
        return noise * self.sigma(self.t_max).item()

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of `prior` in nats at x (batch, *event): (batch,)."""
        std, n = self.sigma(self.t_max).item(), x[0].numel()
        return -0.5 * (x / std).square().flatten(1).sum(1) - n * (math.log(std) + 0.5 * math.log(2.0 * math.pi))

    def _noise_share(self, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha(t), self.sigma(t)
        return sigma / (alpha + sigma)


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A 0-d or (batch,) coefficient in x's dtype, shaped to broadcast against x (batch, *event)."""
    coefficient = coefficient.to(x.dtype)
    return coefficient if coefficient.ndim == 0 else coefficient.reshape(-1, *(1,) * (x.ndim - 1))


def _check_interval(t_min: float, t_max: float) -> None:
    if not (math.isfinite(t_min) and math.isfinite(t_max) and t_min < t_max):
        raise InvalidInput(f"a process needs finite times with t_min < t_max; got t_min={t_min}, t_max={t_max}")


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = t.detach().requires_grad_(True)
        value = function(leaf)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    return torch.zeros_like(t) if slope is None else slope.detach()


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise InvalidInput(f"{owner} needs {name} > 0; got {name}={value}")


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving, linear β: dx = −½β x dt + √β dw, log α = −t²(β₁−β₀)/4 − tβ₀/2, σ² = 1 − α².

    Song et al. 2021, eq. 11. t in [t_min, t_max], usually [1e-3, 1] (1e-5 for likelihoods).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_interval(self.t_min, self.t_max)
        _positive("VP", beta_min=self.beta_min, beta_max=self.beta_max)

    def log_alpha(self, t: Time) -> Tensor:
        """log α(t)."""
        return _vp_log_alpha(as_time(t), self.beta_min, self.beta_max)

    def beta(self, t: Time) -> Tensor:
        """β(t) = β₀ + t(β₁ − β₀)."""
        return self.beta_min + as_time(t) * (self.beta_max - self.beta_min)

    def alpha(self, t: Time) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(2.0 * self.log_alpha(t))).sqrt()

    def alpha_dot(self, t: Time) -> Tensor:
        return -0.5 * self.beta(t) * self.alpha(t)

    def sigma_dot(self, t: Time) -> Tensor:
        return 0.5 * self.beta(t) * (2.0 * self.log_alpha(t)).exp() / self.sigma(t)

    def time(self, half_log_snr: Time) -> Tensor:
        return _vp_time(0.5 * torch.nn.functional.softplus(-2.0 * as_time(half_log_snr), threshold=1e9), self.beta_min, self.beta_max)


def _vp_log_alpha(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    return -t * (0.25 * (beta_max - beta_min) * t + 0.5 * beta_min)


def _vp_time(minus_log_alpha: Tensor, beta_min: float, beta_max: float) -> Tensor:
    # the root of ¼(β₁−β₀)t² + ½β₀t = L in the form without cancellation
    return 4.0 * minus_log_alpha / (beta_min + (beta_min**2 + 4.0 * (beta_max - beta_min) * minus_log_alpha).sqrt())


@dataclass(frozen=True)
class SubVP(Process):
    """Sub-variance preserving: f of VP, g² = β(1 − e^{−2β₀t−(β₁−β₀)t²}), σ = 1 − α². Song et al. 2021, eq. 13."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_interval(self.t_min, self.t_max)
        _positive("SubVP", beta_min=self.beta_min, beta_max=self.beta_max)

    def log_alpha(self, t: Time) -> Tensor:
        """log α(t)."""
        return _vp_log_alpha(as_time(t), self.beta_min, self.beta_max)

    def beta(self, t: Time) -> Tensor:
        """β(t) = β₀ + t(β₁ − β₀)."""
        return self.beta_min + as_time(t) * (self.beta_max - self.beta_min)

    def alpha(self, t: Time) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(2.0 * self.log_alpha(t))

    def alpha_dot(self, t: Time) -> Tensor:
        return -0.5 * self.beta(t) * self.alpha(t)

    def sigma_dot(self, t: Time) -> Tensor:
        return self.beta(t) * (2.0 * self.log_alpha(t)).exp()

    def time(self, half_log_snr: Time) -> Tensor:
        # (1 − α²)/α = ρ, so α = 2/(ρ + √(ρ²+4)); −log α = asinh(ρ/2) keeps its digits when ρ is small
        rho = (-as_time(half_log_snr)).exp()
        return _vp_time(torch.asinh(0.5 * rho), self.beta_min, self.beta_max)


@dataclass(frozen=True)
class CosineVP(Process):
    """Variance preserving, α = cos φ(t)/cos φ(0), φ = (π/2)(t + s)/(1 + s). Nichol & Dhariwal 2021, eq. 17.

    α is 0 at t = 1; t_max = 0.9946 is where continuous-time samplers usually start.
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        _check_interval(self.t_min, self.t_max)
        if self.s < 0 or self.t_max > 1:
            raise InvalidInput(f"CosineVP needs s ≥ 0 and t_max ≤ 1; got s={self.s}, t_max={self.t_max}")

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    def alpha(self, t: Time) -> Tensor:
        return (self._rate * (as_time(t) + self.s)).cos() / math.cos(self._rate * self.s)

    def sigma(self, t: Time) -> Tensor:
        # cos²φ₀ − cos²φ = sin(φ−φ₀) sin(φ+φ₀): no cancellation at small t
        t = as_time(t)
        return ((self._rate * t).sin() * (self._rate * (t + 2.0 * self.s)).sin()).sqrt() / math.cos(self._rate * self.s)

    def alpha_dot(self, t: Time) -> Tensor:
        return -self._rate * (self._rate * (as_time(t) + self.s)).sin() / math.cos(self._rate * self.s)

    def sigma_dot(self, t: Time) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def time(self, half_log_snr: Time) -> Tensor:
        lam, phi0 = as_time(half_log_snr), self._rate * self.s
        alpha2, sigma2 = torch.sigmoid(2.0 * lam), torch.sigmoid(-2.0 * lam)
        phi = torch.atan2((math.sin(phi0) ** 2 + sigma2 * math.cos(phi0) ** 2).sqrt(), alpha2.sqrt() * math.cos(phi0))
        return phi / self._rate - self.s


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: α = 1, σ = σ_min (σ_max/σ_min)^t. Song et al. 2021, eq. 9."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_interval(self.t_min, self.t_max)
        _positive("VE", sigma_min=self.sigma_min, sigma_max_over_sigma_min_log=math.log(self.sigma_max / self.sigma_min))

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * (self._rate * as_time(t)).exp()

    def alpha_dot(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma_dot(self, t: Time) -> Tensor:
        return self._rate * self.sigma(t)

    def time(self, half_log_snr: Time) -> Tensor:
        return (-as_time(half_log_snr) - math.log(self.sigma_min)) / self._rate


@dataclass(frozen=True)
class EDM(Process):
    """α = 1, σ = t, g² = 2t. Karras et al. 2022; time is the noise level."""

    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        _check_interval(self.t_min, self.t_max)
        if self.t_min < 0:
            raise InvalidInput(f"EDM needs t_min ≥ 0, since σ = t; got t_min={self.t_min}")

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def alpha_dot(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma_dot(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def time(self, half_log_snr: Time) -> Tensor:
        return (-as_time(half_log_snr)).exp()


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """α = 1 − t, σ = t: data at t = 0, noise at t = 1, where α is exactly 0. Liu et al. 2023.

    Flow-matching code usually runs time the other way (noise at 0): hand such a network over with `time=lambda t: 1 - t`
    and the sign of its output turned.
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_interval(self.t_min, self.t_max)
        if self.t_min < 0 or self.t_max > 1:
            raise InvalidInput(f"RectifiedFlow lives on 0 ≤ t ≤ 1; got t_min={self.t_min}, t_max={self.t_max}")

    def alpha(self, t: Time) -> Tensor:
        return 1.0 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def alpha_dot(self, t: Time) -> Tensor:
        return -torch.ones_like(as_time(t))

    def sigma_dot(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def time(self, half_log_snr: Time) -> Tensor:
        return torch.sigmoid(-as_time(half_log_snr))


@dataclass(frozen=True, eq=False)
class DiscreteVP(Process):
    """A table ᾱ_0 > ᾱ_1 > … of a discrete-time model made continuous: t is the index, α² = ᾱ and σ² = 1 − ᾱ at integers.

    Between integers the angle θ = atan2(σ, α) = atan e^{−λ} is a C² cubic spline (not-a-knot), so λ(t) is C² too; unlike λ
    the angle stays finite when the last ᾱ is 0 (zero terminal SNR). A table too rough for the spline to stay monotone gets the monotone
    C¹ Hermite cubic of Fritsch & Butland (1984) instead (`smooth` is then False).

    Args:
        alphas_cumprod: ᾱ, a sequence or tensor (N,), strictly decreasing, in [0, 1). t runs over [0, N − 1].

    See `linear`, `scaled_linear`, `cosine` and `sigmoid` for the usual tables.
    """

    alphas_cumprod: Sequence[float] | Tensor = field(repr=False)
    t_min: float = field(init=False, default=0.0)
    t_max: float = field(init=False)
    smooth: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bar = np.asarray(torch.as_tensor(self.alphas_cumprod, dtype=torch.float64).detach().cpu().numpy())
        if bar.ndim != 1 or bar.size < 4 or not np.all(np.diff(bar) < 0) or bar[0] >= 1 or bar[-1] < 0:
            raise InvalidInput(
                "DiscreteVP needs alphas_cumprod as a strictly decreasing table of at least 4 numbers in [0, 1), noise last; got "
                f"shape {bar.shape}, first {bar.flat[0] if bar.size else None}, last {bar.flat[-1] if bar.size else None}. From betas write "
                "DiscreteVP((1 - betas).cumprod(0))"
            )
        theta = np.arctan2(np.sqrt(1.0 - bar), np.sqrt(bar))
        slopes = _spline_slopes(theta)
        smooth = bool(_monotone(theta, slopes))
        if not smooth:
            slopes = _butland_slopes(theta)
        object.__setattr__(self, "t_max", float(bar.size - 1))
        object.__setattr__(self, "smooth", smooth)
        object.__setattr__(self, "_tables", {"cpu": (torch.from_numpy(theta), torch.from_numpy(slopes))})

    def __repr__(self) -> str:
        theta = self._table(torch.device("cpu"))[0]
        return f"DiscreteVP(N={theta.numel()}, alphas_cumprod={theta[0].cos().item() ** 2:.6g}…{theta[-1].cos().item() ** 2:.6g})"

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, n: int = 1000) -> DiscreteVP:
        """β linear from beta_start to beta_end (Ho et al. 2020)."""
        return cls((1.0 - torch.linspace(beta_start, beta_end, n, dtype=torch.float64)).cumprod(0))

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, n: int = 1000) -> DiscreteVP:
        """√β linear (latent diffusion; the defaults are Stable Diffusion's)."""
        return cls((1.0 - torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2).cumprod(0))

    @classmethod
    def cosine(cls, s: float = 0.008, max_beta: float = 0.999, n: int = 1000) -> DiscreteVP:
        """β_k = min(1 − ᾱ((k+1)/n)/ᾱ(k/n), max_beta), ᾱ(t) = cos²((t+s)/(1+s)·π/2) (Nichol & Dhariwal 2021)."""
        bar = (torch.linspace(0, 1, n + 1, dtype=torch.float64).add(s).mul(0.5 * math.pi / (1 + s))).cos() ** 2
        return cls((1.0 - (1.0 - bar[1:] / bar[:-1]).clamp(max=max_beta)).cumprod(0))

    @classmethod
    def sigmoid(cls, beta_start: float = 1e-4, beta_end: float = 0.02, n: int = 1000) -> DiscreteVP:
        """β = sigmoid of a line from −6 to 6, scaled to [beta_start, beta_end]."""
        ramp = torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64))
        return cls((1.0 - (beta_start + ramp * (beta_end - beta_start))).cumprod(0))

    def theta(self, t: Time) -> Tensor:
        """θ(t) = atan(σ/α)."""
        return self._spline(as_time(t))[0]

    def alpha(self, t: Time) -> Tensor:
        return self.theta(t).cos().clamp_min(0.0)

    def sigma(self, t: Time) -> Tensor:
        return self.theta(t).sin()

    def alpha_dot(self, t: Time) -> Tensor:
        theta, slope = self._spline(as_time(t))
        return -theta.sin() * slope

    def sigma_dot(self, t: Time) -> Tensor:
        theta, slope = self._spline(as_time(t))
        return theta.cos() * slope

    def time(self, half_log_snr: Time) -> Tensor:
        lam = as_time(half_log_snr)
        target = torch.atan((-lam).exp())
        theta, slopes = self._table(lam.device)
        k = (torch.searchsorted(theta, target, right=True) - 1).clamp(0, theta.numel() - 2)
        low, high = k.to(target.dtype), k.to(target.dtype) + 1.0
        t = low + (target - theta[k]) / (theta[k + 1] - theta[k])
        for _ in range(8):  # the cubic of one cell is close to its chord: Newton is at its last bit well before 8
            value, slope = self._spline(t)
            t = torch.minimum(torch.maximum(t - (value - target) / slope, low), high)
        return t

    def _spline(self, t: Tensor) -> tuple[Tensor, Tensor]:
        theta, slopes = self._table(t.device)
        k = t.detach().floor().long().clamp(0, theta.numel() - 2)
        r = t - k
        y0, y1, d0, d1 = theta[k], theta[k + 1], slopes[k], slopes[k + 1]
        rise = y1 - y0
        c2, c3 = 3.0 * rise - 2.0 * d0 - d1, d0 + d1 - 2.0 * rise
        return y0 + r * (d0 + r * (c2 + r * c3)), d0 + r * (2.0 * c2 + 3.0 * r * c3)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        tables: dict[str, tuple[Tensor, Tensor]] = self.__dict__["_tables"]
        key = str(device)
        if key not in tables:
            theta, slopes = tables["cpu"]
            tables[key] = (as_time(theta, device), as_time(slopes, device))
        return tables[key]


def _spline_slopes(y: np.ndarray) -> np.ndarray:
    """Slopes at the knots 0, 1, 2, … of the not-a-knot cubic spline through y."""
    n = y.size
    matrix, right = np.zeros((n, n)), np.empty(n)
    inner = np.arange(1, n - 1)
    matrix[inner, inner - 1], matrix[inner, inner], matrix[inner, inner + 1] = 1.0, 4.0, 1.0
    right[1:-1] = 3.0 * (y[2:] - y[:-2])
    # third derivative continuous at the second and the last but one knot
    matrix[0, :2], right[0] = (1.0, 2.0), -2.5 * y[0] + 2.0 * y[1] + 0.5 * y[2]
    matrix[-1, -2:], right[-1] = (2.0, 1.0), 2.5 * y[-1] - 2.0 * y[-2] - 0.5 * y[-3]
    return np.linalg.solve(matrix, right)


def _monotone(y: np.ndarray, slopes: np.ndarray) -> bool:
    """True when every cell's cubic has positive slope throughout (its minimum included)."""
    d0, d1, rise = slopes[:-1], slopes[1:], np.diff(y)
    c2, c3 = 3.0 * rise - 2.0 * d0 - d1, d0 + d1 - 2.0 * rise
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.clip(np.nan_to_num(-c2 / (3.0 * c3)), 0.0, 1.0)
    lowest = np.minimum(np.minimum(d0, d1), d0 + at * (2.0 * c2 + 3.0 * at * c3))
    return bool(np.all(lowest > 0))


def _butland_slopes(y: np.ndarray) -> np.ndarray:
    """Harmonic-mean slopes: the Hermite cubic through increasing data on a unit grid is then increasing."""
    rise = np.diff(y)
    slopes = np.empty_like(y)
    slopes[1:-1] = 2.0 * rise[1:] * rise[:-1] / (rise[1:] + rise[:-1])
    slopes[0], slopes[-1] = rise[0], rise[-1]
    return slopes
