"""Which cells an interval needs, and how its (W, H) is put together from them; on the host, before any number is drawn.

The line is cut into root cells [2^e, 2^{e+1}) (mirrored below 0, one cell next to 0). A root draws its (W, H); the `halvings`
below it give the (W, H) of the halves of every cell that an interval's ends cut:

    W₁ = W/2 + 3H/2 + Z,   H₁ = H/4 − Z/2 + N/2,   W₂ = W/2 − 3H/2 − Z,   H₂ = H/4 − Z/2 − N/2,

Z ~ N(0, h/16) and N ~ N(0, h/12), the Brownian bridge of (W, H) in the middle. All are kept as standard normals, W = √h A and
H = √(h/12) B, for which (A, B, Z, N) ↦ (A₁, B₁, A₂, B₂) is one orthogonal matrix at every level.

An interval is the disjoint union of whole roots and halves, and of parts of the last cells its ends cut. Of such a last cell,
[a, a + λ), the path is the quadratic mean given its (W, H) plus √λ b(θ), b one of the bridges of a table, quadratic between the
2^{depth − halvings} + 1 knots. Pieces (Wᵢ, Hᵢ) of lengths dᵢ make up

    W = Σ Wᵢ,   H = Σ ψ(mᵢ) Wᵢ + (dᵢ/h) Hᵢ,   ψ(u) = ½ − (u − s)/(t − s), mᵢ the middle of the piece.

No weight is a difference of long sums, so short intervals keep their relative accuracy.
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
HALVINGS = 10
"""Halvings whose normals are drawn cell by cell; what lies deeper comes from the table of bridges."""
TABLE_LEVELS = 6
"""Halvings the table of bridges stands for, at most: deeper paths have more of the others."""
ROOT_TWIN = 1 << DEEPEST
"""From the address of a root to that of its second draw; no other cell has it, since the deepest chooses no bridge."""
SQRT3, SQRT12 = 3.0**0.5, 12.0**0.5
_LEVEL = 34
_ADDRESS = (1 << _LEVEL) - 1

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


class Plan(NamedTuple):
    """The cells of some intervals, and the weights of their values.

    The values are pairs, in rows: (A, B) of the roots; (A, B) of the left and right halves of the cells, in turn; two pairs of
    every lookup in the table, the first pairs of all, then the second. Interval i is W = Σ_j weight[i, 0, 0, j]·first +
    weight[i, 0, 1, j]·second over the pairs of rows row[i, j], and H with weight[i, 1].
    """

    roots: Integers  # (2R,) addresses, two for each root
    cells: Integers  # (U,) addresses of the cells to halve, level by level
    levels: list[int]  # cells of each level
    parent: Integers  # (U,) rows of the cells' own values
    leaves: Integers  # (V,) addresses of the cells that choose a bridge
    lookup: Integers  # (2, Q) which leaf, and which column of the table
    owner: Integers  # (2R + U + V,) the interval that brought the cell
    count: Integers  # (n,) pieces
    row: Integers  # (n, S), 0 beyond count
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
    """Address of a cell of root r: heap 0 for what the root draws, 2^level + path for a cell in it."""
    return ((r + 128) << (DEEPEST + 1)) + heap


def halvings(depth: int) -> int:
    """How many of `depth` halvings are drawn cell by cell; the table of bridges has the rest."""
    return depth if depth <= HALVINGS else max(HALVINGS, depth - TABLE_LEVELS)


class _Ends(NamedTuple):
    """Both ends of n intervals, arrays (2, n), and the cells they lie in, (levels + 1, 2, n); lengths in leaves."""

    r: Integers
    y: Floats
    start: Floats  # of the cell
    cut: Booleans  # whether the end lies strictly inside
    same: Booleans  # (n,) one root
    shared: Booleans  # (levels + 1, n) s and t lie strictly inside the same cell
    span: Floats  # (levels + 1, 1, 1) of a cell
    leaf: Floats  # length of a leaf
    between: Floats  # (m, n) lengths of the roots between
    length: Floats  # (n,) of the interval; 1 if it is empty

    @classmethod
    def of(cls, s: Floats, t: Floats, depth: int) -> _Ends:
        r, y = _Points.of(np.stack([np.minimum(s, t), np.maximum(s, t)]), depth)
        span = np.ldexp(1.0, depth - np.arange(halvings(depth) + 1))[:, None, None]
        start = np.floor(y / span) * span
        same, leaf = r[0] == r[1], root_width(r) * 2.0**-depth
        number = r[1] - r[0] - 1
        turn = np.arange(max(0, int(number.max(initial=0))))[:, None]
        between = np.where(turn < number, root_width(r[0] + 1 + turn), 0.0)
        apart = (2.0**depth - y[0]) * leaf[0] + between.sum(0) + y[1] * leaf[1]
        length = np.where(same, (y[1] - y[0]) * leaf[0], apart)
        cut = (y != start) & (length > 0)
        shared = cut.all(1) & same & (start[:, 0] == start[:, 1])
        return cls(r, y, start, cut, same, shared, span, leaf, between, np.where(length > 0, length, 1.0))

    def psi(self, end: int, at: Floats) -> Floats:
        """ψ at places in the root of that end, found from there."""
        away = (self.y[end] - at) * (self.leaf[end] / self.length)
        return away - 0.5 if end else away + 0.5


def plan(s: Floats, t: Floats, depth: int, together: bool) -> Plan:
    """The plan of intervals from s to t, (n,) each; with t < s the signs of W's are turned.

    `together`: all intervals draw a cell once; else each draws its own.
    """
    ends, last = _Ends.of(s, t, depth), halvings(depth)
    roots, root_owner, root = _roots(ends, together)
    path = (ends.start / ends.span).astype(np.int64)
    level = np.arange(last + 1)[:, None, None]
    code = address(ends.r, (1 << level) + path)
    cells, cell_owner, number = _number_ends(ends, slice(last), code + (level << _LEVEL), together)
    halves = len(roots) + 2 * number
    at = np.concatenate([root[None, :2], halves + (path[1:] & 1)])  # rows of the cells the ends lie in
    parent = np.zeros(len(cells), np.int64)
    parent[number[ends.cut[:last]]] = at[:last][ends.cut[:last]]
    pieces = [_whole_roots(ends, root, depth)]
    if last == depth:
        leaves = leaf_owner = lookup = np.zeros(0, np.int64)
        pieces += [_pieces(ends, end, halves[:, end], at[last, end], None, None) for end in (0, 1)]
    else:
        leaves, leaf_owner, which = _number_ends(ends, slice(last, None), code, together)
        inner, knots = _table_parts(ends, 2 ** (depth - last))
        column = (np.floor(ends.y) - ends.start[-1]).astype(np.int64)
        lookup, _, found = _number(inner | knots, (which[0] << _LEVEL) + column, together)
        found += len(roots) + 2 * len(cells)
        for end in (0, 1):
            parts = _pieces(ends, end, halves[:, end], at[last, end], inner[end], found[end])
            knot = _knot(ends, end, knots[end], found[end] + len(lookup), 2 ** (depth - last), parts[2][-1])
            pieces += [parts, knot]
    on, row, weight = (np.concatenate(v) for v in zip(*pieces, strict=True))
    weight[:, 0] *= np.where(s <= t, 1.0, -1.0)
    owner = np.concatenate([root_owner, root_owner, cell_owner, leaf_owner])
    levels = np.bincount(cells >> _LEVEL).tolist()
    lookup = np.stack([lookup >> _LEVEL, lookup & _ADDRESS])
    roots, packed = np.concatenate([roots, roots + ROOT_TWIN]), _packed(on, row, weight)
    return Plan(roots, cells & _ADDRESS, levels, parent, leaves, lookup, owner, *packed)


def _number(on: Booleans, code: Integers, together: bool) -> tuple[Integers, Integers, Integers]:
    """The codes that are on, (…, n), who brought them, and the number of each; in order of the codes if drawn `together`."""
    where = np.flatnonzero(on)
    codes, owner, place = code.ravel()[where], where % on.shape[-1], np.arange(len(where))
    if together and on.shape[-1] > 1:
        codes, first, place = np.unique(codes, return_index=True, return_inverse=True)
        owner = owner[first]
    number = np.zeros(on.shape, np.int64)
    number.ravel()[where] = place
    return codes, owner, number


def _number_ends(ends: _Ends, levels: slice, code: Integers, together: bool) -> tuple[Integers, Integers, Integers]:
    """`_number` of the cut cells of some levels, where t has the cell of s if that is its own."""
    on, shared = ends.cut[levels].copy(), ends.shared[levels]
    on[:, 1] &= ~shared
    codes, owner, number = _number(on, code[levels], together)
    number[:, 1] = np.where(shared, number[:, 0], number[:, 1])
    return codes, owner, number


def _roots(ends: _Ends, together: bool) -> tuple[Integers, Integers, Integers]:
    """`_number` of the roots of s, of t, and between, (2 + m, n)."""
    on = np.concatenate([ends.cut[0], ends.between > 0])
    on[0] |= _whole(ends)
    one = ends.same & on[0]
    on[1] &= ~one
    turn = np.arange(len(ends.between))[:, None]
    r = np.concatenate([ends.r, ends.r[0] + 1 + turn])
    codes, owner, number = _number(on, address(r, 0), together)
    number[1] = np.where(one, number[0], number[1])
    return codes, owner, number


def _whole(ends: _Ends) -> Booleans:
    """Whether the interval has all of the root it starts in."""
    return ~ends.same & (ends.y[0] == 0)


def _whole_roots(ends: _Ends, row: Integers, depth: int) -> tuple[Booleans, Integers, Floats]:
    """(which, rows, weights) of the roots that the interval has from end to end: (k, n), (k, n), (k, 2, 2, n)."""
    on = np.concatenate([_whole(ends)[None], ends.between > 0])
    width = np.concatenate([(2.0**depth * ends.leaf[0])[None], ends.between])
    begun = np.concatenate([np.zeros_like(width[:1]), (2.0**depth - ends.y[0]) * ends.leaf[0] + _before(ends.between)])
    psi = 0.5 - (begun + 0.5 * width) / ends.length
    weight = np.stack([np.ones_like(psi), np.zeros_like(psi), psi, width / ends.length / SQRT12], 1)
    weight *= np.sqrt(width)[:, None]
    return on, np.concatenate([row[:1], row[2:]]), weight.reshape(-1, 2, 2, len(ends.length))


def _before(width: Floats) -> Floats:
    return np.cumsum(width, 0) - width


def _pieces(
    ends: _Ends, end: int, halves: Integers, last: Integers, inner: Booleans | None, table: Integers | None
) -> tuple[Booleans, Integers, Floats]:
    """(which, rows, weights) of what the interval has of the cells that one end cuts: (k, n), (k, n), (k, 2, 2, n).

    Those are `halves` of them beside the end's way down, its part of the `last` cell, and, if there is a `table`, of the cell
    between knots. A cell that both ends cut is left to s.
    """
    y, start, span, cut = ends.y[end], ends.start[:, end], ends.span[:, 0], ends.cut[:, end]
    if end:
        low, high = np.where(ends.same, ends.y[0], 0.0), y
    else:
        low, high = y, np.where(ends.same, ends.y[1], ends.span[0, 0])
    half = span[1:]
    begin = start[:-1] if end else start[:-1] + half
    on = [cut[:-1] & (begin >= low) & (begin + half <= high), cut[-1:] & ~ends.shared[-1:] if end else cut[-1:]]
    rows = [halves + (1 - end), last[None]]
    begins, widths, units = [begin, start[-1:]], [half, span[-1:]], [half, span[-1:]]
    if inner is not None and table is not None:
        on, rows, begins = [*on, inner[None]], [*rows, table[None]], [*begins, np.floor(y)[None]]
        widths, units = [*widths, np.ones((1, 1))], [*units, span[-1:]]  # the table is in units of the last cell
    begin, width, unit = (np.concatenate(v) for v in (begins, widths, units))
    u, v = np.maximum(begin, low), np.minimum(begin + width, high)
    share = (v - u) / width
    lean = SQRT3 * share * (1.0 - ((u - begin) + (v - begin)) / width)
    psi = ends.psi(end, 0.5 * (u + v))
    bend = (v - u) * (ends.leaf[end] / ends.length) * share**2 / SQRT12
    weight = np.stack([share, lean, psi * share, psi * lean + bend], 1)
    weight *= np.sqrt(unit * ends.leaf[end])[:, None]
    return np.concatenate(on), np.concatenate(rows), weight.reshape(-1, 2, 2, len(y))


def _table_parts(ends: _Ends, knots: int) -> tuple[Booleans, Booleans]:
    """Which ends need a part of their cell between knots, and which the bridge at a knot: (2, n) each.

    From s the knot is the next, to t the last before. If no knot lies between them, or one only, the bridge's values there are
    no part of the interval; else the two knots are a cell apart at least, and their difference has lost little to rounding.
    """
    start, cut = ends.start[-1], ends.cut[-1]
    cell = np.floor(ends.y)
    knot = np.stack([np.ceil(ends.y[0]), cell[1]])
    inner = cut & (ends.y != cell)
    one = ends.same & (start[0] == start[1])
    inner[1] &= ~(one & inner[0] & (cell[0] == cell[1]))
    return inner, cut & (knot > start) & (knot < start + knots) & ~(one & (knot[1] <= knot[0]))


def _knot(
    ends: _Ends, end: int, on: Booleans, row: Integers, knots: int, cell: Floats
) -> tuple[Booleans, Integers, Floats]:
    """(which, rows, weights) of the bridge's value b and integral J at the knot beside an end.

    By parts: ∫dw = b(θ₁) − b(θ₀), and ∫ψ dw = ψb |θ₁ − ψb |θ₀ + (λ/h)(J(θ₁) − J(θ₀)). The table has b and J where the cell
    starts that the end lies in. Where s has the knot at its end, the weights (2, 2, n) of its `cell` get the difference.
    """
    y = ends.y[end]
    knot = np.floor(y) if end else np.ceil(y)
    leaf = ends.leaf[end] / ends.length
    size = np.sqrt(knots * ends.leaf[end])
    one, psi = np.ones_like(knot), ends.psi(end, knot)
    weight = np.stack([one, 0.0 * one, psi, knots * leaf]) * size
    if not end:
        moved = np.where(on & (knot != y), size, 0.0)
        cell -= (np.stack([one, 0.0 * one, psi + 0.5 * leaf, leaf / SQRT12]) * moved).reshape(cell.shape)
        weight[2] += leaf * moved
        weight = -weight
    return on[None], row[None], weight.reshape(1, 2, 2, -1)


def _packed(on: Booleans, row: Integers, weight: Floats) -> tuple[Integers, Integers, Floats]:
    """The pieces that are on, moved to the front in their order: count (n,), row (n, S), weight (n, 2, 2, S)."""
    count = on.sum(0)
    most = int(count.max(initial=0))
    order = np.argsort(~on, axis=0, kind="stable")[:most]
    past = np.arange(most)[:, None] >= count
    row = np.where(past, 0, np.take_along_axis(row, order, 0))
    weight = np.take_along_axis(weight, order[:, None, None], 0)
    weight = np.where(past[:, None, None], 0.0, weight)
    return count, row.T, weight.transpose(3, 1, 2, 0)
