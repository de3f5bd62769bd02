"""Errors of states and of laws: pure functions of tensors, each with an interval and a floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput, MissingDependency
from sdeflow.measure.statistics import Estimate, bootstrap

FLOOR_REPEATS = 39
"""Pairs of exact samples behind a Monte-Carlo floor. The largest of 39 is passed by a perfect solver once in 40 runs (2.5 %)."""
REFERENCE_MARGIN = 3.0
"""An error counts as resolved when it is more than this many times the disagreement of the two reference solutions."""


def sample_rmse(x: Tensor, reference: Tensor) -> Tensor:
    """Error of every sample: root mean square over its elements, float64 (batch,)."""
    if x.shape != reference.shape:
        raise InvalidInput(f"x and reference must have one shape; got {tuple(x.shape)} and {tuple(reference.shape)}")
    return (x.double() - reference.double()).flatten(1).square().mean(1).sqrt()


def rmse(
    x: Tensor,
    reference: Tensor,
    uncertainty: Tensor | float = 0.0,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    name: str = "rmse",
) -> Estimate:
    """Root mean square over samples and elements of x − reference, with a bootstrap interval over samples.

    Args:
        x, reference: (batch, *event).
        uncertainty: that of the reference, (batch,) or a number (RMS over elements). The floor is three times its RMS.
    """
    e2 = sample_rmse(x, reference).square()
    value = e2.mean().sqrt().item()
    low, high = bootstrap([e2], _root, level, resamples, seed)
    u = torch.as_tensor(uncertainty, dtype=torch.float64)
    floor = REFERENCE_MARGIN * u.square().mean().sqrt().item()
    return Estimate(name, value, low, high, floor, value > floor)


def _root(mean: Tensor) -> Tensor:
    return mean[:, 0].clamp_min(0.0).sqrt()


def projections(dim: int, count: int = 128, seed: int = 0) -> Tensor:
    """Directions for sliced distances: unit columns, float64 (dim, count); in one dimension the one there is."""
    if dim == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    directions = torch.randn(dim, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return directions / directions.norm(dim=0)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor | None = None) -> float:
    """Sliced Wasserstein-2 distance of two samples (n, *event) and (m, *event), by POT.

    SW₂² = mean over directions θ of W₂²(θ·x, θ·y) (Bonneel et al. 2015). The directions are fixed, so that two calls are comparable.

    Raises:
        MissingDependency: POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise MissingDependency("the sliced Wasserstein distance needs POT; write: pip install POT") from error
    x, y = _rows(x, y)
    directions = projections(x.shape[1]) if directions is None else directions
    distance: Any = ot.sliced_wasserstein_distance(x, y, projections=directions)
    return float(distance)


