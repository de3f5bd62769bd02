"""Which normals the (W, H) of an interval are made of, and with what weights; on the host, before any number is drawn.

Both are functionals ∫ψ dw, with ψ = 1 for W and ψ = ½ − (u − s)/(t − s) for H, zero outside [s, t]. The line is cut into root cells
[2^e, 2^{e+1}) (mirrored below 0, one cell next to 0). A root [a, a + h) draws its W and H, dw = (W + 6(1 − 2θ)H) dθ, θ = (u − a)/h,
and every halving two normals more, Z ~ N(0, h/16) and N ~ N(0, h/12), which add

    dw = (6θ − 2) Z dθ + 3(1 − 2θ) N dθ   on the left half,   (6θ − 4) Z dθ − 3(1 − 2θ) N dθ   on the right, θ in the half,

the Brownian bridge of (W, H) in the middle: W₁ = W/2 + 3H/2 + Z, H₁ = H/4 − Z/2 + N/2 (Alpert's linear multiwavelets, integrated).
A weight is ψ's product with that shape. ψ is linear on cells inside [s, t], so only the cells that s or t cuts have one, besides
the roots; no weight is a difference of long sums, so short intervals keep their relative accuracy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdeflow.errors import InvalidInput

LOWEST, HIGHEST = -24, 80
"""Exponents of the root cells: [0, 2^LOWEST) is one cell, times reach ±2^HIGHEST."""
DEEPEST = 24
"""Bits of a cell's address inside its root."""
SNAP = 2.0**-20
"""Times this share of a leaf away from a leaf's end are that end: rounding must not cost a descent."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Weights(NamedTuple):
    """Interval i is Σ_j weight[i, 0, 0, j]·Z_j + weight[i, 0, 1, j]·N_j for W, weight[i, 1] for H, over its first count[i] cells.

    Z_j, N_j are the standard normals of the cell of address code[i, j]; roots come first, then the cells s cuts, then t's.
    """

    count: Integers  # (n,)
    code: Integers  # (n, S), 0 beyond count
    weight: Floats  # (n, 2, 2, S), 0 beyond count


class _Points(NamedTuple):
    """Where times lie: root cell r and place y in it, in leaves."""

    r: Integers
    y: Floats

    @classmethod
    def of(cls, t: Floats, depth: int) -> _Points:
        if not (np.abs(t) < 2.0**HIGHEST).all():
            raise InvalidInput(f"path times must be finite and below 2^{HIGHEST}; got {t.ravel()[:4].tolist()}")
        mantissa, exponent = np.frexp(np.abs(t))
        # below 0 a cell is open at its other end: −2^e starts the cell that ends at −2^{e−1}
        e = exponent.astype(np.int64) - 1 - ((t < 0) & (mantissa == 0.5))
        low = (e < LOWEST) | (t == 0)
        e = np.where(low, LOWEST, e)
        h = np.ldexp(1.0, e)
        a = np.where(t >= 0, np.where(low, 0.0, h), np.where(low, -h, -2.0 * h))
        r = np.where(t >= 0, e - LOWEST + 1 - low, LOWEST - 2 - e + low)
        y = (t - a) / h * 2.0**depth
        near = np.rint(y)
        y = np.where(np.abs(y - near) < SNAP, near, y)
        over = y >= 2.0**depth  # snapped up to the end of the root: the start of the next one
        return cls(r + over, np.where(over, 0.0, y))


def root_width(r: Integers) -> Floats:
    """Width of root cell r: r = 0, 1, 2, … upwards from 0, −1, −2, … downwards."""
    return np.ldexp(1.0, LOWEST + np.maximum(np.where(r >= 0, r, -1 - r) - 1, 0))


def address(r: Integers, heap: int | Integers) -> Integers:
    """Address of a cell of root r: heap 0 for what the root draws, 2^level + path for a halving."""
    return ((r + 128) << (DEEPEST + 1)) + heap


def is_root(code: Integers) -> NDArray[np.bool_]:
    """Whether an address is that of a root's own draw."""
    return code & ((1 << (DEEPEST + 1)) - 1) == 0


def weights(s: Floats, t: Floats, depth: int) -> Weights:
    """The weights of intervals from s to t, (n,) each. With t < s the signs of W's are turned."""
    p, q = _Points.of(np.minimum(s, t), depth), _Points.of(np.maximum(s, t), depth)
    leaf_p, leaf_q = (root_width(v.r) * 2.0**-depth for v in (p, q))
    same, full = p.r == q.r, 2.0**depth
    between, before = _roots_between(p.r, q.r)
    # from s to the end of its root, or to t
    first = np.where(same, q.y - p.y, full - p.y) * leaf_p
    length = np.where(same, first, first + between.sum(1) + q.y * leaf_q)
    empty = length == 0
    length = np.where(empty, 1.0, length)
    high = np.where(same, q.y, full)
    low = np.where(same, p.y, 0.0)

    level = np.arange(depth)
    span = np.ldexp(1.0, depth - level)  # leaves in a cell
    start_p, start_q = (np.floor(v.y[:, None] / span) * span for v in (p, q))
    cut_p, cut_q = p.y[:, None] != start_p, q.y[:, None] != start_q
    cut_q &= ~(cut_p & same[:, None] & (start_p == start_q))
    parts = [_root_part(p, q, same, between, before, length, depth)]
    for v, start, cut, lo, hi, leaf, at_end in (
        (p, start_p, cut_p, p.y, high, leaf_p, False),
        (q, start_q, cut_q, low, q.y, leaf_q, True),
    ):
        path = (1 << level) + (start / span).astype(np.int64)
        weight = _halving(start, span, lo, hi, leaf / length, v.y, at_end) * np.sqrt(leaf)[:, None, None, None]
        parts.append((cut, address(v.r[:, None], path), weight))
    on, code, weight = (np.concatenate(v, -1) for v in zip(*parts, strict=True))
    on &= ~empty[:, None]
    weight[:, 0] *= np.where(s <= t, 1.0, -1.0)[:, None, None]
    return _packed(on, code, weight)


