"""Solvers of stochastic equations on a Brownian path, in steps fixed beforehand or chosen for every sample.

A rejected step asks the path again over the shorter interval, which conditions on what was seen: the noise is never
redrawn, so the rejection leaves no bias.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sdeflow.brownian import BrownianPath
from sdeflow.charts import BentLine, Chart, StraightLine
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, InChart, Nodes, UniformTime
from sdeflow.processes import expand
from sdeflow.solution import Status
from sdeflow.solvers import stochastic_global
from sdeflow.solvers import stochastic_tableaux as tableaux
from sdeflow.solvers.base import (
    Facts,
    Outcome,
    Solver,
    Task,
    bmm,
    chart_of,
    check_path,
    even_in_lambda,
    finite_rows,
    merge,
    noise_shape,
    output_nodes,
)
from sdeflow.solvers.control import Attempt, Stepper, Trace, check_tolerances, drive, rms
from sdeflow.solvers.stochastic_clocks import STRIDE, Clock, UnitNoise
from sdeflow.solvers.stochastic_tableaux import AdditiveTableau


class Estimate(NamedTuple):
    """What a step says of itself.

    Attributes:
        error: RMS of the local error, (n,).
        rate: κh, by how much the drift changes the state's errors over the step, (n,).
        growth: by how much it lets them grow, or fall where negative, (n,).
    """

    error: Tensor
    rate: Tensor
    growth: Tensor


@dataclass(frozen=True, kw_only=True)
class PathSolver(Solver):
    """What the solvers here share: fixed steps (`steps`, `grid`) or tolerances (`rtol`, `atol`), and a Brownian path.

    The path runs in the clock the solver works in; two solvers in one clock with one seed see one path.
    """

    steps: int | None = None
    grid: Grid | Tensor | list[float] | tuple[float, ...] | None = None
    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 10_000
    controlled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        grid, name = self.grid, type(self).__name__
        if grid is not None and not isinstance(grid, Grid):
            grid = Nodes(grid)
            object.__setattr__(self, "grid", grid)
        if isinstance(grid, Nodes) and self.steps is None:
            object.__setattr__(self, "steps", grid.steps)
        if self.rtol is not None or self.atol is not None:
            if self.steps is not None or grid is not None:
                raise InvalidInput(f"{name} takes steps=/grid= or rtol=/atol=, not both; leave one out")
            if not self.controlled:
                raise InvalidInput(f"{name} has no error estimate; write {name}(steps=100)")
            check_tolerances(name, self.rtol or 0.0, self.atol or 0.0, self.max_steps)
        elif self.steps is None:
            also = ", or rtol= and atol=" if self.controlled else ""
            raise InvalidInput(f"{name} needs steps=<number of steps>, or grid=<tensor of times>{also}; got none")
        elif not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InvalidInput(f"steps must be a positive integer (steps, not time points); got {self.steps!r}")

    @property
    def adaptive(self) -> bool:
        """Whether the steps are chosen by the error."""
        return self.steps is None

    @abstractmethod
    def clock(self, task: Task) -> Clock:
        """The clock and coordinates to work in."""

    @abstractmethod
    def take(
        self, clock: Clock, u: Tensor, h: Tensor, z: Tensor, W: Tensor, H: Tensor
    ) -> tuple[Tensor, Estimate | None]:
        """One step: (z⁺, its estimate or None), u and h 0-d or (n,), W and H as the path gives them, flattened."""

    def integrate(self, task: Task) -> Outcome:
        return self.once(task) if self.adaptive else self._fixed(task, self.clock(task), path_of(task))

    def once(self, task: Task, looser: float = 1.0, stride: float = STRIDE) -> Outcome:
        """One adaptive solve, with tolerances so many times as large and steps no longer than this in `Place.pace`."""
        clock = replace(self.clock(task), stride=stride)
        rtol, atol = looser * (self.rtol or 0.0), looser * (self.atol or 0.0)
        return drive(clock, task, PathStepper(self, clock, path_of(task)), rtol, atol, self.max_steps)

    def rule(self, task: Task) -> Grid:
        """The grid of a solver that was given none."""
        return UniformTime()

    def _fixed(self, task: Task, clock: Clock, path: BrownianPath) -> Outcome:
        assert self.steps is not None
        grid = self.grid if isinstance(self.grid, Grid) else self.rule(task)
        times = grid.times(task.equation.process, task.start, task.stop, self.steps)
        times = times if task.save_at is None else merge(times, task.save_at)
        wanted, total = output_nodes(times, task.save_at), times.numel() - 1
        nodes = clock.u(times)
        z, kept = clock.z(task.start, task.x), {}
        if 0 in wanted:
            kept[0] = task.x
        at, lengths = nodes.to(z.device), nodes.diff().to(z.device)
        for n, (W, H) in enumerate(path.sweep(at)):
            z, _ = self.take(clock, at[n], lengths[n], z, W.flatten(1).to(z.dtype), H.flatten(1).to(z.dtype))
            if n + 1 in wanted:
                kept[n + 1] = clock.x(times[n + 1].item(), z)
            if task.progress is not None:
                task.progress((n + 1) / total)
        x = clock.x(task.stop, z)
        if total in kept:
            kept[total] = x
        status = torch.where(finite_rows(x), task.constant(Status.SUCCESS), task.constant(Status.NON_FINITE))
        states = torch.stack([kept[n] for n in wanted]) if task.save_at is not None else None
        return Outcome(x=x, states=states, status=status, accepted=task.constant(total), rejected=task.constant(0))


def path_of(task: Task) -> BrownianPath:
    """The task's path, or the one of its seeds."""
    if task.path is not None:
        check_path(task)
        return task.path
    x = task.x
    assert task.seeds is not None
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    return BrownianPath(task.seeds, noise_shape(task), dtype=dtype, device=x.device)


