"""The mathematics of Gaussian mixtures under any (α, σ), without processes or time.

p(x_0) = Σ_k w_k N(m_k, C_k) gives, for x = α x_0 + σ ε, p(x) = Σ_k w_k N(α m_k, V_k) with V_k = α² C_k + σ² I. With the
responsibilities γ_k ∝ w_k N(x; α m_k, V_k) and the residuals r_k = x − α m_k,

    ∇log p = −Σ γ_k V_k⁻¹ r_k,    D = E[x_0 | x] = Σ γ_k (m_k + α C_k V_k⁻¹ r_k),    E[ε | x] = −σ ∇log p.

x = α D + σ E[ε|x] gives each from the other; dividing by the larger of α and σ keeps both to full precision at α = 0 and at σ = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import InvalidInput

Array = Tensor | np.ndarray | Sequence

CHUNK_ELEMENTS = 1 << 23
"""Largest intermediate tensor, in elements; larger batches are worked off in chunks of rows."""


class Posterior(NamedTuple):
    """What is known of x_0 given x: log p(x) in nats (batch,), D = E[x_0|x] (batch, d) and ∇log p(x) (batch, d)."""

    log_prob: Tensor
    data: Tensor
    score: Tensor


def work_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of K Gaussians in d dimensions; build one with `Mixture.of`.

    Attributes:
        means: m_k, float64 (K, d).
        variances: eigenvalues of C_k, float64 (K or 1, d or 1): one row when all components share them, one column when isotropic.
        axes: eigenvectors of C_k as columns, float64 (K, d, d); None when they are the coordinate axes.
        weights: w_k, float64 (K,), positive, summing to 1.
    """

    means: Tensor
    variances: Tensor
    axes: Tensor | None
    weights: Tensor

    @classmethod
    def of(
        cls,
        means: Array,
        std: float | Array | None = None,
        cov: Array | None = None,
        weights: Array | None = None,
    ) -> Mixture:
        """Mixture from means (K, d), one of std and cov, and weights (K,) (equal by default; normalised here).

        Args:
            std: standard deviations: a number, (K,) one for each component, or (K, d) / (1, d) one for each axis.
            cov: covariance matrices: (d, d) shared, or (K, d, d); symmetric and positive definite.

        Raises:
            InvalidInput: shapes that do not fit, a variance that is not positive, weights that are not.
        """
        m = torch.as_tensor(means, dtype=torch.float64).detach().cpu()
        if m.ndim != 2 or not m.numel() or not bool(m.isfinite().all()):
            raise InvalidInput(
                f"means must be a finite (components, dimensions) array; got shape {tuple(m.shape)}. One Gaussian is means=[mean]"
            )
        if (std is None) == (cov is None):
            raise InvalidInput("give exactly one of std and cov, e.g. std=0.1")
        variances, axes = _variances(std, m.shape) if cov is None else _eigen(cov, m.shape)
        w = (
            torch.ones(len(m), dtype=torch.float64)
            if weights is None
            else torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
        )
        if w.shape != m.shape[:1] or not bool(((w > 0) & w.isfinite()).all()):
            raise InvalidInput(
                f"weights must be {len(m)} positive numbers, one for each component; got shape {tuple(w.shape)}"
            )
        return cls(m, variances, axes, w / w.sum())

    @property
    def components(self) -> int:
        """K."""
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        """d."""
        return self.means.shape[1]

    @property
    def isotropic(self) -> bool:
        """True when every C_k is a multiple of the identity."""
        return self.axes is None and (self.variances.shape[1] == 1 or self.dim == 1)

    def restricted(self, keep: Tensor) -> Mixture:
        """The mixture of the components where keep (K,) is True, weights renormalised."""
        variances = self.variances if self.variances.shape[0] == 1 else self.variances[keep]
        weights = self.weights[keep]
        return Mixture(
            self.means[keep], variances, None if self.axes is None else self.axes[keep], weights / weights.sum()
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Exact mean (d,) and covariance (d, d) of x_0."""
        mean = self.weights @ self.means
        centred = self.means - mean
        between = centred.T @ (self.weights[:, None] * centred)
        v = self.variances.expand(self.components, self.dim)
        if self.axes is None:
            return mean, between + torch.diag(self.weights @ v)
        return mean, between + torch.einsum("k,kde,ke,kfe->df", self.weights, self.axes, v, self.axes)

    def scale(self, noise: Tensor, component: Tensor) -> Tensor:
        """m_k + C_k^½ noise for standard normal noise (batch, d) and components (batch,) int64."""
        noise = noise * self.variances.expand(self.components, -1)[component].sqrt()
        if self.axes is not None:
            rows = max(1, CHUNK_ELEMENTS // self.dim**2)
            pairs = zip(noise.split(rows), component.split(rows), strict=True)
            noise = torch.cat([torch.einsum("bde,be->bd", self.axes[k], z) for z, k in pairs])
        return self.means[component] + noise

    def posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor, allowed: Tensor | None = None) -> Posterior:
        """log p, D and ∇log p of x = α x_0 + σ ε.

        Args:
            x: (batch, d); computed in float64 whatever its dtype (float32 on devices without float64).
            alpha, sigma: 0-d or (batch,), not both 0.
            allowed: (batch, K) bool, the components row by row that may have made x (its class); all by default. The
                weights are those of the whole mixture, so log p is then the joint density of x and the class.
        """
        log_prob, data, score = self._fields(x, alpha, sigma, allowed, density=True)
        return Posterior(log_prob, data, score)

    def fields(self, x: Tensor, alpha: Tensor, sigma: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(D, ∇log p) of `posterior`, without the cost of the density."""
        _, data, score = self._fields(x, alpha, sigma, allowed, density=False)
        return data, score

    def _fields(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, allowed: Tensor | None, density: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = work_dtype(x.device)
        x, alpha, sigma = x.to(work), alpha.to(work).reshape(-1, 1), sigma.to(work).reshape(-1, 1)
        width = self.components * (1 if self.isotropic else self.dim)
        rows = max(1, CHUNK_ELEMENTS // width)
        if x.shape[0] <= rows:
            return self._chunk(x, alpha, sigma, allowed, density)
        parts = []
        for i in range(0, x.shape[0], rows):
            part = slice(i, i + rows)
            a, s = (c if c.shape[0] == 1 else c[part] for c in (alpha, sigma))
            parts.append(self._chunk(x[part], a, s, None if allowed is None else allowed[part], density))
        log_prob, data, score = (torch.cat(column) for column in zip(*parts, strict=True))
        return log_prob, data, score

    def _chunk(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, allowed: Tensor | None, density: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        tables = self._tables(x.device)
        r = x - alpha * tables.centre
        near = alpha >= sigma  # closer to the data than to the noise: the score is the quantity computed first
        form = _isotropic if self.isotropic else _general
        logits, common, finish = form(tables, r, alpha, sigma, near)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        log_prob = torch.logsumexp(logits, 1) + common if density else x.new_empty(0)
        first = finish(torch.softmax(logits, 1))  # near: −∇log p; far: D − centre
        # the untaken branch must not divide by 0, or autograd turns it into NaN
        safe_alpha, safe_sigma = torch.where(near, alpha, 1.0), torch.where(near, 1.0, sigma)
        data = torch.where(near, (x - sigma**2 * first) / safe_alpha, tables.centre + first)
        score = torch.where(near, -first, (alpha * (tables.centre + first) - x) / safe_sigma**2)
        return log_prob, data, score

    def _tables(self, device: torch.device) -> _Tables:
        cache: dict[str, _Tables] = self.__dict__.setdefault("_cache", {})
        key = str(device)
        if key not in cache:
            cache[key] = _Tables.of(self, device)
        return cache[key]


class _Tables(NamedTuple):
    """What `posterior` needs, on one device; means are centred, which keeps digits of |x − αm|²."""

    centre: Tensor  # (d,)
    means: Tensor  # (K, d), m_k − centre
    rotated: Tensor  # (K, d), the same in the axes of C_k
    variances: Tensor  # (K or 1, d or 1)
    log_weights: Tensor  # (K,)
    into: Tensor | None  # (d, K·d), all axes side by side: r @ into rotates r into every component's axes
    back: Tensor | None  # (K·d, d)

    @staticmethod
    def of(mixture: Mixture, device: torch.device) -> _Tables:
        def put(table: Tensor) -> Tensor:
            return table.to(device, work_dtype(device)).contiguous()

        centre = mixture.weights @ mixture.means
        means, rotated, into, back = mixture.means - centre, mixture.means - centre, None, None
        if mixture.axes is not None:
            rotated = torch.einsum("kd,kde->ke", means, mixture.axes)
            into = put(mixture.axes.permute(1, 0, 2).flatten(1))
            back = put(mixture.axes.transpose(1, 2).flatten(0, 1))
        log_weights = mixture.weights.log()
        return _Tables(put(centre), put(means), put(rotated), put(mixture.variances), put(log_weights), into, back)


def _isotropic(tables: _Tables, r: Tensor, alpha: Tensor, sigma: Tensor, near: Tensor):
    # |r − αm|² expanded: nothing is larger than (batch, K), and the work is two matrix products and a softmax. What all
    # components share stays out of the (batch, K) table: `common`, to be added to log p
    d = r.shape[1]
    v = tables.variances.T  # (1, K or 1)
    V = alpha**2 * v + sigma**2  # (batch or 1, K or 1)
    prior = tables.log_weights - (0.5 * alpha**2 / V) * tables.means.square().sum(1)  # (batch or 1, K)
    from_r = -0.5 * r.square().sum(1, keepdim=True) / V - 0.5 * d * (2.0 * math.pi * V).log()
    # near: Σγ(r − αm)/V; far: Σγ(m + αv(r − αm)/V) = Σγ(σ²/V)m + Σγ(αv/V)r
    on_r = torch.where(near, 1.0, alpha * v) / V
    on_m = torch.where(near, -alpha, sigma**2) / V
    if V.shape[1] == 1:
        logits = ((alpha / V) * r) @ tables.means.T + prior
        return logits, from_r[:, 0], lambda gamma: on_m * (gamma @ tables.means) + on_r * r
    logits = (alpha / V) * (r @ tables.means.T) + prior + from_r

    def finish(gamma: Tensor) -> Tensor:
        return (gamma * on_m) @ tables.means + (gamma * on_r).sum(1, keepdim=True) * r

    return logits, 0.0, finish


def _general(tables: _Tables, r: Tensor, alpha: Tensor, sigma: Tensor, near: Tensor):
    K, d = tables.means.shape
    alpha, sigma, away = alpha[:, :, None], sigma[:, :, None], ~near
    V = alpha**2 * tables.variances + sigma**2  # (batch or 1, K or 1, d)
    y = r[:, None, :] if tables.into is None else (r @ tables.into).reshape(-1, K, d)
    y = y - alpha * tables.rotated  # residuals in the axes of C_k
    logits = tables.log_weights - 0.5 * (y.square() / V).sum(2) - 0.5 * (2.0 * math.pi * V).log().sum(2)

    def finish(gamma: Tensor) -> Tensor:
        # near: Σγ V⁻¹ r_k; far: Σγ(m + α C V⁻¹ r_k)
        q = gamma[:, :, None] * torch.where(near[:, :, None], 1.0, alpha * tables.variances) / V * y
        total = q.sum(1) if tables.back is None else q.flatten(1) @ tables.back
        return total + away * (gamma @ tables.means)

    return logits, 0.0, finish


def _variances(std: float | Array | None, shape: torch.Size) -> tuple[Tensor, None]:
    s = torch.as_tensor(std, dtype=torch.float64).detach().cpu()
    K, d = shape
    if s.ndim == 1 and s.shape[0] == K:
        s = s[:, None]
    elif s.ndim == 0:
        s = s.reshape(1, 1)
    if s.ndim != 2 or s.shape[0] not in (1, K) or s.shape[1] not in (1, d):
        raise InvalidInput(
            f"std must be a number, ({K},) for one value a component, or ({K}, {d}) for one value a component and axis; got shape {tuple(s.shape)}"
        )
    if not bool(((s > 0) & s.isfinite()).all()):
        raise InvalidInput(
            f"std must be positive and finite, or the density has no score at σ = 0; got {s.min().item()}. Write std=1e-3 for nearly bare points"
        )
    return s.square(), None


def _eigen(cov: Array, shape: torch.Size) -> tuple[Tensor, Tensor]:
    C = torch.as_tensor(cov, dtype=torch.float64).detach().cpu()
    K, d = shape
    if C.shape not in ((d, d), (K, d, d)):
        raise InvalidInput(f"cov must have shape ({d}, {d}) or ({K}, {d}, {d}); got {tuple(C.shape)}")
    if not torch.allclose(C, C.mT, rtol=1e-10, atol=1e-12 * float(C.abs().max())):
        raise InvalidInput("cov must be symmetric; write 0.5 * (cov + cov.T) if only rounding made it otherwise")
    values, axes = torch.linalg.eigh(C.expand(K, d, d))
    if not float(values.min()) > 0:
        raise InvalidInput(
            f"cov must be positive definite; its smallest eigenvalue is {values.min().item():.3g}. Write cov + 1e-6 * torch.eye({d})"
        )
    return values, axes
