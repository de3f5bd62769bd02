"""What a solver is, and the native loop over a fixed grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.brownian import BrownianPath
from sdeflow.charts import Chart, chart_for
from sdeflow.counting import Counter
from sdeflow.equations import Equation
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, Nodes, UniformLogSNR, UniformTime
from sdeflow.solution import Status

FARTHEST = 14.0
"""|λ| up to which steps are even in λ by default: σ/α between 1e-6 and 1e6."""


@dataclass(frozen=True)
class Facts:
    """What a solver claims; the contract tests prove it and the docs table prints it.

    Attributes:
        name: the method's usual name.
        order: global order on ODEs, None if it solves none.
        strong: strong order on the noise it accepts, None if none is claimed.
        weak: weak order, likewise.
        evaluations: network evaluations a step (asymptotically), None if it depends on the run.
        adaptive: whether it chooses its own steps.
        noise: equation noises it accepts: "none", "additive", "diagonal", "scalar", "general".
        face: "drift" for any equation, "diffusion" when it needs the equation's process and predict.
        reference: where the method is from.
    """

    name: str
    order: float | None
    strong: float | None
    weak: float | None
    evaluations: float | None
    adaptive: bool
    noise: tuple[str, ...]
    face: Literal["drift", "diffusion"]
    reference: str


@dataclass(frozen=True)
class Task:
    """One solve, checked: what a solver gets.

    Attributes:
        equation: the equation.
        x: start states, (batch, *event).
        start, stop: times; either order.
        save_at: output times in order of travel, float64 on the CPU, or None for the end alone.
        seeds: per-sample seeds, int64 (batch,), for stochastic equations; else None.
        path: a Brownian path to use instead of seeds, or None.
        gradients: whether the graph is kept.
        counter: counts evaluations; restrict it when samples leave the batch.
        progress: called with the fraction of the interval done, or None.
    """

    equation: Equation
    x: Tensor
    start: float
    stop: float
    save_at: Tensor | None
    seeds: Tensor | None
    path: Any
    gradients: bool
    counter: Counter
    progress: Callable[[float], None] | None = None

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.x.shape[0]

    def constant(self, value: int) -> Tensor:
        """An int64 (batch,) tensor of one value on the state's device."""
        return torch.full((self.batch,), value, dtype=torch.int64, device=self.x.device)


@dataclass
class Outcome:
    """What a solver gives back; see `Solution` for the meanings."""

    x: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    states: Tensor | None = None
    error_estimate: Tensor | None = None
    dense: Callable[[float | Tensor], Tensor] | None = None


class Solver(ABC):
    """A frozen dataclass whose fields are its settings."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What the method claims with these settings."""

    @abstractmethod
    def integrate(self, task: Task) -> Outcome:
        """Run the method."""

    def check(self, task: Task) -> None:
        """Refuse what the method cannot solve.

        Raises:
            InvalidInput: the equation lacks the face or has noise the method does not accept, the chart is none, or the
                method is adaptive and the state in half precision.
        """
        facts, equation, chart = self.facts, task.equation, getattr(self, "chart", None)
        if chart is not None and not isinstance(chart, Chart):
            given = f"the class {chart.__name__}" if isinstance(chart, type) else repr(chart)
            raise InvalidInput(f"chart must be a Chart or None; got {given}. Write chart=sf.StraightLine(c=0.5)")
        if facts.adaptive and task.x.dtype.itemsize < 4:
            raise InvalidInput(
                f"{facts.name} controls an error that {task.x.dtype} cannot resolve; write solve(..., x.float()): the network "
                "keeps its own dtype. Or take a solver with fixed steps"
            )
        if facts.face == "diffusion" and (equation.process is None or equation.predict is None):
            raise InvalidInput(
                f"{facts.name} needs the process and prediction of a diffusion equation, and {equation!r} has only a "
                "drift; "
                'write sf.ProbabilityFlowODE(predict), or take a generic solver such as sf.RungeKutta("rk4", steps=...)'
            )
        if equation.noise not in facts.noise:
            have = ", ".join("ODEs" if n == "none" else f"{n} noise" for n in facts.noise)
            what = "an ODE" if equation.noise == "none" else f"{equation.noise} noise"
            raise InvalidInput(
                f"{facts.name} solves {have}; {equation!r} is {what}. `sdeflow solvers` lists what each solver accepts"
            )
        if task.path is not None and equation.stochastic:
            check_path(task, strict=not callable(getattr(task.path, "increment", None)))


