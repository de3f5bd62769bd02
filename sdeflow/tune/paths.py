"""True paths of pilot samples, and what they say of a candidate without the network.

One tight solve gives D and ε̂ along true paths, so A D + S ε̂ is the true z in any chart. A candidate's defect (its quadrature error
on the true path) follows, and a linear recursion carries it to the end: with e_n = p_n − z(u_n) and W the weights,

    e_{n+1} = e_n + Σ_j W_nj J(u_j) e_j + Σ_j W_nj F(u_j) − (z(u_{n+1}) − z(u_n)),

J the Jacobian, taken as that of data with one scale (a denoiser known only through c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.charts import BoundChart, StraightLine
from sdeflow.equations import ReverseSDE
from sdeflow.grids import Nodes
from sdeflow.processes import Process
from sdeflow.solvers.fixed_adams import FixedAdams, adams_weights, integrals
from sdeflow.tune.candidates import PLAIN

LOCAL = 6
"""Points of the local interpolant of D and ε̂ along the tight solve."""


@dataclass(frozen=True)
class Paths:
    """Paths of n samples, as D and ε̂ on the nodes of a solve.

    Attributes:
        process, start, stop: of the solve.
        end: x at stop, (n, *event), float64.
        clock: u of the nodes in `StraightLine()`, decreasing, (M + 1,).
        data, noise: D and the ε̂ of the corrected state, (M + 1, n·d).
        scale: RMS over components of the standard deviation of the ends.
    """

    process: Process
    start: float
    stop: float
    end: Tensor
    clock: np.ndarray
    data: np.ndarray
    noise: np.ndarray
    scale: float

    @classmethod
    def along(cls, equation: ReverseSDE, x: Tensor, calls: int) -> Paths:
        """Adams PEC of order 5 with `calls` evaluations from x, keeping D and ε̂ everywhere, in float64."""
        process, predict = equation.process, equation.predict
        assert process is not None and predict is not None
        start, stop = float(process.t_max), float(process.t_min)
        t = PLAIN.times(process, start, stop, calls - 1, 1.0)
        chart = StraightLine().bind(process)
        u = chart.u(t).numpy()
        dA, dS = (c.tolist() for c in chart.drift_weights(chart.u(t)))
        alpha, sigma, m = process.alpha(t).tolist(), process.sigma(t).tolist(), chart.m(t).tolist()
        predictor, corrector = integrals(u, 5, 0), integrals(u, 5, 1)
        z = p = x.double() * m[0]
        slopes: list[Tensor] = []
        data: list[Tensor] = []
        noise: list[Tensor] = []
        for n in range(calls):
            D, eps = (v.double() for v in predict.pair((p / m[n]).to(x.dtype), t[n]))
            slopes.append(dA[n] * D + dS[n] * eps)
            if n:
                z = z + _weighted(corrector[n - 1], slopes)
            data.append(D)
            noise.append((z / m[n] - alpha[n] * D) / sigma[n])
            if n < calls - 1:
                p = z + _weighted(predictor[n], slopes)
        end = z / m[-1]
        scale = end.flatten(1).std(0).square().mean().sqrt().item()
        flat = [torch.stack(v).flatten(1).cpu().numpy() for v in (data, noise)]
        return cls(process, start, stop, end, u, flat[0], flat[1], max(scale, 1e-6))

    def at(self, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """D and ε̂ at times t, (t, n·d) each, by local Lagrange interpolation in the clock."""
        u = StraightLine().bind(self.process).u(t).numpy()
        first = np.searchsorted(-self.clock, -u) - LOCAL // 2
        at = np.clip(first, 0, self.clock.size - LOCAL)[:, None] + np.arange(LOCAL)
        nodes = self.clock[at]
        away = np.where(np.eye(LOCAL, dtype=bool), 1.0, nodes[:, :, None] - nodes[:, None, :])
        from_u = np.where(np.eye(LOCAL, dtype=bool), 1.0, u[:, None, None] - nodes[:, None, :])
        weight = (from_u / away).prod(2)
        return tuple(np.einsum("nk,nkf->nf", weight, values[at]) for values in (self.data, self.noise))

    def states(self, chart: BoundChart, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """z and D at times t, (t, n, d) each."""
        D, eps = self.at(t)
        A, S, _, _ = (c.numpy()[:, None] for c in chart.coefficients(chart.u(t)))
        shape = (t.numel(), len(self.end), -1)
        return (A * D + S * eps).reshape(shape), D.reshape(shape)

    def model(self, solver: FixedAdams, rows: int) -> float:
        """Mean over the first `rows` samples of the RMS end-point error of the solver, by the recursion above."""
        assert isinstance(solver.grid, Nodes) and isinstance(solver.chart, StraightLine)
        assert solver.corrector is not None
        t = torch.tensor(solver.grid.values, dtype=torch.float64)
        D, eps = (v[:, : v.shape[1] // len(self.end) * rows] for v in self.at(t))
        chart = solver.chart.bind(self.process)
        u = chart.u(t)
        A, S, dA, dS = (c.numpy()[:, None] for c in chart.coefficients(u))
        W = adams_weights(u.numpy(), solver.order, solver.corrector)
        defect = W @ (dA * D + dS * eps)[:-1] - np.diff(A * D + S * eps, axis=0)
        v = u.numpy()[:-1]
        coupled = np.tril(W) * ((2.0 * v - 1.0) / ((1.0 - v) ** 2 + v**2))
        steps = len(W)
        # unknowns e_1 … e_N; e_0 = 0
        system = np.eye(steps) - np.eye(steps, k=-1)
        system[:, :-1] -= coupled[:, 1:]
        end = np.linalg.solve(system, defect)[-1] / chart.m(t[-1]).item()
        return float(np.sqrt(np.square(end.reshape(rows, -1)).mean(1)).mean())


def _weighted(row: np.ndarray, slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for j in np.flatnonzero(row):
        total = total.add(slopes[j], alpha=float(row[j]))
    return total
