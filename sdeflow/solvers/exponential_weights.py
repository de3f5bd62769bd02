"""The exact linear part: coefficients of x_t = A x_s + Σ_j W_j F_j + noise, in float64, for whole grids at once.

With y = x/α, ρ = σ/α and φ(ρ) = ρ e^{−∫η²dλ} every member of the family solves

    y_t = (φ_t/φ_s) y_s + φ_t ∫ D d(1/φ) + √(ρ_t² − ρ_s² φ_t²/φ_s²) z,

φ = ρ^{1+η²} for constant η; with q = e^{−∫η²dλ} this is x_t = (σ_t/σ_s) q x_s + α_t ∫ D dω + σ_t √(1−q²) z, ω = φ_t/φ.
For η = 0 the same flow with ε̂ in place of D is x_t = (α_t/α_s) x_s + α_t ∫ ε̂ dρ. F = D or ε̂ is replaced by the
polynomial through its values at p nodes in a variable u: the W then satisfy Σ_j r_j^k W_j = μ_k, k < p, with
s = (u − u_s)/(u_t − u_s), r_j the nodes' s and μ_k = α_t ∫ s^k dω the moments.

α = 0 (λ = −∞) and σ = 0 (λ = +∞) are ordinary points: only exponentials of −h enter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sdeflow.processes import Process

Array = np.ndarray
Form = Literal["data", "noise"]


@dataclass(frozen=True)
class Points:
    """Times with what the process says there: t, α, σ, λ, float64 arrays of one shape."""

    t: Array
    alpha: Array
    sigma: Array
    lam: Array

    @classmethod
    def at(cls, process: Process, t: Tensor) -> Points:
        """The points at times t (float64, CPU)."""
        return cls(*(c.numpy() for c in (t, process.alpha(t), process.sigma(t), process.half_log_snr(t))))

    def clean(self) -> Points:
        """These and, behind them, the clean data: α = 1, σ = 0, λ = ∞; its time is never asked for."""
        ends = (np.nan, 1.0, 0.0, np.inf)
        return Points(*(np.append(c, e) for c, e in zip((self.t, self.alpha, self.sigma, self.lam), ends, strict=True)))

    def __getitem__(self, which) -> Points:
        return Points(self.t[which], self.alpha[which], self.sigma[which], self.lam[which])

    def __len__(self) -> int:
        return len(self.t)


@dataclass(frozen=True)
class Strength:
    """How much noise: η(λ) through ∫η²dλ and 1 + η² = d ln φ/d ln ρ.

    Attributes:
        decay: ∫η²dλ between two λ, broadcasting; a step's first axis is its number.
        growth: 1 + η² at λ.
        noisy: False where η = 0 throughout.
        clock: the noise whose ∫η²dλ is the clock of the Brownian path, None for this one.
    """

    decay: Callable[[Array, Array], Array]
    growth: Callable[[Array], Array]
    noisy: bool
    clock: Strength | None = None

    @classmethod
    def constant(cls, eta: float | Array) -> Strength:
        """η the same at all λ, or one number a step."""
        eta2 = np.square(np.asarray(eta, float))

        def per_step(like: Array) -> Array:
            return eta2.reshape(-1, *(1,) * (like.ndim - 1)) if eta2.ndim else eta2

        def decay(a: Array, b: Array) -> Array:
            k = per_step(b)
            return k * np.where(k > 0, b - a, 0.0)  # η = 0 wins over an infinite step

        # one η a step belongs to its grid: the mean stands in for it in the clock
        clock = cls.constant(float(np.sqrt(eta2.mean()))) if eta2.ndim else None
        return cls(decay, lambda lam: 1.0 + per_step(lam), bool(np.any(eta2 > 0)), clock)


FLOW = Strength.constant(0.0)


@dataclass(frozen=True)
class Linear:
    """Exact part of the steps s → t, arrays: x_t = A x_s + W F + noise·z when F is constant."""

    A: Array
    W: Array
    noise: Array


def linear_data(s: Points, t: Points, decay: Array | float = 0.0) -> Linear:
    """A = (σ_t/σ_s) q, W = α_t (1 − q e^{−h}), noise σ_t √(1 − q²), q = e^{−decay}, decay = ∫η²dλ."""
    h = t.lam - s.lam
    A = t.sigma / s.sigma * np.exp(-decay)
    with np.errstate(invalid="ignore", over="ignore"):
        W = np.where(t.alpha > 0, -t.alpha * np.expm1(-(h + decay)), -s.alpha * A)
    noise = t.sigma * np.sqrt(np.maximum(-np.expm1(-2.0 * decay), 0.0))
    return Linear(A, W, np.broadcast_to(noise, h.shape))


def linear_noise(s: Points, t: Points) -> Linear:
    """The flow (η = 0) in ε̂: A = α_t/α_s, W = σ_t − A σ_s = −σ_t (e^h − 1)."""
    h = t.lam - s.lam
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        A = t.alpha / s.alpha
        W = np.where(np.isfinite(h), -t.sigma * np.expm1(h), t.sigma - A * s.sigma)
    return Linear(A, W, np.zeros_like(h))


@lru_cache
def gauss(n: int) -> tuple[Array, Array]:
    """Gauss–Legendre nodes and weights on [0, 1], exact to degree 2n − 1."""
    x, w = np.polynomial.legendre.leggauss(n)
    return 0.5 * (x + 1.0), 0.5 * w


def moments(s: Points, t: Points, form: Form, clock: Callable[[Array], Array], p: int, eta: Strength = FLOW) -> Array:
    """μ_k = α_t ∫ s^k dω (data) or α_t ∫ s^k dρ (noise), k = 0 … p−1: (n, p), by 32-point Gauss–Legendre in λ.

    Args:
        s, t: the ends of n steps; α_s may be 0, α_t may not.
        clock: u as a function of λ, finite at both ends.
        eta: the noise, of these n steps.
    """
    x, w = gauss(32)
    lam_t, h = t.lam[:, None], (t.lam - s.lam)[:, None]
    finite = np.isfinite(h)
    # from λ = −∞ the variable e^{λ−λ_t} in [0, 1] is regular, and e^{−(λ_t−λ)} dλ is its differential
    lam = np.where(finite, lam_t - np.where(finite, h, 0.0) * (1.0 - x), lam_t + np.log(x))
    if form == "noise":
        measure = -t.sigma[:, None] * np.exp(lam_t - lam) * h * w
    else:
        step = np.where(finite, np.exp(lam - lam_t) * np.where(finite, h, 0.0), 1.0)
        measure = t.alpha[:, None] * np.exp(-eta.decay(lam, lam_t)) * eta.growth(lam) * step * w
    u_s, u_t = clock(s.lam)[:, None], clock(t.lam)[:, None]
    unit = (clock(lam) - u_s) / (u_t - u_s)
    return np.stack([(measure * unit**k).sum(1) for k in range(p)], 1)


def interpolating(mu: Array, nodes: Array) -> Array:
    """W (n, p) with Σ_j r_j^k W_j = μ_k for nodes r (n, p): the integral of the polynomial through the nodes."""
    p = nodes.shape[1]
    powers = np.stack([nodes**k for k in range(p)], 1)
    return np.linalg.solve(powers, mu[:, :, None])[:, :, 0]


def clocks(process: Process, name: str) -> Callable[[Array], Array]:
    """u(λ) for the interpolation variables: "lambda", "rho" = e^{−λ}, "t", and "share" = σ/(α+σ), finite everywhere."""
    table: dict[str, Callable[[Array], Array]] = {
        "lambda": lambda lam: lam,
        "rho": lambda lam: np.exp(-lam),
        "t": lambda lam: process.time(torch.from_numpy(np.ascontiguousarray(lam))).numpy(),
        "share": lambda lam: 1.0 / (1.0 + np.exp(lam)),
    }
    return table[name]
