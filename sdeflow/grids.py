"""Where the steps of a fixed-step solve lie.

A grid gives `times(process, start, stop, steps)`: float64 (steps + 1,), on the CPU, in the order of travel, `start`
first and `stop`
last, both exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdeflow.charts import Chart, LogSNR, PlainTime, StraightLine
from sdeflow.errors import InvalidInput
from sdeflow.processes import Process


class Grid(ABC):
    """A rule for placing steps."""

    def times(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        """The (steps + 1,) node times from start to stop.

        Raises:
            InvalidInput: steps < 1, the grid needs a process and the equation has none, or the nodes do not move
                strictly from start to stop.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise InvalidInput(
                f"steps must be a positive integer (the number of steps, not of time points); got {steps!r}"
            )
        nodes = self.nodes(process, float(start), float(stop), steps).to("cpu", torch.float64).clone()
        nodes[0], nodes[-1] = start, stop
        check_nodes(nodes, f"{self!r}")
        return nodes

    @abstractmethod
    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        """The nodes before the ends are made exact."""


def check_nodes(nodes: Tensor, owner: str) -> None:
    """Refuse nodes that are not finite or not strictly monotone."""
    moves = nodes.diff()
    if (
        nodes.ndim != 1
        or nodes.numel() < 2
        or not bool(nodes.isfinite().all())
        or not (bool((moves > 0).all()) or bool((moves < 0).all()))
    ):
        shown = [round(v, 6) for v in nodes.flatten()[:6].tolist()]
        raise InvalidInput(
            f"{owner} gave times {shown}{'…' if nodes.numel() > 6 else ''} that do not move strictly one way from "
            "start to stop; "
            "a grid needs at least two finite, strictly monotone times"
        )


def _need(process: Process | None, grid: Grid) -> Process:
    if process is None:
        raise InvalidInput(f"{grid!r} needs a diffusion process, and this equation has none; write grid=UniformTime()")
    return process


@dataclass(frozen=True)
class InChart(Grid):
    """Uniform in a chart's clock."""

    chart: Chart = field(default_factory=StraightLine)

    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        if process is None and isinstance(self.chart, PlainTime):
            return torch.linspace(start, stop, steps + 1, dtype=torch.float64)
        bound = self.chart.bind(_need(process, self))
        first, last = bound.u(start).item(), bound.u(stop).item()
        for name, t, u in (("start", start, first), ("stop", stop, last)):
            if not abs(u) < float("inf"):
                zero = "α" if bound.process.alpha(t) == 0 else "σ"
                raise InvalidInput(
                    f"{self!r}: the clock is infinite at {name}={t}, where {zero} = 0; write grid=InChart(StraightLine()), "
                    f"or another {name}"
                )
        return bound.t(torch.linspace(first, last, steps + 1, dtype=torch.float64))


@dataclass(frozen=True)
class UniformTime(Grid):
    """Uniform in t."""

    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """Uniform in λ = log(α/σ). Where the interval reaches α = 0 the first step spans from there to `lowest`, the
    rest is uniform."""

    lowest: float = -6.0

    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        bound = LogSNR().bind(_need(process, self))
        first, last = bound.u(start).item(), bound.u(stop).item()
        if first == -float("inf") and steps > 1:
            inner = bound.t(torch.linspace(self.lowest, last, steps, dtype=torch.float64))
            return torch.cat([torch.tensor([start], dtype=torch.float64), inner])
        if last == -float("inf") and steps > 1:
            inner = bound.t(torch.linspace(first, self.lowest, steps, dtype=torch.float64))
            return torch.cat([inner, torch.tensor([stop], dtype=torch.float64)])
        return bound.t(torch.linspace(first, last, steps + 1, dtype=torch.float64))


@dataclass(frozen=True)
class Karras(Grid):
    """Uniform in (σ/α)^{1/rho}. Karras et al. 2022, eq. 5; rho = 7."""

    rho: float = 7.0

    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        process = _need(process, self)
        first, last = (process.rho(t).item() ** (1.0 / self.rho) for t in (start, stop))
        if max(first, last) == float("inf"):
            raise InvalidInput(
                f"{self!r}: σ/α is infinite at start={start} or stop={stop} (α = 0 there); write "
                "grid=InChart(StraightLine())"
            )
        return process.time_of_rho(torch.linspace(first, last, steps + 1, dtype=torch.float64) ** self.rho)


