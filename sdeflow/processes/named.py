"""The usual continuous-time processes, each in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.processes.base import Process, Time, as_time, check_interval


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
        check_interval(self.t_min, self.t_max)
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
        return _vp_time(
            0.5 * torch.nn.functional.softplus(-2.0 * as_time(half_log_snr), threshold=1e9),
            self.beta_min,
            self.beta_max,
        )


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
        check_interval(self.t_min, self.t_max)
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
        check_interval(self.t_min, self.t_max)
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
        check_interval(self.t_min, self.t_max)
        _positive(
            "VE", sigma_min=self.sigma_min, sigma_max_over_sigma_min_log=math.log(self.sigma_max / self.sigma_min)
        )

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
        check_interval(self.t_min, self.t_max)
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

    Flow-matching code usually runs time the other way (noise at 0): hand such a network over with `time=lambda t: 1 -
    t`
    and the sign of its output turned.
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_interval(self.t_min, self.t_max)
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
