"""Coordinates in which every Gaussian process is the same flow.

A chart takes (t, x) to (u, z) with z = m x, so that z = A(u) x_0 + S(u) ε for known A, S whatever the process is
(m = A/α = S/σ). In it the probability-flow ODE is dz/du = A′D + S′ε̂, and the reverse SDE of strength η

    dz = [A′D + (S′ + η²(S′ − S A′/A)) ε̂] du + η √|2S(S′ − S A′/A)| dw̄,

ε̂ = (z − A D)/S. Solvers work in (u, z); t exists for the user and the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput, finite
from sdeflow.predictions import Prediction
from sdeflow.processes import Process, Time, as_time, expand


class Chart(ABC):
    """A choice of clock u and state scale m. `bind` it to a process to use it."""

    def bind(self, process: Process) -> BoundChart:
        """This chart for one process."""
        return BoundChart(self, process)

    @abstractmethod
    def clock(self, process: Process, t: Tensor) -> Tensor:
        """u(t)."""

    @abstractmethod
    def time(self, process: Process, u: Tensor) -> Tensor:
        """t(u)."""

    @abstractmethod
    def scale(self, process: Process, t: Tensor) -> Tensor:
        """m(t) with z = m x."""

    @abstractmethod
    def coefficients(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(A, S, dA/du, dS/du)."""


