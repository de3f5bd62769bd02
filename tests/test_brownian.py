"""Brownian paths: law, exactness under splitting, and independence of everything but (seed, time). False-alarm rate 1e-6 a test."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torchsde
from scipy import stats

from sdeflow.brownian import BrownianPath
from sdeflow.brownian_plan import weights
from sdeflow.errors import InvalidInput
from sdeflow.random import sample_seeds

RATE = 1e-6
SCALES = (1.0, 1e-6, 1e10)


def path(batch: int = 5, dim: int = 3, dtype: torch.dtype = torch.float64, **settings) -> BrownianPath:
    return BrownianPath(sample_seeds(1, batch), (dim,), dtype=dtype, **settings)


def times(seed: int, n: int, scale: float = 1.0) -> list[float]:
    """n sorted times in [−scale, scale], some of them ends of cells."""
    draw = random.Random(seed)
    return sorted(
        {scale * (draw.uniform(-1, 1) if draw.random() < 0.6 else draw.randint(-16, 16) / 16) for _ in range(n)}
    )


def merged(first, second, p: float, q: float):
    """(W, H) of two neighbouring intervals of lengths p and q together: hH = pH₁ + qH₂ + ½(qW₁ − pW₂)."""
    (W1, H1), (W2, H2) = first, second
    return W1 + W2, (p * H1 + q * H2 + 0.5 * (q * W1 - p * W2)) / (p + q)


@pytest.mark.parametrize("scale", SCALES)
def test_split_then_merge_is_exact(scale: float):
    walk = path()
    for trial in range(60):
        nodes = times(trial, 3, scale)
        if len(nodes) < 3:
            continue
        s, m, t = nodes
        W, H = merged(walk.increment(s, m), walk.increment(m, t), m - s, t - m)
        whole_W, whole_H = walk.increment(s, t)
        assert (W - whole_W).abs().max() < 1e-12 * math.sqrt(t - s)
        assert (H - whole_H).abs().max() < 1e-12 * math.sqrt(t - s)


def standardised(walk: BrownianPath, s: float, t: float) -> tuple[np.ndarray, np.ndarray]:
    W, H = walk.increment(s, t)
    return (W / math.sqrt(t - s)).flatten().numpy(), (H * math.sqrt(12.0 / (t - s))).flatten().numpy()


@pytest.mark.parametrize(
    ("s", "t"),
    [(0.0, 1.0), (0.3, 0.7), (0.5, 0.75), (0.123, 0.1241), (-0.4, 1.3), (-3.0, -2.9), (7e-6, 9e5), (2.0, 2.5)],
)
def test_law_of_increment_and_area(s: float, t: float):
    n = 60_000
    w, k = standardised(BrownianPath(torch.arange(n), (1,), dtype=torch.float64), s, t)
    assert stats.kstest(w, "norm").pvalue > RATE
    assert stats.kstest(k, "norm").pvalue > RATE
    assert abs((w * k).mean()) < stats.norm.isf(RATE / 2) / math.sqrt(n)


def test_joint_covariance_on_random_nested_intervals():
    """All second moments of (W, H) over nested and neighbouring intervals, from cov(w(u), w(v)) = min(u, v)."""
    n, draw = 40_000, random.Random(5)
    walk = BrownianPath(torch.arange(n), (1,), dtype=torch.float64)
    for _ in range(4):
        a, b, c, d = sorted(draw.uniform(0.05, 2.0) for _ in range(4))
        pieces = [(a, d), (b, c), (a, b), (c, d), (b, d)]
        found = np.stack([v.flatten().numpy() for s, t in pieces for v in walk.increment(s, t)])
        exact = covariance(pieces)
        z = (found @ found.T / n - exact) / np.sqrt((np.outer(np.diag(exact), np.diag(exact)) + exact**2) / n)
        assert abs(z).max() < stats.norm.isf(RATE / 400)


def covariance(pieces: list[tuple[float, float]]) -> np.ndarray:
    """Both W and H are ∫ φ dw: φ = 1 for W and ½ − (u − s)/(t − s)·1 … so that H = ∫(½ − (u − s)/h) dw on the interval."""
    nodes = sorted({v for piece in pieces for v in piece})
    x, weight = np.polynomial.legendre.leggauss(3)
    u = np.concatenate([0.5 * (q - p) * x + 0.5 * (p + q) for p, q in zip(nodes, nodes[1:], strict=False)])
    du = np.concatenate([0.5 * (q - p) * weight for p, q in zip(nodes, nodes[1:], strict=False)])
    phi = []
    for s, t in pieces:
        inside = ((u > s) & (u < t)).astype(float)
        phi += [inside, inside * (0.5 - (u - s) / (t - s))]
    kernel = np.stack(phi)
    return (kernel * du) @ kernel.T


@pytest.mark.parametrize("depth", [4, 16])
def test_variance_is_low_by_no_more_than_stated(depth: int):
    """Exactly, from the weights: by |t| 2^−depth/(6h) of W's, three times that of H's; nearly reached; never too much."""
    s = np.random.default_rng(0).uniform(0.5, 1.0, 4000)
    for h in (8.0 * 2.0**-depth, 64.5 * 2.0**-depth):
        h = np.minimum(h, 1.0 - s)
        h = np.where(h < 2.0 * 2.0**-depth, 2.0 * 2.0**-depth, h)
        W, H = ((weights(s, s + h, depth).weight ** 2).sum((2, 3)) / h[:, None]).T
        share = 2.0**-depth * (s + h) / (6.0 * h)
        low_W, low_H = 1.0 - W, 1.0 - 12.0 * H
        assert min(low_W.min(), low_H.min()) > -1e-12
        assert (low_W <= share).all() and (low_H <= 3.0 * share).all()
        assert (low_W / share).max() > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_depend_on_seed_and_time_alone(dtype: torch.dtype):
    """Bitwise: batch composition and order, per-sample times, order of queries, and sweeps over any grid."""
    whole = path(37, 3, dtype)
    rows = torch.tensor([30, 2, 17, 2])
    some, alone = whole.restrict(rows), BrownianPath([int(whole.seeds[17])], (3,), dtype=dtype)
    nodes = times(3, 24)
    expected = [whole.increment(s, t) for s, t in zip(nodes, nodes[1:], strict=False)]
    W, H = path(37, 3, dtype).increments(nodes)
    back_W, back_H = whole.increments(nodes[::-1])
    for i in reversed(range(len(expected))):
        s, t = nodes[i : i + 2]
        for one, many, k in ((expected[i][0], W, 0), (expected[i][1], H, 1)):
            assert torch.equal(many[i], one)
            assert torch.equal(some.increment(s, t)[k], one[rows])
            assert torch.equal(alone.increment(s, t)[k], one[17:18])
            assert torch.equal(alone.increment(torch.tensor([s], dtype=torch.float64), t)[k], one[17:18])
            assert torch.equal(whole.increment(torch.full((37,), s, dtype=torch.float64), t)[k], one)
        assert torch.equal(back_W[-1 - i], -expected[i][0]) and torch.equal(back_H[-1 - i], expected[i][1])
    own = torch.linspace(-1, 1, 37, dtype=torch.float64)
    mixed_W, mixed_H = whole.increment(own, 0.77)
    for i in (0, 5, 18, 36):
        one_W, one_H = whole.increment(own[i].item(), 0.77)
        assert torch.equal(mixed_W[i], one_W[i]) and torch.equal(mixed_H[i], one_H[i])


def test_a_sweep_in_pieces_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    grid = torch.linspace(0.0, 1.0, 33)
    W, H = path().increments(grid)
    monkeypatch.setattr("sdeflow.brownian.SWEEP", 5 * 15)
    monkeypatch.setattr("sdeflow.brownian.NORMALS", 30)
    monkeypatch.setattr("sdeflow.brownian.STEPS", 3)
    for i, (w, h) in enumerate(path().sweep(grid)):
        assert torch.equal(w, W[i]) and torch.equal(h, H[i])


def test_float32_sees_the_path_of_float64():
    grid = torch.linspace(0.01, 1.0, 50)
    for single, double in zip(path(64, dtype=torch.float32).increments(grid), path(64).increments(grid), strict=True):
        assert (single - double).abs().max() < 2e-6


def test_rounding_of_a_time_changes_nothing():
    """A node one rounding error off a cell's end is that end, and a tiny move elsewhere moves the path as little."""
    walk = path()
    W, _ = walk.increment(0.1, 0.75)
    assert torch.equal(walk.increment(0.1, math.nextafter(0.75, 0))[0], W)
    assert (walk.increment(0.1, 0.75 + 1e-9)[0] - W).abs().max() < 1e-5


