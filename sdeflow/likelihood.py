"""Log-likelihoods and latents by the probability-flow ODE.

In a chart z = m x the flow dz/du = F(u, z) carries the density along with d log p_z/du = −div F, hence

    log p(x_0) = log p_T(x_T) + ∫ div F du + d·log(m_0/m_T),

the integral from the data end to the noise end, d the number of elements of one sample. State and integral are solved
together as one ODE, so the solver controls the error of both.

Sources: Chen et al. 2018 (instantaneous change of variables), Grathwohl et al. 2019 (Hutchinson's estimator),
Song et al. 2021, section 4.3; Hutchinson 1990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.charts import Chart, chart_for
from sdeflow.equations import Equation, Field, ProbabilityFlowODE
from sdeflow.errors import InvalidInput
from sdeflow.networks import pullback, rows_of
from sdeflow.predictions import Prediction
from sdeflow.random import sample_seeds, standard_normal, uniform
from sdeflow.solution import Solution
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver

Divergence = Literal["exact", "rademacher", "gaussian"]
PROBE_STREAM = 201
"""Random stream of the probes."""
CHUNK_ELEMENTS = 1 << 22
"""Largest stack of cotangents at a time, in elements."""


@dataclass(frozen=True)
class Likelihood:
    """What `log_likelihood` found.

    Attributes:
        log_prob: log p(x) in nats, (batch,); NaN for samples that did not reach the noise end.
        standard_error: of `log_prob`, from the spread of the probes, (batch,); zeros for the exact divergence, NaN for a
            single probe, which shows no spread.
        latent: the state at the noise end, shaped as x.
        solution: the solve of state and integral; its x is (batch, d + probes), in the chart.
        probes: number of independent estimates averaged.
    """

    log_prob: Tensor
    standard_error: Tensor
    latent: Tensor
    solution: Solution
    probes: int = 1

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """(low, high), (batch,) each: Student's t interval of the probes' mean at the given level."""
        if not 0.0 < level < 1.0:
            raise InvalidInput(f"level must be in (0, 1); got {level}")
        half = (
            student_quantile(0.5 + 0.5 * level, self.probes - 1) * self.standard_error
            if self.probes > 1
            else (self.standard_error)
        )
        return self.log_prob - half, self.log_prob + half

    def bits_per_dim(self, width: float = 2.0 / 256) -> Tensor:
        """Bits a dimension, (batch,); see the function `bits_per_dim`."""
        return bits_per_dim(self.log_prob, self.latent[0].numel(), width)


def log_likelihood(
    predict: Prediction,
    x: Tensor,
    solver: Solver,
    *,
    divergence: Divergence = "exact",
    probes: int = 1,
    seed: int | Sequence[int] | Tensor = 0,
    start: float | None = None,
    stop: float | None = None,
    chart: Chart | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    gradients: bool = False,
    on_failure: str = "raise",
) -> Likelihood:
    """log p(x) in nats under the probability flow of a prediction: the density of x_t at t = start.

    Args:
        predict: any prediction.
        x: (batch, *event), floating; give float64 for errors below 1e-4 nats.
        solver: any ODE solver; it sees the generic equation of (z, integral) in the chart's clock.
        divergence: "exact" (d backward passes an evaluation), or Hutchinson's estimator tr J ≈ vᵀJv with "rademacher" or
            "gaussian" probes v, held fixed along the flow (one backward pass a probe).
        probes: number of probes a sample; from two on the standard error is known.
        seed: of the probes: an integer or one seed a sample.
        start, stop: the data and the noise end; default: the process's t_min and t_max.
        chart: coordinates to solve in; default `sf.chart_for` of the network. Its c is best about half the data's
            standard deviation or less: the density is made near the data end.
        prior: log-density of the state at `stop`, (batch, *event) → (batch,); default: the process's Gaussian prior, which
            ignores what is left of the data there (1e-3 to 2e-2 nats for VP).
        gradients: keep the graph, so that `log_prob` can be differentiated.
        on_failure: as in `solve`.

    An evaluation counts forward passes; the backward passes of the divergence come on top.

    Raises:
        InvalidInput: an argument cannot be used.
        SolveFailed: a sample did not reach the end.
    """
    _check(predict, x, divergence, probes)
    process = predict.process
    start = process.t_min if start is None else float(start)
    stop = process.t_max if stop is None else float(stop)
    if not start < stop:
        raise InvalidInput(
            f"start is the data end and stop the noise end, so start < stop; got start={start:g} and stop={stop:g}"
        )
    bound, d, batch = (chart or chart_for(predict, start, stop)).bind(process), x[0].numel(), x.shape[0]
    vectors = _probes(divergence, probes, seed, x)
    columns = 1 if vectors is None else probes

    def drift(u: Tensor, y: Tensor) -> Tensor:
        z = y[:, :d].reshape(-1, *x.shape[1:])
        rows = None if vectors is None else rows_of(vectors, z, "probes")
        value, trace = value_and_divergence(lambda z: bound.drift(predict, u, z), z, rows)
        return torch.cat([value.flatten(1), trace.to(y.dtype)], 1)

    y = torch.cat([bound.to_chart(start, x).flatten(1), x.new_zeros(batch, columns)], 1)
    solution = solve(
        _DensityFlow(drift, predict, bound.u(start).item(), bound.u(stop).item()),
        solver,
        y,
        gradients=gradients,
        on_failure=on_failure,
    )
    latent = bound.from_chart(stop, solution.x[:, :d].reshape(x.shape))
    scale = d * (bound.m(start).log() - bound.m(stop).log()).item()
    end = process.prior_log_prob(latent) if prior is None else prior(latent)
    if not isinstance(end, Tensor) or end.shape != (batch,):
        got = f"shape {tuple(end.shape)}" if isinstance(end, Tensor) else type(end).__name__
        raise InvalidInput(
            f"prior returned {got} for a latent of shape {tuple(latent.shape)}; it must return one number a sample, "
            f"({batch},): sum over the event, as in lambda z: normal.log_prob(z).flatten(1).sum(1)"
        )
    # what stopped on the way has a state and an integral, but no density
    end = torch.where(solution.success, end, math.nan)
    estimates = solution.x[:, d:]
    spread = estimates.std(1) / math.sqrt(columns) if columns > 1 else torch.full_like(end, math.nan)
    return Likelihood(
        log_prob=end + estimates.mean(1) + scale,
        standard_error=torch.zeros_like(end) if vectors is None else spread,
        latent=latent,
        solution=solution,
        probes=columns,
    )


class _DensityFlow(Equation):
    """The ODE of state and integral, which has the prediction's parameters and none of its structure."""

    def __init__(self, drift: Field, predict: Prediction, start: float, stop: float):
        super().__init__(drift, start=start, stop=stop)
        self._of = predict

    def parameters(self) -> tuple[Tensor, ...]:
        return self._of.parameters()


