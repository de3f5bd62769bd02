"""True paths of pilot samples: one tight solve, D and ε̂ along it, and from them x at any time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.charts import StraightLine, chart_for
from sdeflow.equations import ReverseSDE
from sdeflow.processes import Process, as_time
from sdeflow.solvers.fixed_adams import integrals
from sdeflow.tune.candidates import PLAIN

LOCAL = 6
"""Points of the local interpolant of D and ε̂ along the tight solve."""


@dataclass(frozen=True)
class Paths:
    """Paths of n samples, as D and ε̂ on the nodes of a solve, in d of their components.

    Attributes:
        process, start, stop: of the solve.
        end: x at stop, (n, d), float64.
        chart: that of the solve.
        clock: u of the nodes in it, decreasing, (M + 1,).
        data, noise: D and the ε̂ of the corrected state, (M + 1, n·d).
        scale: RMS over components of the standard deviation of the ends.
    """

    process: Process
    start: float
    stop: float
    end: np.ndarray
    chart: StraightLine
    clock: np.ndarray
    data: np.ndarray
    noise: np.ndarray
    scale: float

    @classmethod
    def along(cls, equation: ReverseSDE, x: Tensor, calls: int, kept: Tensor) -> Paths:
        """Adams PEC of order 5 with `calls` evaluations from x, keeping D and ε̂ everywhere, in float64.

        Args:
            kept: components to keep, indices (d,) into the flattened event.
        """
        process, predict = equation.process, equation.predict
        assert process is not None and predict is not None
        start, stop = float(process.t_max), float(process.t_min)
        t = PLAIN.times(process, start, stop, calls - 1, 1.0)
        line = chart_for(predict, start, stop)
        chart = line.bind(process)
        u = chart.u(t).numpy()
        dA, dS = (c.tolist() for c in chart.drift_weights(chart.u(t)))
        alpha, sigma, m = process.alpha(t).tolist(), process.sigma(t).tolist(), chart.m(t).tolist()
        predictor, corrector = integrals(u, 5, 0), integrals(u, 5, 1)
        z = p = wide(x) * m[0]
        slopes: list[Tensor] = []
        data: list[np.ndarray] = []
        noise: list[np.ndarray] = []
        for n in range(calls):
            D, eps = (wide(v) for v in predict.pair((p / m[n]).to(x.dtype), t[n]))
            slopes.append(dA[n] * D + dS[n] * eps)
            if n:
                z = z + _weighted(corrector[n - 1], slopes)
            data.append(chosen(D, kept))
            noise.append(chosen((z / m[n] - alpha[n] * D) / sigma[n], kept))
            if n < calls - 1:
                p = z + _weighted(predictor[n], slopes)
            if n >= 5:
                slopes[n - 5] = slopes[n][:0]  # no weight reaches it any more
        end = chosen(z / m[-1], kept)
        scale = float(np.sqrt(end.var(0, ddof=1).mean()))
        flat = [np.stack(v).reshape(calls, -1) for v in (data, noise)]
        return cls(process, start, stop, end, line, u, flat[0], flat[1], scale if scale > 1e-6 else 1e-6)

    def at(self, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """D and ε̂ at times t, (t, n, d) each, by local Lagrange interpolation in the clock."""
        u = self.chart.bind(self.process).u(t).numpy()
        first = np.searchsorted(-self.clock, -u) - LOCAL // 2
        at = np.clip(first, 0, self.clock.size - LOCAL)[:, None] + np.arange(LOCAL)
        nodes = self.clock[at]
        away = np.where(np.eye(LOCAL, dtype=bool), 1.0, nodes[:, :, None] - nodes[:, None, :])
        from_u = np.where(np.eye(LOCAL, dtype=bool), 1.0, u[:, None, None] - nodes[:, None, :])
        weight = (from_u / away).prod(2)
        shape = (t.numel(), *self.end.shape)
        return tuple(np.einsum("nk,nkf->nf", weight, values[at]).reshape(shape) for values in (self.data, self.noise))

    def states(self, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """x and D at times t, (t, n, d) each."""
        D, eps = self.at(t)
        alpha, sigma = (c.numpy()[:, None, None] for c in (self.process.alpha(t), self.process.sigma(t)))
        return alpha * D + sigma * eps, D


def wide(x: Tensor) -> Tensor:
    """x in float64, or float32 on devices that have no float64."""
    return as_time(x)


def chosen(x: Tensor, kept: Tensor) -> np.ndarray:
    """Components `kept` of every sample, (n, d) float64 on the host."""
    return x.flatten(1)[:, kept].cpu().double().numpy()


def _weighted(row: np.ndarray, slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[-1])
    for j in np.flatnonzero(row):
        total = total.add(slopes[j], alpha=float(row[j]))
    return total
