"""What the two library backends share: the coordinates of a solve, checks of settings, statuses on the way out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.charts import BoundChart, Chart, PlainTime
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, Nodes
from sdeflow.processes import Time, as_time, expand
from sdeflow.solution import Status
from sdeflow.solvers.base import Task, chart_of

PATIENCE = 4
"""Attempts in a row, each step a fifth of the one before, after which a non-finite sample is given up."""


STRIKES = 3 * PATIENCE
"""Such attempts in all before the solve gets past where they ended: steps that creep up to a wall are finite ever again."""


class Strikes:
    """Which samples are to be given up: for PATIENCE non-finite attempts in a row, or STRIKES of them without getting past."""

    def __init__(self, like: Tensor):
        self.in_a_row, self.without_passing = torch.zeros_like(like), torch.zeros_like(like)
        self.wall = torch.full(like.shape, math.inf, dtype=torch.float64, device=like.device)

    def judge(self, trouble: Tensor | None, begun: float, ended: float) -> Tensor | None:
        """Heed one attempt.

        Args:
            trouble: the samples for which it was not finite, (batch,) bool, None for none.
            begun, ended: how far from the start it began and ended.

        Returns:
            The samples to be given up, (batch,) bool, None for none.
        """
        past = self.wall <= begun
        self.wall, self.without_passing = (
            self.wall.masked_fill(past, math.inf),
            self.without_passing.masked_fill(past, 0),
        )
        if trouble is None:
            self.in_a_row.zero_()
            return None
        self.in_a_row = torch.where(trouble, self.in_a_row + 1, 0)
        self.without_passing = self.without_passing + trouble
        self.wall = torch.where(trouble, self.wall.clamp_max(ended), self.wall)
        return (self.in_a_row >= PATIENCE) | (self.without_passing >= STRIKES)


class Stopped(Exception):
    """No further step can be made; the status says why."""

    def __init__(self, status: Status):
        super().__init__(status.name)
        self.status = status


# --- settings


def check_method(owner: str, method: Any, known: dict[str, Any], refused: dict[str, str]) -> Any:
    """The table's entry of a method; InvalidInput with the list, or with the reason why it is not offered."""
    if method in refused:
        raise InvalidInput(f"{owner} does not offer {method}: {refused[method]}")
    if not isinstance(method, str) or method not in known:
        raise InvalidInput(f"{owner}'s method must be one of {', '.join(known)}; got {method!r}")
    return known[method]


def check_steps(owner: str, steps: Any) -> None:
    if steps is None:
        raise InvalidInput(f"{owner} needs steps=<number of steps>, or grid=<tensor of times>; neither was given")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InvalidInput(f"steps must be a positive integer (steps, not time points); got {steps!r}")


def check_tolerances(rtol: Any, atol: Any) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, bool) or not isinstance(value, float | int) or not (math.isfinite(value) and value >= 0):
            raise InvalidInput(f"{name} must be a finite number ≥ 0; got {value!r}. Write e.g. {name}=1e-5")
    if rtol == atol == 0:
        raise InvalidInput("rtol and atol are both 0, which no step can meet; write e.g. rtol=1e-5, atol=1e-5")


def check_limit(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInput(f"{name} must be a positive integer; got {value!r}")


def accept_nodes(solver: Any) -> None:
    """A frozen solver's `grid` of times becomes `Nodes`, which bring their number of steps."""
    if solver.grid is not None and not isinstance(solver.grid, Grid):
        object.__setattr__(solver, "grid", Nodes(solver.grid))
    if isinstance(solver.grid, Nodes) and solver.steps is None:
        object.__setattr__(solver, "steps", solver.grid.steps)


# --- samples


def rows(mask: Tensor, x: Tensor) -> Tensor:
    """A (batch,) mask shaped to broadcast against x (batch, *event)."""
    return mask.reshape(-1, *(1,) * (x.ndim - 1))


# --- the coordinates a solve happens in


@dataclass(frozen=True)
class Clock:
    """The (u, z) of one solve: a bound chart's, or (t, x) itself."""

    task: Task
    bound: BoundChart | None

    @classmethod
    def of(cls, task: Task, chart: Chart | None) -> Clock:
        """The chart's coordinates on equations with a prediction (None: those of the chart that suits it), else t.

        Raises:
            InvalidInput: the clock or the scale is infinite at an end of the interval.
        """
        process = task.equation.process
        if task.equation.predict is None or process is None or isinstance(chart, PlainTime):
            return cls(task, None)
        chart = chart_of(task, chart)
        bound = chart.bind(process)
        for t in (task.start, task.stop):
            if not bool(bound.u(t).isfinite() & bound.m(t).isfinite()):
                raise InvalidInput(
                    f"{chart!r} does not reach t={t} (α or σ is 0 there); write chart=StraightLine(), or another "
                    "start and stop"
                )
        return cls(task, bound)

    def u(self, t: Tensor) -> Tensor:
        """The clock at times t."""
        return t if self.bound is None else self.bound.u(t)

    def enter(self, x: Tensor) -> Tensor:
        """z of the start state."""
        return x if self.bound is None else self.bound.to_chart(self.task.start, x)

    def t(self, u: Tensor) -> Tensor:
        """Times at which the clock shows u."""
        return u if self.bound is None else self.bound.t(u)

    def leave(self, t: Time, z: Tensor) -> Tensor:
        """x of z at time t, one for all or one a sample."""
        return z if self.bound is None else self.bound.from_chart(t, z)

    def drift(self, u: Tensor, z: Tensor) -> Tensor:
        """dz/du, (batch, *event); the network sees the state's own dtype."""
        equation, state = self.task.equation, z.to(self.task.x.dtype)
        if self.bound is None:
            return equation.drift(u, state).to(z.dtype)
        assert equation.predict is not None
        return self.bound.drift(equation.predict, u, state, equation.eta).to(z.dtype)

    def diffusion(self, u: Tensor, z: Tensor) -> Tensor:
        """Noise amplitude of z per √|du|, shaped as the equation's noise says."""
        equation = self.task.equation
        if self.bound is None:
            return equation.diffusion(u, z.to(self.task.x.dtype)).to(z.dtype)
        return expand(as_time(self.bound.diffusion(u, equation.eta), z.device), z)
