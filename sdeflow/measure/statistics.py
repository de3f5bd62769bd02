"""Estimates with intervals: the bootstrap, seeded and vectorised over resamples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput

CHUNK_ELEMENTS = 1 << 22
"""Largest table of resampling indices, in elements."""

Statistic = Callable[..., Tensor]


@dataclass(frozen=True)
class Estimate:
    """A measured error.

    Attributes:
        name: what was measured.
        value: the estimate.
        low, high: the ends of its confidence interval; NaN where there is none.
        floor: what a perfect solver could show here: the uncertainty of the reference, or the Monte-Carlo noise of two exact samples.
        resolved: True when the value stands out of the floor; otherwise it says only "no larger than about the floor".
    """

    name: str
    value: float
    low: float
    high: float
    floor: float
    resolved: bool


def derived_seed(seed: int, purpose: str) -> int:
    """Another seed for each purpose, so that no two samples of one run share their numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:7], "big")


def bootstrap(
    groups: Sequence[Tensor],
    statistic: Statistic,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """BCa bootstrap interval of a statistic of means (Efron 1987; Efron & Tibshirani 1993, ch. 14).

    Args:
        groups: independent samples, each (n_i, k_i) or (n_i,): k_i features of n_i rows. Rows are resampled within their group.
        statistic: `statistic(mean_1, mean_2, …)` with mean_i (R, k_i), returning (R,); a smooth function of the features' means.
        level: coverage aimed at.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The ends of the interval; equal when the statistic does not vary.

    Raises:
        InvalidInput: a group of fewer than 2 rows, or a level outside (0, 1).
    """
    if not 0 < level < 1 or resamples < 20:
        raise InvalidInput(
            f"bootstrap needs 0 < level < 1 and resamples ≥ 20; got level={level}, resamples={resamples}"
        )
    tables = [g.detach().double().cpu().reshape(g.shape[0], -1) for g in groups]
    if any(table.shape[0] < 2 for table in tables):
        raise InvalidInput("an interval over samples needs at least 2 of them; write samples=256")
    centre = statistic(*(table.mean(0, keepdim=True) for table in tables))
    generator = torch.Generator().manual_seed(seed)
    draws = statistic(*(_resampled_means(table, resamples, generator) for table in tables)).sort().values
    if not bool(draws.isfinite().all()):
        return math.nan, math.nan
    if float(draws[-1] - draws[0]) == 0.0:
        return float(draws[0]), float(draws[0])
    # ties count half, and the ends of the table stand for what lies beyond it
    below = ((draws < centre).double().mean() + 0.5 * (draws == centre).double().mean()).clamp(
        0.5 / resamples, 1 - 0.5 / resamples
    )
    z0 = torch.special.ndtri(below)
    a = _acceleration(tables, statistic)
    z = torch.special.ndtri(torch.tensor([0.5 * (1 - level), 0.5 * (1 + level)], dtype=torch.float64))
    shifted = z0 + (z0 + z) / (1.0 - a * (z0 + z)).clamp_min(1e-3)
    low, high = torch.quantile(draws, torch.special.ndtr(shifted)).tolist()
    return low, high


def _resampled_means(table: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    n = table.shape[0]
    rows = max(1, CHUNK_ELEMENTS // n)
    parts = []
    for begin in range(0, resamples, rows):
        m = min(rows, resamples - begin)
        index = torch.randint(n, (m, n), generator=generator)
        counts = torch.zeros(m, n, dtype=torch.float64).scatter_add_(1, index, torch.ones(m, n, dtype=torch.float64))
        parts.append(counts @ table / n)
    return torch.cat(parts)


def _acceleration(tables: Sequence[Tensor], statistic: Statistic) -> float:
    """a = Σ l³ / 6(Σ l²)^{3/2} over the influences l = (n−1)(θ̄ − θ₋ᵢ)/n of all rows of all groups, by the jackknife."""
    means = [table.mean(0, keepdim=True) for table in tables]
    second = third = 0.0
    for g, table in enumerate(tables):
        n = table.shape[0]
        without = (n * means[g] - table) / (n - 1)
        theta = statistic(*(without if i == g else mean.expand(n, -1) for i, mean in enumerate(means)))
        influence = (n - 1) / n * (theta.mean() - theta)
        second += float(influence.square().sum())
        third += float(influence.pow(3).sum())
    return third / (6.0 * second**1.5) if second > 0 else 0.0
