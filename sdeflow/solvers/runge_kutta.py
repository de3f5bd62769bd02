"""Explicit Runge–Kutta methods on a fixed grid, for any ODE; on diffusion equations in a chart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.charts import Chart
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, InChart, UniformTime
from sdeflow.solvers.base import Facts, Task, chart_of
from sdeflow.solvers.linear import DriftCalls, Evaluations, LinearMethod, Plan, Stage
from sdeflow.solvers.tableaux import TABLEAUX, Tableau


@dataclass(frozen=True)
class RungeKutta(LinearMethod):
    """k_i = f(u + c_i h, z + h Σ a_ij k_j), z⁺ = z + h Σ b_i k_i, in t, or on a diffusion equation in a chart's (u, z).

    Args:
        method: "euler", "midpoint", "heun", "kutta3", "rk4", "dopri5" or "tsit5"; or a `Tableau` of one's own.
        steps: number of steps.
        grid: a rule for placing them, or the times themselves; default uniform in the chart's clock.
        chart: None for `sf.chart_for` of the network on diffusion equations and t on all others; `PlainTime()` for t on all.
        denoise: end with a step from `stop` to σ = 0, where x = D (diffusion equations only); one evaluation, counted. States at
            `save_at` are those before it.

    Example:
        >>> sf.solve(sf.ProbabilityFlowODE(predict), sf.RungeKutta("rk4", steps=20), noise)
    """

    method: str | Tableau = "rk4"
    chart: Chart | None = None
    denoise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.method, Tableau) and self.method not in TABLEAUX:
            raise InvalidInput(
                f'method must be one of {", ".join(TABLEAUX)} or a Tableau; got {self.method!r}. Write RungeKutta("rk4", steps=20)'
            )

    @property
    def tableau(self) -> Tableau:
        """The method's Butcher data."""
        return self.method if isinstance(self.method, Tableau) else TABLEAUX[self.method]

    @property
    def facts(self) -> Facts:
        t = self.tableau
        return Facts(t.name, t.order, None, None, t.stages, False, ("none",), "drift", t.reference)

    def check(self, task: Task) -> None:
        super().check(task)
        if task.equation.predict is None and (self.denoise or self.chart is not None):
            raise InvalidInput(
                "chart and denoise need a diffusion equation; leave them out for an Equation of your own"
            )

    def rule(self, task: Task) -> Grid:
        return UniformTime() if task.equation.predict is None else InChart(chart_of(task, self.chart))

    def plan(self, task: Task, times: Tensor) -> Plan:
        return _in_time(self.tableau, task, times) if task.equation.predict is None else _in_chart(self, task, times)


def _stages(tableau: Tableau, first: int, scale: list[float], gain: list[float]) -> list[Stage]:
    """One step: x ← scale_i·anchor + gain_i Σ a_ij F_j, for every stage after the first and for the end."""
    rows = (*tableau.a[1:], tableau.b)
    return [
        Stage(first + i, scale[i], [(first + j, gain[i] * w) for j, w in enumerate(row)], anchor=i == 0)
        for i, row in enumerate(rows)
    ]


def _in_time(tableau: Tableau, task: Task, times: Tensor) -> Plan:
    h = times.diff()
    t = times[:-1, None] + h[:, None] * torch.tensor(tableau.c, dtype=torch.float64)
    n, ones = tableau.stages, [1.0] * tableau.stages
    plan = [_stages(tableau, i * n, ones, [hi] * n) for i, hi in enumerate(h.tolist())]
    return Plan(DriftCalls(task.equation, t.flatten(), task.x.device), plan)


def _in_chart(solver: RungeKutta, task: Task, times: Tensor) -> Plan:
    # z = m x: x_i = (m_s x_s + h Σ a_ij V_j)/m_i, V = dz/du = p·D + q·ε̂
    tableau, process = solver.tableau, task.equation.process
    assert process is not None
    chart = chart_of(task, solver.chart).bind(process)
    u = chart.u(times)
    h, c = u.diff(), torch.tensor((*tableau.c, 1.0), dtype=torch.float64)
    inner = u[:-1, None] + h[:, None] * c
    t = chart.t(inner)
    # nodes as given, not there and back through the clock
    t, inner = (
        torch.where(c == 0.0, a[:-1, None], torch.where(c == 1.0, a[1:, None], b)) for a, b in ((times, t), (u, inner))
    )
    m = chart.m(t)
    scale, gain = (m[:, :1] / m[:, 1:]).tolist(), (h[:, None] / m[:, 1:]).tolist()
    calls, (p, q) = t[:, :-1].flatten(), chart.drift_weights(inner[:, :-1].flatten())
    if tableau.stages == 1 and not solver.denoise:
        A, W = m[:, 0] / m[:, 1], tableau.b[0] * h / m[:, 1]
        return Plan.one_step(Evaluations(task, calls, p, q), A.numpy(), W.numpy(), None, None)
    plan = [_stages(tableau, i * tableau.stages, s, g) for i, (s, g) in enumerate(zip(scale, gain, strict=True))]
    if solver.denoise:
        one = torch.ones(1, dtype=torch.float64)
        plan.append([Stage(calls.numel(), 0.0, [(calls.numel(), 1.0)])])
        calls, p, q = torch.cat([calls, times[-1:]]), torch.cat([p, one]), torch.cat([q, 0 * one])
    return Plan(Evaluations(task, calls, p, q), plan)


def butcher(tableau: Tableau) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A, b, c) as float64 arrays, A (stages, stages)."""
    A = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.a):
        A[i, :i] = row
    return A, np.array(tableau.b), np.array(tableau.c)