def value_and_divergence(
    function: Callable[[Tensor], Tensor], z: Tensor, vectors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(F(z), div F): shapes of z (batch, *event) and (batch, 1), or (batch, k) for probes (batch, k, *event).

    One forward pass of F, whose rows must not depend on each other; d backward passes without probes (vᵀJ for the unit
    vectors v, each row's own element summed), k with them (vᵀJv).
    """
    value, pull = pullback(function, z)
    d = z[0].numel()

    def one(v: Tensor) -> Tensor:
        v = v.expand_as(z)
        return (pull(v) * v).flatten(1).sum(1)

    stack = (
        torch.eye(d, dtype=z.dtype, device=z.device).reshape(d, 1, *z.shape[1:])
        if vectors is None
        else (vectors.movedim(1, 0))
    )
    at_once = max(1, CHUNK_ELEMENTS // z.numel())
    try:
        terms = torch.vmap(one, chunk_size=at_once)(stack)
    except RuntimeError:  # some backward passes have no batching rule, convolutions with group norm among them
        terms = torch.stack([one(v) for v in stack])
    return value, terms.sum(0)[:, None] if vectors is None else terms.T


def bits_per_dim(log_prob: Tensor, dim: int, width: float = 2.0 / 256) -> Tensor:
    """−log₂(p·width^d)/d: bits a dimension of data quantised in steps of `width`, their density smoothed within a step.

    Args:
        log_prob: log-density in nats, any shape.
        dim: d.
        width: spacing of the quantised values in the units of x; 2/256 for 8-bit pixels scaled to [−1, 1].
    """
    if not width > 0 or dim < 1:
        raise InvalidInput(f"bits_per_dim needs dim ≥ 1 and width > 0; got dim={dim}, width={width}")
    return -log_prob / (dim * math.log(2.0)) - math.log2(width)


def encode(
    predict: Prediction, x: Tensor, solver: Solver, *, start: float | None = None, stop: float | None = None, **options
) -> Solution:
    """Data to latent: the probability-flow ODE from the data end to the noise end (with `DDIM` as solver: DDIM inversion).

    Args:
        predict, x, solver: as in `solve`; x (batch, *event) at time `start`.
        start, stop: default: the process's t_min and t_max.
        options: further arguments of `solve`.
    """
    process = predict.process
    first, last = process.t_min if start is None else start, process.t_max if stop is None else stop
    return solve(ProbabilityFlowODE(predict), solver, x, start=first, stop=last, **options)


def decode(
    predict: Prediction, x: Tensor, solver: Solver, *, start: float | None = None, stop: float | None = None, **options
) -> Solution:
    """Latent to data: the probability-flow ODE from the noise end to the data end; undoes `encode` (same start and stop).

    Args:
        predict, x, solver: as in `solve`; x (batch, *event) at time `stop`.
        start, stop: the data end and the noise end, as in `encode`.
        options: further arguments of `solve`.
    """
    process = predict.process
    first, last = process.t_min if start is None else start, process.t_max if stop is None else stop
    return solve(ProbabilityFlowODE(predict), solver, x, start=last, stop=first, **options)


def student_quantile(p: float, freedom: int) -> float:
    """The p-quantile (p > ½) of Student's t with ν = freedom degrees, by quadrature.

    With T = √ν tan θ the density of θ is proportional to cos^{ν−1} θ on (−π/2, π/2).
    """
    theta = torch.linspace(0.0, 0.5 * math.pi, 20001, dtype=torch.float64)
    weight = theta.cos().clamp_min(0.0) ** (freedom - 1)
    mass = torch.cat([weight.new_zeros(1), torch.cumulative_trapezoid(weight, theta)])
    at = torch.searchsorted(mass, (2.0 * p - 1.0) * mass[-1]).clamp(1, theta.numel() - 1)
    low, high = mass[at - 1], mass[at]
    share = ((2.0 * p - 1.0) * mass[-1] - low) / (high - low)
    return float(math.sqrt(freedom) * (theta[at - 1] + share * (theta[at] - theta[at - 1])).tan())


def _probes(divergence: Divergence, probes: int, seed, x: Tensor) -> Tensor | None:
    if divergence == "exact":
        return None
    seeds, shape = sample_seeds(seed, x.shape[0], x.device), (probes, *x.shape[1:])
    if divergence == "gaussian":
        return standard_normal(seeds, shape, stream=PROBE_STREAM, dtype=x.dtype, device=x.device)
    u = uniform(seeds, shape, stream=PROBE_STREAM, dtype=torch.float64 if x.device.type != "mps" else x.dtype)
    return torch.where(u < 0.5, -1.0, 1.0).to(x.dtype)


def _check(predict: Prediction, x: Tensor, divergence: str, probes: int) -> None:
    if not isinstance(predict, Prediction):
        raise InvalidInput(
            f"log_likelihood needs a prediction; got {type(predict).__name__}. Write sf.log_likelihood("
            "sf.NoisePrediction(network, process), x, solver)"
        )
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not x.numel():
        raise InvalidInput(
            "x must be a floating tensor of shape (batch, *event) with at least one sample; write x[None]"
        )
    if divergence not in ("exact", "rademacher", "gaussian"):
        raise InvalidInput(f'divergence must be "exact", "rademacher" or "gaussian"; got {divergence!r}')
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise InvalidInput(f"probes must be a positive integer; got {probes!r}")
    if divergence == "exact" and probes != 1:
        raise InvalidInput('the exact divergence takes no probes; write divergence="rademacher", probes=16')