@dataclass(frozen=True)
class BoundChart:
    """A chart on a process. u and t: floats, 0-d or (batch,) tensors; coefficients are float64; z keeps its dtype."""

    chart: Chart
    process: Process

    def u(self, t: Time) -> Tensor:
        """The chart's clock at time t."""
        return self.chart.clock(self.process, as_time(t))

    def t(self, u: Time) -> Tensor:
        """The time at which the chart's clock shows u."""
        return self.chart.time(self.process, as_time(u))

    def m(self, t: Time) -> Tensor:
        """The state's scale at time t: z = m x."""
        return self.chart.scale(self.process, as_time(t))

    def to_chart(self, t: Time, x: Tensor) -> Tensor:
        """z of the state x at time t."""
        return expand(self.m(as_time(t, x.device)), x) * x

    def from_chart(self, t: Time, z: Tensor) -> Tensor:
        """x of the chart's state z at time t."""
        return z / expand(self.m(as_time(t, z.device)), z)

    def coefficients(self, u: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(A, S, dA/du, dS/du) at u."""
        return self.chart.coefficients(self.process, as_time(u))

    def drift_weights(self, u: Tensor, eta: float = 0.0) -> tuple[Tensor, Tensor]:
        """(p, q) with dz/du = p·D + q·ε̂."""
        A, S, dA, dS = self.chart.coefficients(self.process, u)
        return (dA, dS) if eta == 0 else (dA, dS + eta**2 * (dS - S * dA / A))

    def drift(self, predict: Prediction, u: Time, z: Tensor, eta: float = 0.0) -> Tensor:
        """dz/du of the probability-flow ODE (η = 0) or of the reverse SDE, shaped as z; one network call."""
        u = as_time(u, z.device)
        t = self.t(u)
        p, q = self.drift_weights(u, eta)
        return predict.combine(self.from_chart(t, z), t, p, q)

    def diffusion(self, u: Time, eta: float = 1.0) -> Tensor:
        """η√|2S(S′ − S A′/A)|: noise amplitude of z per √|du|."""
        A, S, dA, dS = self.coefficients(u)
        return eta * (2.0 * S * (dS - S * dA / A)).abs().sqrt()


def _check_scale(c: float) -> None:
    if not (finite(c) and c > 0):
        raise InvalidInput(
            f"the chart's data scale c must be a positive and finite number; got {c!r}. Write e.g. StraightLine(c=0.5)"
        )


@dataclass(frozen=True)
class StraightLine(Chart):
    """u = σ/(cα+σ), z = c x/(cα+σ): A = 1 − u, S = c u, so dz/du = cε̂ − D = (z − D)/u for every process.

    u runs inside (0, 1], 1 being α = 0; c is the scale of the data (its standard deviation). With c = 1 this is
    rectified flow and the right side is its velocity.
    """

    c: float = 0.5

    def __post_init__(self) -> None:
        _check_scale(self.c)

    def clock(self, process: Process, t: Tensor) -> Tensor:
        sigma = process.sigma(t)
        return sigma / (self.c * process.alpha(t) + sigma)

    def time(self, process: Process, u: Tensor) -> Tensor:
        return process.time_of_rho(self.c * u / (1.0 - u))

    def scale(self, process: Process, t: Tensor) -> Tensor:
        return self.c / (self.c * process.alpha(t) + process.sigma(t))

    def coefficients(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(u)
        return 1.0 - u, self.c * u, -one, self.c * one


@dataclass(frozen=True)
class BentLine(StraightLine):
    """The straight line with a clock that has room near pure noise: u = −s − bend·ln(1 − e^{−s/bend}), s = cα/(cα+σ) + delta.

    du is the straight line's where cα/(cα+σ) is above `bend`, and bend·dλ from there down to `delta`. z = c x/(cα+σ) as there.

    For networks that predict the noise or the score. An error δ of ε̂ is one of δσ/α in D = (x − σε̂)/α: on the straight line dz/du
    then has a term δ(cα+σ)/α, which grows without bound towards pure noise and which no polynomial follows; steps even in λ do. What a network
    without such errors, or one that predicts the data or v, costs more here than on the straight line is in docs/choosing.md.

    Args:
        c: scale of the data.
        bend: share of the data in the state, cα/(cα+σ), below which the clock is λ's.
        delta: error of ε̂ that is to be expected; where the share is less, D is all error, and the clock ends.
    """

    bend: float = 0.1
    delta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bend", "delta"):
            value = getattr(self, name)
            if not (finite(value) and value > 0):
                raise InvalidInput(
                    f"BentLine needs a positive and finite {name}; got {value!r}. Write sf.BentLine(c=0.5)"
                )

    def clock(self, process: Process, t: Tensor) -> Tensor:
        data = self.c * process.alpha(t)
        s = data / (data + process.sigma(t)) + self.delta
        return -s - self.bend * (-torch.expm1(-s / self.bend)).log()

    def _share(self, u: Tensor) -> Tensor:
        """cα/(cα+σ) at u."""
        soft = self.bend * torch.logaddexp(torch.zeros_like(u), -u / self.bend)
        return (soft - self.delta).clamp(0.0, 1.0)

    def time(self, process: Process, u: Tensor) -> Tensor:
        share = self._share(u)
        return process.time_of_rho(self.c * (1.0 - share) / share)

    def coefficients(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        share, pace = self._share(u), torch.sigmoid(-u / self.bend)
        return share, self.c * (1.0 - share), -pace, self.c * pace


FELT = 0.1
"""Share of the data's scale that an error of D may be before it is worth room in the clock."""


def chart_for(
    predict: Prediction, start: float | None = None, stop: float | None = None, c: float = 0.5
) -> StraightLine:
    """The chart that suits a network from start to stop, which solvers take when given none.

    `BentLine(c)` where its errors are many times as large in D (`Prediction.cancelled`), as those of noise and score are near pure noise; else
    `StraightLine(c)`.

    Args:
        predict: the network.
        start, stop: the times of the solve, in either order; default: all of the process's.
        c: the data's scale, e.g. `sf.data_scale(equation, pilot)`.
    """
    _check_scale(c)
    process = predict.process
    times = process.t_max if start is None else start, process.t_min if stop is None else stop
    noisy = BentLine(c)
    cancelled = max(predict.cancelled(t).item() for t in times)
    return noisy if noisy.delta * cancelled > FELT * c else StraightLine(c)


@dataclass(frozen=True)
class Trigonometric(Chart):
    """u = θ with σ/α = c·tan θ, z = cos θ · x/α: A = cos θ, S = c·sin θ. θ = π/2 is α = 0."""

    c: float = 0.5

    def __post_init__(self) -> None:
        _check_scale(self.c)

    def clock(self, process: Process, t: Tensor) -> Tensor:
        return torch.atan2(process.sigma(t), self.c * process.alpha(t))

    def time(self, process: Process, u: Tensor) -> Tensor:
        # cot, not tan: θ = π/2 in float64 must give σ/α = ∞ within rounding on either side
        return process.time((u.cos().clamp_min(0.0) / (self.c * u.sin())).log())

    def scale(self, process: Process, t: Tensor) -> Tensor:
        return self.c / torch.hypot(self.c * process.alpha(t), process.sigma(t))

    def coefficients(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = u.cos(), u.sin()
        return cos, self.c * sin, -sin, self.c * cos


@dataclass(frozen=True)
class LogSNR(Chart):
    """u = λ = log(α/σ), z = x/α: A = 1, S = e^{−λ}, dz/dλ = −e^{−λ}ε̂ = D − z. Does not reach α = 0."""

    def clock(self, process: Process, t: Tensor) -> Tensor:
        return process.half_log_snr(t)

    def time(self, process: Process, u: Tensor) -> Tensor:
        return process.time(u)

    def scale(self, process: Process, t: Tensor) -> Tensor:
        return 1.0 / process.alpha(t)

    def coefficients(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rho = (-u).exp()
        return torch.ones_like(u), rho, torch.zeros_like(u), -rho


@dataclass(frozen=True)
class SNRTime(Chart):
    """u = e^{2λ} = α²/σ², z = αx/σ²: A = u, S = √u. The reverse SDE (η = 1) of every process is dz = D du + dw.

    Stochastic localisation (El Alaoui & Montanari 2022). Regular at α = 0, where z = 0. u spans many decades: choose
    the
    grid in another clock.
    """

    def clock(self, process: Process, t: Tensor) -> Tensor:
        return (process.alpha(t) / process.sigma(t)) ** 2

    def time(self, process: Process, u: Tensor) -> Tensor:
        return process.time(0.5 * u.log())

    def scale(self, process: Process, t: Tensor) -> Tensor:
        return process.alpha(t) / process.sigma(t) ** 2

    def coefficients(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        root = u.sqrt()
        return u, root, torch.ones_like(u), 0.5 / root


@dataclass(frozen=True)
class PlainTime(Chart):
    """u = t, z = x: the equation as the process writes it. Here to show what it costs; see the other charts."""

    def clock(self, process: Process, t: Tensor) -> Tensor:
        return t

    def time(self, process: Process, u: Tensor) -> Tensor:
        return u

    def scale(self, process: Process, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def coefficients(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return process.coefficients(u)