def noise_shape(task: Task) -> tuple[int, ...]:
    """The shape of one sample's Brownian motion."""
    if task.equation.noise == "scalar":
        return (1,)
    if task.equation.noise == "general":
        return (task.equation.diffusion(task.start, task.x).shape[-1],)
    return tuple(task.x.shape[1:])


def check_path(task: Task, strict: bool = True) -> None:
    """Refuse a path that is not one of the samples' own: a smaller one would be spread over elements.

    Args:
        strict: refuse other objects with an `increment` of their own, which torchsde's methods take, too.

    Raises:
        InvalidInput: the path is no `BrownianPath`, not for as many samples, or not of the shape the equation's noise has.
    """
    path, shape = task.path, noise_shape(task)
    if not strict and not isinstance(path, BrownianPath):
        return
    if not isinstance(path, BrownianPath) or path.batch != task.batch or path.shape != shape:
        raise InvalidInput(
            f"the path must be a BrownianPath for {task.batch} samples of shape {shape}; got {path!r}. Write "
            f"sf.BrownianPath(sf.sample_seeds(7, {task.batch}), {shape})"
        )


def chart_of(task: Task, chart: Chart | None) -> Chart:
    """The chart asked for, or the one that suits the task's network."""
    if chart is not None:
        return chart
    assert task.equation.predict is not None
    return chart_for(task.equation.predict, task.start, task.stop)


def even_in_lambda(task: Task) -> Grid | None:
    """Steps even in λ; None where λ is infinite, or all but: where there is no signal or no noise at all."""
    process = task.equation.process
    assert process is not None
    lam = process.half_log_snr(torch.tensor([task.start, task.stop], dtype=torch.float64))
    return UniformLogSNR() if bool((lam.abs() < FARTHEST).all()) else None


def need_less_noise(task: Task) -> None:
    """Refuse a stochastic diffusion equation solved from data to noise, for methods whose noise is that of the way down.

    Raises:
        InvalidInput: there is noise, and σ/α does not fall.
    """
    process = task.equation.process
    if process is None or not task.equation.stochastic:
        return
    if not bool(process.half_log_snr(task.stop) > process.half_log_snr(task.start)):
        raise InvalidInput(
            f"this solver's noise is that of a reverse SDE on its way from noise to data, and this solve goes from t={task.start} "
            f"to {task.stop}, towards noise; write sf.solve(sf.ForwardSDE(process), sf.ShARK(steps=...), x) to add noise to data, or "
            "take sf.ShARK, which follows a reverse SDE either way"
        )


