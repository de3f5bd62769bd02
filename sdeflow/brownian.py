"""One Brownian path a sample, evaluated anywhere without memory: increments and space-time Lévy areas.

Every root cell and every halving draws two normals, keyed by (seed, cell, element), and the (W, H) of cells follow level by level
from root to leaf. `HALVINGS` below the root a cell chooses one of a table of bridges for all that lies deeper, down to `depth`
halvings, where the path is the quadratic θW + 6θ(1 − θ)H, the mean given (W, H). An interval is a weighted sum of cells and parts
of cells; `brownian_plan` has them and their weights. A cell is computed by the same sequence of operations whoever asks, and
an interval summed in the same order, so it has the same bits in any batch, sweep or order of queries.

What is exact: the mean and all second moments of (W, H) between ends of leaves. What is not: halvings take their normals from
`lattice_normals` with 2¹⁵ values each within ±4.2, roots from two of these, within ±5.9; and a step shorter than a cell of the
table, 2^−10 of |t|, has much of its variance from one of 2¹⁴ bridges, so its fourth moment is a few per cent off and it has
few values beyond 4σ. Sums of several such steps are normal again.

Sources: Foster, Lyons & Oberhauser 2020 and Foster, Habermann & Goncalo dos Reis 2024 (H and its bridges);
Jelinčič, Tao, Cass, Foster & Kidger 2024, "Single-seed generation of Brownian paths and integrals" (virtual Brownian tree).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.brownian_plan import DEEPEST, Floats, Integers, Plan, halvings, plan
from sdeflow.errors import InvalidInput
from sdeflow.random import BRIDGE_BITS, LATTICE_BITS, Key, bridges, lattice_normals, mix64_

if TYPE_CHECKING:
    from torchsde import BaseBrownian

PATH_STREAM = 16
"""Random stream of Brownian paths, apart from those of priors, steps and data."""
ROOT_1_2, ROOT_3, ROOT_1_8, ROOT_3_8 = 0.5**0.5, 3.0**0.5, 0.125**0.5, 0.375**0.5
_FIELDS = ((1 << LATTICE_BITS) - 1) * 0x0001000100010001
VALUES = 1 << 20
"""Pairs of values held at once: bounds memory, and few enough blocks that torch's calls cost less than numbers."""
STEPS = 256
"""Steps of a sweep worked on at once; they share their cells."""
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
            variance low by at most 2^−depth |t|/(6h) of itself, that of H by three
            times as much.

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
        depth: int = 16,
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
        if isinstance(s, (int, float)) and isinstance(t, (int, float)):
            W, H = self._shared(np.array([s], np.float64), np.array([t], np.float64))
        else:
            s, t = self._time(s), self._time(t)
            if s.ndim == t.ndim == 0:
                W, H = self._shared(s.cpu().numpy()[None], t.cpu().numpy()[None])
            else:
                W, H = self._own(s.expand(self.batch).cpu().numpy(), t.expand(self.batch).cpu().numpy())
        return W.reshape(self.batch, *self.shape), H.reshape(self.batch, *self.shape)

    def increments(self, grid: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
        """(W, H) of all steps of a grid (n + 1,), increasing or decreasing: (n, batch, *shape) each.

        The numbers of `increment`, bit for bit, drawn so that steps share their common cells.
        """
        grid = torch.as_tensor(grid, dtype=torch.float64)
        if grid.ndim != 1 or grid.numel() < 2:
            raise InvalidInput(f"a sweep needs a grid of at least two times, (n + 1,); got shape {tuple(grid.shape)}")
        at = grid.cpu().numpy()
        W, H = self._shared(at[:-1], at[1:])
        return W.reshape(-1, self.batch, *self.shape), H.reshape(-1, self.batch, *self.shape)

    def sweep(self, grid: Tensor | Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """(W, H) of one step of the grid after the other, drawn some steps ahead in bounded memory."""
        grid = torch.as_tensor(grid, dtype=torch.float64)
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

    def _shared(self, s: Floats, t: Floats) -> tuple[Tensor, Tensor]:
        """Intervals (n,) that all samples share: (n, batch, elements)."""
        e = self._elements
        out = torch.empty(2, len(s), self.batch * e, dtype=self.dtype, device=self.device)
        for first in range(0, len(s), STEPS):
            steps = slice(first, first + STEPS)
            drawing = _shared_drawing(s[steps].tobytes(), t[steps].tobytes(), self.depth, self.dtype, self.device)
            samples = max(1, VALUES // max(1, sum(drawing.rows) * e))
            for i in range(0, self.batch, samples):
                rows = slice(i, i + samples)
                state, gamma = self._key.state[None, rows], self._key.gamma[None, rows]
                drawing.run(state, gamma, e, out[:, steps, i * e : (i + samples) * e])
        return out[0], out[1]

    def _own(self, s: Floats, t: Floats) -> tuple[Tensor, Tensor]:
        """One interval a sample, (batch,): (batch, elements)."""
        out = torch.empty(2, self.batch, self._elements, dtype=self.dtype, device=self.device)
        ahead = max(1, VALUES // max(1, 48 * self._elements))
        for first in range(0, self.batch, ahead):
            rows = slice(first, first + ahead)
            drawing = _Drawing.of(plan(s[rows], t[rows], self.depth, False), self.depth, self.dtype, self.device)
            owner = torch.from_numpy(drawing.owner).to(self.device)
            state, gamma = (k[rows][owner, None] for k in self._key)
            drawing.run(state, gamma, self._elements, out[:, rows])
        return out[0], out[1]


class _Drawing(NamedTuple):
    """A `Plan` on the device: rows of values, then weighted sums over them, in turns.

    The j-th turn adds the j-th piece of every interval that has so many.
    """

    cells: Tensor  # (2R + U + V, 1) addresses: two for each root, then of the cells to halve, then of those that choose a bridge
    kinds: tuple[int, int, int]  # R, U, V
    owner: Integers  # (2R + U + V,) the interval that brought the cell
    halves: list[int]  # of each level
    parents: list[slice | Tensor]  # of each level
    which: Tensor | None  # (Q,) leaf of a row from the table; None: one each, in order
    column: Tensor  # (Q, 1) where the row's column starts in the table
    order: Tensor | None  # (n,) places of the intervals if those with most pieces come first; None: as given
    active: list[int]  # pieces of each turn
    first: _Terms  # the first pieces
    rest: _Terms | None  # the others, turn by turn
    table: Tensor  # (columns · entries, 4)

    @classmethod
    def of(cls, plan: Plan, depth: int, dtype: torch.dtype, device: torch.device) -> _Drawing:
        order = np.argsort(-plan.count, kind="stable")
        there = (np.arange(plan.row.shape[1]) < plan.count[order, None]).T
        active = there.sum(1).tolist() or [0]
        row, weight = plan.row[order].T[there], plan.weight[order].transpose(3, 0, 1, 2)[there]
        which, column = plan.lookup
        leaves = len(plan.leaves)
        table = bridges(depth - halvings(depth), dtype, device) if leaves else torch.empty(0, 1, 4)
        kinds = len(plan.roots) // 2, len(plan.cells), leaves
        ends, parents = np.cumsum(plan.levels), torch.from_numpy(plan.parent).to(device).split(plan.levels)
        return cls(
            torch.from_numpy(np.concatenate([plan.roots, plan.cells, plan.leaves])[:, None]).to(device),
            kinds,
            plan.owner,
            [2 * m for m in plan.levels],
            [_rows(plan.parent[end - len(at) : end], at) for end, at in zip(ends, parents, strict=True)],
            None if np.array_equal(which, np.arange(leaves)) else torch.from_numpy(which).to(device),
            torch.from_numpy(column[:, None] * table.shape[1]).to(device, torch.int32),
            torch.from_numpy(np.argsort(order)).to(device) if (np.diff(order) < 0).any() else None,
            active,
            _Terms.of(row[: active[0]], weight[: active[0]], dtype, device),
            _Terms.of(row[active[0] :], weight[active[0] :], dtype, device) if len(active) > 1 else None,
            table.flatten(0, 1),
        )

    @property
    def rows(self) -> list[int]:
        """Rows of values: of roots, of halves, from the table."""
        return [self.kinds[0], 2 * self.kinds[1], 2 * len(self.column)]

    def run(self, state: Tensor, gamma: Tensor, elements: int, out: Tensor) -> None:
        """(W, H) into (2, n, samples · elements), from keys (1, samples), or (cells, 1) of every cell."""
        R, U, V = self.kinds
        entry = _entries(self.cells, state, gamma, elements)
        value = torch.empty(2, sum(self.rows), entry.shape[1], dtype=out.dtype, device=out.device)
        of_roots, of_halves, of_table = value.split(self.rows, 1)
        pair = torch.empty(2, 2 * R + U, entry.shape[1], dtype=out.dtype, device=out.device)
        for table, normals in zip(_halving_normals(out.dtype, out.device), pair, strict=True):
            torch.index_select(table, 0, entry[: 2 * R + U].view(-1), out=normals.view(-1))
        one, two, halving = pair.split([R, R, U], 1)
        scale = _scale(0.6 / ROOT_1_8, 0.6 / ROOT_1_2, out)
        torch.add(one.mul_(scale), two.mul_(scale * (0.8 / 0.6)), out=of_roots)
        if U:
            self._halve(halving, value, of_halves)
        if V:
            leaf = entry[2 * R + U :].bitwise_and_((1 << BRIDGE_BITS) - 1)
            chosen = (leaf if self.which is None else torch.index_select(leaf, 0, self.which)).add(self.column).view(-1)
            found = _fours(self.table, chosen).view(-1, entry.shape[1], 2, 2)
            for kind, pairs in enumerate(of_table.chunk(2, 1)):
                for i, values in enumerate(pairs):
                    values.copy_(found[..., kind, i])
        self._sum(value, out)

    def _halve(self, pair: Tensor, value: Tensor, halves: Tensor) -> None:
        """Values of the halves of all cells, level by level, from the cells' normals (2, U, N)."""
        bends = (pair[0] * -ROOT_3).split([m // 2 for m in self.halves])
        scale = _scale(ROOT_1_2, ROOT_1_8, value)
        others = pair.split([m // 2 for m in self.halves], 1)
        for parent, half, bend, other in zip(self.parents, halves.split(self.halves, 1), bends, others, strict=True):
            own = value[:, parent] if isinstance(parent, slice) else torch.index_select(value, 1, parent)
            # (A₁, B₁), (A₂, B₂) = (u, p) ± (v, n)
            mean = own * scale
            mean[1].add_(bend)
            other[0].add_(own[1] * ROOT_3_8)
            left, right = half.view(2, -1, 2, half.shape[2]).unbind(2)
            torch.add(mean, other, out=left)
            torch.sub(mean, other, out=right)

    def _sum(self, value: Tensor, out: Tensor) -> None:
        """The pieces of every interval, weighted, into (2 for W and H, n, samples · elements)."""
        total = out if self.order is None else torch.empty_like(out)
        n, most = total.shape[1], self.active[0]
        self.first.weigh(value, total[:, :most])
        if most < n:
            total[:, most:] = 0.0
        if self.rest is not None:
            parts = torch.empty(2, sum(self.active[1:]), value.shape[2], dtype=value.dtype, device=value.device)
            self.rest.weigh(value, parts)
            for m, part in zip(self.active[1:], parts.split(self.active[1:], 1), strict=True):
                (total if m == n else total[:, :m]).add_(part)
        if self.order is not None:
            out.copy_(torch.index_select(total, 1, self.order))


class _Terms(NamedTuple):
    """Pieces (m,): their rows and weights."""

    row: slice | Tensor
    weight: list[Tensor | None]  # of A and B for W, then for H, (m, 1); None: all are 0

    @classmethod
    def of(cls, row: Integers, weight: Floats, dtype: torch.dtype, device: torch.device) -> _Terms:
        """From rows (m,) and weights (m, 2, 2)."""
        weight = np.ascontiguousarray(weight.reshape(-1, 4).T)
        values = torch.from_numpy(weight).to(device, dtype)[..., None].unbind()
        row = np.ascontiguousarray(row)
        some = (weight != 0).any(1)
        return cls(
            _rows(row, torch.from_numpy(row).to(device)),
            [w if on else None for w, on in zip(values, some.tolist(), strict=True)],
        )

    def weigh(self, value: Tensor, out: Tensor) -> None:
        """The pieces' parts of W and H, into (2, m, N)."""
        A, B = (value[:, self.row] if isinstance(self.row, slice) else torch.index_select(value, 1, self.row)).unbind()
        for of_A, of_B, part in zip(self.weight[::2], self.weight[1::2], out, strict=True):
            if of_A is not None:
                torch.mul(A, of_A, out=part)
                if of_B is not None:
                    part += B * of_B
            elif of_B is not None:
                torch.mul(B, of_B, out=part)
            else:
                part.zero_()


def _fours(table: Tensor, index: Tensor) -> Tensor:
    """Rows (n, 4) of a table (m, 4); on the CPU four floats move as one number, four times as fast as one by one."""
    if table.dtype == torch.float32 and table.device.type == "cpu":
        return torch.index_select(table.view(torch.complex128).squeeze(1), 0, index).view(torch.float32).view(-1, 4)
    return torch.index_select(table, 0, index)


def _rows(row: Integers, at: Tensor) -> slice | Tensor:
    """Rows to take, `at` on the device, as a slice if they lie one after the other: that copies nothing."""
    n = len(row)
    if n and row[-1] - row[0] == n - 1 and (n == 1 or (np.diff(row) == 1).all()):
        return slice(int(row[0]), int(row[-1]) + 1)
    return at


@functools.lru_cache(maxsize=128)
def _shared_drawing(s: bytes, t: bytes, depth: int, dtype: torch.dtype, device: torch.device) -> _Drawing:
    # the grid of a sweep comes again with the next batch
    return _Drawing.of(plan(np.frombuffer(s), np.frombuffer(t), depth, True), depth, dtype, device)


@functools.cache
def _halving_normals(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """`lattice_normals` as halvings need them: Z/√8 and N/√2."""
    Z, N = lattice_normals(dtype, device)
    return Z * ROOT_1_8, N * ROOT_1_2


def _scale(first: float, second: float, like: Tensor) -> Tensor:
    """Factors of the two of pairs (2, …, N)."""
    return torch.tensor([first, second], dtype=like.dtype, device=like.device)[:, None, None]


def _words(code: Tensor, state: Tensor, gamma: Tensor, number: int) -> Tensor:
    """Words 0 … number − 1 of cells, addresses (cells, 1) and keys (1, samples) or (cells, 1): (cells, samples, number)."""
    begin = (code << 30) * gamma
    begin += state
    step = torch.arange(1, number + 1, dtype=torch.int64, device=state.device)
    return mix64_(begin[..., None] + gamma[..., None] * step)


def _entries(code: Tensor, state: Tensor, gamma: Tensor, elements: int) -> Tensor:
    """Entries of a table of 2^LATTICE_BITS that cells choose, (cells, samples · elements): four elements a word."""
    words = _words(code, state, gamma, (elements + 3) // 4)
    fields = words.bitwise_and_(_FIELDS).view(torch.int16)
    if elements % 4 == 0:
        return fields.int().flatten(1)
    out = torch.empty(*fields.shape[:2], elements, dtype=torch.int32, device=words.device)
    for i in range(min(4, elements)):  # a last axis as short as 2 would be slow
        out[..., i::4].copy_(fields[..., i:elements:4])
    return out.flatten(1)
