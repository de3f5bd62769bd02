"""The clock and coordinates a stochastic solver works in: dz = f du + g dw, w a Brownian path in the time u.

Three kinds: the equation's own time; a chart; and the clock of unit noise. For the last, take Gaussian data N(0, c²) as a
reference, θ with σ/α = c tan θ, y = x/α. Its denoiser is cos²θ·y, and under it the reverse SDE of strength η is, in

    z = cos^{1+η²}θ · y,   u = −c²(1 − cos^{2η²}θ) ∈ [−c², 0),

plain Brownian motion: the linear part is gone and the noise is 1. For any data what remains is

    dz = (1+η²)/(2η²c²) · cos^{1−η²}θ · (D − c cot θ · ε̂) du + dw,

whose drift is (D − z)/(−u) at η = 1. u is 0 at clean data, where Brownian paths resolve time best. With c → ∞ and η = 1 this is
stochastic localisation, dv = D ds + dB_s in s = (α/σ)²; the finite c keeps the noise of small steps from being amplified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.charts import Chart
from sdeflow.errors import InvalidInput
from sdeflow.processes import Process, as_time, expand
from sdeflow.processes.base import last_answer
from sdeflow.solvers.base import Task
from sdeflow.solvers.control import Flow, one_answer

WIDE = 1.5
"""The longest axes of data of scale c, over c: an error made early grows by the square of that as against data without such axes."""
LEAST = 0.01
"""Of an early error no less than this is taken to remain at the end."""
STRIDE = 1.75
"""Longest step in units of `pace`, which are those of λ: a Gaussian's transition, 10 to 90 % of it, takes 2.2, the choice of a mode less. Two stages
on either side of one see nothing of it."""
SMALL = 0.25
"""Of the state's standard deviation, what an error that is to be forgotten may be: a network says nothing of states far from its data."""


def even(sigma: Tensor, alpha: Tensor, low: float, high: float) -> Tensor:
    """asinh(ρ̂/low), ρ̂ = ρ/(1 + ρ/high), ρ = σ/α: even in λ where ρ lies between the scales low and high, finite at α = 0 and at σ = 0."""
    return (sigma / (alpha + sigma / high) / low).asinh()


def rho_where(place: Tensor, low: float, high: float) -> Tensor:
    """ρ where `even` is this, ∞ at α = 0."""
    capped = low * place.sinh()
    return capped / (1.0 - capped / high).clamp_min(0.0)


class Place(NamedTuple):
    """What reference data say of clock readings; all (n,).

    Attributes:
        pace: how far the solve has come: even in λ between scales that no data of this scale exceed, finite at both ends.
        kept: what the noise to come leaves of an error in units of the state's standard deviation: (cos θ/cos θ_end)^{η²}.
        carry: ∂x_end/∂z for Gaussian data, for which cos^{1+η²}θ·y is a martingale, y = x/α.
        small: the largest error in z that counts as a small one, infinite where nothing is known of the data.
    """

    pace: Tensor
    kept: Tensor
    carry: Tensor
    small: Tensor