@dataclass(frozen=True, kw_only=True)
class FixedStep(Solver):
    """A method on a grid fixed beforehand, the same for all samples.

    A method is `init` and `step`; this class holds the loop. Give `steps`, with `grid` a rule for placing them, or
    give `grid` as the
    times themselves. Output times (`save_at`) that are no nodes are made nodes, so they are as accurate as the end.
    """

    steps: int | None = None
    grid: Grid | Tensor | list[float] | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        grid = self.grid
        if isinstance(grid, str | type):
            given = repr(grid) if isinstance(grid, str) else f"the class {grid.__name__}"
            raise InvalidInput(f"grid must be a rule or a list of times; got {given}. Write e.g. grid=sf.Karras()")
        if grid is not None and not isinstance(grid, Grid):
            grid = Nodes(grid)
            object.__setattr__(self, "grid", grid)
        if isinstance(grid, Nodes) and self.steps is None:
            object.__setattr__(self, "steps", grid.steps)
        if self.steps is None:
            raise InvalidInput(
                f"{type(self).__name__} needs steps=<number of steps>, or grid=<tensor of times>; neither was given"
            )
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InvalidInput(f"steps must be a positive integer (steps, not time points); got {self.steps!r}")

    def rule(self, task: Task) -> Grid:
        """The grid of a solver that was given none."""
        return UniformTime()

    def times(self, task: Task) -> Tensor:
        """The nodes of this solve: float64 on the CPU, start first, save_at merged in."""
        assert self.steps is not None
        grid = self.grid if isinstance(self.grid, Grid) else self.rule(task)
        times = grid.times(task.equation.process, task.start, task.stop, self.steps)
        return times if task.save_at is None else merge(times, task.save_at)

    @abstractmethod
    def init(self, task: Task, times: Tensor) -> Any:
        """Whatever the steps need: coefficients for the whole grid, an empty history."""

    @abstractmethod
    def step(self, task: Task, state: Any, n: int, x: Tensor) -> tuple[Tensor, Any]:
        """From times[n] to times[n + 1]: (x, state)."""

    def total(self, state: Any, times: Tensor) -> int:
        """Number of steps: those between the nodes, and any the method adds behind them."""
        return times.numel() - 1

    def integrate(self, task: Task) -> Outcome:
        times = self.times(task)
        wanted = output_nodes(times, task.save_at)
        state, x, kept = self.init(task, times), task.x, {}
        total = self.total(state, times)
        if 0 in wanted:
            kept[0] = x
        for n in range(total):
            x, state = self.step(task, state, n, x)
            if n + 1 in wanted:
                kept[n + 1] = x
            if task.progress is not None:
                task.progress((n + 1) / total)
        finite = finite_rows(x)
        status = torch.where(finite, task.constant(Status.SUCCESS), task.constant(Status.NON_FINITE))
        states = torch.stack([kept[n] for n in wanted]) if task.save_at is not None else None
        return Outcome(x=x, states=states, status=status, accepted=task.constant(total), rejected=task.constant(0))


NEAR = 0.05
"""Share of a step within which a node gives way to an output time."""


def merge(times: Tensor, extra: Tensor, near: float = NEAR) -> Tensor:
    """Nodes with the extra times among them, in order of travel.

    Args:
        times: nodes, (n,).
        extra: (m,).
        near: a node that an extra time is closer to than this share of the distance to its next node gives way to it. Multistep methods
            divide by the distances of nodes: with one step a thousandth of the others UniPC's error was up to 20 times as large, Adams's 30.
    """
    step, span = times.diff().abs(), (times[-1] - times[0]).abs()
    none = step.new_full((1,), torch.inf)
    room = near * torch.cat([none, step]).minimum(torch.cat([step, none]))
    far = (times[:, None] - extra).abs().amin(1) > room.clamp_min(1e-12 * span)
    far[0], far[-1] = True, True
    inner = ((extra[:, None] - times[[0, -1]]).abs() > 1e-12 * span).all(1)
    return torch.cat([times[far], extra[inner]]).sort(descending=bool(times[0] > times[-1])).values


def output_nodes(times: Tensor, save_at: Tensor | None) -> list[int]:
    """For every output time the index of its node."""
    if save_at is None:
        return []
    return (times[:, None] - save_at[None, :]).abs().argmin(0).tolist()


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a b, (n, m, d), of a (n, m, k) and b (n, k, d), in their own dtype: torch.autocast is for the network."""
    if not torch.is_autocast_enabled(a.device.type):
        return torch.bmm(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def finite_rows(x: Tensor) -> Tensor:
    """True for every sample whose elements are all finite, (batch,) bool."""
    return x.isfinite().flatten(1).all(1)
