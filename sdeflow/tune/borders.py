"""How far a candidate moves the borders between the destinations of the flow.

Start states on two sides of a border end in different modes. A solver moves the border by a small angle s in the space of
start states, and every sample between the old and the new border flips. On quarter circles of starts cos θ x_a + sin θ x_b (x_a, x_b
samples of the Gaussian prior; every point of it is one too) with J(w) the RMS distance between the true ends w apart across the border,
flips add to the mean square end-point error

    (2/π) Σ_borders J(|s|)² |s|.

A pilot of 32 samples hardly ever flips: its own error says nothing of this, while with few evaluations it is nearly all of the
error of many samples. But s can be measured: from a start on the border, θ*, it is the displacement of the numerical path across the
border, in units of what separates the true paths from θ* ± δ,

    s = 2δ ⟨x̂ − x, x_+ − x_−⟩ / ‖x_+ − x_−‖²,

at the first node where D on the two sides differs by a third of J. Of each circle the one border is followed that bisection with short
solves leads to; how many others there are is estimated from the halves bisection leaves behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.equations import ReverseSDE
from sdeflow.grids import Nodes
from sdeflow.solve import solve
from sdeflow.solvers.fixed_adams import FixedAdams
from sdeflow.tune.candidates import PLAIN
from sdeflow.tune.paths import Paths, chosen

HALVINGS = 10
COUNTED = (4, 8)
"""Halvings whose other halves are counted: narrow enough that a distance beyond J/2 across one is a border."""
HALF = 0.02
"""δ, radians: many times what ten halvings of a quarter circle leave (0.0015), little beside the way to the next border."""
NEAR = (0.002, 0.2)
"""Distances from the border, radians, between which errors are sampled."""
SEPARATED = 1.0 / 3.0
WIDTHS = 0.5 * math.pi * 0.5 ** np.arange(HALVINGS + 1)
"""Widths of the arcs, radians."""


def cost(short: int) -> int:
    """Evaluations a sample `Borders.found` spends with solves of `short` evaluations."""
    return (HALVINGS + 2) * short


@dataclass(frozen=True)
class Borders:
    """Starts on borders and the true paths beside them.

    Attributes:
        start: (n, *event): row k lies on the arc from pilot k to pilot k + 1, under row k's own condition (class, prompt).
        near: (n, *event): starts on the same arcs beside the border, as far from it as NEAR says.
        left, right: paths from θ* − δ and θ* + δ.
        jump: J(2δ) of every row, (n,).
        across: J at WIDTHS of every row, (HALVINGS + 1, n).
        others: other borders expected on an arc.
    """

    start: Tensor
    near: Tensor
    left: Paths
    right: Paths
    jump: np.ndarray
    across: np.ndarray
    others: float

    @classmethod
    def found(cls, equation: ReverseSDE, pilot: Tensor, short: int, beside: int, kept: Tensor) -> Borders:
        """Follow the larger jump of the end states through HALVINGS halvings of each arc.

        Args:
            short: evaluations of the solves that bisect.
            beside: evaluations of the two solves beside the border.
            kept: components the paths keep.
        """
        other, n, process = pilot.roll(-1, 0), pilot.shape[0], equation.process
        assert process is not None
        grid = Nodes(PLAIN.times(process, float(process.t_max), float(process.t_min), short, 1.0))
        solver = FixedAdams(order=4, grid=grid)

        def arc(theta: np.ndarray) -> Tensor:
            angle = torch.from_numpy(theta).to(pilot).reshape(-1, *[1] * (pilot.ndim - 1))
            return angle.cos() * pilot + angle.sin() * other

        def ends(theta: np.ndarray) -> np.ndarray:
            return chosen(solve(equation, solver, arc(theta), on_failure="return").x, kept)

        low, high = np.zeros(n), np.full(n, 0.5 * math.pi)
        at_low, at_high = ends(low), ends(high)
        across, left_behind = [_rms(at_high - at_low)], []
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            at = ends(middle)
            lower, upper = _rms(at - at_low), _rms(at_high - at)
            left = lower > upper
            across.append(np.where(left, lower, upper))
            left_behind.append(np.where(left, upper, lower))
            low, high = np.where(left, low, middle), np.where(left, middle, high)
            at_low, at_high = (
                np.where(left[:, None], at_low, at),
                np.where(left[:, None], at, at_high),
            )
        theta = 0.5 * (low + high)
        left, right = (Paths.along(equation, arc(theta + way * HALF), beside, kept) for way in (-1.0, 1.0))
        jump = _rms(right.end - left.end)
        counted = slice(*COUNTED)
        hits = (np.array(left_behind)[counted] > 0.5 * np.median(jump)).mean(1)
        others = float(hits.sum() / (2.0 / math.pi * WIDTHS[1:][counted]).sum())
        way = np.where(np.arange(n) % 2, 1.0, -1.0) * _near(n)
        return cls(arc(theta), arc(theta + way), left, right, jump, np.array(across), others)

    def displacement(self, times: Tensor, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """(node, direction) of borders `rows`: the node where s is measured (n,), and v (N + 1, n, d) with s = ⟨x̂ − x, v⟩."""
        (x_left, D_left), (x_right, D_right) = (
            tuple(v[:, rows] for v in side.states(times)) for side in (self.left, self.right)
        )
        parted = np.sqrt(np.square(D_right - D_left).mean(2)) >= SEPARATED * self.jump[rows]
        parted[0], parted[-1] = False, True
        across = x_right - x_left
        size = np.maximum(np.square(across).sum(2, keepdims=True), 1e-300)
        return parted.argmax(0), 2.0 * HALF * across / size

    def tails(self, error: np.ndarray, rows: slice) -> float:
        """What samples near borders add to the mean square error, from the errors (n,) of `near[rows]`: (2/π)(1 + others) ∫ e² dθ."""
        apart = _near(len(self.start))[rows]
        log_range = math.log(NEAR[1] / NEAR[0])
        return 4.0 / math.pi * (1.0 + self.others) * log_range * float((apart * np.square(error)).mean())

    def flips(self, s: np.ndarray, rows: slice) -> tuple[float, float]:
        """(probability that a sample flips, what flips add to the mean square end-point error) with borders moved by s (n,).

        (2/π)(1 + others) times the mean of |s| and of J(|s|)²|s|.
        """
        s = np.clip(np.abs(s), 1e-300, WIDTHS[0])
        x, log_s = np.log(WIDTHS[::-1]), np.log(s)
        J = np.log(np.maximum(self.across[::-1, rows], 1e-300))
        # narrower than any arc seen: on as between the last two, which is 0 across a jump and 1 where the flow is smooth
        steepness = np.clip((J[1] - J[0]) / math.log(2.0), 0.0, 1.0)
        log_J = np.array([np.interp(value, x, column) for value, column in zip(log_s, J.T, strict=True)])
        log_J += steepness * np.minimum(log_s - x[0], 0.0)
        often = 2.0 / math.pi * (1.0 + self.others)
        return often * float(s.mean()), often * float((np.exp(2.0 * log_J) * s).mean())


def _near(n: int) -> np.ndarray:
    """How far beside the border row k's `near` starts: every eight rows in turn cover NEAR evenly in the logarithm."""
    return NEAR[0] * (NEAR[1] / NEAR[0]) ** ((np.arange(n) % 8 * 5 % 8 + 0.5) / 8.0)


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x).mean(1))