def sliced_wasserstein_estimate(
    x: Tensor,
    y: Tensor,
    floor: float,
    directions: Tensor | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Sliced Wasserstein-2 with a bootstrap interval over the rows of both samples, which must be equally many.

    SW₂² is linearised in the two empirical laws by its dual potentials (del Barrio & Loubes 2019), φ′ = 2(a − T(a)) along each direction:
    resampling then costs two means instead of a sort. Its error is of second order, and matters near the floor only.

    Args:
        floor: what exact samples of this size show, see `monte_carlo_floor`.
    """
    x, y = _rows(x, y)
    if x.shape[0] != y.shape[0]:
        raise InvalidInput(f"x and y must have as many rows for an interval; got {x.shape[0]} and {y.shape[0]}")
    directions = projections(x.shape[1]) if directions is None else directions
    value = sliced_wasserstein(x, y, directions)
    phi, psi = _potentials(x @ directions, y @ directions)

    def statistic(mean_phi: Tensor, mean_psi: Tensor) -> Tensor:
        return (value**2 + mean_phi[:, 0] + mean_psi[:, 0]).clamp_min(0.0).sqrt()

    low, high = bootstrap([phi, psi], statistic, level, resamples, seed)
    return Estimate("sliced_wasserstein", value, low, high, floor, value > floor)


def _potentials(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Centred dual potentials (φ(x_i), ψ(y_i)) of W₂², averaged over directions; a, b (n, L) projections."""
    a, rank_a = a.sort(0)
    b, rank_b = b.sort(0)
    gap = a - b

    def integrate(points: Tensor, rank: Tensor, sign: float) -> Tensor:
        pieces = sign * (gap[1:] + gap[:-1]) * points.diff(dim=0)
        potential = torch.cat([torch.zeros_like(points[:1]), pieces.cumsum(0)])
        potential = torch.empty_like(potential).scatter_(0, rank, potential)
        return (potential - potential.mean(0)).mean(1)

    return integrate(a, rank_a, 1.0), integrate(b, rank_b, -1.0)


def energy_distance(x: Tensor, y: Tensor, unbiased: bool = True) -> float:
    """√(2E|X−Y| − E|X−X′| − E|Y−Y′|) of two laws, Euclidean norm (Székely & Rizzo 2013), from samples of them.

    Args:
        x, y: (n, *event) and (m, *event).
        unbiased: leave a sample's distance to itself out of E|X−X′|, which makes the square unbiased: 0 on average for equal laws (the root of a
            negative square is given as 0). False is the distance of the two empirical laws; in high dimensions it is mostly bias.
    """
    return math.sqrt(max(_energy(*_rows(x, y), unbiased)[0], 0.0))


def energy_distance_estimate(
    x: Tensor, y: Tensor, floor: float, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Unbiased `energy_distance` with a bootstrap interval over the rows of both samples, by its influence functions."""
    square, phi, psi = _energy(*_rows(x, y), unbiased=True)
    value = math.sqrt(max(square, 0.0))

    def statistic(mean_phi: Tensor, mean_psi: Tensor) -> Tensor:
        return (square + mean_phi[:, 0] + mean_psi[:, 0]).clamp_min(0.0).sqrt()

    low, high = bootstrap([phi, psi], statistic, level, resamples, seed)
    return Estimate("energy_distance", value, low, high, floor, value > floor)


def _energy(x: Tensor, y: Tensor, unbiased: bool) -> tuple[float, Tensor, Tensor]:
    """The squared energy distance, and its centred influence functions at the rows of x and of y."""
    xy, xx, yy = torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)
    own = 1 if unbiased else 0
    to_x, to_y = xx.sum(1) / (x.shape[0] - own), yy.sum(1) / (y.shape[0] - own)
    square = 2.0 * xy.mean() - to_x.mean() - to_y.mean()
    phi, psi = 2.0 * (xy.mean(1) - to_x), 2.0 * (xy.mean(0) - to_y)
    return square.item(), phi - phi.mean(), psi - psi.mean()


def moment_error(x: Tensor, mean: Tensor, cov: Tensor) -> float:
    """Error of a sample's moments against exact ones: √(mean_i [m_i² + (s_i − 1)²]) over the axes i of cov.

    m_i and s_i are the sample's mean and standard deviation along axis i in units of the exact standard deviation; this is the
    Wasserstein-2 distance of the two Gaussians with independent axes, per axis, in those units. 0.1 means off by about 10 %.
    """
    y = _whitened(x, mean, cov)
    return _moment_statistic(torch.cat([y.mean(0), y.square().mean(0)])[None]).item()


def moment_error_estimate(
    x: Tensor, mean: Tensor, cov: Tensor, floor: float, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """`moment_error` with a bootstrap interval over samples."""
    y = _whitened(x, mean, cov)
    features = torch.cat([y, y.square()], 1)
    low, high = bootstrap([features], _moment_statistic, level, resamples, seed)
    value = _moment_statistic(features.mean(0, keepdim=True)).item()
    return Estimate("moments", value, low, high, floor, value > floor)


def moment_deviation(x: Tensor, mean: Tensor, cov: Tensor) -> tuple[float, int]:
    """(largest |z|, number of comparisons) of every mean and covariance entry of a Gaussian sample against the exact ones.

    z is a sample moment's deviation in units of its own standard error, known for a Gaussian: C_ii/n for means,
    (C_ii C_jj + C_ij²)/n for covariances. With a false-alarm rate p the largest stays below `norm.isf(p / 2 / comparisons)`.
    """
    x = x.double().flatten(1)
    n, mean, cov = x.shape[0], mean.double(), cov.double()
    r = x - mean
    variance = cov.diagonal()
    z_mean = (r.mean(0) / (variance / n).sqrt()).abs().max()
    spread = ((variance[:, None] * variance + cov**2) / n).sqrt()
    z_cov = ((r.T @ r / n - cov) / spread).abs().max()
    d = mean.numel()
    return float(torch.maximum(z_mean, z_cov)), d + d * (d + 1) // 2


def _whitened(x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(cov.double())
    return (x.double().flatten(1) - mean.double()) @ axes / values.sqrt()


def _moment_statistic(mean: Tensor) -> Tensor:
    m, second = mean.chunk(2, dim=1)
    s = (second - m**2).clamp_min(0.0).sqrt()
    return (m**2 + (s - 1.0) ** 2).mean(1).sqrt()


def monte_carlo_floor(distance: Callable[[int], float], repeats: int = FLOOR_REPEATS) -> float:
    """The largest of `repeats` distances between exact samples; `distance(r)` makes the r-th from fresh samples.

    A perfect solver exceeds it with probability 1/(repeats + 1), whatever the distance's distribution.
    """
    return max(distance(r) for r in range(repeats))


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim < 2 or x.shape[1:] != y.shape[1:]:
        raise InvalidInput(
            f"two samples (n, *event) and (m, *event) were expected; got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x.detach().double().cpu().flatten(1), y.detach().double().cpu().flatten(1)