class NoDense(Stepper):
    """A stepper whose states between steps cannot be had: there the path is rough, and no polynomial follows it."""

    def payload(self) -> tuple[Tensor, ...]:
        """Nothing is kept."""
        return ()

    def interpolate(self, trace: Trace, piece: Tensor, u: Tensor) -> Tensor:
        """Refuses: ask for the times with save_at, which makes them ends of steps."""
        raise InvalidInput("a stochastic solve has no states between its steps; write solve(..., save_at=[...])")


class PathStepper(NoDense):
    """A one-step method under `drive`: PI control, every sample with its own step and its own stretch of its path."""

    safety, proportional, integral = 0.9, 0.1, 0.3

    def __init__(self, solver: PathSolver, clock: Clock, path: BrownianPath):
        self.solver, self.clock, self.path = solver, clock, path
        self.span = abs(clock.ends[1] - clock.ends[0])

    def longest(self, u: Tensor) -> Tensor | None:
        return self.clock.longest(u)

    def begin(self, u: Tensor, z: Tensor, f: Tensor) -> None:
        self.previous = torch.ones_like(u)
        self.error = self.previous

    def attempt(self, u: Tensor, z: Tensor, step: Tensor, end: Tensor, allowed: Tensor) -> Attempt:
        here = self.clock.place(u)
        W, H = (v.flatten(1).to(z.dtype) for v in self.path.increment(u, end))
        ahead, found = self.solver.take(self.clock, u, step, z, W, H)
        assert found is not None
        there = self.clock.place(end)
        # Local errors add up as squares, so each step may make its share of the square; where errors are forgotten at a rate μ as much as
        # is forgotten meanwhile, 1 − e^{−2μh}, may be made anew
        part = ((there.pace - here.pace) / self.span).abs()
        share = part.maximum(-torch.expm1(2.0 * found.growth)).sqrt()
        # the error is made by the step's end
        late = (here.carry / there.carry).clamp_max(1.0)
        # errors are forgotten by steps that resolve the forgetting alone
        unstable = torch.where(found.rate > 1.0, here.kept, 1.0)
        self.error = found.error / (allowed * late * unstable).minimum(here.small).mul(share)
        bounded = self.error.clamp(1e-6, 1e6)
        grow = self.safety * bounded ** -(self.integral + self.proportional) * self.previous**self.proportional
        # with the share the estimate goes as h^{5/3}
        shrink = self.safety * bounded**-0.6
        return Attempt(ahead, self.error, grow.clamp(0.2, 4.0), shrink.clamp(0.1, 0.9))

    def commit(self, ok: Tensor) -> None:
        self.previous = torch.where(ok, self.error.clamp(1e-2, 1e2), self.previous)

    def keep(self, rows: Tensor) -> None:
        self.previous, self.error = self.previous[rows], self.error[rows]
        self.path = self.path.restrict(rows)


