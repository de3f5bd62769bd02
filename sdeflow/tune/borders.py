"""How far a candidate moves the borders between the destinations of the flow.

Start states on two sides of a border end in different modes. A solver moves the border by a small angle s in the space of
start states, and every sample between the old and the new border flips: with J the distance (RMS) between the destinations, flips
add to the mean square end-point error

    (2/π) Σ_borders J² |s|,

averaged over quarter circles of starts cos θ x_a + sin θ x_b (x_a, x_b samples of the Gaussian prior; every point of it is one too).
Of each circle the one border is measured that bisection leads to. A pilot of 32 samples hardly ever flips: its own error says
nothing of this, while with few evaluations it is nearly all of the error of many samples. But s can be measured: from a start on the
border, θ*, it is the displacement of the numerical path across the border, in units of what separates the true paths from θ* ± δ,

    s = 2δ ⟨ẑ − z, z_+ − z_−⟩ / ‖z_+ − z_−‖²,

at the first node where D on the two sides differs by a third of J. Borders are found by bisection with short solves.
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
from sdeflow.tune.paths import Paths

HALVINGS = 10
HALF = 0.02
"""δ, radians: many times what ten halvings of a quarter circle leave (0.0015), little beside the way to the next border."""
SEPARATED = 1.0 / 3.0
RESOLVED = 0.1 * 0.5 * math.pi / 2**HALVINGS
"""Smaller s are not told from 0: θ* is known to its last interval, and candidates stretch distances from the border by per cents."""


def cost(short: int) -> int:
    """Evaluations a sample `Borders.found` spends with solves of `short` evaluations."""
    return (HALVINGS + 2) * short


@dataclass(frozen=True)
class Borders:
    """Starts on borders, in rows of their own, and the true paths beside them.

    Attributes:
        start: (n, *event): row k lies on the arc from pilot k to pilot k + 1, under row k's own condition (class, prompt).
        left, right: paths from θ* − δ and θ* + δ.
        jump: J of every row, (n,).
    """

    start: Tensor
    left: Paths
    right: Paths
    jump: np.ndarray

    @classmethod
    def found(cls, equation: ReverseSDE, pilot: Tensor, short: int, beside: int) -> Borders:
        """Follow the larger jump of the end states through HALVINGS halvings of each arc.

        Args:
            short: evaluations of the solves that bisect.
            beside: evaluations of the two solves beside the border.
        """
        other, n, process = pilot.roll(-1, 0), pilot.shape[0], equation.process
        assert process is not None
        grid = Nodes(PLAIN.times(process, float(process.t_max), float(process.t_min), short, 1.0))
        solver = FixedAdams(order=4, grid=grid)

        def arc(theta: Tensor) -> Tensor:
            theta = theta.to(pilot).reshape(-1, *[1] * (pilot.ndim - 1))
            return theta.cos() * pilot + theta.sin() * other

        def ends(theta: Tensor) -> Tensor:
            return solve(equation, solver, arc(theta), on_failure="return").x.flatten(1).double().cpu()

        low, high = torch.zeros(n, dtype=torch.float64), torch.full((n,), 0.5 * math.pi, dtype=torch.float64)
        at_low, at_high = ends(low), ends(high)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            at = ends(middle)
            left = (at - at_low).square().sum(1) > (at_high - at).square().sum(1)
            low, high = torch.where(left, low, middle), torch.where(left, middle, high)
            at_low = torch.where(left[:, None], at_low, at)
            at_high = torch.where(left[:, None], at, at_high)
        theta = 0.5 * (low + high)
        sides = [Paths.along(equation, arc(theta + way * HALF), beside) for way in (-1.0, 1.0)]
        jump = (sides[1].end - sides[0].end).flatten(1).square().mean(1).sqrt().cpu().numpy()
        return cls(arc(theta), sides[0], sides[1], jump)

    def flips(self, nodes: list[np.ndarray], centre: Paths, solver: FixedAdams, rows: slice) -> float:
        """What flips add to the mean square end-point error: 2/π times the mean of J²|s| over `rows`.

        Args:
            nodes: z of the numerical paths after every step, N arrays (n, d); `rows` started at `start`.
            centre: true paths; `rows` from `start`.
        """
        assert isinstance(solver.grid, Nodes) and solver.chart is not None
        t = torch.tensor(solver.grid.values[1:], dtype=torch.float64)
        chart = solver.chart.bind(centre.process)
        z, _ = (v[:, rows] for v in centre.states(chart, t))
        (z_left, D_left), (z_right, D_right) = (
            tuple(v[:, rows] for v in side.states(chart, t)) for side in (self.left, self.right)
        )
        parted = np.sqrt(np.square(D_right - D_left).mean(2)) >= SEPARATED * self.jump[rows]
        parted[-1] = True
        first, row = parted.argmax(0), np.arange(z.shape[1])
        across = (z_right - z_left)[first, row]
        away = np.stack([v[rows] for v in nodes])[first, row] - z[first, row]
        size = np.maximum(np.square(across).sum(1), 1e-300)
        s = 2.0 * HALF * np.abs((away * across).sum(1)) / size
        return float((np.square(self.jump[rows]) * np.clip(2.0 / math.pi * (s - RESOLVED), 0.0, 1.0)).mean())
