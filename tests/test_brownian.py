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
from sdeflow.brownian_plan import Plan, halvings, plan
from sdeflow.errors import InvalidInput
from sdeflow.random import bridges, sample_seeds

RATE = 1e-6
SCALES = (1.0, 1e-6, 1e10)
LEAF = 2.0**-16
"""Of a path of the usual depth, between 1 and 2."""


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
        if len(nodes) == 3:
            assert_split(walk, *nodes)


@pytest.mark.parametrize("depth", [4, 11, 13, 16, 20, 24])
def test_split_then_merge_is_exact_in_the_smallest_cells(depth: int):
    """Three times in one of the last cells that are halved, or in one and the next; near and between knots and on them."""
    walk, draw = path(depth=depth), random.Random(depth)
    cell = 2.0 ** -halvings(depth)
    for _ in range(40):
        start = 1.0 + cell * draw.randint(0, round(1 / cell) - 2)
        units = sorted(draw.sample([draw.uniform(0, 1.5) for _ in range(4)] + [i / 64 for i in range(65)], 3))
        if min(units[1] - units[0], units[2] - units[1]) > 1 / 64:
            assert_split(walk, *(start + cell * u for u in units))


def assert_split(walk: BrownianPath, s: float, m: float, t: float) -> None:
    W, H = merged(walk.increment(s, m), walk.increment(m, t), m - s, t - m)
    whole_W, whole_H = walk.increment(s, t)
    assert (W - whole_W).abs().max() < 1e-12 * math.sqrt(t - s)
    assert (H - whole_H).abs().max() < 1e-12 * math.sqrt(t - s)


def standardised(walk: BrownianPath, s: float, t: float) -> tuple[np.ndarray, np.ndarray]:
    W, H = walk.increment(s, t)
    return (W / math.sqrt(t - s)).flatten().numpy(), (H * math.sqrt(12.0 / (t - s))).flatten().numpy()


@pytest.mark.parametrize(
    ("s", "t"),
    [
        (0.0, 1.0),
        (0.3, 0.7),
        (0.5, 0.75),
        (0.123, 0.1241),
        (-0.4, 1.3),
        (-3.0, -2.9),
        (7e-6, 9e5),
        (2.0, 2.5),
        (0.7001, 0.7001 + 2e-4),
        (80904 * LEAF, 80906 * LEAF),
    ],
)
def test_law_of_increment_and_area(s: float, t: float):
    n = 60_000
    w, k = standardised(BrownianPath(torch.arange(n), (1,), dtype=torch.float64), s, t)
    assert stats.kstest(w, "norm").pvalue > RATE
    assert stats.kstest(k, "norm").pvalue > RATE
    assert abs((w * k).mean()) < stats.norm.isf(RATE / 2) / math.sqrt(n)


@pytest.mark.parametrize(
    ("begin", "end"), [(0.05, 2.0), (45876 * LEAF, 45876 * LEAF + 2.0**-10), (91750 * LEAF, 91750 * LEAF + 2.0**-8)]
)
def test_joint_covariance_on_random_nested_intervals(begin: float, end: float):
    """All second moments of (W, H) over nested and neighbouring intervals, from cov(w(u), w(v)) = min(u, v)."""
    n, draw = 40_000, random.Random(5)
    walk = BrownianPath(torch.arange(n), (1,), dtype=torch.float64)
    for _ in range(4):
        a, b, c, d = sorted(begin + (end - begin) * draw.randint(0, 64) / 64 for _ in range(4))
        if len({a, b, c, d}) < 4:
            continue
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


