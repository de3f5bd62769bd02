"""Statistics and distances against scipy and POT."""

import math

import numpy as np
import pytest
import torch

from sdeflow import measure as me

F64 = torch.float64


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_interval_is_scipys_bca():
    """Two bootstraps of 100000 resamples each: ends equal within their Monte-Carlo noise, below 2 % of the width."""
    scipy_stats = pytest.importorskip("scipy.stats")
    e2 = rows(60, 1, 0)[:, 0].exp()
    ours = me.bootstrap([e2], lambda m: m[:, 0].sqrt(), resamples=100_000)
    peer = scipy_stats.bootstrap(
        (e2.numpy(),),
        lambda x, axis: np.sqrt(np.mean(x, axis=axis)),
        n_resamples=100_000,
        method="BCa",
        batch=1000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = peer.high - peer.low
    assert abs(ours[0] - peer.low) < 0.02 * width and abs(ours[1] - peer.high) < 0.02 * width


def test_energy_distance_is_scipys_in_one_dimension():
    scipy_stats = pytest.importorskip("scipy.stats")
    x, y = rows(50, 1, 0), 1.3 * rows(70, 1, 1) + 0.2
    assert me.energy_distance(x, y, unbiased=False) == pytest.approx(
        scipy_stats.energy_distance(x[:, 0], y[:, 0]), rel=1e-10
    )


def test_sliced_distance_is_pots_own_with_the_same_directions():
    ot = pytest.importorskip("ot")
    x, y = rows(50, 3, 0), rows(70, 3, 1) + 0.5
    directions = me.projections(3, 40)
    a, b = (x @ directions).numpy(), (y @ directions).numpy()
    each = [ot.wasserstein_1d(a[:, i], b[:, i], p=2) for i in range(40)]
    assert me.sliced_wasserstein(x, y, directions) == pytest.approx(math.sqrt(float(sum(each)) / 40), rel=1e-10)
