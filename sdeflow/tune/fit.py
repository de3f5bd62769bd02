"""Weights fitted to true paths while they are followed.

With the nodes chosen, an explicit linear method is its weights: x_n = (σ_n/σ_0) x_0 + Σ_{j<n} C_nj D_j. Row n is fitted when D_0 … D_{n−1}
are known on the method's own states, by least squares over the pilot,

    Σ_i ‖ x_i(t_n) − (σ_n/σ_0) x_i,0 − Σ_j C_nj D_ij ‖² + λ |C_n − A_n|²,    C_n = A_n + Σ_m δ_m Δ_m,

A_n Adams's own row and Δ_m the divided differences of order q over neighbouring nodes: a fitted method is still exact where D is a
polynomial of degree q − 1 in the chart's clock, which is what holds it to the paths of samples unlike the pilot. λ is chosen row by row
by cross-validation over groups of samples, as the largest that does about as well as the best, and Adams's row stays where none
helps. Every sample is moved on by the weights fitted without its group, so the errors are those of samples not seen.

All rows together cost one solve, and none when D is taken from the true paths (`modelled`).

Samples on borders join until they leave them, and once more across the border, where their error decides who flips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.equations import ReverseSDE
from sdeflow.tune.borders import Borders
from sdeflow.tune.paths import Paths, chosen, wide

GROUPS = 8
PENALTIES = 10.0 ** np.arange(-18, 3)
"""λ tried, relative to the largest singular value squared."""
TOLERATED = 0.2
"""Of the mean square error: the largest λ is taken that costs no more."""
LOUDEST = 8.0
"""Largest Σ|C_n| against |ΣC_n|: how much louder than D itself errors of D may come out."""
ACROSS = 3.0
"""Weight of the error across a border, against that of one component of a sample."""
STRAY = 0.2, 5.0
"""Samples off their true path by more than this share of the data's scale plus this many medians do not lead the others."""


class Fitted(NamedTuple):
    """Weights and what they did to samples they were not fitted to."""

    weights: np.ndarray  # C (N, N), fitted to all samples
    error: np.ndarray  # RMS end-point error of every sample
    displaced: np.ndarray  # s of every border


