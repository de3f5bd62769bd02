"""torchdiffeq's solvers (Chen et al. 2018; torchdiffeq 0.2.5) behind sdeflow's face.

What the library does with the step, sdeflow leaves alone; what goes wrong around the step is put right here: end points
that are overstepped and interpolated back, a first probe outside the interval, one error norm for the whole batch, fixed
methods without steps, assertions for failures. docs/backends.md lists each with its cure.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torchdiffeq
from torch import Tensor

from sdeflow.charts import Chart
from sdeflow.counting import CallLimitReached
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, InChart, UniformTime
from sdeflow.processes import Time, as_time
from sdeflow.solution import Status
from sdeflow.solvers.backends import (
    Clock,
    Stopped,
    Strikes,
    accept_nodes,
    check_limit,
    check_method,
    check_steps,
    check_tolerances,
    rows,
)
from sdeflow.solvers.base import Facts, Outcome, Solver, Task, chart_of, finite_rows, merge


class Method(NamedTuple):
    """A method of the library: order, drift calls a step, whether it chooses its steps, where it is from."""

    order: int
    calls: float | None
    adaptive: bool
    reference: str


METHODS = {
    "dopri5": Method(5, 6, True, "Dormand & Prince 1980"),
    "bosh3": Method(3, 3, True, "Bogacki & Shampine 1989"),
    "dopri8": Method(8, 13, True, "Prince & Dormand 1981"),
    "adaptive_heun": Method(2, 1, True, "Heun 1900"),
    "euler": Method(1, 1, False, "Euler 1768"),
    "midpoint": Method(2, 2, False, "Runge 1895"),
    "heun2": Method(2, 2, False, "Heun 1900"),
    "heun3": Method(3, 3, False, "Heun 1900"),
    "rk4": Method(4, 4, False, "Kutta 1901"),
    "explicit_adams": Method(4, 1, False, "Bashforth & Adams 1883"),
    "implicit_adams": Method(4, None, False, "Moulton 1926"),
}
REFUSED = {
    "fehlberg2": "its error estimate misses errors a thousand times the tolerance without a warning; write "
    'TorchDiffEq("adaptive_heun")',
    "scipy_solver": "it has no step limit, no norm of its own, no statistics and no gradients, and returns too few "
    'states when it fails; write TorchDiffEq("dopri8")',
    "fixed_adams": 'it is another name; write TorchDiffEq("implicit_adams", steps=...)',
}


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """An ODE through `torchdiffeq.odeint`; diffusion equations in a chart's (u, z), others in t.

    An adaptive method has one step for the whole batch: with the default norm the worst sample sets it, so that no
    sample's error grows with the batch, but a sample's result does depend on its batch-mates within the tolerance.
    Tolerances hold for z, which is of the data's size. torchdiffeq hands the drift its time in the state's precision.

    Args:
        method: adaptive "dopri5", "bosh3", "dopri8", "adaptive_heun"; on a fixed grid "euler", "midpoint", "heun2",
            "heun3", "rk4", and, on grids uniform in the clock, "explicit_adams", "implicit_adams".
        rtol, atol: tolerances of an adaptive method (and of implicit_adams' iteration): |e| ≤ atol + rtol·|z|.
        steps: number of steps of a fixed method.
        grid: a rule for placing them, or the times themselves; default uniform in the chart's clock.
        chart: None for `sf.chart_for` of the network on diffusion equations and t on all others; `PlainTime()` for t on all.
        norm: "sample" for the largest of the samples' RMS errors, "batch" for the library's one RMS over all.
        exact_outputs: end steps at every `save_at`; False interpolates there by the library's quartic, which costs no
            evaluations but is of fourth order only. The end of the interval is never interpolated.
        first_step: size of the first step in the clock; default by a probe inside the interval (one evaluation).
        max_steps: attempted steps, after which samples end as MAX_STEPS.
        max_evaluations: network calls, likewise; default no limit.
        max_order: of the Adams methods, 4…11; their start keeps the global order at 4, more only lowers the constant.
        adjoint: with `solve(..., gradients=True)`, gradients by the adjoint ODE in constant memory; its calls happen
            in backward() and are not counted.
        adjoint_params: parameters whose gradients the adjoint gives; default all that wants a
            gradient in the prediction (networks, guidance, conditions) or in a drift that is a module.

    Raises:
        InvalidInput: unknown or refused method, settings of the other kind of method, adaptive half precision, an
            Adams method on a grid that is not uniform in the clock, a chart on an equation without a prediction.

    Example:
        >>> sf.solve(sf.ProbabilityFlowODE(predict), sf.TorchDiffEq("dopri5", rtol=1e-5, atol=1e-5), noise)
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    grid: Grid | Tensor | list[float] | tuple[float, ...] | None = None
    chart: Chart | None = None
    norm: Literal["sample", "batch"] = "sample"
    exact_outputs: bool = True
    first_step: float | None = None
    max_steps: int = 10_000
    max_evaluations: int | None = None
    max_order: int = 4
    adjoint: bool = False
    adjoint_params: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        known = check_method("TorchDiffEq", self.method, METHODS, REFUSED)
        accept_nodes(self)
        if known.adaptive and not (self.steps is None and self.grid is None):
            raise InvalidInput(
                f'{self.method} chooses its own steps; leave steps and grid out, or write TorchDiffEq("rk4", steps=20)'
            )
        if not known.adaptive:
            check_steps(f'TorchDiffEq("{self.method}")', self.steps)
        check_tolerances(self.rtol, self.atol)
        check_limit("max_steps", self.max_steps)
        if self.max_evaluations is not None:
            check_limit("max_evaluations", self.max_evaluations)
        if self.norm not in ("sample", "batch"):
            raise InvalidInput(f'norm must be "sample" or "batch"; got {self.norm!r}')
        if self.first_step is not None and not (math.isfinite(self.first_step) and self.first_step > 0):
            raise InvalidInput(f"first_step must be positive and finite; got {self.first_step!r}")
        if not 4 <= self.max_order <= 11:
            raise InvalidInput(f"max_order must lie in 4…11; got {self.max_order!r}")

    @property
    def facts(self) -> Facts:
        order, calls, adaptive, reference = METHODS[self.method]
        return Facts(self.method, order, None, None, calls, adaptive, ("none",), "drift", f"torchdiffeq; {reference}")

    def check(self, task: Task) -> None:
        super().check(task)
        if self.chart is not None and task.equation.predict is None:
            raise InvalidInput("chart needs a diffusion equation; leave it out for an Equation of your own")

    def integrate(self, task: Task) -> Outcome:
        clock = Clock.of(task, self.chart)
        # half-precision states are summed, and their times told, in float32
        wide = task.x.dtype if task.x.dtype.itemsize >= 4 else torch.float32
        z = clock.enter(task.x.to(wide))
        outputs = [] if task.save_at is None else [t for t in task.save_at.tolist() if t != task.start]
        times = torch.tensor([task.start, *outputs], dtype=torch.float64)
        if times[-1] != task.stop:
            times = torch.cat([times, torch.tensor([task.stop], dtype=torch.float64)])
        u = clock.u(times)
        watch = (AdaptiveWatch if METHODS[self.method].adaptive else Watch)(self, task, clock, z, u)
        if self.max_evaluations is not None:
            task.counter.limit = self.max_evaluations
        try:
            states = self._odeint(task, watch, clock, times, u)
        except (Stopped, CallLimitReached) as stop:
            states = watch.abandon(stop.status if isinstance(stop, Stopped) else Status.MAX_STEPS)
        finally:
            watch.watching = False
        states = watch.close(states)
        x = clock.leave(watch.times(clock), states[-1]).to(task.x.dtype)
        saved = None
        if task.save_at is not None:
            inner = [clock.leave(t, states[i + 1]).to(task.x.dtype) for i, t in enumerate(outputs)]
            if outputs and outputs[-1] == task.stop:
                inner[-1] = torch.where(rows(watch.status == Status.SUCCESS, x), x, math.nan)
            saved = torch.stack([task.x] * (task.save_at.numel() - len(outputs)) + inner)
        return Outcome(x=x, states=saved, status=watch.status, accepted=watch.accepted, rejected=watch.rejected)

    def _odeint(self, task: Task, watch: Watch, clock: Clock, times: Tensor, u: Tensor) -> Tensor:
        known, z, device = METHODS[self.method], watch.state, watch.state.device
        ts = u.to(as_time(0.0, device))
        # the adjoint equation is told the times that the library has turned into increasing ones
        way = 1.0 if self.adjoint and bool(u[-1] > u[0]) else -1.0
        options: dict[str, Any]
        if known.adaptive:
            ends = ts if self.exact_outputs else ts[-1:]
            first = watch.probe(known.order) if self.first_step is None else self.first_step
            # a step that happens to end on one of step_t, rather than being cut there, makes the library forget the rest
            first = min(first, (u[-1] - u[0]).abs().item()) * (1.0 + 1e-9)
            options = {"norm": watch.norm, "first_step": first, "step_t": ends, "dtype": ts.dtype}
            backward = {"first_step": first, "step_t": way * ts, "dtype": ts.dtype}
        else:
            nodes = clock.u(self._nodes(task, times))
            if self.method.endswith("adams"):
                _check_uniform(self.method, nodes)
            nodes = nodes.to(device)
            options = {"grid_constructor": lambda f, y, t: _between(nodes, t)}
            if self.method.endswith("adams"):
                # the library counts the explicit method's order one too high
                options["max_order"] = self.max_order + (self.method == "explicit_adams")
            backward = options | {"grid_constructor": lambda f, y, t: _between(way * nodes, t)}
        settings = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": options}
        with warnings.catch_warnings():
            # implicit_adams says that its iteration stopped at its limit: it then is a predictor-corrector of as many passes
            warnings.filterwarnings("ignore", message="Functional iteration did not converge")
            if self.adjoint and task.gradients:
                params = task.equation.parameters() if self.adjoint_params is None else self.adjoint_params
                return torchdiffeq.odeint_adjoint(
                    watch, z, ts, **settings, adjoint_options=backward, adjoint_params=tuple(params)
                )  # type: ignore[return-value]
            return torchdiffeq.odeint(watch, z, ts, **settings)  # type: ignore[return-value]

    def _nodes(self, task: Task, times: Tensor) -> Tensor:
        assert self.steps is not None
        grid = self.grid
        if grid is None:
            grid = UniformTime() if task.equation.predict is None else InChart(chart_of(task, self.chart))
        assert isinstance(grid, Grid)
        nodes = grid.times(task.equation.process, task.start, task.stop, self.steps)
        return nodes if task.save_at is None else merge(nodes, times)


def _check_uniform(method: str, nodes: Tensor) -> None:
    h = nodes.diff()
    if not bool(((h - h.mean()).abs() <= 1e-6 * h.mean().abs()).all()):
        raise InvalidInput(
            f"{method} has its order on equal steps of the clock only, and these are unequal; leave grid out, put save_at "
            'on nodes, or write TorchDiffEq("rk4", steps=...)'
        )


def _between(nodes: Tensor, t: Tensor) -> Tensor:
    """The nodes from t[0] to t[-1], in that direction and with these ends."""
    low, high = torch.minimum(t[0], t[-1]), torch.maximum(t[0], t[-1])
    inner = nodes[(nodes > low) & (nodes < high)].sort(descending=bool(t[0] > t[-1])).values
    return torch.cat([t[:1], inner, t[-1:]])


# --- what happens around the steps


class Watch:
    """The drift as torchdiffeq sees it, watched: finite rows, attempts, accepted steps, limits, outputs reached.

    A sample whose drift is non-finite again and again, see `Strikes` (once on a fixed grid or at the start), is frozen: its
    drift is 0 from then on and the norm leaves it out, so that the others go on as if it were not there.
    """

    def __init__(self, solver: TorchDiffEq, task: Task, clock: Clock, z: Tensor, u: Tensor):
        self.solver, self.task, self.clock = solver, task, clock
        self.adaptive = METHODS[solver.method].adaptive
        self.low, self.high = u.min().item(), u.max().item()
        self.first, self.final = u[0].item(), u[-1].item()
        self.outputs, self.kept = u.tolist(), {0: z}
        self.watching, self.attempts = True, 0
        self.at, self.state, self.last = self.first, z, z
        self.status, self.accepted, self.rejected = task.constant(0), task.constant(0), task.constant(0)
        self.dead = torch.zeros_like(self.status, dtype=torch.bool)
        self.end = torch.full(self.dead.shape, math.inf, dtype=torch.float64, device=z.device)
        self.trouble: Tensor | None = None
        self.strikes, self.tried = Strikes(self.status), (0.0, 0.0)
        self.memo: tuple[Tensor, Tensor] | None = None
        self._bury(~finite_rows(z))
        self.state = torch.where(rows(self.dead, z), torch.zeros_like(z), z)

    def __call__(self, u: Tensor, z: Tensor) -> Tensor:
        if self.memo is not None and self.memo[0] is z:
            f, self.memo = self.memo[1], None  # the probe's own call at the start
            return f
        u = as_time(u.detach(), z.device)
        if z.dtype != torch.float64:
            # the library rounds times to the state's precision, which may lie outside the interval
            u = u.clamp(self.low, self.high)
        f = self.clock.drift(u, torch.where(rows(self.dead, z), self.last.nan_to_num(0.0, 0.0, 0.0), z))
        bad = ~finite_rows(f) & ~self.dead
        if not self.watching:
            if bool(bad.any()):
                raise FloatingPointError("the drift became non-finite while the adjoint equation was solved")
        elif not self.adaptive:
            self._bury(bad)
        elif bool(bad.any()):
            self.trouble = bad if self.trouble is None else self.trouble | bad
        return torch.where(rows(bad | self.dead, f), torch.zeros_like(f), f)

    def probe(self, order: int) -> float:
        """First step by Hairer, Nørsett & Wanner, II.4, from one more evaluation, kept inside the interval."""
        z, way = self.state, 1.0 if self.final > self.first else -1.0
        span = abs(self.final - self.first)
        start = torch.tensor(self.first, dtype=torch.float64)
        f0 = self(start, z)
        if self.trouble is not None:  # not even the start has a drift
            self._bury(self.trouble)
            self.trouble = None
        with torch.no_grad():
            scale = self.solver.atol + self.solver.rtol * z.abs()
            d0, d1 = self.norm(z / scale).item(), self.norm(f0 / scale).item()
            h0 = min(1e-6 * span if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, span)
            f1 = self(start + way * h0, z + way * h0 * f0)
            if self.trouble is not None:
                self.trouble = None
                h = h0
            else:
                d2 = self.norm((f1 - f0) / scale).item() / h0
                h1 = max(1e-6 * span, 1e-3 * h0) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1.0 / order)
                h = min(100.0 * h0, h1)
        self.memo = (z, f0)
        return min(max(h, 1e-12 * span), span)

    def norm(self, ratio: Tensor) -> Tensor:
        """The size of errors already divided by their tolerances (batch, *event): 0-d."""
        if self.trouble is not None:
            return torch.full((), math.inf, dtype=ratio.dtype, device=ratio.device)
        square = ratio.flatten(1).square().mean(1)
        square = torch.where(self.dead, torch.zeros_like(square), square)
        alive = (~self.dead).sum().clamp_min(1)
        size = (square.max() if self.solver.norm == "sample" else square.sum() / alive).sqrt()
        return size.nan_to_num(nan=math.inf, posinf=math.inf)

    # --- the library's callbacks: a step from t0 of size dt begins

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if not self.watching:
            return
        self.at, self.state = float(t0), y0
        if self.adaptive:
            self._judge()
            h = float(dt)
            if not math.isfinite(h) or self.at + h == self.at:
                raise Stopped(Status.STEP_UNDERFLOW)
            if self.attempts >= self.solver.max_steps:
                raise Stopped(Status.MAX_STEPS)
            self.tried = self._way(self.at), self._way(self.at) + h  # the library's steps are positive, whichever way
        else:
            self.accepted += ~self.dead
        if bool(self.dead.all()):
            raise Stopped(Status.NON_FINITE)
        self.attempts += 1
        for i, u in enumerate(self.outputs):
            if i not in self.kept and u == self.at:
                self.kept[i] = y0
        if self.task.progress is not None:
            self.task.progress((self.at - self.first) / (self.final - self.first))

    def _judge(self) -> None:
        """After an attempt: give up the samples that are non-finite again and again."""
        given_up = self.strikes.judge(self.trouble, *self.tried)
        self.trouble = None
        if given_up is not None:
            self._bury(given_up)

    def _bury(self, fresh: Tensor) -> None:
        """Samples that fail now: their last state is the one this step began with."""
        fresh = fresh & ~self.dead
        self.last = torch.where(rows(self.dead, self.state), self.last, self.state)
        self.end = torch.where(fresh, self._way(self.at), self.end)
        self.status = torch.where(fresh, int(Status.NON_FINITE), self.status)
        if not self.adaptive and self.attempts:
            self.accepted = self.accepted - fresh.long()
        self.dead = self.dead | fresh

    def _way(self, u: float) -> float:
        return abs(u - self.first)

    # --- the end

    def abandon(self, status: Status) -> Tensor:
        """The states reached when no further step can be made; NaN where none was."""
        if self.adaptive:
            self._judge()
        self.last = torch.where(rows(self.dead, self.state), self.last, self.state)
        self.end = torch.where(self.dead, self.end, self._way(self.at))
        self.status = torch.where(self.dead, self.status, int(status))
        self.dead = torch.ones_like(self.dead)
        void = torch.full_like(self.state, math.nan)
        return torch.stack([self.kept.get(i, void) for i in range(len(self.outputs))])

    def times(self, clock: Clock) -> Time:
        """Where each sample ended: its own time if any failed."""
        if not bool(self.dead.any()):
            return self.task.stop
        u = self.first + math.copysign(1.0, self.final - self.first) * self.end
        t = torch.where(self.end == 0.0, self.task.start, clock.t(u.clamp(self.low, self.high)))
        return torch.where(self.dead, t, self.task.stop)

    def close(self, states: Tensor) -> Tensor:
        """The states at all outputs: NaN where a failed sample did not arrive, its last state as the end's."""
        self._bury(~finite_rows(states[-1]))
        out = []
        for i, u in enumerate(self.outputs):
            late = self.dead & (self.end < self._way(u))
            out.append(torch.where(rows(late, states[i]), math.nan, states[i]))
        final = torch.where(rows(self.dead, out[-1]), self.last, out[-1])
        return torch.stack([*out, final])


class AdaptiveWatch(Watch):
    """Adaptive methods alone tell of accepted and rejected steps; the library warns of such callbacks on others."""

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if self.watching:
            self.accepted += ~self.dead

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if self.watching:
            self.rejected += ~self.dead