@dataclass(frozen=True)
class Multiscale(Grid):
    """Uniform in λ where σ/α lies between two scales of the data, coarser and regular beyond, also at σ = 0 and α = 0.

    Uniform in u(ρ) = asinh(ρ/low) − asinh(high/ρ) − ln ρ, ρ = σ/α, for which −du/dλ = (1 + low²/ρ²)^{−½} + (1 + ρ²/high²)^{−½} − 1:
    1 between the scales, high/ρ above, ρ/low below. On data of scales log-uniform in [low, high] the denoiser of an axis is a
    function of λ + log(scale) alone, so even steps in λ make even errors. One scale alone is what `InChart(Trigonometric(c))` is for.

    Args:
        low: smallest scale to resolve, as a standard deviation; well below the finest detail of the data.
        high: the largest, about twice the data's standard deviation.
    """

    low: float = 0.01
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.low < self.high < float("inf"):
            raise InvalidInput(
                f"Multiscale needs 0 < low < high; got {self.low} and {self.high}. Write Multiscale(0.01, 2.0)"
            )

    def clock(self, lam: Tensor) -> Tensor:
        """−u at λ (float64, ±∞ included), growing with λ."""
        # asinh(ρ/low) − ln ρ and asinh(high/ρ) + ln ρ are finite at ρ = ∞ and at ρ = 0 respectively; both from e^{−|λ|}
        rho, inverse = (-lam).exp(), lam.exp()
        above = ((1.0 / self.low) + (1.0 / self.low**2 + inverse**2).sqrt()).log() - (self.high * inverse).asinh()
        below = (rho / self.low).asinh() - (self.high + (self.high**2 + rho**2).sqrt()).log()
        return -torch.where(lam < 0.0, above, below)

    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        process = _need(process, self)
        ends = process.half_log_snr(torch.tensor([start, stop], dtype=torch.float64))
        first, last = self.clock(ends).tolist()
        u = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        # u is between two straight lines in λ; 64 halvings reach the last bit
        low = torch.full_like(u, min(-60.0, *(v for v in ends.tolist() if v > -float("inf"))))
        high = torch.full_like(u, max(60.0, *(v for v in ends.tolist() if v < float("inf"))))
        for _ in range(64):
            middle = 0.5 * (low + high)
            above = self.clock(middle) > u
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return process.time(0.5 * (low + high))


@dataclass(frozen=True)
class Power(Grid):
    """Uniform in t^{1/power}; power = 2 is the quadratic grid of DDIM and DEIS."""

    power: float = 2.0

    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        if min(start, stop) < 0:
            raise InvalidInput(f"{self!r} needs times ≥ 0; got start={start}, stop={stop}")
        return (
            torch.linspace(start ** (1 / self.power), stop ** (1 / self.power), steps + 1, dtype=torch.float64)
            ** self.power
        )


@dataclass(frozen=True)
class Quadratic(Power):
    """Uniform in √t (Song et al. 2021, DDIM)."""

    power: float = field(default=2.0, init=False)


@dataclass(frozen=True)
class Nodes(Grid):
    """The caller's own times, start first: a sequence or tensor (n + 1,). `steps` must be left out or be n."""

    values: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values, dtype=torch.float64).detach().cpu()
        check_nodes(values, "Nodes")
        object.__setattr__(self, "values", tuple(values.tolist()))

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.values) - 1

    def times(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        nodes = self.nodes(process, start, stop, steps)
        tolerance = 1e-9 * max(1.0, abs(start), abs(stop))
        if abs(nodes[0].item() - start) > tolerance or abs(nodes[-1].item() - stop) > tolerance:
            raise InvalidInput(
                f"the grid runs from {nodes[0].item():g} to {nodes[-1].item():g} but the solve from {start:g} to "
                f"{stop:g}; "
                f"write solve(..., start={nodes[0].item():g}, stop={nodes[-1].item():g})"
            )
        return super().times(process, start, stop, steps)

    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        if steps != self.steps:
            raise InvalidInput(f"the grid has {self.steps} steps, but steps={steps} was given; leave steps out")
        return torch.tensor(self.values, dtype=torch.float64)


@dataclass(frozen=True)
class Discrete(Grid):
    """Integer times of a model with n training steps, as discrete-time samplers space them, then `stop`.

    "leading": 0, n//steps, 2(n//steps), …; "trailing": n−1, n−1−n/steps, …; "linspace": `steps` values from 0 to n − 1. Where the last of
    them is `stop` itself, as 0 is, its step would be empty: the integers are then the first `steps` of those for steps + 1.
    The first node is the largest of them, which for "leading" is below t_max: start the solve there, at `Discrete(...).start(steps)`.
    """

    n: int = 1000
    spacing: str = "trailing"

    def __post_init__(self) -> None:
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise InvalidInput(f'spacing must be "leading", "trailing" or "linspace"; got {self.spacing!r}')

    def indices(self, steps: int) -> Tensor:
        """The `steps` integer times, largest first, float64."""
        if not 1 <= steps <= self.n:
            raise InvalidInput(f"{self!r} holds between 1 and {self.n} steps; got {steps}")
        if self.spacing == "leading":
            k = torch.arange(steps, dtype=torch.float64) * (self.n // steps)
        elif self.spacing == "trailing":
            return (self.n - torch.arange(steps, dtype=torch.float64) * (self.n / steps)).round() - 1
        else:
            k = torch.linspace(0, self.n - 1, steps, dtype=torch.float64).round()
        return k.flip(0)

    def _inner(self, steps: int, stop: float) -> Tensor:
        inner = self.indices(steps)
        if inner[-1].item() > stop:
            return inner
        if steps == self.n:
            raise InvalidInput(
                f"{self!r} has {self.n} integer times, the last of them at or below stop={stop:g}, so at most {self.n - 1} steps; got {steps}"
            )
        return self.indices(steps + 1)[:-1]

    def start(self, steps: int, stop: float = 0.0) -> float:
        """The first node of a solve to `stop`."""
        return self._inner(steps, stop)[0].item()

    def nodes(self, process: Process | None, start: float, stop: float, steps: int) -> Tensor:
        inner = self._inner(steps, stop)
        if abs(inner[0].item() - start) > 1e-9:
            raise InvalidInput(
                f"{self!r} with {steps} steps starts at t={inner[0].item():g}, the solve at {start:g}; write "
                f"solve(..., start={inner[0].item():g})"
            )
        return torch.cat([inner, torch.tensor([stop], dtype=torch.float64)])