class Pilot(NamedTuple):
    """Samples, borders and the neighbourhood of borders: rows 0 … first − 1, first … last − 1, last … n − 1 of `start`."""

    start: Tensor
    kept: Tensor
    paths: Paths
    borders: Borders | None
    first: int
    last: int

    def displacement(self, times: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """`Borders.displacement` of the rows on borders."""
        if self.borders is None:
            return np.zeros(0, int), np.zeros((times.numel(), 0, self.kept.numel()))
        return self.borders.displacement(times, slice(self.first, self.last))


Output = Callable[[int], np.ndarray]
"""k → D_k in the kept components, where the samples are."""
Move = Callable[[np.ndarray], np.ndarray]
"""Each sample's row of weights (n, k) → x_k in the kept components; the samples are there from then on."""


def solved(equation: ReverseSDE, times: Tensor, pilot: Pilot) -> tuple[Output, Move]:
    """D from the network on the states the weights lead to."""
    process, predict = equation.process, equation.predict
    assert process is not None and predict is not None
    ratio = (process.sigma(times) / process.sigma(times[0])).tolist()
    start, outputs, x = pilot.start, [], wide(pilot.start)

    def output(k: int) -> np.ndarray:
        outputs.append(wide(predict.data(x.to(start.dtype), times[k])))
        return chosen(outputs[-1], pilot.kept)

    def move(own: np.ndarray) -> np.ndarray:
        nonlocal x
        x = wide(start) * ratio[len(outputs)]
        for j, D in enumerate(outputs):
            x += D * torch.from_numpy(own[:, j].copy()).to(D).reshape(-1, *[1] * (D.ndim - 1))
        return chosen(x, pilot.kept)

    return output, move


def modelled(times: Tensor, pilot: Pilot, part: slice) -> tuple[Output, Move]:
    """The same without the network: D is that of the true path plus J (x̂ − x), J that of data with one scale; components `part`."""
    paths = pilot.paths
    process = paths.process
    true, D = (v[:, :, part] for v in paths.states(times))
    alpha, sigma = process.alpha(times).numpy(), process.sigma(times).numpy()
    J = alpha * paths.scale**2 / (alpha**2 * paths.scale**2 + sigma**2)
    ratio, start = sigma / sigma[0], chosen(pilot.start, pilot.kept)[:, part]
    outputs: list[np.ndarray] = []
    x = start

    def output(k: int) -> np.ndarray:
        outputs.append(D[k] + J[k] * (x - true[k]) if k else D[0])
        return outputs[-1]

    def move(own: np.ndarray) -> np.ndarray:
        nonlocal x
        x = start * ratio[len(outputs)]
        for j, value in enumerate(outputs):
            x += own[:, j, None] * value
        return x

    return output, move


def fit(
    output: Output,
    move: Move,
    times: Tensor,
    clock: np.ndarray,
    adams: np.ndarray,
    exact: int,
    pilot: Pilot,
    part: slice = slice(None),
) -> Fitted:
    """Fit the weights on `times` while solving.

    Args:
        output, move: of `solved` or `modelled`.
        clock: u of the times.
        adams: the weights to correct, (N, N).
        exact: q.
        part: the components `output` gives, among the pilot's.
    """
    process, paths = pilot.paths.process, pilot.paths
    steps, n = len(adams), len(pilot.start)
    true = paths.states(times)[0][:, :, part]
    node, across = pilot.displacement(times)
    across = across[:, :, part]
    ratio, alpha = (process.sigma(times) / process.sigma(times[0])).tolist(), process.alpha(times).tolist()
    group, start = np.arange(n) % GROUPS, chosen(pilot.start, pilot.kept)[:, part]
    weights, displaced = np.zeros_like(adams), np.zeros(node.size)
    left_at = np.full(n, steps + 1)
    left_at[pilot.first : pilot.last] = node
    seen: list[np.ndarray] = []
    x = start
    for k in range(steps):
        seen.append(output(k))
        row = weights[k, : k + 1] = adams[k, : k + 1]
        own = np.tile(row, (n, 1))
        if k >= exact:
            off = np.sqrt(np.square(x - true[k]).mean(1))
            astray = off > STRAY[0] * alpha[k] * paths.scale + STRAY[1] * np.median(off)
            data = np.stack(seen)
            left = true[k + 1] - ratio[k + 1] * start - np.tensordot(row, data, 1)
            system = _System(_differences(clock[: k + 1], exact), group)
            system.add(data, left, (k + 1 <= left_at) & ~astray)
            beside = ((k + 1 <= left_at) & ~astray)[pilot.first : pilot.last]
            system.add_across(
                data[:, pilot.first : pilot.last], left[pilot.first : pilot.last], across[k + 1], beside, pilot.first
            )
            shift, shifts = system.solved(LOUDEST * abs(row.sum()))
            weights[k, : k + 1] += shift
            own = own + shifts[group]
        x = move(own)
        here = node == k + 1
        displaced[here] = np.einsum("nd,nd->n", (x - true[k + 1])[pilot.first : pilot.last][here], across[k + 1][here])
    return Fitted(weights, np.sqrt(np.square(x - true[-1]).mean(1)), displaced)


def _differences(u: np.ndarray, order: int) -> np.ndarray:
    """(k + 1 − order, k + 1): divided differences over order + 1 neighbours of the nodes u (k + 1,), absolute values adding up to 2."""
    rows = np.eye(u.size)
    for m in range(1, order + 1):
        rows = np.diff(rows, axis=0) / (u[m:] - u[:-m])[:, None]
    return rows * (2.0 / np.abs(rows).sum(1, keepdims=True))


class _System:
    """The least squares of one row: equations over the coefficients of `basis` (m, k + 1)."""

    def __init__(self, basis: np.ndarray, group: np.ndarray):
        self.basis, self.group = basis, group
        self.rows: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.groups: list[np.ndarray] = []

    def add(self, data: np.ndarray, left: np.ndarray, live: np.ndarray) -> None:
        """One equation for every component of the samples that are `live`: data (k + 1, n, d), left (n, d)."""
        change = np.tensordot(self.basis, data[:, live], 1)
        self.rows.append(change.reshape(len(self.basis), -1).T)
        self.values.append(left[live].ravel())
        self.groups.append(np.repeat(self.group[live], left.shape[1]))

    def add_across(self, data: np.ndarray, left: np.ndarray, across: np.ndarray, live: np.ndarray, first: int) -> None:
        """One equation for every border: what is left in the direction across it."""
        unit = across[live] / np.maximum(np.sqrt(np.square(across[live]).sum(1, keepdims=True)), 1e-300)
        seen = np.einsum("nd,knd->kn", ACROSS * unit, data[:, live])
        self.rows.append((self.basis @ seen).T)
        self.values.append(np.einsum("nd,nd->n", ACROSS * unit, left[live]))
        self.groups.append(self.group[first : first + len(live)][live])

    def solved(self, limit: float) -> tuple[np.ndarray, np.ndarray]:
        """Change of the row, (k + 1,), fitted to all groups, and without each one, (GROUPS, k + 1).

        Ridge regression in the coordinates of the singular vectors, where the normal equations are well conditioned.
        """
        rows, target, group = (np.concatenate(v) for v in (self.rows, self.values, self.groups))
        nothing = np.zeros(self.basis.shape[1]), np.zeros((GROUPS, self.basis.shape[1]))
        if not rows.size:
            return nothing
        # |C − A|² = δᵀ B Bᵀ δ = |Rᵀδ|², with R the triangular factor of Bᵀ
        root = np.linalg.qr(self.basis.T)[1].T
        U, size, V = np.linalg.svd(np.linalg.solve(root, rows.T).T, full_matrices=False)
        known = size > 1e-14 * size[0]
        if not known.any():
            return nothing
        U, size, V = U[:, known], size[known], V[known]
        of = [group == g for g in range(GROUPS)]
        gram, moment = np.stack([U[g].T @ U[g] for g in of]), np.stack([U[g].T @ target[g] for g in of])
        total, gram = moment.sum(0), gram.sum(0) - gram
        penalty = PENALTIES[:, None] * np.square(size[0] / size)
        matrix = gram[:, None] + penalty[:, None] * np.eye(size.size)
        value = np.broadcast_to((total - moment)[:, None, :, None], (*matrix.shape[:3], 1))
        found = np.linalg.solve(matrix, value)[..., 0]
        off = np.sum([np.square(target[g][:, None] - U[g] @ found[i].T).sum(0) for i, g in enumerate(of)], axis=0)
        if not off.min() < np.square(target).sum():
            return nothing
        back = np.linalg.solve(root.T, V.T / size).T @ self.basis
        shift = (total / (1.0 + penalty)) @ back
        best = int(np.flatnonzero(off <= (1.0 + TOLERATED) * off.min()).max())
        loud = np.abs(shift).sum(1) > limit
        while best < len(shift) - 1 and loud[best]:
            best += 1
        return shift[best], found[:, best] @ back