@dataclass(frozen=True)
class Clock(Flow):
    """An SDE in its own time (chart None) or in a chart; states are flattened to (n, d)."""

    stride: float = STRIDE

    @staticmethod
    def plain(task: Task, chart: Chart | None) -> Clock:
        """The task's SDE in t, or in a chart's clock."""
        equation = task.equation
        if chart is not None and (equation.process is None or equation.predict is None):
            raise InvalidInput(
                f"chart={chart!r} needs a diffusion equation; {equation!r} has no process. Leave chart out"
            )
        equation = one_answer(equation)
        bound = None if chart is None or equation.process is None else chart.bind(equation.process)
        return Clock(equation, bound, task.start, task.stop, task.x.shape[1:])

    def rhs(self, u: Tensor, z: Tensor) -> Tensor:
        """f(u, z), (n, d); u 0-d or (n,)."""
        if self.chart is None:
            return super().rhs(u, z)
        t, shaped = self.when(u), z.reshape(-1, *self.event)
        p, q = self.chart.drift_weights(u, self.equation.eta)
        assert self.equation.predict is not None
        return self.equation.predict.combine(shaped / expand(self.chart.m(t), shaped), t, p, q).flatten(1)

    def noise(self, u: Tensor, z: Tensor) -> Tensor:
        """g(u, z), broadcastable to (n, d), or (n, d, m) for general noise."""
        if self.chart is not None:
            return expand(self.chart.diffusion(u, self.equation.eta), z)
        shaped = z.reshape(-1, *self.event)
        g = self.equation.diffusion(self.t(u), shaped).to(z.dtype)
        if self.equation.noise == "general":
            return g
        return g.broadcast_to(shaped.shape).flatten(1)

    @property
    def known(self) -> bool:
        """Whether this is a reverse SDE, so that reference data say what becomes of errors."""
        return self.equation.process is not None and self.equation.predict is not None

    @property
    def scale(self) -> float:
        """The data's standard deviation, as far as it is known."""
        return 0.5 if self.chart is None else getattr(self.chart.chart, "c", 0.5)

    @cached_property
    def place(self) -> Callable[[Tensor], Place]:
        """The `Place` at u. That of the tensor asked for last is kept: a step asks several times where it begins."""
        return last_answer(self._place)

    @cached_property
    def when(self) -> Callable[[Tensor], Tensor]:
        """t(u); that of the tensor asked for last is kept."""
        return last_answer(self.t)

    def _place(self, u: Tensor) -> Place:
        process = self.equation.process
        if not self.known or process is None:
            one = torch.ones_like(u)
            return Place(u, one, one, torch.full_like(u, torch.inf))
        t = self.when(u)
        alpha, sigma, units = process.alpha(t), process.sigma(t), self.units(t)
        over, cos = self._reference(alpha, sigma)
        over_end, cos_end = self._at_end.to(u.device)
        kept = ((cos / cos_end) ** (self.equation.eta**2)).clamp(LEAST, 1.0)
        return Place(
            pace=even(sigma, alpha, *self.between),
            kept=kept,
            carry=over / over_end * kept / units,
            small=SMALL * units * torch.hypot(self.scale * alpha, sigma),
        )

    def _reference(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """cos θ/α and cos θ, c being that of the longest axes."""
        c = WIDE * self.scale
        hypotenuse = torch.hypot(c * alpha, sigma)
        return c / hypotenuse, c * alpha / hypotenuse

    @cached_property
    def _at_end(self) -> Tensor:
        """`_reference` at the stop, (2,)."""
        process, end = self.equation.process, as_time(self.stop)
        assert process is not None
        return torch.stack(self._reference(process.alpha(end), process.sigma(end)))

    @property
    def between(self) -> tuple[float, float]:
        """Scales that no data of this scale exceed."""
        return 0.01 * self.scale, 10.0 * self.scale

    @cached_property
    def ends(self) -> tuple[float, float]:
        """`pace` at the start and the stop."""
        first, last = (
            self._place(self.u(torch.tensor(t, dtype=torch.float64))).pace.item() for t in (self.start, self.stop)
        )
        return first, last

    def longest(self, u: Tensor) -> Tensor | None:
        """The step from u, (n,), over which `pace` changes by `stride`; None where nothing is known of the data."""
        process = self.equation.process
        if not self.known or process is None:
            return None
        first, last = self.ends
        there = self.place(u).pace + math.copysign(self.stride, last - first)
        rho = rho_where(there.clamp(min(first, last), max(first, last)), *self.between)
        t = process.time_of_rho(rho).clamp(min(self.start, self.stop), max(self.start, self.stop))
        return (self.u(t) - u).abs()

    def units(self, t: Tensor) -> Tensor:
        """z/x at t."""
        return torch.ones_like(t) if self.chart is None else self.chart.m(t)

    def carry(self, u: Tensor) -> Tensor:
        return self.place(u).carry


@dataclass(frozen=True)
class UnitNoise(Clock):
    """A reverse SDE in the clock of unit noise for data of scale c."""

    c: float = 0.5

    @property
    def scale(self) -> float:
        return self.c

    @staticmethod
    def of(task: Task, c: float) -> UnitNoise:
        """The task's reverse SDE in this clock."""
        clock = UnitNoise(one_answer(task.equation), None, task.start, task.stop, task.x.shape[1:], c=c)
        alpha, sigma = clock.process.alpha(task.start).item(), clock.process.sigma(task.start).item()
        if not (alpha > 0 and sigma > 0):
            raise InvalidInput(
                f"the solve starts at t={task.start}, where α = {alpha:g} and σ = {sigma:g}, and the reverse SDE needs both "
                f"positive; start a little inside, e.g. solve(..., start={0.999 * task.start:g})"
            )
        return clock

    @property
    def process(self) -> Process:
        """The equation's process."""
        assert self.equation.process is not None
        return self.equation.process

    def _angles(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(cos θ, sin θ) at t."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        hypotenuse = torch.hypot(self.c * alpha, sigma)
        return self.c * alpha / hypotenuse, sigma / hypotenuse

    def _m(self, t: Tensor) -> Tensor:
        cos, _ = self._angles(t)
        return cos ** (1.0 + self.equation.eta**2) / self.process.alpha(t)

    def u(self, t: Tensor | float) -> Tensor:
        cos, sin = self._angles(as_time(t))
        # 1 − cos^{2η²} without cancellation where θ is small
        log_cos = torch.where(sin < 0.5, 0.5 * torch.log1p(-(sin**2)), cos.log())
        return self.c**2 * torch.expm1(2.0 * self.equation.eta**2 * log_cos)

    def t(self, u: Tensor) -> Tensor:
        log_cos = torch.log1p(u / self.c**2) / (2.0 * self.equation.eta**2)
        rho = self.c * (-torch.expm1(2.0 * log_cos)).sqrt() / log_cos.exp()
        return self.process.time_of_rho(rho).clamp(min(self.start, self.stop), max(self.start, self.stop))

    def z(self, t: Tensor | float, x: Tensor) -> Tensor:
        return (expand(self._m(as_time(t, x.device)), x) * x).flatten(1)

    def x(self, t: Tensor | float, z: Tensor) -> Tensor:
        z = z.reshape(-1, *self.event)
        return z / expand(self._m(as_time(t, z.device)), z)

    def rhs(self, u: Tensor, z: Tensor) -> Tensor:
        t, eta2 = self.when(u), self.equation.eta**2
        cos, sin = self._angles(t)
        p = (1.0 + eta2) / (2.0 * eta2 * self.c**2) * cos ** (1.0 - eta2)
        assert self.equation.predict is not None
        return self.equation.predict.combine(self.x(t, z), t, p, -p * self.c * cos / sin).flatten(1)

    def noise(self, u: Tensor, z: Tensor) -> Tensor:
        return z.new_ones(())

    def units(self, t: Tensor) -> Tensor:
        return self._m(t)