@dataclass(frozen=True, kw_only=True)
class AdditiveMethod(PathSolver):
    """A tableau for additive noise, in the equation's own time or in a chart (reverse SDEs)."""

    chart: Chart | None = None
    global_error: bool = False
    tableau: ClassVar[AdditiveTableau]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_error and not self.adaptive:
            name = type(self).__name__
            also = (
                f"write {name}(rtol=0.0, atol=1e-2, global_error=True)"
                if self.controlled
                else "it has none; leave it out"
            )
            raise InvalidInput(
                f"{name}(global_error=True) solves more and more tightly, which needs tolerances: {also}"
            )

    def integrate(self, task: Task) -> Outcome:
        return stochastic_global.integrate(self, task) if self.global_error else super().integrate(task)

    @property
    def facts(self) -> Facts:
        t = self.tableau
        return Facts(t.name, None, t.strong, t.weak, t.stages, self.adaptive, ("additive",), "drift", t.reference)

    def clock(self, task: Task) -> Clock:
        return Clock.plain(task, self.chart)

    def take(
        self, clock: Clock, u: Tensor, h: Tensor, z: Tensor, W: Tensor, H: Tensor
    ) -> tuple[Tensor, Estimate | None]:
        tableau, hz = self.tableau, expand(h, z)
        g = [clock.noise(u + d * h if d else u, z) for d in tableau.d]
        places, f = [], []
        for c, a, p, q in zip(tableau.c, tableau.a, tableau.p, tableau.q, strict=True):
            places.append(z + _drift(hz, a, f) + _noise(g, p, q, W, H))
            f.append(clock.rhs(u + c * h if c else u, places[-1]))
        ahead = z + _drift(hz, tableau.alpha, f) + _noise(g, tableau.v, tableau.w, W, H)
        if not self.adaptive:
            return ahead, None
        over = torch.stack([clock.noise(u + d * h, z).detach().expand_as(z) for d in (0.0, 0.5, 1.0)])
        return ahead, self._estimate(h, [v.detach() for v in f], (places[-1] - places[0]).detach(), over)

    def _estimate(self, h: Tensor, f: list[Tensor], moved: Tensor, g: Tensor) -> Estimate:
        """The local error of a step, from f at the stages, the state's move from the first stage to the last, and g (3, n, d) at the
        step's beginning, middle and end.

        κ = |Δf|/|move|, Δf from the first stage to the last, is the size of ∂f/∂z. What is random in the move is replaced by half by its
        variance: a step is judged by what it may do rather than by what its noise did. ℓ² = h²f² + h(g² + Δg²) is the square of the
        step's length. Then

            linear drift: e₁κ²h²ℓ,    a drift that bends: e₂f″g²h² = 2e₂(κh)^{3/2}ℓ,

        e₁ and e₂ the tableau's constants, with f″g = 2κ^{3/2} as for f = m tanh(mz) at |mz| ≈ 1: κ becomes another in the time 1/κ. Two
        evaluations cannot tell which it is. Their geometric mean, the second counting twice, (4e₁e₂²)^{1/3} (κh)^{5/3}ℓ, goes as h^{13/6}
        and is off by h^{1/3} one way and h^{1/6} the other: a factor of 4 or 2 over three decades of tolerance. Of ∫g dw the method
        misses e₃g″h^{5/2}.
        """
        t, change, length = self.tableau, f[-1] - f[0], h.abs()
        size, turn, bow = rms(g).amax(0), rms(g[2] - g[0]), rms(g[1] - 0.5 * (g[0] + g[2]))
        walk = length * rms(f[0]).maximum(rms(f[-1]))
        expected = (t.c[-1] * walk).square() + (t.reach * size).square() * length
        square = (0.5 * (rms(moved).square() + expected)).clamp_min(1e-300)
        rate = rms(change) / square.sqrt() * length
        growth = (change * moved).mean(1) / square * h
        path = (walk.square() + (size.square() + turn.square()) * length).sqrt()
        local = (t.linear_error * (2.0 * t.bent_error) ** 2) ** (1.0 / 3.0) * rate ** (5.0 / 3.0) * path
        missed = t.noise_error * 8.0 * bow * length.sqrt()  # g″h² = 8 bow
        return Estimate((local.square() + missed.square()).sqrt(), rate, growth)


def _drift(h: Tensor, weights: tuple[float, ...], f: list[Tensor]) -> Tensor | float:
    used = [(w, k) for w, k in zip(weights, f, strict=True) if w]
    return h * sum((k * w for w, k in used[1:]), used[0][1] * used[0][0]) if used else 0.0


def _noise(g: list[Tensor], p: tuple[float, ...], q: tuple[float, ...], W: Tensor, H: Tensor) -> Tensor | float:
    total: Tensor | float = 0.0
    for amplitude, a, b in zip(g, p, q, strict=True):
        if a or b:
            total = total + amplitude * (W * a + H * b)
    return total


