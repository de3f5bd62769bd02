"""Adams methods on a fixed grid: one evaluation a step, in a chart."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdeflow.charts import BentLine, Chart, PlainTime, StraightLine, Trigonometric
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, InChart, Nodes, UniformTime
from sdeflow.processes import Process
from sdeflow.solvers.base import Facts, Task, chart_of
from sdeflow.solvers.linear import DriftCalls, Evaluations, LinearMethod, Plan, Stage

HIGHEST_ORDER = 8
_CHARTS = {chart.__name__: chart for chart in (StraightLine, BentLine, Trigonometric, PlainTime)}


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
        chart: None for `sf.chart_for` of the network on diffusion equations and t on all others; `PlainTime()` for t on all.

    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, III.1 and III.5.
    """

    order: int = 3
    corrector: int | None = None
    chart: Chart | None = None

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
            InvalidInput: the grid is a rule, not times, or the chart is none of StraightLine, BentLine, Trigonometric, PlainTime.
        """
        if not isinstance(self.grid, Nodes) or type(self.chart) not in _CHARTS.values():
            raise InvalidInput(
                "only a solver with its own times and a StraightLine, BentLine, Trigonometric or PlainTime chart can be saved, such as "
                "the result of sf.tune; write FixedAdams(grid=times, chart=sf.StraightLine())"
            )
        chart = {"name": type(self.chart).__name__, **vars(self.chart)}
        data = {"solver": "FixedAdams", "order": self.order, "corrector": self.corrector, "chart": chart}
        data["times"] = list(self.grid.values)
        if isinstance(self, FittedAdams):
            data["weights"] = [list(row) for row in self.weights]
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> FixedAdams:
        """The solver `save` wrote.

        Raises:
            InvalidInput: the file holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            chart = dict(data["chart"])
            made = {
                "order": data["order"],
                "corrector": data["corrector"],
                "chart": _CHARTS[chart.pop("name")](**chart),
                "grid": Nodes(data["times"]),
            }
            return FittedAdams(**made, weights=data["weights"]) if "weights" in data else FixedAdams(**made)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path} is no solver saved by FixedAdams.save: {error}") from error

    def check(self, task: Task) -> None:
        super().check(task)
        if task.equation.predict is None and self.chart is not None:
            raise InvalidInput("chart needs a diffusion equation; leave it out for an Equation of your own")

    def rule(self, task: Task) -> Grid:
        return UniformTime() if task.equation.predict is None else InChart(chart_of(task, self.chart))

    def plan(self, task: Task, times: Tensor) -> Plan:
        assert self.corrector is not None
        if task.equation.predict is None:
            calls = DriftCalls(task.equation, times[:-1], task.x.device)
            weights, n = adams_weights(times.numpy(), self.order, self.corrector), times.numel() - 1
            steps = [[Stage(i, 1.0, _terms(row))] for i, row in zip(range(n), weights, strict=True)]
            return Plan(calls, steps)
        process = task.equation.process
        assert process is not None
        chart = chart_of(task, self.chart).bind(process)
        u, m = chart.u(times), chart.m(times)
        p, q = chart.drift_weights(u[:-1])
        scale = (m[:-1] / m[1:]).tolist()
        weights = adams_weights(u.numpy(), self.order, self.corrector) / m[1:, None].numpy()
        steps = [[Stage(i, a, _terms(row))] for i, (a, row) in enumerate(zip(scale, weights, strict=True))]
        return Plan(Evaluations(task, times[:-1], p, q), steps)


@dataclass(frozen=True)
class FittedAdams(FixedAdams):
    """Adams's method on its own times, its weights corrected for one network: what `sf.tune` returns.

    Every explicit method of one evaluation a step that is exact where D is constant has the form

        x_n = (σ_n/σ_0) x_0 + Σ_{j<n} C_nj D(x_j, t_j),    Σ_j C_nj = α_n − α_0 σ_n/σ_0,

    multistep, predictor–corrector and exponential methods alike; `weights` are the C, and order, corrector and chart say which
    Adams method they correct (`data_weights`). They hold for one process, one network and these times.

    Args:
        weights: N rows, row n − 1 holding C_n0 … C_n,n−1.

    Raises:
        InvalidInput: rows of other lengths, or, when solving, sums that are not those of the equation's process.
    """

    weights: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", tuple(tuple(float(w) for w in row) for row in self.weights))
        if not isinstance(self.grid, Nodes) or [len(row) for row in self.weights] != list(
            range(1, self.grid.steps + 1)
        ):
            raise InvalidInput(
                f"fitted weights need their times and rows of 1, 2, … weights, one row a step; got {len(self.weights)} rows of "
                f"{[len(row) for row in self.weights][:4]}… and {self.grid!r}. Write sf.tune(equation, budget, pilot)"
            )

    @property
    def facts(self) -> Facts:
        return replace(super().facts, name=f"{super().facts.name}, fitted", order=1, face="diffusion")

    def check(self, task: Task) -> None:
        super().check(task)
        process = task.equation.process
        assert process is not None and isinstance(self.grid, Nodes)
        times = torch.tensor(self.grid.values, dtype=torch.float64)
        alpha, sigma = process.alpha(times), process.sigma(times)
        due = alpha[1:] - alpha[0] * sigma[1:] / sigma[0]
        sums = torch.tensor([math.fsum(row) for row in self.weights], dtype=torch.float64)
        if not bool(((sums - due).abs() <= 1e-6 * due.abs().clamp(min=1e-6)).all()):
            raise InvalidInput(
                f"these weights were fitted to another process than {process!r}; tune again: sf.tune(equation, budget, pilot)"
            )
        if task.save_at is not None:
            far = (task.save_at[:, None] - times).abs().amin(1) > 1e-12 * (times[-1] - times[0]).abs()
            if bool(far.any()):
                raise InvalidInput(
                    f"fitted weights belong to their times, and save_at={task.save_at[far][0].item():g} is none of them; choose from "
                    f"solver.grid.values = {[float(f'{t:.4g}') for t in times.tolist()]}, or write sf.FixedAdams(order={self.order}, ...)"
                )

    def plan(self, task: Task, times: Tensor) -> Plan:
        process = task.equation.process
        assert process is not None
        sigma = process.sigma(times).numpy()
        rows = np.zeros((len(self.weights) + 1, len(self.weights)))
        for n, row in enumerate(self.weights, start=1):
            rows[n, :n] = row
        scale = sigma[1:] / sigma[:-1]
        rows = rows[1:] - scale[:, None] * rows[:-1]
        steps = [[Stage(i, float(a), _terms(row))] for i, (a, row) in enumerate(zip(scale, rows, strict=True))]
        return Plan(Evaluations(task, times[:-1]), steps)


def data_weights(process: Process, times: Tensor, chart: Chart, order: int, corrector: int) -> np.ndarray:
    """C (N, N) of `FittedAdams` for Adams's own weights in a chart: lower triangular, row n − 1 for x_n."""
    bound = chart.bind(process)
    u = bound.u(times)
    A, S, dA, dS = (c.numpy() for c in bound.coefficients(u))
    W = adams_weights(u.numpy(), order, corrector)
    steps = len(W)
    # z_n less its share of z_0 is Σ b_nj D_j; F = dA D + dS (z − A D)/S
    z, F = np.zeros((steps + 1, steps)), np.zeros((steps, steps))
    for n in range(steps):
        F[n] = dS[n] / S[n] * z[n]
        F[n, n] += dA[n] - dS[n] * A[n] / S[n]
        z[n + 1] = z[n] + W[n, : n + 1] @ F[: n + 1]
    return z[1:] / bound.m(times)[1:, None].numpy()


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