def as_sums(drawn: Plan, depth: int) -> np.ndarray:
    """(n, 2, K): the (W, H) of intervals planned each for itself, as sums of K independent standard normals.

    Runs the plan in numpy on unit vectors: each interval's draws are numbered, and each of its leaves has the vectors whose
    products are the second moments of the table.
    """
    levels, n, R = depth - halvings(depth), len(drawn.count), len(drawn.roots) // 2
    owner = np.delete(drawn.owner, np.s_[R : 2 * R])
    number = np.array([(owner[:i] == owner[i]).sum() for i in range(len(owner))])
    most = 2 * (number.max() + 1)
    table = np.zeros((1, 4, 0))
    if levels:
        entries = bridges(levels, torch.float64, torch.device("cpu")).numpy()
        moments = np.einsum("aei,bej->aibj", entries, entries, optimize=True) / entries.shape[1]
        values, axes = np.linalg.eigh(moments.reshape(len(entries) * 4, -1))
        table = (axes * np.sqrt(values.clip(0))).reshape(len(entries), 4, -1)
    leaf = len(drawn.cells) + R
    slots = number[leaf:] - (number[leaf:].min(initial=0))
    rows = np.zeros(
        (R + 2 * len(drawn.cells) + 2 * drawn.lookup.shape[1], 2, most + table.shape[2] * (slots.max(initial=-1) + 1))
    )
    unit = np.eye(rows.shape[2])
    rows[:R, 0], rows[:R, 1] = unit[2 * number[:R]], unit[2 * number[:R] + 1]
    for u, parent in enumerate(drawn.parent):
        (A, B), Z, N = rows[parent], unit[2 * number[R + u]], unit[2 * number[R + u] + 1]
        # W = A, H = B/√12, of halves of length ½
        W, H, Z, N = A, B / 12**0.5, Z / 4, N / 12**0.5
        for bit, sign in ((0, 1), (1, -1)):
            half = W / 2 + sign * (1.5 * H + Z), H / 4 - Z / 2 + sign * N / 2
            rows[R + 2 * u + bit] = half[0] * 2**0.5, half[1] * 24**0.5
    at = R + 2 * len(drawn.cells)
    Q = drawn.lookup.shape[1]
    for q, (which, column) in enumerate(drawn.lookup.T):
        begin = most + slots[which] * table.shape[2]
        place = np.s_[:, begin : begin + table.shape[2]]
        rows[at + q][place], rows[at + Q + q][place] = table[column, :2], table[column, 2:]
    return np.einsum("nkpj,njpx->nkx", drawn.weight, rows[drawn.row]).reshape(n, 2, -1)


@pytest.mark.parametrize("depth", [4, 12, 16])
def test_variance_is_low_by_no_more_than_stated(depth: int):
    """Exactly, from the plan: by |t| 2^−depth/(6h) of W's, three times that of H's; nearly reached; never too much."""
    s = np.random.default_rng(0).uniform(0.5, 1.0, 100)
    for h in (8.0 * 2.0**-depth, 64.5 * 2.0**-depth):
        h = np.minimum(h, 1.0 - s)
        h = np.where(h < 2.0 * 2.0**-depth, 2.0 * 2.0**-depth, h)
        W, H = ((as_sums(plan(s, s + h, depth, False), depth) ** 2).sum(2) / h[:, None]).T
        share = 2.0**-depth * (s + h) / (6.0 * h)
        low_W, low_H = 1.0 - W, 1.0 - 12.0 * H
        assert min(low_W.min(), low_H.min()) > -1e-11
        assert (low_W <= share).all() and (low_H <= 3.0 * share).all()
        assert (low_W / share).max() > 0.4


@pytest.mark.parametrize("depth", [4, 12, 16, 20])
def test_second_moments_between_ends_of_leaves_are_exact(depth: int):
    """Variances and covariance of (W, H), of steps of every length down to a leaf, and across roots."""
    draw = np.random.default_rng(depth)
    first = draw.integers(2**depth, 2 ** (depth + 1), 60)
    steps = np.maximum(1, (2.0 ** draw.uniform(0, depth, 60)).astype(np.int64))
    last = first + steps
    last += last % 2 * (last > 2 ** (depth + 1))  # leaves are twice as long there
    s, t = (v * 2.0**-depth for v in (first, last))
    found = as_sums(plan(s, t, depth, False), depth)
    moments = found @ found.transpose(0, 2, 1) / (t - s)[:, None, None]
    assert abs(moments - np.diag([1.0, 1.0 / 12.0])).max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_depend_on_seed_and_time_alone(dtype: torch.dtype):
    """Bitwise: batch composition and order, per-sample times, order of queries, and sweeps over any grid."""
    whole = path(37, 3, dtype)
    rows = torch.tensor([30, 2, 17, 2])
    some, alone = whole.restrict(rows), BrownianPath([int(whole.seeds[17])], (3,), dtype=dtype)
    nodes = sorted(times(3, 24) + [0.6 + i * 2.0**-13 for i in range(6)])
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


@pytest.mark.parametrize("elements", [1, 2, 4, 5, 8])
def test_an_element_does_not_depend_on_how_many_there_are(elements: int):
    for s, t in ((0.3, 0.8), (0.7, 0.70002)):
        few, many = path(7, elements).increment(s, t), path(7, 13).increment(s, t)
        assert all(torch.equal(a, b[:, :elements]) for a, b in zip(few, many, strict=True))


def test_a_sweep_in_pieces_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    grid = torch.linspace(0.0, 1.0, 33)
    W, H = path().increments(grid)
    monkeypatch.setattr("sdeflow.brownian.SWEEP", 5 * 15)
    monkeypatch.setattr("sdeflow.brownian.VALUES", 30)
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
