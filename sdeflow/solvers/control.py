"""Step-size control: one loop in which every sample has its own clock.

A method is a `Stepper`: it tries a step of every sample and says how large the error was and how much the step may
change. `drive` does the rest: acceptance, landing on output times and the end, failures, and taking finished samples
out of the batch. Everything is a tensor over the samples that are still under way; the host learns one number a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sdeflow.charts import BoundChart, Chart, LogSNR, StraightLine, Trigonometric
from sdeflow.equations import Equation
from sdeflow.errors import InvalidInput, finite
from sdeflow.processes import expand
from sdeflow.processes.base import remembering
from sdeflow.solution import Status
from sdeflow.solvers.base import Outcome, Task, chart_of

FIRST = 0.35
TRIES = 12
"""Times in a row that a sample's evaluation may be non-finite, its step quartered each time, before it fails."""


def check_tolerances(owner: str, rtol: float, atol: float, max_steps: int) -> None:
    """Refuse tolerances and limits that no run could meet.

    Raises:
        InvalidInput: a negative or non-finite tolerance, both zero, or max_steps < 1.
    """
    if not (finite(rtol) and finite(atol) and rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise InvalidInput(
            f"rtol and atol must be finite numbers, ≥ 0 and not both 0; got rtol={rtol!r}, atol={atol!r}. "
            f"Write {owner}(rtol=1e-4, atol=1e-4)"
        )
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
        raise InvalidInput(f"max_steps must be a positive integer; got {max_steps!r}")


@dataclass(frozen=True)
class Flow:
    """The ODE dz/du that a task asks for, in a chart's (u, z), or in (t, x) itself when `chart` is None.

    States are flattened to (n, d). No evaluation leaves the task's interval: t(u) is clamped to it, since u(t) and
    t(u) are inverse only up to rounding.
    """

    equation: Equation
    chart: BoundChart | None
    start: float
    stop: float
    event: torch.Size
    one_time: bool = False

    @cached_property
    def reach(self) -> float:
        """The standard deviation of x at the end for Gaussian data of the chart's scale."""
        assert self.chart is not None
        A, S, _, _ = self.chart.coefficients(self.chart.u(self.stop))
        return (torch.hypot(self.scale * A, S) / self.chart.m(self.stop)).item()

    @property
    def scale(self) -> float:
        """The chart's data scale c."""
        return getattr(self.chart.chart, "c", 0.5) if self.chart is not None else 1.0

    @staticmethod
    def of(task: Task, chart: Chart | None, one_time: bool = False) -> Flow:
        """The task's flow; `chart` None means the chart that suits the network of a diffusion equation, t for any other."""
        equation = task.equation
        diffusion = equation.process is not None and equation.predict is not None
        if chart is not None and not diffusion:
            raise InvalidInput(
                f"chart={chart!r} needs a diffusion equation; {equation!r} has no process. Leave chart out"
            )
        equation = one_answer(equation)
        bound = chart_of(task, chart).bind(equation.process) if equation.process and diffusion else None
        return Flow(equation, bound, task.start, task.stop, task.x.shape[1:], one_time)

    @property
    def natural(self) -> bool:
        """Whether the clock's unit is the scale on which a diffusion's flow bends."""
        return self.chart is not None and isinstance(self.chart.chart, StraightLine | Trigonometric | LogSNR)

    def u(self, t: Tensor | float) -> Tensor:
        """The clock at times t, float64."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return t if self.chart is None else self.chart.u(t)

    def t(self, u: Tensor) -> Tensor:
        """The time at clock readings u, inside the task's interval."""
        t = u if self.chart is None else self.chart.t(u)
        return t.clamp(min(self.start, self.stop), max(self.start, self.stop))

    def z(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Flattened chart state (n, d) of the states x (n, *event) at time t."""
        return (x if self.chart is None else self.chart.to_chart(t, x)).flatten(1)

    def x(self, t: Tensor | float, z: Tensor) -> Tensor:
        """States (n, *event) of chart states z (n, d) at time t, a number or (n,)."""
        z = z.reshape(-1, *self.event)
        return z if self.chart is None else self.chart.from_chart(t, z)

    def rhs(self, u: Tensor, z: Tensor) -> Tensor:
        """dz/du at u (n,), z (n, d); one evaluation a sample."""
        shaped = z.reshape(-1, *self.event)
        u = u[0] if self.one_time else u
        t = self.t(u)
        if self.chart is None:
            return self.equation.drift(t, shaped).flatten(1)
        p, q = self.chart.drift_weights(u)
        x = shaped / expand(self.chart.m(t), shaped)
        assert self.equation.predict is not None
        return self.equation.predict.combine(x, t, p, q).flatten(1)

    def carry(self, u: Tensor) -> Tensor:
        """By how much an error in z at u grows until it is an error in x at the end, (n,).

        For Gaussian data of the chart's scale c the flow multiplies z by q(u_end)/q(u), q = √(c²A² + S²) being the
        standard deviation of z, and x = z/m. In the straight-line chart this is between 1/√2 and √2; in the
        trigonometric chart it is 1.
        """
        if self.chart is None:
            return torch.ones_like(u)
        A, S, _, _ = self.chart.coefficients(u)
        return self.reach / torch.hypot(self.scale * A, S)


def one_answer(equation: Equation) -> Equation:
    """The same equation, whose process (`remembering`) is asked once for what a step needs several times."""
    if equation.process is None or equation.predict is None:
        return equation
    equation, predict = copy.copy(equation), copy.copy(equation.predict)
    equation.process = predict.process = remembering(predict.process)
    equation.predict = predict
    return equation


class Attempt(NamedTuple):
    """What a stepper found when it tried a step.

    Attributes:
        z: the state after the step, (n, d).
        error: estimated local error over the allowed one, (n,): accepted where ≤ 1.
        grow: factor on the step if this one is accepted, (n,).
        shrink: factor on the step if it is not, (n,).
    """

    z: Tensor
    error: Tensor
    grow: Tensor
    shrink: Tensor


News = tuple[Tensor, Callable[[list[int]], None]]
"""Integers (m,) on the device, and the function that wants them as a list."""


class Stepper(Protocol):
    """A method under `drive`. Its tensors hold the samples still under way, in the order of `drive`'s own."""

    stretch: float = 1.05
    """A step may be lengthened this much to land, so that no sliver is left over."""

    def longest(self, u: Tensor) -> Tensor | None:
        """The longest steps from u, (n,), over which the method can be taken to see what happens; None for any."""
        return None

    def begin(self, u: Tensor, z: Tensor, f: Tensor) -> None:
        """The first evaluation f (n, d) at u (n,), z (n, d)."""
        ...

    def attempt(self, u: Tensor, z: Tensor, step: Tensor, end: Tensor, allowed: Tensor) -> Attempt:
        """Try from u to end = u + step; `allowed` (n,) is the local error in z (RMS) that is allowed."""
        ...

    def commit(self, ok: Tensor) -> News | None:
        """The samples (n,) bool whose attempt was accepted. Returns what the host should know of it, and whom to tell."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these samples (indices into the present ones) alone."""
        ...

    def payload(self) -> tuple[Tensor, ...]:
        """What `interpolate` needs of the step just tried besides its ends and first state, each (n, …)."""
        ...

    def interpolate(self, trace: Trace, piece: Tensor, u: Tensor) -> Tensor:
        """The states (m, d) at u (m,), each inside the accepted step piece (m,) of the trace."""
        ...


class Trace:
    """All accepted steps of a run, sample by sample in the order of travel, from which states between are had.

    Attributes:
        row: (m,) the sample; first: (m,) index of that sample's first step; start, end: (m,) clock; z: (m, d) state at start;
        payload: the stepper's own.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, row: Tensor, start: Tensor, end: Tensor, z: Tensor, payload: tuple[Tensor, ...], ok: Tensor) -> None:
        """Keep the steps accepted by `ok`."""
        some = ok.nonzero().flatten()
        self.parts.append(tuple(part[some] for part in (row, start, end, z, *payload)))

    def close(self, flow: Flow, stepper: Stepper, x: Tensor) -> Callable[[float | Tensor], Tensor]:
        """state(t): (batch, *event) at a time t in the interval, NaN for samples that did not get there."""
        columns = [torch.cat(column) for column in zip(*self.parts, strict=True)]
        order = columns[0].argsort(stable=True)
        self.row, self.start, self.end, self.z, *rest = (column[order] for column in columns)
        self.payload = tuple(rest)
        place = torch.arange(len(order), device=order.device)
        fresh = torch.cat([place.new_ones(1, dtype=torch.bool), self.row[1:] != self.row[:-1]])
        self.first = torch.where(fresh, place, 0).cummax(0).values
        low, high = sorted((flow.start, flow.stop))

        def state(t: float | Tensor) -> Tensor:
            when = float(t)
            if not low <= when <= high:
                raise InvalidInput(
                    f"t={when:g} is outside the solved interval [{low:g}, {high:g}]; choose a time inside"
                )
            if when == flow.start:
                return x
            u = flow.u(when).to(self.start.device)
            inside = ((u - self.start) * (u - self.end) <= 0).nonzero().flatten()
            z = flow.z(flow.start, x).new_full((x.shape[0], self.z.shape[1]), torch.nan)
            if inside.numel():  # else no sample got so far
                z[self.row[inside]] = stepper.interpolate(self, inside, u.expand(len(inside)))
            return flow.x(when, z)

        return state


def rms(z: Tensor) -> Tensor:
    """Root mean square over the last dimension, float64."""
    return torch.linalg.vector_norm(z, dim=-1).double() / math.sqrt(z.shape[-1])


def first_step(flow: Flow, z: Tensor, f: Tensor, allowed: Tensor, span: Tensor, order: int = 1) -> Tensor:
    """A first step whose error is about the allowed one, (n,), for a method of this order (the first of a run).

    In a chart the flow bends on the scale 1 of the clock: for Gaussian data of scale κc, z‴ = 3z″ = 3κ²z where u = 1 in
    the straight-line chart, so a step that ends with the trapezoidal rule makes κ²h³|z|/4, and h = (a/|z|)^{1/3} is a
    good one for κ² < 4, less a fifth. Elsewhere |z″| is guessed as |f|²/|z| and not less than |f|/span, and h^{p+1} takes the place of
    h² in ½h²|z″| = a.
    """
    size, speed = rms(z.detach()), rms(f.detach())
    tiny = torch.finfo(torch.float64).tiny
    # a state of size 0 says nothing of the scale
    known = size > allowed
    if flow.natural:
        return FIRST * (allowed / size.clamp_min(tiny)).clamp_max(1.0).pow(1.0 / (max(order, 2) + 1.0)).minimum(span)
    bend = torch.where(known, (speed.square() / size.clamp_min(tiny)).maximum(speed / span), speed / span).clamp_min(
        tiny
    )
    scale = torch.where(known, (size / bend).sqrt().minimum(span), span)
    relative = 2.0 * allowed / (bend * scale.square()).clamp_min(tiny)
    return (scale * relative ** (1.0 / (order + 1.0))).minimum(span)


@dataclass
class _Under:
    """The samples under way: all tensors (n, …)."""

    rows: Tensor
    u: Tensor
    z: Tensor
    h: Tensor
    target: Tensor
    accepted: Tensor
    broken: Tensor

    def keep(self, rows: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


def drive(
    flow: Flow,
    task: Task,
    stepper: Stepper,
    rtol: float,
    atol: float,
    max_steps: int,
    coupled: bool = False,
    dense: bool = False,
    order: int = 1,
) -> Outcome:
    """Run a stepper over a task.

    Every sample takes its own steps, unless `coupled`: then the largest error decides for all. A step is allowed the
    local error atol + rtol·|x| (RMS over the sample's elements) as carried to the end by `Flow.carry`. `order` is that
    of the method's first step; with `dense` all accepted steps are kept, and the outcome can be asked for any time.

    Returns:
        An Outcome. Statuses: MAX_STEPS after max_steps tries, NON_FINITE where the network stays so at ever smaller
        steps, STEP_UNDERFLOW where the step falls to the rounding of the clock.
    """
    run = _Run(flow, task, stepper, rtol, atol, coupled, Trace() if dense else None, order)
    for _ in range(max_steps):
        if not run.step():
            break
    return run.outcome()


class _Run:
    def __init__(
        self,
        flow: Flow,
        task: Task,
        stepper: Stepper,
        rtol: float,
        atol: float,
        coupled: bool,
        trace: Trace | None,
        order: int,
    ):
        self.trace, self.order = trace, order
        self.stretch = stepper.stretch
        self.flow, self.task, self.stepper = flow, task, stepper
        self.rtol, self.atol, self.coupled = rtol, atol, coupled
        device, n = task.x.device, task.batch
        saved = [] if task.save_at is None else task.save_at.tolist()
        self.saved = len(saved)
        self.times = torch.tensor(
            saved if saved and saved[-1] == task.stop else [*saved, task.stop], dtype=torch.float64
        )
        self.targets = flow.u(self.times).to(device)
        begin, finish = flow.u(task.start).item(), self.targets[-1].item()
        if not (math.isfinite(begin) and math.isfinite(finish)):
            raise InvalidInput(
                f"the chart's clock is infinite at start={task.start} or stop={task.stop} (α = 0 or σ = 0 there); "
                "take another chart, e.g. chart=sf.StraightLine()"
            )
        self.sign, self.span = math.copysign(1.0, finish - begin), abs(finish - begin)
        self.smallest = 8.0 * torch.finfo(torch.float64).eps * max(abs(begin), abs(finish))
        z = flow.z(task.start, task.x)
        self.z, self.u = z, torch.full((n,), begin, dtype=torch.float64, device=device)
        self.status = task.constant(Status.MAX_STEPS)
        self.accepted, self.rejected = task.constant(0), task.constant(0)
        self.states = None if task.save_at is None else z.new_full((len(self.times), n, z.shape[1]), torch.nan)
        zero = task.constant(0)
        self.now = _Under(torch.arange(n, device=device), self.u, z, self.u, zero, zero, zero)
        self.single, self.turn = self.states is None, 0
        self._begin()

    def _begin(self) -> None:
        now = self.now
        if self.states is not None:  # a first output time at the start itself
            here = self.targets[0] == now.u[0]
            self.states[0] = torch.where(here, now.z, self.states[0])
            now.target = now.target + here
        bad = ~self._first().isfinite().all(1)
        if bool(bad.any()):
            now.broken = now.broken + TRIES * bad
            self._leave(bad, torch.zeros_like(bad), bad)

    def _first(self) -> Tensor:
        """Evaluate where the samples are and choose a first step from there; returns f (n, d)."""
        now = self.now
        f = self.flow.rhs(now.u, now.z)
        now.h = first_step(
            self.flow, now.z, f, self.allowed(now.u, now.z), torch.full_like(now.u, self.span), self.order
        )
        if self.coupled:
            now.h = now.h.nan_to_num(nan=self.span).amin().expand_as(now.h)
        self.stepper.begin(now.u, now.z, f)
        return f

    def allowed(self, u: Tensor, z: Tensor) -> Tensor:
        """The local error in z that a step from (u, z) may make."""
        allowed = self.flow.carry(u).reciprocal().mul_(self.atol)
        return allowed.add_(rms(z.detach()), alpha=self.rtol) if self.rtol else allowed

    def step(self) -> bool:
        """Try one step of every sample under way; False when none is left."""
        now = self.now
        if not now.rows.numel():
            return False
        self.turn += 1
        goal = self.targets[-1] if self.single else self.targets[now.target]
        left = (goal - now.u).mul_(self.sign)
        limit = self.stepper.longest(now.u)
        now.h = now.h if limit is None else now.h.minimum(limit)
        land = now.h * self.stretch >= left
        # two equal steps to the goal rather than a long one and a sliver
        # cut to float32's digits: estimates differ in their last ones with the batch's shape, and a Brownian path by √|Δu| at an end Δu off
        h = torch.where(land, left, torch.minimum(now.h, 0.5 * left).float().double())
        step = self.sign * h
        end = torch.where(land, goal, now.u + step)
        tried = self.stepper.attempt(now.u, now.z, step, end, self.allowed(now.u, now.z))
        error, grow, shrink = tried.error, tried.grow, tried.shrink
        broken = ~(error < math.inf)
        if self.coupled:
            # a sample that breaks off holds the others up until it has failed, and no longer
            error = torch.where(broken, math.inf, error).amax().expand_as(error)
            grow = grow.amin().expand_as(grow)
            shrink = torch.where(broken.any(), 0.25, shrink.nan_to_num(nan=0.25).amin()).expand_as(h)
        ok = error <= 1.0
        # a rejected last step that shrinks by less than the stretch would be stretched back to itself, for ever
        shrink = torch.where(land, shrink.clamp_max(0.99 / self.stretch), shrink)
        if self.trace is not None:
            self.trace.add(now.rows, now.u, end, now.z, self.stepper.payload(), ok)
        now.u = torch.where(ok, end, now.u)
        now.z = torch.where(ok[:, None], tried.z, now.z)
        planned = now.h
        now.h = h * torch.where(ok, grow, torch.where(broken, 0.25, shrink))
        now.accepted = now.accepted + ok
        now.broken = (now.broken + broken) * broken
        done = ok & land
        if not self.single:
            # a step cut short to land says little against the step that was planned
            now.h = torch.where(done & (grow >= 1.0), torch.maximum(now.h, planned), now.h)
            self._save(done)
            now.target = now.target + done
            done = now.target == len(self.targets)
            now.target = now.target.clamp_max(len(self.targets) - 1)
        small = now.h < self.smallest
        if self.coupled:  # those that do not break off start again from here once the others have failed
            small = small & ~(broken.any() & ~broken)
        gone = done | small | (now.broken >= TRIES)
        if self._tell(ok, gone):
            self._leave(gone, done, broken)
            if self.coupled and self.now.rows.numel():
                self._first()
        if self.task.progress is not None:
            inside = (self.now.u - self.targets[-1]).abs().sum().item() / self.span
            self.task.progress(1.0 - inside / self.task.batch)
        return bool(self.now.rows.numel())

    def _tell(self, ok: Tensor, gone: Tensor) -> bool:
        """The one word a step from the device to the host: whether samples leave, and what the stepper has to say."""
        news, leaves = self.stepper.commit(ok), gone.any().long()[None]
        some, *rest = (leaves if news is None else torch.cat([leaves, news[0]])).tolist()
        if news is not None:
            news[1](rest)
        return bool(some)

    def _save(self, arrived: Tensor) -> None:
        if self.states is not None:
            now = self.now
            self.states[now.target, now.rows] = torch.where(arrived[:, None], now.z, self.states[now.target, now.rows])

    def _leave(self, gone: Tensor, done: Tensor, broken: Tensor) -> None:
        """Take the samples `gone` out of the batch: done, or failed where they break off, or with too small a step."""
        now = self.now
        failed = (now.broken >= TRIES) | ((now.h < self.smallest) & broken)
        status = torch.where(done, Status.SUCCESS, torch.where(failed, Status.NON_FINITE, Status.STEP_UNDERFLOW))
        out, rest = gone.nonzero().flatten(), (~gone).nonzero().flatten()
        self.status = self.status.index_put((now.rows[out],), status[out].to(torch.int64))
        self._write_back(out)
        self.now.keep(rest)
        self.stepper.keep(rest)
        self.task.counter.restrict(self.now.rows)

    def _write_back(self, some: Tensor) -> None:
        now, rows = self.now, self.now.rows[some]
        self.z = self.z.index_put((rows,), now.z[some])
        self.u = self.u.index_put((rows,), now.u[some])
        self.accepted = self.accepted.index_put((rows,), now.accepted[some])
        # a sample under way tries one step a turn
        self.rejected = self.rejected.index_put((rows,), self.turn - now.accepted[some])

    def outcome(self) -> Outcome:
        flow, task = self.flow, self.task
        self._write_back(torch.arange(len(self.now.rows), device=self.now.rows.device))
        task.counter.restrict(None)
        if task.progress is not None:
            task.progress(1.0)
        states = None
        if self.states is not None:
            times = self.times[: self.saved].tolist()
            states = torch.stack([flow.x(t, z) for t, z in zip(times, self.states, strict=False)])
        dense = None
        if self.trace is not None and self.trace.parts:
            dense = self.trace.close(flow, self.stepper, task.x)
        at = torch.where(self.status == Status.SUCCESS, task.stop, flow.t(self.u))
        return Outcome(
            x=flow.x(at, self.z),
            states=states,
            status=self.status,
            accepted=self.accepted,
            rejected=self.rejected,
            dense=dense,
        )
