"""One Brownian path a sample, evaluated anywhere without memory: increments and space-time Lévy areas.

The real line is cut into root cells [2^e, 2^{e+1}) (mirrored below 0, one cell next to 0), so that the resolution is relative.
Every cell [a, a + h] has W = w(a + h) − w(a) and H = (1/h)∫(w(u) − w(a) − (u − a)W/h) du, independent N(0, h) and N(0, h/12);
a root draws them, its descendants come from halving,

    W₁ = W/2 + 3H/2 + Z,   W₂ = W − W₁,   H₁,₂ = H/4 − Z/2 ± N/2,   Z ~ N(0, h/16), N ~ N(0, h/12),

with one Box–Muller pair (Z, N) a cell and element, keyed by (seed, cell, element). At `depth` halvings below its root the path
is the quadratic θW + 6θ(1 − θ)H, the mean given (W, H). An interval is put together from the fewest cells, always the
same ones in the same order, so its (W, H) has the same bits in whatever order, batch or sweep it is asked for.

Sources: Foster, Lyons & Oberhauser 2020 and Foster, Habermann & Goncalo dos Reis 2024 (H and its bridges);
Jelinčič, Tao, Cass, Foster & Kidger 2024, "Single-seed generation of Brownian paths and integrals" (virtual Brownian tree).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.random import BLOCK, Key, mix64_, normal_pair_

if TYPE_CHECKING:
    from torchsde import BaseBrownian

PATH_STREAM = 16
"""Random stream of Brownian paths, apart from those of priors, steps and data."""
LOWEST, HIGHEST = -24, 80
"""Exponents of the root cells: [0, 2^LOWEST) is one cell, times reach ±2^HIGHEST."""
DEEPEST = 24
"""Bits of a cell's address inside its root."""
SNAP = 2.0**-20
"""Times this share of a leaf away from a leaf's end are that end: rounding must not cost a descent."""
COLUMNS = 1 << 13
"""Elements of the batch worked on at once, so that a level of the tree stays in a core's cache."""
PLANNED = 1 << 12
"""Longest sweep whose plan is kept."""
SWEEP = 1 << 20
"""Elements drawn ahead in a sweep, over all its steps."""

Time = float | Tensor


