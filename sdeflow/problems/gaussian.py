"""One Gaussian: every linear equation on it has a closed form, so solvers can be measured without Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.problems.problem import Problem, flatten
from sdeflow.processes import Process, Time, as_time


@dataclass(frozen=True, eq=False, repr=False)
class GaussianProblem(Problem):
    """Data N(m, C). In the axes of C everything decouples into numbers: v the variances of the data, V = α²v + σ² those of x_t."""

    def flow(self, x: Tensor, process: Process, start: Time, stop: Time) -> Tensor:
        """The exact probability-flow map: x at time start to time stop, either way, shape and dtype of x.

        x_stop = α_e m + (V_e/V_s)^½ (x − α_s m), from dV/dt = 2fV + g² and dy/dt = (V̇/2V) y for y = x − αm.
        """
        flat = flatten(x, self.dim, self.name)
        (a_s, _, V_s), (a_e, _, V_e) = self._axes(process, start, x), self._axes(process, stop, x)
        m, E = self._mean_and_axes(x)
        y = (flat.to(m.dtype) - a_s * m) @ E * (V_e / V_s).sqrt()
        return (a_e * m + y @ E.T).reshape(x.shape).to(x.dtype)

    def reverse_moments(
        self,
        process: Process,
        eta: float = 1.0,
        start: float | None = None,
        stop: float | None = None,
        mean: Tensor | None = None,
        cov: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Exact mean (d,) and covariance (d, d), float64, at stop of dx = [f x − ½(1+η²) g² s] dt + η g dw̄ begun at start.

        With y = x − αm the exact score makes it dy = [f + ½(1+η²) g²/V] y dt + η g dw̄. From V̇ = 2fV + g² the transition is
        Φ = (V_e/V_s)^{(1+η²)/2} (α_s/α_e)^{η²}, and V itself solves the variance equation Ṗ = 2[f + ½(1+η²)g²/V]P − η²g², so
            E y_e = Φ E y_s,   P_e − V_e = Φ (P_s − V_s) Φ.

        Args:
            eta: η ≥ 0; 0 is the probability-flow ODE.
            start, stop: default t_max and t_min.
            mean, cov: moments at start; default those of `process.prior`, N(0, σ(t_max)² I), which are not quite those of x_t there. Pass
                `*problem.moments(process, start)` to begin at the exact marginal: the result is then the marginal at stop.
        """
        if not eta >= 0:
            raise InvalidInput(f"eta must be ≥ 0; got {eta}")
        start = process.t_max if start is None else float(start)
        stop = process.t_min if stop is None else float(stop)
        if eta > 0 and stop > start:
            raise InvalidInput(
                f"the reverse SDE runs from noise to data; got start={start} < stop={stop}. Write start={stop}, stop={start}"
            )
        x = torch.zeros(1, self.dim, dtype=torch.float64)
        (a_s, s_s, V_s), (a_e, _, V_e) = self._axes(process, start, x), self._axes(process, stop, x)
        m, E = self._mean_and_axes(x)
        mean_s = torch.zeros_like(m) if mean is None else mean.to(m.dtype)
        cov_s = s_s**2 * torch.eye(self.dim, dtype=m.dtype) if cov is None else cov.to(m.dtype)
        shrink = torch.ones_like(a_s) if start == stop else (a_s / a_e) ** (eta**2)
        phi = (V_e / V_s) ** (0.5 * (1.0 + eta**2)) * shrink
        y = phi * ((mean_s - a_s * m) @ E)
        P = torch.diag(V_e) + phi[:, None] * (E.T @ cov_s @ E - torch.diag(V_s)) * phi
        return a_e * m + E @ y, E @ P @ E.T

    def _axes(self, process: Process, t: Time, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = as_time(t, x.device)
        alpha, sigma = process.alpha(t), process.sigma(t)
        v = self.mixture.variances[0].expand(self.dim).to(x.device, alpha.dtype)
        return alpha, sigma, alpha**2 * v + sigma**2

    def _mean_and_axes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = as_time(0.0, x.device).dtype
        axes = torch.eye(self.dim, dtype=torch.float64) if self.mixture.axes is None else self.mixture.axes[0]
        return self.mixture.means[0].to(x.device, dtype), axes.to(x.device, dtype)
