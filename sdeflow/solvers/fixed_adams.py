"""Adams methods on a fixed grid: one evaluation a step, in a chart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from sdeflow.charts import Chart, PlainTime, StraightLine, Trigonometric
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, InChart, Nodes, UniformTime
from sdeflow.solvers.base import Facts, Task
from sdeflow.solvers.linear import DriftCalls, Evaluations, LinearMethod, Plan, Stage

HIGHEST_ORDER = 8
_CHARTS = {chart.__name__: chart for chart in (StraightLine, Trigonometric, PlainTime)}


@dataclass(frozen=True)
class FixedAdams(LinearMethod):
    """Adams–Bashforth of one order on any grid, with an Adams–Moulton corrector fed by the predictor's evaluation (PEC).

    On u_0, u_1, …: F_n = f(u_n, p_n) at the predicted state, then

        z_n = z_{n−1} + ∫_{u_{n−1}}^{u_n} P_n,    p_{n+1} = z_n + ∫_{u_n}^{u_{n+1}} Q_n,

    P_n and Q_n the polynomials through the last `corrector` and `order` of F_0 … F_n. Weights are exact for the grid, however
    uneven. The result is p_N, so that N steps are N evaluations. The first steps take the order the history allows, which
    on grids refined evenly limits the observed order to 3 (2 without a corrector); `sf.tune` places them accordingly.

    Args:
        order: order of the predictor, 1 to 8.
        corrector: number of nodes of the corrector, at least 2; 0 for none. Default: the order (but at least 2).
        steps: number of steps, which is the number of evaluations.
        grid: a rule for placing them, or the times themselves; default uniform in the chart's clock.
        chart: None for `StraightLine()` on diffusion equations and t on all others; `PlainTime()` for t on all.

    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, III.1 and III.5.
    """

    order: int = 3
    corrector: int | None = None
    chart: Chart | None = None
    default_grid: ClassVar[Grid] = UniformTime()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.order, bool) or self.order not in range(1, HIGHEST_ORDER + 1):
            raise InvalidInput(f"order must be an integer from 1 to {HIGHEST_ORDER}; got {self.order!r}")
        if self.corrector is None:
            object.__setattr__(self, "corrector", max(2, self.order))
        if isinstance(self.corrector, bool) or self.corrector not in (0, *range(2, HIGHEST_ORDER + 2)):
            raise InvalidInput(
                f"corrector must be 0 (none) or a number of nodes from 2 to {HIGHEST_ORDER + 1}; got {self.corrector!r}"
            )

    @property
    def facts(self) -> Facts:
        # the corrector is fed by an evaluation O(h^{p+1}) off, so it can add one order; the first steps, of order 1 with
        # a trapezoid behind them, are O(h³) in all, O(h²) without the corrector, and a fixed order above does not show
        assert self.corrector is not None
        reached = min(self.order + 1, self.corrector, 3) if self.corrector else min(self.order, 2)
        name = f"Adams {self.order}, " + (f"corrector {self.corrector}" if self.corrector else "no corrector")
        return Facts(
            name,
            max(reached, min(self.order, 2)),
            None,
            None,
            1,
            False,
            ("none",),
            "drift",
            "Hairer, Nørsett & Wanner 1993, III.5",
        )

    def save(self, path: str | Path) -> None:
        """Write order, corrector, chart and times to a small JSON file.

        Raises:
            InvalidInput: the grid is a rule, not times, or the chart is none of StraightLine, Trigonometric, PlainTime.
        """
        if not isinstance(self.grid, Nodes) or type(self.chart) not in _CHARTS.values():
            raise InvalidInput(
                "only a solver with its own times and a StraightLine, Trigonometric or PlainTime chart can be saved, such as "
                "the result of sf.tune; write FixedAdams(grid=times, chart=sf.StraightLine())"
            )
        chart = {"name": type(self.chart).__name__, **vars(self.chart)}
        data = {"solver": "FixedAdams", "order": self.order, "corrector": self.corrector, "chart": chart}
        Path(path).write_text(json.dumps({**data, "times": list(self.grid.values)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> FixedAdams:
        """The solver `save` wrote.

        Raises:
            InvalidInput: the file holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            chart = dict(data["chart"])
            return cls(
                order=data["order"],
                corrector=data["corrector"],
                chart=_CHARTS[chart.pop("name")](**chart),
                grid=Nodes(data["times"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path} is no solver saved by FixedAdams.save: {error}") from error

    def times(self, task: Task) -> Tensor:
        if self.grid is None and task.equation.predict is not None:
            return self.nodes(task, InChart(self.chart or StraightLine()))
        return super().times(task)

    def plan(self, task: Task, times: Tensor) -> Plan:
        assert self.corrector is not None
        if task.equation.predict is None:
            calls = DriftCalls(task.equation, times[:-1], task.x.device)
            weights, n = adams_weights(times.numpy(), self.order, self.corrector), times.numel() - 1
            steps = [[Stage(i, 1.0, _terms(row))] for i, row in zip(range(n), weights, strict=True)]
            return Plan(calls, steps)
        process = task.equation.process
        assert process is not None
        chart = (self.chart or StraightLine()).bind(process)
        u, m = chart.u(times), chart.m(times)
        p, q = chart.drift_weights(u[:-1])
        scale = (m[:-1] / m[1:]).tolist()
        weights = adams_weights(u.numpy(), self.order, self.corrector) / m[1:, None].numpy()
        steps = [[Stage(i, a, _terms(row))] for i, (a, row) in enumerate(zip(scale, weights, strict=True))]
        return Plan(Evaluations(task, times[:-1], p, q), steps)


def _terms(row: np.ndarray) -> list[tuple[int, float]]:
    return [(int(j), float(row[j])) for j in np.flatnonzero(row)]


def adams_weights(u: np.ndarray, order: int, corrector: int) -> np.ndarray:
    """W (N, N), lower triangular, with p_{n+1} = p_n + Σ_j W_nj F_j on the nodes u (N + 1,).

    The predictor of step n, plus what the corrector changes in the step before: p_{n+1} − p_n = Q_n + (P_n − Q_{n−1}).
    """
    n = u.size - 1
    W = integrals(u, order, 0)
    if corrector and n > 1:
        late = integrals(u, corrector, 1)
        late[:, :n] -= W
        W[1:] += late[:-1, :n]
    return W


def integrals(u: np.ndarray, k: int, ahead: int) -> np.ndarray:
    """(N, N + ahead): row n integrates over [u_n, u_{n+1}] the polynomial through the k nodes ending with u_{n+ahead}.

    Rows with fewer than k nodes behind them use those there are.
    """
    steps = u.size - 1
    out = np.zeros((steps, steps + ahead))
    for nodes in range(1, k + 1):
        rows = np.arange(steps)
        rows = rows[rows + ahead + 1 == nodes] if nodes < k else rows[rows + ahead + 1 >= k]
        if not rows.size:
            continue
        at = rows[:, None] + ahead - np.arange(nodes)
        h = u[rows + 1] - u[rows]
        x = (u[at] - u[rows, None]) / h[:, None]
        power = np.arange(nodes)
        vandermonde = x[:, None, :] ** power[:, None]
        moments = np.broadcast_to(1.0 / (power + 1.0), (rows.size, nodes))[..., None]
        out[rows[:, None], at] = h[:, None] * np.linalg.solve(vandermonde, moments)[..., 0]
    return out
