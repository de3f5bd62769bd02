"""Adaptive Runge–Kutta pairs with a step of its own for every sample."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sdeflow.charts import Chart
from sdeflow.solvers.base import Facts, Outcome, Solver, Task
from sdeflow.solvers.control import Attempt, Flow, Stepper, Trace, check_tolerances, drive, rms
from sdeflow.solvers.tableaux import DOPRI5, TSIT5, Tableau

SAFETY = 0.9
GROW, SHRINK = 5.0, 0.2
INTEGRAL, PROPORTIONAL = 0.7, 0.4
"""PI control h⁺ = h·safety·e^{−α/5}·e₋^{β/5} with α = 0.7, β = 0.4 (Gustafsson 1991), e₋ the last accepted error."""


@dataclass(frozen=True)
class _Pair(Solver):
    """An explicit pair of order 5(4), last stage = first stage of the next step.

    Args:
        rtol, atol: a step's error may be atol + rtol·|x| (RMS over a sample's elements).
        max_steps: tries of a step before a sample stops with status MAX_STEPS.
        chart: None for `sf.chart_for` of the network on diffusion equations and t on any other ODE; `PlainTime()` for t on all.
        coupled: one step size for the whole batch, by its largest error.
        dense: keep the steps for `solution.at(t)`, by a quartic through both ends, their slopes and the middle.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    max_steps: int = 10_000
    chart: Chart | None = None
    coupled: bool = False
    dense: bool = False
    tableau: ClassVar[Tableau]
    embedded: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        check_tolerances(type(self).__name__, self.rtol, self.atol, self.max_steps)

    @property
    def facts(self) -> Facts:
        return Facts(
            name=type(self).__name__,
            order=5,
            strong=None,
            weak=None,
            evaluations=6,
            adaptive=True,
            noise=("none",),
            face="drift",
            reference=self.tableau.reference,
        )

    def integrate(self, task: Task) -> Outcome:
        flow = Flow.of(task, self.chart, one_time=self.coupled)
        stepper = PairStepper(flow, self.tableau, self.embedded)
        return drive(
            flow, task, stepper, self.rtol, self.atol, self.max_steps, self.coupled, self.dense, self.tableau.order - 1
        )


@dataclass(frozen=True)
class Dopri5(_Pair):
    __doc__ = "Dormand & Prince's pair of order 5(4). " + (_Pair.__doc__ or "").split("\n", 1)[1]
    tableau = DOPRI5
    embedded = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class Tsit5(_Pair):
    __doc__ = "Tsitouras's pair of order 5(4). " + (_Pair.__doc__ or "").split("\n", 1)[1]
    tableau = TSIT5
    embedded = (
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    )


@lru_cache(maxsize=8)
def middle(tableau: Tableau) -> tuple[float, ...]:
    """Weights of z(u + h/2) − z(u) over h on all stages, the last being f(u + h, z⁺): the shortest of order 4.

    The conditions of the eight trees up to order 4, at θ = ½, are linear in the weights.
    """
    s = tableau.stages + 1
    a = np.zeros((s, s))
    for i, row in enumerate((*tableau.a, tableau.b)):
        a[i, : len(row)] = row
    c, theta = a.sum(1), 0.5
    trees = np.stack([c**0, c, c**2, a @ c, c**3, c * (a @ c), a @ c**2, a @ a @ c])
    values = np.array([1, 1 / 2, 1 / 3, 1 / 6, 1 / 4, 1 / 8, 1 / 12, 1 / 24]) * theta ** np.array(
        [1, 2, 3, 3, 4, 4, 4, 4]
    )
    found, *_ = np.linalg.lstsq(trees, values, rcond=1e-10)
    assert np.abs(trees @ found - values).max() < 1e-8, f"{tableau.name} has no middle of order 4"
    return tuple(found.tolist())


class PairStepper(Stepper):
    """Stages of one step for all samples, and the PI controller's memory."""

    def __init__(self, flow: Flow, tableau: Tableau, embedded: tuple[float, ...]):
        self.flow, self.tableau = flow, tableau
        self.a, self.b, self.c, self.e = tableau.a, tableau.b, tableau.c, embedded

    def begin(self, u: Tensor, z: Tensor, f: Tensor) -> None:
        """See `Stepper`."""
        self.f, self.last = f, torch.ones_like(u)

    def attempt(self, u: Tensor, z: Tensor, step: Tensor, end: Tensor, allowed: Tensor) -> Attempt:
        """See `Stepper`."""
        h = step.to(z.dtype)[:, None]
        stages = [self.f]

        def combined(weights: tuple[float, ...]) -> Tensor:
            return h * sum(w * f for w, f in zip(weights, stages, strict=False) if w != 0.0)

        for row, c in zip(self.a[1:], self.c[1:], strict=True):
            stages.append(self.flow.rhs(end if c == 1.0 else u + c * step, z + combined(row)))
        z_new = z + combined(self.b)
        stages.append(self.flow.rhs(end, z_new))
        self.stages, self.h, self.z, self.z_new = stages, h, z, z_new
        error = rms(combined(self.e).detach()) / allowed
        exponent = 1.0 / self.tableau.order
        self.error = error
        small = error.clamp_min(1e-10)
        grow = SAFETY * small ** (-INTEGRAL * exponent) * self.last ** (PROPORTIONAL * exponent)
        shrink = SAFETY * small**-exponent
        return Attempt(z_new, error, grow.clamp(SHRINK, GROW), shrink.clamp(SHRINK, 0.9).nan_to_num(nan=SHRINK))

    def commit(self, ok: Tensor) -> None:
        """See `Stepper`."""
        self.f = torch.where(ok[:, None], self.stages[-1], self.f)
        self.last = torch.where(ok, self.error.clamp_min(1e-4), self.last)

    def keep(self, rows: Tensor) -> None:
        """See `Stepper`."""
        self.f, self.last = self.f[rows], self.last[rows]

    def payload(self) -> tuple[Tensor, ...]:
        """See `Stepper`."""
        move = sum(w * f for w, f in zip(middle(self.tableau), self.stages, strict=True))
        return self.z_new, self.stages[0], self.stages[-1], self.z + self.h * move

    def interpolate(self, trace: Trace, piece: Tensor, u: Tensor) -> Tensor:
        """See `Stepper`: the quartic through z and f at both ends and z in the middle."""
        end, f0, f1, mid = (part[piece] for part in trace.payload)
        z, h = trace.z[piece], (trace.end - trace.start)[piece]
        v = ((u - trace.start[piece]) / h).to(z.dtype)[:, None]
        h = h.to(z.dtype)[:, None]
        line = z + v * (end - z)
        cubic = line + v * (v - 1.0) * ((v - 1.0) * (h * f0 - (end - z)) + v * (h * f1 - (end - z)))
        # at v = ½ the cubic is off by what the quartic term, (v(v − 1))² = 1/16 there, must add
        half = 0.5 * (z + end) + 0.125 * h * (f0 - f1)
        return cubic + 16.0 * (v * (v - 1.0)) ** 2 * (mid - half)