def _packed(on: NDArray[np.bool_], code: Integers, weight: Floats) -> Weights:
    """The cells that are on, moved to the front in their order."""
    count = on.sum(1)
    most = int(count.max(initial=0))
    order = np.argsort(~on, axis=1, kind="stable")[:, :most]
    past = np.arange(most) >= count[:, None]
    code = np.where(past, 0, np.take_along_axis(code, order, 1))
    weight = np.take_along_axis(weight, order[:, None, None, :], 3)
    weight[np.broadcast_to(past[:, None, None], weight.shape)] = 0.0
    return Weights(count, code, weight)


def _moments(begin: Floats, end: Floats, start: Floats, size: Floats, rate: Floats, at: Floats, at_end: bool):
    """(∫ψ dθ, ∫ψθ dθ) over [begin, end] in a half [start, start + size], for both ψ: (n, 2, k). `at` is s, or t with `at_end`.

    All in leaves; `rate` is −dψ/du of H's a leaf. From an end of the interval, ψ = ½ − (u − s)/(t − s) = −½ + (t − u)/(t − s).
    """
    share = np.maximum(end - begin, 0.0) / size
    middle = 0.5 * (begin + end)
    mean = (middle - start) / size
    psi = -0.5 + (at - middle) * rate if at_end else 0.5 - (middle - at) * rate
    zeroth = np.stack([share, share * psi], 1)
    return zeroth, zeroth * mean[:, None] - np.stack([np.zeros_like(psi), share**3 * rate * size / 12.0], 1)


def _halving(start: Floats, span: Floats, lo: Floats, hi: Floats, rate: Floats, at: Floats, at_end: bool) -> Floats:
    """Weights (n, 2, 2, levels) of halvings of cells from `start`, where a leaf is 1 long and the interval is [lo, hi]."""
    half = 0.5 * span
    lo, hi, rate, at = (v[:, None] for v in (lo, hi, rate, at))
    a = _moments(np.maximum(lo, start), np.minimum(hi, start + half), start, half, rate, at, at_end)
    b = _moments(np.maximum(lo, start + half), np.minimum(hi, start + span), start + half, half, rate, at, at_end)
    Z = 6.0 * (a[1] + b[1]) - 2.0 * a[0] - 4.0 * b[0]
    N = 3.0 * (a[0] - b[0]) - 6.0 * (a[1] - b[1])
    return np.stack([Z * np.sqrt(span / 16.0), N * np.sqrt(span / 12.0)], 2)


def _roots_between(first: Integers, last: Integers) -> tuple[Floats, Floats]:
    """Widths of the roots strictly between two, (n, most), 0 beyond; and the sums of those before each."""
    number = last - first - 1
    turn = np.arange(max(0, int(number.max(initial=0))))
    width = np.where(turn < number[:, None], root_width(first[:, None] + 1 + turn), 0.0)
    return width, np.cumsum(width, 1) - width


def _root_part(p, q, same, between, before, length, depth):
    """(which, address, weight) of the roots of s, between, and of t."""
    full = np.full((len(same), 1), 2.0**depth)
    zero = np.zeros_like(full)
    leaf_p, leaf_q = (root_width(v.r) * 2.0**-depth for v in (p, q))
    y_p, y_q, length = p.y[:, None], q.y[:, None], length[:, None]
    first = _moments(y_p, np.where(same[:, None], y_q, full), zero, full, leaf_p[:, None] / length, y_p, False)
    last = _moments(zero, y_q, zero, full, leaf_q[:, None] / length, y_q, True)
    turn = np.arange(between.shape[1])
    ones = np.ones_like(between)
    begun = (full - y_p) * leaf_p[:, None] + before
    # ψ in units of a whole root
    middle = _moments(
        0.0 * ones, ones, 0.0 * ones, ones, between / length, -begun / np.where(between > 0, between, 1.0), False
    )
    zeroth, one = (np.concatenate(v, -1) for v in zip(first, middle, last, strict=True))
    r = np.concatenate([p.r[:, None], p.r[:, None] + 1 + turn, q.r[:, None]], 1)
    on = np.concatenate([np.ones_like(same)[:, None], between > 0, (~same & (q.y > 0))[:, None]], 1)
    width = root_width(r)[:, None]
    weight = np.stack([zeroth * np.sqrt(width), (zeroth - 2.0 * one) * 6.0 * np.sqrt(width / 12.0)], 2)
    return on, address(r, 0), weight
