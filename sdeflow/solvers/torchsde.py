"""torchsde's methods (Li et al. 2020, Kidger et al. 2021; torchsde 0.2.6) behind sdeflow's face.

The method's step is the library's; the loop over the steps is here, because the library's own interpolates outputs off
its steps, takes one more step when sums of dt miss the end, accepts failed steps at dt_min, has no limits and follows no
grid but an even one. The library's clock runs forward only: an equation solved from large u to small runs in s = −u,
which is exact. docs/backends.md lists every pitfall with its cure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchsde._core import methods as library
from torchsde._core.adaptive_stepping import update_step_size
from torchsde._core.base_sde import ForwardSDE as LibrarySDE

from sdeflow.brownian import BrownianPath
from sdeflow.charts import Chart, Trigonometric
from sdeflow.counting import CallLimitReached
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, InChart, Nodes, UniformLogSNR, UniformTime
from sdeflow.processes import as_time
from sdeflow.random import standard_normal
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
from sdeflow.solvers.base import Facts, Outcome, Solver, Task, finite_rows, merge
from sdeflow.solvers.torchsde_adjoint import Adjoint, Trace, by_adjoint
from sdeflow.solvers.torchsde_equation import (
    AdditiveEquation,
    TorchsdeEquation,
    along,
    library_interval,
    stepwise,
)

JUMP_STREAM = 3
"""Random stream of the step that leaves α = 0, apart from those of steps, priors, data and paths."""
LOWEST = -6.0
"""λ to which that step goes where the grid is a rule: its error is of order α² = e^{−12}."""


class Method(NamedTuple):
    """A method: orders on additive noise, drift calls a step there, calculus, what it accepts, where it is from."""

    strong: float
    weak: float
    calls: int
    calculus: tuple[str, ...]
    noise: tuple[str, ...]
    levy: str
    reference: str


_ITO, _STRATONOVICH = ("ito",), ("stratonovich",)
_COMMUTATIVE, _ALL = ("additive", "diagonal", "scalar"), ("additive", "diagonal", "scalar", "general")
METHODS = {
    "srk": Method(1.5, 2.0, 2, _ITO, _COMMUTATIVE, "space-time", "Rößler 2010"),
    "euler": Method(1.0, 1.0, 1, _ITO, _ALL, "none", "Maruyama 1955"),
    "milstein": Method(1.0, 1.0, 1, _ITO + _STRATONOVICH, _COMMUTATIVE, "none", "Milstein 1974"),
    "heun": Method(1.0, 2.0, 2, _STRATONOVICH, _ALL, "none", "Rümelin 1982"),
    "midpoint": Method(1.0, 1.0, 2, _STRATONOVICH, _ALL, "none", "Kloeden & Platen 1992"),
    "euler_heun": Method(1.0, 1.0, 1, _STRATONOVICH, _ALL, "none", "Kloeden & Platen 1992"),
    "log_ode": Method(1.0, 1.0, 2, _STRATONOVICH, _ALL, "foster", "Foster, Lyons & Oberhauser 2020"),
}
REFUSED = {
    "reversible_heun": "it is unstable on reverse-time diffusion (its two states drift apart where the drift is "
    'stiff); write TorchSDE("heun", steps=...)',
    "adjoint_reversible_heun": "it only serves that method's gradients",
}


@dataclass(frozen=True)
class TorchSDE(Solver):
    """An SDE through torchsde's methods; diffusion equations in a chart's (u, z), others in t.

    Orders hold for additive noise, which every reverse SDE has. Adaptive steps are torchsde's: one step against two
    halves, its step-size rule, for the whole batch; the largest sample's RMS error decides.

    The noise lives in the clock of the solve and depends on the sample's own seed, not on its batch. With `seed=`, step n
    of a fixed grid draws its own normals, at the cost of a normal; adaptive steps query a `BrownianPath` of that seed.
    With `path=` every solver in the same chart sees the same path, whatever its steps are. "log_ode" needs Lévy areas, so
    its noise is torchsde's Brownian interval: one entropy for the batch, derived from all its seeds.

    Args:
        method: "srk", "euler", "milstein" (Itô), "heun", "midpoint", "euler_heun", "log_ode" (Stratonovich; where the noise
            does not depend on the state the two are one).
        steps: number of steps; of the first step with adaptive=True (default there: 100).
        dt: step in the clock, in place of steps.
        grid: a rule for placing the steps, or the times themselves; default uniform in λ on diffusion equations, else in t.
        adaptive: choose the steps by rtol, atol; three times the calls a step.
        rtol, atol: tolerances of z, adaptive only.
        chart: None for `Trigonometric()` on diffusion equations and t on all others; `PlainTime()` for t on all.
        max_steps: attempted steps of an adaptive solve, after which samples end as MAX_STEPS.
        max_evaluations: network calls, likewise; default no limit.
        adjoint: with `solve(..., gradients=True)`, gradients by torchsde's adjoint SDE on the steps of the solve, in memory
            that does not grow with their number; they converge to plain autograd's as the steps shrink. y is solved back
            from the outputs, which loses what the equation has forgotten: more `save_at` times hold it closer. The
            adjoint's calls happen in backward() and are not counted.
        adjoint_params: parameters whose gradients the adjoint gives; default all that wants a
            gradient in the prediction (networks, guidance, conditions) or in a drift that is a module.

    Where a solve begins at α = 0 (rectified flow at t = 1, tables whose last ᾱ is 0), the reverse SDE forgets its state at once:
    the first step is x = αD + σε, exact as long as D is constant; its error is O(α²).

    Raises:
        InvalidInput: unknown or refused method, no steps, noise or calculus the method does not solve, adaptive half
            precision, a chart on an equation without a prediction.

    Example:
        >>> sf.solve(sf.ReverseSDE(predict), sf.TorchSDE("srk", steps=100), noise, seed=0)
    """

    method: str = "srk"
    steps: int | None = None
    dt: float | None = None
    grid: Grid | Tensor | list[float] | tuple[float, ...] | None = None
    adaptive: bool = False
    rtol: float = 1e-3
    atol: float = 1e-3
    chart: Chart | None = None
    max_steps: int = 100_000
    max_evaluations: int | None = None
    adjoint: bool = False
    adjoint_params: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        check_method("TorchSDE", self.method, METHODS, REFUSED)
        accept_nodes(self)
        if self.dt is not None:
            if self.steps is not None or self.grid is not None:
                raise InvalidInput("dt and steps (or grid) both place the steps; leave one of them out")
            if not (math.isfinite(self.dt) and self.dt > 0):
                raise InvalidInput(f"dt must be positive and finite, whichever way the solve runs; got {self.dt!r}")
        if self.adaptive and self.grid is not None:
            raise InvalidInput("an adaptive solve chooses its own steps; leave grid out")
        if not (self.dt is not None or (self.adaptive and self.steps is None)):
            check_steps(f'TorchSDE("{self.method}")', self.steps)
        check_tolerances(self.rtol, self.atol)
        check_limit("max_steps", self.max_steps)
        if self.max_evaluations is not None:
            check_limit("max_evaluations", self.max_evaluations)

    @property
    def facts(self) -> Facts:
        m = METHODS[self.method]
        calls = None if self.adaptive else float(m.calls)
        return Facts(
            self.method, None, m.strong, m.weak, calls, self.adaptive, m.noise, "drift", f"torchsde; {m.reference}"
        )

    def check(self, task: Task) -> None:
        super().check(task)
        equation, known = task.equation, METHODS[self.method]
        if equation.noise != "additive" and equation.calculus not in known.calculus:
            fit = [name for name, m in METHODS.items() if equation.calculus in m.calculus and equation.noise in m.noise]
            raise InvalidInput(
                f"{self.method} solves {' and '.join(known.calculus)} equations, and {equation!r} is {equation.calculus} "
                f"with {equation.noise} noise; take one of {', '.join(fit)}"
            )
        if self.chart is not None and equation.predict is None:
            raise InvalidInput("chart needs a diffusion equation; leave it out for an Equation of your own")
        if self.adaptive and self.method == "euler" and equation.noise != "additive":
            raise InvalidInput(
                "adaptive steps with euler need additive noise: with other noise the steps' choice biases it; "
                'write TorchSDE("srk", adaptive=True)'
            )
        if task.path is not None and METHODS[self.method].levy == "foster":
            raise InvalidInput(f"{self.method} needs Lévy areas between elements, which a path has not; write seed=...")

    def integrate(self, task: Task) -> Outcome:
        if self.max_evaluations is not None:
            task.counter.limit = self.max_evaluations
        return _Run(self, task).go()


# --- the loop


class _Run:
    """One solve: the jump from α = 0 if there is one, then steps of the library's method in s = ±u.

    `y` is always the state the samples have reached, flattened (batch, d), in the coordinates of `clock`.
    """

    def __init__(self, solver: TorchSDE, task: Task):
        self.solver, self.task, self.chart = solver, task, solver.chart or Trigonometric()
        self.outputs = [] if task.save_at is None else task.save_at.tolist()
        self.status, self.accepted, self.rejected = task.constant(0), task.constant(0), task.constant(0)
        self.dead = torch.zeros_like(self.status, dtype=torch.bool)
        self.saved: dict[float, Tensor] = {}
        self.trace: Trace | None = None
        self.clock = Clock(task, None)
        self.t = torch.full(self.dead.shape, task.start, dtype=as_time(0.0, task.x.device).dtype, device=task.x.device)
        # half-precision states are summed in float32; the network sees their own dtype
        self.y = task.x.flatten(1).to(task.x.dtype if task.x.dtype.itemsize >= 4 else torch.float32)

    def go(self) -> Outcome:
        task = self.task
        self._bury(~finite_rows(self.y))
        self._reached(task.start)
        try:
            nodes, jumps = self._nodes()
            if jumps:
                self._jump(nodes[1].item())
                nodes = nodes[1:]
            if nodes.numel() > 1:
                self._walk(nodes)
        except CallLimitReached:
            self._give_up(Status.MAX_STEPS)
        except Stopped as stop:
            self._give_up(stop.status)
        x, states = self._state(), None
        if self.outputs:
            void = torch.full_like(x, math.nan)
            states = torch.stack([self.saved.get(t, void) for t in self.outputs])
        return Outcome(x=x, states=states, status=self.status, accepted=self.accepted, rejected=self.rejected)

    # --- where the steps lie

    def _nodes(self) -> tuple[Tensor, bool]:
        """All nodes in t, outputs among them, and whether the first step is the jump from α = 0."""
        solver, task, process = self.solver, self.task, self.task.equation.process
        start, steps, grid = task.start, solver.steps, solver.grid
        predict = task.equation.predict
        jumps = predict is not None and start > task.stop and self._at_zero(start)
        head = torch.empty(0, dtype=torch.float64)
        if jumps and not isinstance(grid, Nodes):
            assert process is not None
            inner = [t for t in self.outputs if t < start]
            head = torch.tensor([start], dtype=torch.float64)
            start = max([process.time(LOWEST).item(), task.stop, *inner[:1]])
            if start == task.stop:
                return torch.cat([head, head.new_tensor([start])]), True
            # the jump is one of the steps
            steps = None if steps is None else max(1, steps - 1)
        if grid is None and predict is not None:
            grid = UniformLogSNR() if solver.dt is None else InChart(self.chart)
        grid = UniformTime() if grid is None else grid
        assert isinstance(grid, Grid)
        if solver.dt is not None:
            ends = Clock.of(replace(task, start=start), self.chart).u(head.new_tensor([start, task.stop]))
            steps = math.ceil((ends[1] - ends[0]).abs().item() / solver.dt - 1e-9)
        nodes = torch.cat([head, grid.times(process, start, task.stop, steps or 100)])
        return (nodes if task.save_at is None else merge(nodes, task.save_at)), jumps

    def _at_zero(self, t: float) -> bool:
        # the last of a table may be 0 but for rounding, as may be a cosine
        process = self.task.equation.process
        return process is not None and bool(process.alpha(t) < 1e-6 * process.sigma(t))

    # --- steps

    def _jump(self, t: float) -> None:
        """From α = 0 to t, for constant D: x ← (σ_t/σ_s)q x + (α_t − α_s(σ_t/σ_s)q) D + σ_t√(1 − q²) ε, q = e^{−η²h}; one evaluation.

        q is 0 where α_s is.
        """
        task, process, predict = self.task, self.task.equation.process, self.task.equation.predict
        assert process is not None and predict is not None
        seeds = task.path.seeds if task.seeds is None else task.seeds
        noise = standard_normal(seeds, self.y.shape[1:], stream=JUMP_STREAM, dtype=self.y.dtype, device=self.y.device)
        h = process.half_log_snr(t) - process.half_log_snr(task.start)
        q = (-(task.equation.eta**2) * h).exp().item()
        carried = q * (process.sigma(t) / process.sigma(task.start)).item()
        mean = predict.combine(task.x, task.start, process.alpha(t) - carried * process.alpha(task.start), 0.0).flatten(
            1
        )
        noisy = carried * task.x.flatten(1) + math.sqrt(1.0 - q**2) * process.sigma(t).item() * noise
        self._arrive(mean + noisy, t, None)

    def _walk(self, nodes: Tensor) -> None:
        task = replace(self.task, start=nodes[0].item(), x=self._state())
        clock = Clock.of(task, self.chart)
        u = clock.u(nodes)
        sign = 1.0 if bool(u[-1] > u[0]) else -1.0
        s = sign * u
        if not bool((s.diff() > 0).all()):
            raise InvalidInput(
                f"the grid does not move one way in the clock of {self.chart!r}; write another grid or chart"
            )
        self.y = clock.enter(self.y.reshape(task.x.shape)).flatten(1)
        self.clock, self.t = clock, torch.full_like(self.t, task.start)
        adjoint, method = self._method(task, clock, sign, s)

        def walk() -> None:
            if self.solver.adaptive:
                self._choose_steps(method, s, sign, nodes)
                return
            for n, t in enumerate(nodes[1:].tolist()):
                y, _ = method.step(s[n], s[n + 1], self.y, ())
                self._arrive(y, t, s[n + 1 : n + 2])
                self._tell((n + 1) / (nodes.numel() - 1))

        if self.solver.adjoint and task.gradients:
            self._keep_ends(walk, adjoint, s[0])
        else:
            walk()

    def _keep_ends(self, walk: Callable[[], None], adjoint: Adjoint, first: Tensor) -> None:
        """Walk without a graph; what is given out is differentiated by the adjoint."""
        params = self.task.equation.parameters() if self.solver.adjoint_params is None else self.solver.adjoint_params
        start, trace = self.y, Trace([first])

        def traced() -> Trace:
            self.y, self.trace = start.detach(), trace
            walk()
            if not trace.given or trace.given[-1] != len(trace.s) - 1:
                trace.give(self.y, self.dead, None)
            return trace

        states = by_adjoint(traced, adjoint, start, params)
        self.y, self.trace = states[-1], None
        for t, dead, y in zip(trace.times, trace.dead, states, strict=True):
            if t is not None:
                x = self.clock.leave(t, y.reshape(self.task.x.shape)).to(self.task.x.dtype)
                self.saved[t] = torch.where(rows(dead, x), math.nan, x)

    def _choose_steps(self, method: Any, s: Tensor, sign: float, nodes: Tensor) -> None:
        """torchsde's adaptive rule: one step against two halves."""
        solver, at, h = self.solver, s[0], (s[1] - s[0]).item()
        ends = torch.isin(nodes, torch.tensor([*self.outputs, self.task.stop], dtype=torch.float64))
        strikes, ratio, attempts = Strikes(self.status), None, 0
        for end, t in zip(s[ends], nodes[ends].tolist(), strict=True):
            while at < end:
                cut = bool(at + h * (1.0 + 1e-9) >= end)
                to = end if cut else at + h
                middle = 0.5 * (at + to)
                if attempts >= solver.max_steps:
                    raise Stopped(Status.MAX_STEPS)
                if not bool((middle > at) & (to > middle)):
                    raise Stopped(Status.STEP_UNDERFLOW)
                attempts += 1
                full, _ = method.step(at, to, self.y, ())
                half, _ = method.step(at, middle, self.y, ())
                half, _ = method.step(middle, to, half, ())
                size = (to - at).item()
                bad = ~(finite_rows(full) & finite_rows(half)) & ~self.dead
                broken = bool(bad.any())
                given_up = strikes.judge(bad if broken else None, (at - s[0]).item(), (to - s[0]).item())
                if broken:
                    assert given_up is not None
                    self.rejected += ~self.dead
                    self._bury(given_up)
                    h, ratio = 0.2 * size, None
                    continue
                error = self._error(full, half)
                proposed, ratio = update_step_size(error, size, prev_error_ratio=ratio)
                if error > 1.0:
                    self.rejected += ~self.dead
                    h = proposed
                    continue
                h = max(h, proposed) if cut else proposed
                at = to
                self._arrive(half, t if cut else self.clock.t(sign * at).item(), torch.stack([middle, to]), cut)
                self._tell(((at - s[0]) / (s[-1] - s[0])).item())

    @torch.no_grad()
    def _error(self, full: Tensor, half: Tensor) -> float:
        tolerance = self.solver.atol + self.solver.rtol * torch.maximum(full.abs(), half.abs())
        square = ((full - half) / tolerance).square().mean(1)
        return max(1e-7, torch.where(self.dead, 0.0, square).max().sqrt().item())

    # --- where the samples are

    def _state(self) -> Tensor:
        z = self.y.reshape(self.task.x.shape)
        return self.clock.leave(self.t, z).to(self.task.x.dtype)

    def _arrive(self, y: Tensor, t: float, s: Tensor | None, node: bool = True) -> None:
        """The samples step to y at t, by way of the clock's s; those for which it is not finite stay, and fail."""
        if self.trace is not None and s is not None:
            self.trace.s.extend(s)
        self.accepted += ~self.dead
        bad = ~finite_rows(y) & ~self.dead
        self._bury(bad)
        self.accepted -= bad.long()
        self.y = torch.where(self.dead[:, None], self.y, y)
        self.t = torch.where(self.dead, self.t, t)
        if node:
            self._reached(t)

    def _bury(self, bad: Tensor) -> None:
        """Samples that fail now stay where they are."""
        self.status = torch.where(bad & ~self.dead, int(Status.NON_FINITE), self.status)
        self.dead = self.dead | bad
        if bool(self.dead.all()):
            raise Stopped(Status.NON_FINITE)

    def _reached(self, t: float) -> None:
        for wanted in self.outputs:
            if abs(wanted - t) <= 1e-12 * abs(self.task.stop - self.task.start):
                x = self._state()
                self.saved[wanted] = torch.where(rows(self.dead, x), math.nan, x)
                if self.trace is not None:
                    self.trace.give(self.y, self.dead, wanted)

    def _give_up(self, status: Status) -> None:
        self.status = torch.where(self.dead, self.status, int(status))

    def _tell(self, fraction: float) -> None:
        if self.task.progress is not None:
            self.task.progress(fraction)

    # --- the library's stepper

    def _method(self, task: Task, clock: Clock, sign: float, s: Tensor) -> tuple[Adjoint, Any]:
        """The equation's adjoint and the library's solver object for this equation, clock and noise."""
        equation, known = task.equation, METHODS[self.solver.method]
        calculus = equation.calculus if equation.calculus in known.calculus else known.calculus[0]
        kind = AdditiveEquation if equation.noise == "additive" else TorchsdeEquation
        parts = clock.drift, clock.diffusion, equation.noise
        event = tuple(task.x.shape[1:])
        sde = kind(*parts, calculus, sign, event)
        channels = {"scalar": 1, "general": -1}.get(equation.noise, self.y.shape[1])
        if channels < 0:
            channels = sde.g(s[0], self.y).shape[-1]
        shape = (task.batch, channels)
        if task.path is not None:
            bm = along(task.path, sign, shape, self.y)
        elif known.levy == "foster":
            bm = library_interval(task, s, channels, self.y, known.levy)
        elif self.solver.adaptive:
            assert task.seeds is not None
            bm = along(BrownianPath(task.seeds, (channels,), self.y.dtype), sign, shape, self.y)
        else:
            assert task.seeds is not None
            bm = stepwise(task.seeds, s, shape, self.y)
        settings = {"dt": 0.0, "adaptive": False, "rtol": 0.0, "atol": 0.0, "dt_min": 0.0, "options": {}}
        # graphs must not be remembered from one backward step to the next
        adjoint = Adjoint(lambda calculus: kind(*parts, calculus, sign, event, 0), equation.noise, calculus, bm)
        return adjoint, library.select(method=self.solver.method, sde_type=calculus)(
            sde=LibrarySDE(sde), bm=bm, **settings
        )
