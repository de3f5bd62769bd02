"""Discrete-time models made continuous."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.processes.base import Process, Time, as_time


@dataclass(frozen=True, eq=False)
class DiscreteVP(Process):
    """A table ᾱ_0 > ᾱ_1 > … of a discrete-time model made continuous: t is the index, α² = ᾱ and σ² = 1 − ᾱ at
    integers.

    Between integers the angle θ = atan2(σ, α) = atan e^{−λ} is a C² cubic spline (not-a-knot), so λ(t) is C² too;
    unlike λ
    the angle stays finite when the last ᾱ is 0 (zero terminal SNR). A table too rough for the spline to stay monotone
    gets the monotone
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
                "DiscreteVP needs alphas_cumprod as a strictly decreasing table of at least 4 numbers in [0, 1), "
                "noise last; got "
                f"shape {bar.shape}, first {bar.flat[0] if bar.size else None}, last "
                f"{bar.flat[-1] if bar.size else None}. From betas write "
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
        first, last = (theta[[0, -1]].cos() ** 2).tolist()
        return f"DiscreteVP(N={theta.numel()}, alphas_cumprod={first:.6g}…{last:.6g})"

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

    def coefficients(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        theta, slope = self._spline(as_time(t))
        cos, sin = theta.cos(), theta.sin()
        return cos.clamp_min(0.0), sin, -sin * slope, cos * slope

    def time(self, half_log_snr: Time) -> Tensor:
        lam = as_time(half_log_snr)
        target = torch.atan((-lam).exp())
        theta, _ = self._table(lam.device)
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
