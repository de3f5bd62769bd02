"""One Brownian path a sample, evaluated anywhere without memory: increments and space-time Lévy areas.

Every root cell and every halving draws two normals, keyed by (seed, cell, element). (W, H) of an interval is their weighted sum,
root first, then down to the ends of the interval; `brownian_plan` has the cells and the weights. The sum is taken in the same order
whoever asks, so an interval has the same bits in any batch, sweep or order of queries. `depth` halvings below its root the path is
the quadratic θW + 6θ(1 − θ)H, the mean given (W, H).

Roots are drawn by Box–Muller, halvings from `lattice_normals`, which have the exact second moments and 2¹⁵ values each: an
increment is normal up to the sum of several such, and every covariance of (W, H) between ends of leaves is exact.

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

from sdeflow.brownian_plan import DEEPEST, Floats, Integers, Weights, is_root, weights
from sdeflow.errors import InvalidInput
from sdeflow.random import LATTICE_BITS, Key, lattice_normals, mix64_, normal_pair_

if TYPE_CHECKING:
    from torchsde import BaseBrownian

PATH_STREAM = 16
"""Random stream of Brownian paths, apart from those of priors, steps and data."""
NORMALS = 1 << 19
"""Pairs of normals held at once: bounds memory, and few enough blocks that torch's calls cost less than numbers."""
STEPS = 32
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
            times as much. An end costs up to `depth` pairs an element.

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
        W, H = (torch.empty(len(s), self.batch, self._elements, dtype=self.dtype, device=self.device) for _ in range(2))
        for first in range(0, len(s), STEPS):
            steps = slice(first, first + STEPS)
            plan = _shared_sum(s[steps].tobytes(), t[steps].tobytes(), self.depth, self.dtype, self.device)
            samples = max(1, NORMALS // max(1, len(plan.owner) * self._elements))
            for i in range(0, self.batch, samples):
                rows = slice(i, i + samples)
                state, gamma = self._key.state[None, rows], self._key.gamma[None, rows]
                total = plan.run(state, gamma, len(s[steps]), self._elements, self.dtype)
                W[steps, rows] = total[:, 0]
                H[steps, rows] = total[:, 1]
        return W, H

    def _own(self, s: Floats, t: Floats) -> tuple[Tensor, Tensor]:
        """One interval a sample, (batch,): (batch, elements)."""
        W, H = (torch.empty(self.batch, self._elements, dtype=self.dtype, device=self.device) for _ in range(2))
        ahead = max(1, 2 * NORMALS // max(1, 32 * self._elements))
        for first in range(0, self.batch, ahead):
            rows = slice(first, first + ahead)
            plan = _Sum.of(weights(s[rows], t[rows], self.depth), False, self.dtype, self.device)
            owner = torch.from_numpy(plan.owner).to(self.device)
            state, gamma = (k[rows][owner, None] for k in self._key)
            total = plan.run(state, gamma, len(s[rows]), self._elements, self.dtype)
            W[rows], H[rows] = total[:, 0, 0], total[:, 1, 0]
        return W, H


class _Sum(NamedTuple):
    """Weighted sums over cells, in turns: the j-th adds the j-th cell of every interval that has so many."""

    order: Tensor | None  # (n,) intervals, those with most cells first; None: as given
    roots: Tensor  # (U₀, 1) addresses
    halvings: Tensor  # (U₁, 1) addresses
    owner: Integers  # (U₀ + U₁,) the interval that brought the cell
    cell: list[Tensor]  # of the j-th turn: (m_j,) cells
    weight: list[tuple[Tensor, Tensor]]  # of the j-th turn: of Z and of N, (m_j, 2 for W and H, 1) each

    @classmethod
    def of(cls, plan: Weights, shared: bool, dtype: torch.dtype, device: torch.device) -> _Sum:
        """The sums of a plan, its intervals drawing their cells once together if `shared`, else each its own."""
        order = np.argsort(-plan.count, kind="stable")
        code, count = plan.code[order], plan.count[order]
        there = np.arange(code.shape[1]) < count[:, None]
        owner = np.broadcast_to(order[:, None], code.shape)[there]
        codes, place = code[there], np.arange(there.sum())
        if shared and len(order) > 1:
            codes, first, place = np.unique(codes, return_index=True, return_inverse=True)
            owner = owner[first]
        roots_first = np.argsort(~is_root(codes), kind="stable")
        rank = np.empty_like(roots_first)
        rank[roots_first] = np.arange(len(codes))
        index = np.zeros_like(code)
        index[there] = rank[place]
        codes, roots = codes[roots_first], int(is_root(codes).sum())
        active = there.sum(0).tolist()
        cells = torch.from_numpy(np.ascontiguousarray(index.T)).to(device)
        weight = np.ascontiguousarray(plan.weight[order].transpose(3, 0, 1, 2))
        values = torch.from_numpy(weight).to(device, dtype)[..., None]
        return cls(
            torch.from_numpy(order).to(device) if (np.diff(order) < 0).any() else None,
            torch.from_numpy(codes[:roots, None]).to(device),
            torch.from_numpy(codes[roots:, None]).to(device),
            owner[roots_first],
            [cells[j, :m] for j, m in enumerate(active)],
            [(values[j, :m, :, 0], values[j, :m, :, 1]) for j, m in enumerate(active)],
        )

    def run(self, state: Tensor, gamma: Tensor, n: int, elements: int, dtype: torch.dtype) -> Tensor:
        """(n, 2 for W and H, samples, elements) from keys (1, samples), or (cells, 1) of every cell."""
        roots, samples = len(self.roots), state.shape[1]
        pair = torch.empty(2, len(self.owner), samples, elements, dtype=dtype, device=state.device)
        split = (slice(None, roots), slice(roots, None)) if state.shape[0] > 1 else (slice(None), slice(None))
        _draw_roots(self.roots, state[split[0]], gamma[split[0]], pair[:, :roots])
        _draw_halvings(self.halvings, state[split[1]], gamma[split[1]], pair[:, roots:])
        pair = pair.flatten(2)
        total = torch.zeros(n, 2, samples * elements, dtype=dtype, device=state.device)
        if n == 1:  # its cells are in order
            chosen = zip(pair[0, :, None].unbind(), pair[1, :, None].unbind(), strict=True)
        else:
            chosen = (torch.index_select(pair, 1, cell)[:, :, None].unbind() for cell in self.cell)
        for (Z, N), (of_Z, of_N) in zip(chosen, self.weight, strict=True):
            part = total[: len(of_Z)] if len(of_Z) < n else total
            part += Z * of_Z
            part += N * of_N
        if self.order is not None:
            total = torch.empty_like(total).index_copy_(0, self.order, total)
        return total.view(n, 2, samples, elements)


@functools.lru_cache(maxsize=128)
def _shared_sum(s: bytes, t: bytes, depth: int, dtype: torch.dtype, device: torch.device) -> _Sum:
    # the grid of a sweep comes again with the next batch
    return _Sum.of(weights(np.frombuffer(s), np.frombuffer(t), depth), True, dtype, device)


def _words(code: Tensor, state: Tensor, gamma: Tensor, number: int) -> Tensor:
    """Words 0 … number − 1 of cells, addresses (cells, 1) and keys (1, samples) or (cells, 1): (cells, samples, number)."""
    begin = (code << 30) * gamma
    begin += state
    step = torch.arange(1, number + 1, dtype=torch.int64, device=state.device)
    return mix64_(begin[..., None] + gamma[..., None] * step)


def _draw_roots(code: Tensor, state: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Normals of roots, into (2, cells, samples, elements)."""
    if out.shape[1]:
        normal_pair_(_words(code, state, gamma, out.shape[3]), out[0], out[1])


def _draw_halvings(code: Tensor, state: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Normals of halvings, into (2, cells, samples, elements): four elements a word, 15 bits each."""
    if out.shape[1]:
        elements = out.shape[3]
        fields = _words(code, state, gamma, (elements + 3) // 4).view(torch.int16)[..., :elements]
        index = fields.bitwise_and((1 << LATTICE_BITS) - 1).int().flatten()
        for table, normals in zip(lattice_normals(out.dtype, out.device), out, strict=True):
            torch.index_select(table, 0, index, out=normals.view(-1))