@dataclass(frozen=True, kw_only=True)
class SEA(AdditiveMethod):
    """Shifted Euler for additive noise: z⁺ = z + h f(u, z + g(W/2 + H)) + gW; one evaluation a step, strong order 1.

    Args:
        steps: number of steps; `grid`: a rule for placing them, or the times themselves (default uniform in t).
        chart: for reverse SDEs, the chart to work in; None for the equation's own time.
    """

    tableau: ClassVar[AdditiveTableau] = tableaux.SEA
    controlled: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class SRA1(AdditiveMethod):
    """Rößler's SRA1 for additive noise: two evaluations a step, strong order 1.5.

    Args:
        steps: number of steps; `grid`: a rule for placing them, or the times themselves (default uniform in t).
        rtol, atol: instead of steps: the strong error at the end aimed at, atol + rtol·|x|, RMS over elements; every sample takes its own
            steps.
        max_steps: tries allowed a sample.
        chart: for reverse SDEs, the chart to work in; None for the equation's own time.
        global_error: solve every sample more and more tightly on its path until two solves agree all along it, so that no sample beside
            a border of two modes is lost to the wrong one. Brings an error estimate. Status NOT_CONVERGED where solves do not come
            to agree. See `sdeflow.solvers.stochastic_global`.
    """

    tableau: ClassVar[AdditiveTableau] = tableaux.SRA1


@dataclass(frozen=True, kw_only=True)
class SRA2(AdditiveMethod):
    """Rößler's SRA2 for additive noise: two evaluations a step, strong order 1.5. Arguments as for `SRA1`."""

    tableau: ClassVar[AdditiveTableau] = tableaux.SRA2


@dataclass(frozen=True, kw_only=True)
class SRA3(AdditiveMethod):
    """Rößler's SRA3 for additive noise: three evaluations a step, strong order 1.5, order 3 where the noise vanishes. Arguments as for `SRA1`."""

    tableau: ClassVar[AdditiveTableau] = tableaux.SRA3


@dataclass(frozen=True, kw_only=True)
class SOSRA(AdditiveMethod):
    """Rackauckas & Nie's stability-optimised SRA: three evaluations a step, strong order 1.5. Arguments as for `SRA1`."""

    tableau: ClassVar[AdditiveTableau] = tableaux.SOSRA


@dataclass(frozen=True, kw_only=True)
class ShARK(AdditiveMethod):
    """Shifted additive-noise Runge–Kutta of Foster, dos Reis & Strange 2024: two evaluations a step, strong order 1.5.

    f₁ = f(u, z + g₀H), f₂ = f(u + ⅚h, z + ⅚h f₁ + g₀(⅚W + H)), z⁺ = z + h(0.4 f₁ + 0.6 f₂) + ∫g dw for g linear over the
    step. The smallest error constant of the tableaux here on linear equations. Arguments as for `SRA1`.
    """

    tableau: ClassVar[AdditiveTableau] = tableaux.SHARK


@dataclass(frozen=True, kw_only=True)
class ExponentialShARK(ShARK):
    """ShARK on a reverse SDE whose linear part for Gaussian data N(0, c²) is taken exactly, in the clock of unit noise.

    dz = (1+η²)/(2η²c²) · cos^{1−η²}θ · (D − c cot θ · ε̂) du + dw, σ/α = c tan θ: see `stochastic_clocks`. On such data the
    method is exact, path by path; g does not vary, so nothing is lost to g′.

    Args:
        c: scale of the data (its standard deviation).
        steps: number of steps; `grid`: a rule for placing them, or the times themselves (default `InChart(StraightLine(c/2))`,
            even in λ for networks that predict noise or score).
        rtol, atol, max_steps: as for `SRA1`.
    """

    c: float = 0.5

    @property
    def facts(self) -> Facts:
        return Facts(
            "Exponential ShARK",
            None,
            1.5,
            2.0,
            2.0,
            self.adaptive,
            ("additive",),
            "diffusion",
            tableaux.SHARK.reference,
        )

    def clock(self, task: Task) -> Clock:
        return UnitNoise.of(task, self.c)

    def rule(self, task: Task) -> Grid:
        # D as noise and score give it near pure noise is mostly their error: a state that took a long step with it is unlike any the network knows
        bent = isinstance(chart_of(task, None), BentLine)
        # even in θ would do for data of the one scale c, on which there is nothing to do; the work is in what is finer
        return (even_in_lambda(task) if bent else None) or InChart(StraightLine(0.5 * self.c))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.c < float("inf"):
            raise InvalidInput(f"c, the scale of the data, must be positive and finite; got {self.c}")
        if self.chart is not None:
            raise InvalidInput("ExponentialShARK has a clock of its own; leave chart out, or take ShARK(chart=...)")


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(PathSolver):
    """x⁺ = x + h f + g W, for every kind of noise in Itô's sense; strong order ½ (1 for additive noise).

    Args:
        steps: number of steps; `grid`: a rule for placing them, or the times themselves (default uniform in t).
        chart: for reverse SDEs, the chart to work in; None for the equation's own time.
    """

    chart: Chart | None = None
    controlled: ClassVar[bool] = False

    @property
    def facts(self) -> Facts:
        noise = ("additive", "diagonal", "scalar", "general")
        return Facts("Euler–Maruyama", None, 0.5, 1.0, 1.0, False, noise, "drift", "Maruyama 1955")

    def check(self, task: Task) -> None:
        super().check(task)
        _need_calculus(self, task, "ito")

    def clock(self, task: Task) -> Clock:
        return Clock.plain(task, self.chart)

    def take(self, clock: Clock, u: Tensor, h: Tensor, z: Tensor, W: Tensor, H: Tensor) -> tuple[Tensor, None]:
        return z + expand(h, z) * clock.rhs(u, z) + _times(clock.noise(u, z), W), None