class BrownianPath:
    """w on the whole real line, one independent path for every sample and element.

    Args:
        seeds: one integer a sample: int64 (batch,) tensor or a sequence; see `sample_seeds`.
        shape: event shape, without the batch.
        dtype, device: of the values. float32 and float64 see the same path up to rounding.
        depth: halvings below a root cell, 1…24. Steps should be longer than 2^−depth of |t|: a step of length h has its
            variance low by at most 2^−depth |t|/(8h) of itself. A descent costs `depth` normal pairs an element.

    Raises:
        InvalidInput: the seeds are not integers, one a sample, or an argument is out of range.

    Example:
        >>> path = BrownianPath(sample_seeds(7, 256), (2,))
        >>> W, H = path.increment(0.25, 0.5)
    """

    def __init__(
        self,
        seeds: Tensor | Sequence[int],
        shape: Sequence[int] | int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        depth: int = 18,
    ):
        given = torch.as_tensor(seeds)
        if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
            raise InvalidInput(
                f"a path needs integer seeds of shape (batch,); got {given.dtype} of {tuple(given.shape)}. Write "
                "sf.BrownianPath(sf.sample_seeds(7, batch), shape)"
            )
        if not dtype.is_floating_point or dtype.itemsize < 4:
            raise InvalidInput(f"a path is float32 or float64; got {dtype}. Cast what it returns")
        if not 1 <= depth <= DEEPEST:
            raise InvalidInput(f"depth must lie in 1…{DEEPEST}; got {depth}")
        self.seeds = given.to(device or given.device, torch.int64)
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype, self.depth = dtype, depth
        self._elements = math.prod(self.shape)
        self._key = Key.of(self.seeds, PATH_STREAM)

    def __repr__(self) -> str:
        return f"BrownianPath({self.batch} samples, shape={self.shape}, {self.dtype}, depth={self.depth})"

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.seeds.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the values are made."""
        return self.seeds.device

    def restrict(self, rows: Tensor) -> BrownianPath:
        """The paths of the samples `rows` (indices or mask), in that order."""
        return BrownianPath(self.seeds[rows], self.shape, self.dtype, depth=self.depth)

    def increment(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """(W, H) over [s, t], each (batch, *shape).

        W = w(t) − w(s). With t < s the path is run backwards, as reverse SDEs do: W changes sign, H does not.
        In both directions ∫(w(u) − w(s))|du| = |t − s|(W/2 + H).

        Args:
            s, t: floats, 0-d tensors, or one time a sample (batch,); |time| < 2^80.
        """
        s, t = self._time(s), self._time(t)
        if s.ndim == t.ndim == 0:
            W, H = self._shared(s[None], t[None])
        else:
            W, H = self._own(s.expand(self.batch), t.expand(self.batch))
        return W.reshape(self.batch, *self.shape), H.reshape(self.batch, *self.shape)

    def increments(self, grid: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
        """(W, H) of all steps of a grid (n + 1,), increasing or decreasing: (n, batch, *shape) each.

        The numbers of `increment`, bit for bit, drawn level by level so that steps share their common cells.
        """
        grid = torch.as_tensor(grid, dtype=torch.float64, device=self.device)
        if grid.ndim != 1 or grid.numel() < 2:
            raise InvalidInput(f"a sweep needs a grid of at least two times, (n + 1,); got shape {tuple(grid.shape)}")
        W, H = self._shared(grid[:-1], grid[1:])
        return W.reshape(-1, self.batch, *self.shape), H.reshape(-1, self.batch, *self.shape)

    def sweep(self, grid: Tensor | Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """(W, H) of one step of the grid after the other, drawn some steps ahead in bounded memory."""
        grid = torch.as_tensor(grid, dtype=torch.float64, device=self.device)
        ahead = max(1, SWEEP // max(1, self.batch * self._elements))
        for first in range(0, grid.numel() - 1, ahead):
            W, H = self.increments(grid[first : first + ahead + 1])
            yield from zip(W, H, strict=True)

    def as_torchsde(self, flipped: bool = False) -> BaseBrownian:
        """This path as torchsde's `bm=`, so that its solvers see the same noise; events must be flat, shape (d,).

        Args:
            flipped: torchsde's clock is −t, for equations solved from large t to small.
        """
        if len(self.shape) != 1:
            raise InvalidInput(f"torchsde's states are (batch, d); this path has events of shape {self.shape}")
        from sdeflow.brownian_torchsde import path_class

        return path_class()(self, flipped)

    # --- from intervals to cells

    def _time(self, t: Time) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64, device=self.device)
        if t.ndim and t.shape != (self.batch,):
            raise InvalidInput(f"a time must be one number or one a sample ({self.batch},); got shape {tuple(t.shape)}")
        return t

    def _shared(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals (n,) that all samples share: (n, batch·elements)."""
        columns = self.batch * self._elements
        W, H = (torch.empty(s.shape[0], columns, dtype=self.dtype, device=self.device) for _ in range(2))
        if 1 < s.shape[0] <= PLANNED:  # the grid of a sweep comes again with the next batch
            plan = _sweep_plan(tuple(s.tolist()), tuple(t.tolist()), self.depth, self.device)
        else:
            plan = _Plan.of(s, t, self.depth, 1, torch.zeros_like(s, dtype=torch.int64))
        state, gamma = (k[:, None].expand(-1, self._elements) for k in self._key)
        element = torch.arange(self._elements, dtype=torch.int64, device=self.device)
        state, gamma = (state + (element + 1) * gamma).reshape(1, -1), gamma.reshape(1, -1)
        for c in range(0, columns, COLUMNS):
            part = slice(c, c + COLUMNS)
            W[:, part], H[:, part] = plan.run(state[:, part], gamma[:, part], self.dtype)
        return W, H

    def _own(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One interval a sample, (batch,): (batch, elements)."""
        W, H = (torch.empty(self.batch, self._elements, dtype=self.dtype, device=self.device) for _ in range(2))
        element = torch.arange(self._elements, dtype=torch.int64, device=self.device)
        ahead = max(1, 2 * COLUMNS // max(1, self._elements))
        for first in range(0, self.batch, ahead):
            part = slice(first, first + ahead)
            state, gamma = self._key.state[part, None], self._key.gamma[part, None]
            samples = torch.arange(state.shape[0], device=self.device)
            plan = _Plan.of(s[part], t[part], self.depth, state.shape[0], samples)
            W[part], H[part] = plan.run(state + (element + 1) * gamma, gamma, self.dtype)
        return W, H


class _Points(NamedTuple):
    """Where times lie: root cell r, its start a and width h, leaf x and place θ in the leaf; all of one shape."""

    r: Tensor
    h: Tensor
    x: Tensor
    theta: Tensor

    @classmethod
    def of(cls, t: Tensor, depth: int) -> _Points:
        if not bool((t.abs() < 2.0**HIGHEST).all()):
            raise InvalidInput(f"path times must be finite and below 2^{HIGHEST}; got {t.flatten()[:4].tolist()}")
        mantissa, exponent = torch.frexp(t.abs())
        # below 0 a cell is open at its other end: −2^e starts the cell that ends at −2^{e−1}
        e = exponent.long() - 1 - ((t < 0) & (mantissa == 0.5)).long()
        e = torch.where(t == 0, LOWEST - 1, e)
        low = e < LOWEST
        e = e.clamp(min=LOWEST)
        h = _power_of_two(e)
        a = torch.where(t >= 0, torch.where(low, 0.0, h), torch.where(low, -h, -2.0 * h))
        r = torch.where(t >= 0, e - LOWEST + 1 - low.long(), LOWEST - 2 - e + low.long())
        y = (t - a) * (2.0**depth / h)
        near = y.round()
        y = torch.where((y - near).abs() < SNAP, near, y)
        x = y.floor().long()
        over = x >> depth  # snapped up to the end of the root: the start of the next one
        theta = y - y.floor()
        r_next = r + over
        return cls(r_next, torch.where(over > 0, _root_width(r_next), h), x - (over << depth), theta)


def _power_of_two(e: Tensor) -> Tensor:
    """2^e exactly, float64, for LOWEST ≤ e ≤ HIGHEST."""
    return torch.tensor([2.0**k for k in range(LOWEST, HIGHEST + 1)], dtype=torch.float64, device=e.device)[e - LOWEST]


def _root_width(r: Tensor) -> Tensor:
    """Width of root cell r: r = 0, 1, 2, … upwards from 0, −1, −2, … downwards."""
    n = torch.where(r >= 0, r, -1 - r)
    return _power_of_two(LOWEST + (n - 1).clamp(min=0))


def _address(r: Tensor, heap: int | Tensor) -> Tensor:
    """Address of a cell of root r: heap 0 for what the root draws, 2^level + path for a halving."""
    return ((r + 128) << (DEEPEST + 1)) + heap


def _bits(x: Tensor) -> Tensor:
    """Bit length of integers 0 ≤ x < 2^53."""
    return torch.frexp(x.double()).exponent.long()


def _trailing_zeros(x: Tensor, none: int) -> Tensor:
    """Number of zero bits below the lowest one; `none` for x = 0."""
    return torch.where(x == 0, none, _bits(x & -x) - 1)


def _parts(ids: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """(address (U, 1), sample (U,), root's width (U, 1)) of cell numbers address·samples + sample."""
    address = ids // samples
    return address[:, None], ids % samples, _root_width((address >> (DEEPEST + 1)) - 128)[:, None]


class _Take(NamedTuple):
    """Halves that intervals take up at one level."""

    row: Tensor  # (k,) interval
    half: Tensor  # (k,) which half
    width: Tensor  # (k, 1) of the half
    length: Tensor  # (k, 1) of what the interval's prefix or suffix has so far


class _Level(NamedTuple):
    """The halving of U cells; halves are numbered left 0…U−1, right U…2U−1."""

    code: Tensor  # (U, 1) address of the cell
    sample: Tensor  # (U,) its row of keys
    width: Tensor  # (U, 1) of the cell
    append: _Take  # to prefixes, on their right
    prepend: _Take  # to suffixes, on their left
    source: Tensor  # (U',) halves that are the cells of the next level


class _Leaf(NamedTuple):
    """Parts [θ₁, θ₂] of leaves."""

    row: Tensor  # (k,) interval
    cell: Tensor  # (k,) leaf
    width: Tensor  # (k, 1) of the leaf
    first: Tensor  # (k, 1) θ₁
    last: Tensor  # (k, 1) θ₂
    length: Tensor  # (k, 1) of what the interval's prefix or suffix has so far


class _Roots(NamedTuple):
    """Root cells to draw, and, where they are whole pieces of intervals, whose."""

    code: Tensor  # (U, 1)
    sample: Tensor  # (U,)
    width: Tensor  # (U, 1)
    row: Tensor  # (U,) interval
    turn: Tensor  # (U,) 0 for an interval's first root, 1 for its second, …


class _Plan(NamedTuple):
    """The cells of some intervals [s, t]: integers and lengths, no random numbers yet.

    An interval inside one root is a suffix of the left and a prefix of the right half of the smallest cell around it; any
    other is a suffix of a root, whole roots, and a prefix of a root. Rows 0…n−1 below are suffixes, n…2n−1 prefixes.
    """

    sign: Tensor
    roots: _Roots
    levels: list[_Level]
    leaf: _Leaf
    between: _Roots
    prefix: Tensor  # (n, 1) length of the prefixes
    length: Tensor  # (n, 1) of the intervals

    @classmethod
    def of(cls, s: Tensor, t: Tensor, depth: int, samples: int, sample: Tensor) -> _Plan:
        """The plan for s, t (n,), interval i belonging to sample[i] < samples."""
        n, p, q = s.shape[0], _Points.of(torch.minimum(s, t), depth), _Points.of(torch.maximum(s, t), depth)
        r, h, x, theta = (torch.cat(pair) for pair in zip(p, q, strict=True))
        # levels above the smallest cell around the interval: −1 for several roots, `depth` for one leaf
        common = torch.where(p.r == q.r, depth - _bits(p.x ^ q.x), -1)
        # levels after which a point is the end of a cell: 0 at a root's start, depth + 1 inside a leaf
        ends = torch.where(theta > 0, depth + 1, depth - _trailing_zeros(x, depth))
        whole = (common < 0) & (ends[:n] == 0)
        empty = (p.r == q.r) & (p.x == q.x) & (p.theta == q.theta)
        short = (ends[:n] <= common) & (common < depth)  # the suffix is all of the left half
        need = torch.cat([torch.where(short, common + 1, ends[:n]), ends[n:]]).clamp(max=depth)
        need[:n][common == depth] = depth
        need[:n][whole | empty] = 0
        need[n:][empty | (common == depth)] = 0
        in_leaf = torch.cat([(theta[:n] > 0) | (common == depth), theta[n:] > 0]) & (need == depth)
        in_leaf[:n] &= ~short
        c, who, done = common.repeat(2), sample.repeat(2), torch.zeros_like(h)

        active = (need > 0).nonzero()[:, 0]
        ids, place = torch.unique(_address(r[active], 1) * samples + who[active], return_inverse=True)
        address, own, width = _parts(ids, samples)
        roots = _Roots(address - 1, own, width, own, own)
        levels = []
        for level in range(int(need.max())):
            bit, cells = (x[active] >> (depth - 1 - level)) & 1, ids.numel()
            suffix, inside, open_ = active < n, level > c[active], ends[active] > level
            corner = suffix & (level == c[active]) & ~open_
            right = suffix & inside & open_ & ((bit == 0) | (ends[active] == level + 1))
            left = ~suffix & inside & (bit == 1)
            takes = []
            for chosen in (left, right | corner):
                rows = active[chosen]
                width = h[rows] * 2.0 ** -(level + 1)
                half = (place + right * cells)[chosen]
                takes.append(_Take(rows, half, width[:, None], done[rows][:, None]))
                done[rows] += width
            code, own, width = _parts(ids, samples)
            stay = (need[active] > level + 1) | in_leaf[active]
            taken, active = (place + bit * cells)[stay], active[stay]
            path = (1 << (level + 1)) + (x[active] >> (depth - 1 - level))
            ids, place = torch.unique(_address(r[active], path) * samples + who[active], return_inverse=True)
            source = torch.empty_like(ids).index_copy_(0, place, taken)
            levels.append(_Level(code, own, width * 2.0**-level, takes[0], takes[1], source))
        first = torch.where(active < n, theta[active], 0.0)
        last = torch.where(active >= n, theta[active], 1.0)
        one = (active < n) & (c[active] == depth)
        last[one] = theta[n:][active[one]]
        width = h[active] * 2.0**-depth
        leaf = _Leaf(active, place, *(v[:, None] for v in (width, first, last, done[active])))
        done[active] += width * (last - first)
        between = _between(p.r + (~whole).long(), q.r, sample, samples)
        middle = torch.zeros_like(s).index_add_(0, between.row, between.width[:, 0])
        length = torch.where(empty, 1.0, done[:n] + middle + done[n:])
        sign = torch.where(s <= t, 1.0, -1.0)
        return cls(sign[:, None], roots, levels, leaf, between, done[n:, None], length[:, None])

    def run(self, state: Tensor, gamma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(W, H) of the intervals, (n, C), from keys (samples, C) and (samples, C or 1)."""
        n, columns = self.sign.shape[0], state.shape[1]
        W, A = (
            torch.zeros(2 * n, columns, dtype=dtype, device=state.device) for _ in range(2)
        )  # A: ∫ of w − w(piece's start)
        cell, arch = _draw_roots(self.roots, state, gamma, dtype)
        normals = self._normals(state, gamma, dtype)
        for level, (Z, N) in zip(self.levels, normals, strict=True):
            cell, arch = _halve(level, cell, arch, Z, N)
            for take, on_left in ((level.append, False), (level.prepend, True)):
                if take.row.numel():
                    w, k = cell[take.half], arch[take.half]
                    _join(W, A, take.row, w, k, take.width.to(dtype), take.length.to(dtype), on_left)
            cell, arch = cell[level.source], arch[level.source]
        self._take_leaves(W, A, cell, arch)
        W, A, prefix_W, prefix_A = W[:n], A[:n], W[n:], A[n:]
        self._take_roots(W, A, state, gamma)
        A += W * self.prefix.to(dtype)
        A += prefix_A
        W += prefix_W
        H = A.mul_((1.0 / self.length).to(dtype)).sub_(W * 0.5)
        return W.mul_(self.sign.to(dtype)), H

    def _normals(self, state: Tensor, gamma: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """(Z, N)/std of every level: made together where there are few, since torch's calls then cost more than numbers."""
        sizes = [level.code.shape[0] for level in self.levels]
        if self.levels and sum(sizes) * state.shape[1] <= 4 * BLOCK:
            code, sample = (torch.cat([getattr(v, k) for v in self.levels]) for k in ("code", "sample"))
            first, second = _pairs(code, sample, state, gamma, dtype)
            yield from zip(first.split(sizes), second.split(sizes), strict=True)
        else:
            for level in self.levels:
                yield _pairs(level.code, level.sample, state, gamma, dtype)

    def _take_leaves(self, W: Tensor, A: Tensor, cell: Tensor, arch: Tensor) -> None:
        row, place, *scalars = self.leaf
        width, first, last, length = (v.to(W.dtype) for v in scalars)
        part = last - first
        bow = 6.0 * (last * (1.0 - last) - first * (1.0 - first))
        for chosen, on_left in ((row < self.sign.shape[0], True), (row >= self.sign.shape[0], False)):
            if bool(chosen.any()):
                c, a, p = cell[place[chosen]], arch[place[chosen]], part[chosen]
                w, k = c * p + a * bow[chosen], a * p**2
                _join(W, A, row[chosen], w, k, width[chosen] * p, length[chosen], on_left)

    def _take_roots(self, W: Tensor, A: Tensor, state: Tensor, gamma: Tensor) -> None:
        cell, arch = _draw_roots(self.between, state, gamma, W.dtype)
        width = self.between.width.to(W.dtype)
        for turn in range(int(self.between.turn.max()) + 1 if width.numel() else 0):
            mine = (self.between.turn == turn).nonzero()[:, 0]
            _join(W, A, self.between.row[mine], cell[mine], arch[mine], width[mine], width[mine], False)


@functools.lru_cache(maxsize=32)
def _sweep_plan(s: tuple[float, ...], t: tuple[float, ...], depth: int, device: torch.device) -> _Plan:
    first, last = (torch.tensor(v, dtype=torch.float64, device=device) for v in (s, t))
    return _Plan.of(first, last, depth, 1, torch.zeros(len(s), dtype=torch.int64, device=device))


def _join(
    W: Tensor, A: Tensor, row: Tensor, w: Tensor, k: Tensor, width: Tensor, length: Tensor, on_left: bool
) -> None:
    """Give the intervals `row` a piece with increment w, area k and that width, in place.

    A of a union is A_left + |right|·W_left + A_right, A = width (w/2 + k) of the piece; `length` is that of what stands.
    """
    area = (w * 0.5 + k) * width
    area += w * length if on_left else W[row] * width
    A.index_add_(0, row, area)
    W.index_add_(0, row, w)


def _between(first: Tensor, last: Tensor, sample: Tensor, samples: int) -> _Roots:
    """The roots first … last − 1 of every interval, in order."""
    count = (last - first).clamp(min=0)
    row = torch.arange(count.numel(), device=count.device).repeat_interleave(count)
    turn = torch.arange(row.numel(), device=count.device) - (count.cumsum(0) - count)[row]
    address, own, width = _parts(_address(first[row] + turn, 0) * samples + sample[row], samples)
    return _Roots(address, own, width, row, turn)


def _draw_roots(roots: _Roots, state: Tensor, gamma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(W, H) of root cells, (U, C)."""
    W, H = _pairs(roots.code, roots.sample, state, gamma, dtype)
    return W.mul_(roots.width.sqrt().to(dtype)), H.mul_((roots.width / 12.0).sqrt().to(dtype))


def _halve(level: _Level, W: Tensor, H: Tensor, Z: Tensor, N: Tensor) -> tuple[Tensor, Tensor]:
    """(W, H) of the halves, (2U, C) each, from those of the cells (U, C) and two normals each."""
    Z *= (level.width / 16.0).sqrt().to(W.dtype)
    N *= (level.width / 48.0).sqrt().to(W.dtype)  # half of N ~ N(0, h/12)
    W12, H12 = W.new_empty(2, *W.shape), H.new_empty(2, *H.shape)
    torch.mul(H, 1.5, out=W12[0])
    W12[0] += W * 0.5
    W12[0] += Z
    torch.sub(W, W12[0], out=W12[1])
    common = H.mul_(0.25).sub_(Z.mul_(0.5))
    torch.add(common, N, out=H12[0])
    torch.sub(common, N, out=H12[1])
    return W12.flatten(0, 1), H12.flatten(0, 1)


def _pairs(code: Tensor, sample: Tensor, state: Tensor, gamma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Independent standard normals of the cells, two of (U, C): word code·2³⁰ + element of every sample's generator."""
    cells, columns = code.shape[0], state.shape[1]
    first, second = (torch.empty(cells, columns, dtype=dtype, device=state.device) for _ in range(2))
    own = state.shape[0] > 1
    rows = max(1, BLOCK // max(1, columns))
    for i in range(0, cells, rows):
        part = slice(i, i + rows)
        words = (code[part] << 30) * (gamma[sample[part]] if own else gamma)
        words = words + (state[sample[part]] if own else state)
        normal_pair_(mix64_(words), first[part], second[part])
    return first, second