def test_empty_interval_is_zero():
    for t in (0.0, 0.3, 0.5, -2.0):
        W, H = path().increment(t, t)
        assert not W.any() and not H.any()


@pytest.mark.parametrize("flipped", [False, True])
def test_torchsde_sees_this_path(flipped: bool):
    """dx = −x dt + dw by torchsde's Euler is the same recursion as by hand."""
    walk, n = path(6, 2), 20

    class Decay(torch.nn.Module):
        noise_type, sde_type = "additive", "ito"

        def f(self, t, x):
            return -x

        def g(self, t, x):
            return torch.eye(2, dtype=x.dtype).expand(x.shape[0], 2, 2)

    bm = walk.as_torchsde(flipped=flipped)
    start, stop = (-1.0, 0.0) if flipped else (0.0, 1.0)
    ts = torch.tensor([start, stop], dtype=torch.float64)
    x = torch.zeros(6, 2, dtype=torch.float64)
    found = torchsde.sdeint(Decay(), x, ts, bm=bm, method="euler", dt=1.0 / n)[-1]
    grid = torch.linspace(start, stop, n + 1, dtype=torch.float64)
    for W, _ in walk.sweep(-grid if flipped else grid):
        x = x - x / n + W
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)
    W, U = bm(0.2, 0.5, return_U=True)
    steps = torch.linspace(0.2, 0.5, 2001, dtype=torch.float64)
    inner = walk.increments(-steps if flipped else steps)[0].cumsum(0)
    area = (inner.sum(0) - 0.5 * inner[-1]) * (0.3 / 2000)
    torch.testing.assert_close(U, area, rtol=0, atol=2e-4)
    torch.testing.assert_close(W, inner[-1], rtol=0, atol=1e-12)


def test_what_is_refused():
    with pytest.raises(InvalidInput, match="integer seeds"):
        BrownianPath(torch.zeros(3), (2,))
    with pytest.raises(InvalidInput, match="float32 or float64"):
        path(dtype=torch.float16)
    with pytest.raises(InvalidInput, match="depth"):
        path(depth=30)
    with pytest.raises(InvalidInput, match="one a sample"):
        path().increment(torch.zeros(4), 1.0)
    with pytest.raises(InvalidInput, match="finite"):
        path().increment(0.0, math.inf)
    with pytest.raises(InvalidInput, match="grid"):
        path().increments([1.0])
    with pytest.raises(InvalidInput, match="events of shape"):
        BrownianPath([1], (2, 2)).as_torchsde()
    with pytest.raises(InvalidInput, match="Lévy"):
        path().as_torchsde()(0.0, 1.0, return_A=True)