@dataclass(frozen=True, kw_only=True)
class Milstein(EulerMaruyama):
    """x⁺ = x + h f + g W + ½ g g′ (W² − |h|): Itô, strong order 1, one drift and two diffusion evaluations a step.

    g g′ is the difference quotient (g(x + g√h) − g(x))/√h along g, right for diagonal noise (each g_i a function of x_i) and for
    scalar noise; no derivative is asked for. Arguments as for `EulerMaruyama`. (Milstein 1974; Kloeden & Platen 1992, 11.1)
    """

    @property
    def facts(self) -> Facts:
        noise = ("additive", "diagonal", "scalar")
        return Facts("Milstein", None, 1.0, 1.0, 1.0, False, noise, "drift", "Milstein 1974")

    def take(self, clock: Clock, u: Tensor, h: Tensor, z: Tensor, W: Tensor, H: Tensor) -> tuple[Tensor, None]:
        ahead, _ = super().take(clock, u, h, z, W, H)
        if clock.equation.noise == "additive":
            return ahead, None
        g, length = clock.noise(u, z), expand(h.abs(), z)
        slope = (clock.noise(u, z + g * length.sqrt()) - g) / length.sqrt()
        return ahead + 0.5 * slope * (W.square() - length), None


@dataclass(frozen=True, kw_only=True)
class StochasticHeun(EulerMaruyama):
    """x̃ = x + h f + g W, x⁺ = x + ½h(f + f̃) + ½(g + g̃)W: Stratonovich, strong order 1 for diagonal, scalar and additive noise.

    For additive noise the two calculi are one. Arguments as for `EulerMaruyama`. (Rümelin 1982)
    """

    @property
    def facts(self) -> Facts:
        noise = ("additive", "diagonal", "scalar")
        return Facts("Stochastic Heun", None, 1.0, 1.0, 2.0, False, noise, "drift", "Rümelin 1982")

    def check(self, task: Task) -> None:
        Solver.check(self, task)
        if task.equation.noise != "additive":
            _need_calculus(self, task, "stratonovich")

    def take(self, clock: Clock, u: Tensor, h: Tensor, z: Tensor, W: Tensor, H: Tensor) -> tuple[Tensor, None]:
        f, g, hz = clock.rhs(u, z), clock.noise(u, z), expand(h, z)
        ahead = z + hz * f + g * W
        return z + 0.5 * hz * (f + clock.rhs(u + h, ahead)) + 0.5 * (g + clock.noise(u + h, ahead)) * W, None


def _need_calculus(solver: PathSolver, task: Task, calculus: str) -> None:
    if task.equation.calculus != calculus:
        other = "Milstein, EulerMaruyama" if calculus == "stratonovich" else "StochasticHeun"
        raise InvalidInput(
            f'{solver.facts.name} solves equations with calculus="{calculus}", this one has "{task.equation.calculus}"; take {other}'
        )


def _times(g: Tensor, W: Tensor) -> Tensor:
    """g W: elementwise, or (n, d, m) times (n, m)."""
    return bmm(g, W[..., None])[..., 0] if g.ndim == 3 else g * W
