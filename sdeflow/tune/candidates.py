"""What `tune` chooses among: grid densities in λ, charts, orders and correctors of `FixedAdams`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sdeflow.charts import StraightLine
from sdeflow.grids import Nodes
from sdeflow.processes import Process
from sdeflow.solvers.fixed_adams import FixedAdams

UNFITTED = 99
"""`exact` of candidates that keep Adams's own weights: no row has so many nodes."""


@dataclass(frozen=True)
class Candidate:
    """Order, corrector and chart StraightLine(c s) of Adams; grid; and the degree below which fitted weights stay exact.

    Grid density a + exp(−½((λ + log s − μ)/w)²) in λ, above log s + λ = −log k.

    s is the scale of the data, so that a candidate means the same on data of any scale.
    """

    order: int
    corrector: int
    log_c: float
    log_a: float
    mu: float
    log_w: float
    log_k: float
    exact: int = 1

    def times(self, process: Process, start: float, stop: float, steps: int, scale: float) -> Tensor:
        """(steps + 1,) node times from start to stop, float64.

        Where the noise is k times the data and more, D hardly moves: that stretch belongs to the first step.
        """
        shift = math.log(scale)
        low = max(process.half_log_snr(start).item(), -self.log_k - shift)
        lam = np.linspace(low, process.half_log_snr(stop).item(), 2001)
        density = math.exp(self.log_a) + np.exp(-0.5 * ((lam + shift - self.mu) / math.exp(self.log_w)) ** 2)
        share = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
        inner = np.interp(np.linspace(0.0, share[-1], steps + 1), share, lam)
        nodes = process.time(torch.from_numpy(inner)).clone()
        nodes[0], nodes[-1] = start, stop
        return nodes

    def solver(self, process: Process, start: float, stop: float, steps: int, scale: float) -> FixedAdams:
        """The solver this candidate is."""
        times = self.times(process, start, stop, steps, scale)
        chart = StraightLine(c=scale * math.exp(self.log_c))
        return FixedAdams(order=self.order, corrector=self.corrector, chart=chart, grid=Nodes(times))

    def moved(self, rng: np.random.Generator, spread: float) -> Candidate:
        """A neighbour: continuous settings by normals of this spread, now and then another order or corrector."""
        order = self.order
        if rng.random() < 0.2:
            order = int(np.clip(order + rng.choice([-1, 1]), 1, 6))
        c, a, mu, w, k = spread * rng.standard_normal(5)
        return replace(
            self,
            order=order,
            corrector=self.corrector if order == self.order else max(2, _corrector(rng, order)),
            log_c=self.log_c + 0.5 * c,
            log_a=self.log_a + a,
            mu=self.mu + mu,
            log_w=self.log_w + 0.5 * w,
            log_k=self.log_k + k,
            exact=_exact(rng) if rng.random() < 0.2 else self.exact,
        )


PLAIN = Candidate(5, 5, 0.0, math.log(0.3), 0.5, math.log(2.0), math.log(1e5))
"""A grid that serves any data: for the solves that precede the search."""


def draw(rng: np.random.Generator) -> Candidate:
    """A candidate at random."""
    order = int(rng.integers(2, 6))
    return Candidate(
        order,
        _corrector(rng, order),
        rng.uniform(math.log(0.4), math.log(2.0)),
        rng.uniform(math.log(0.02), math.log(2.0)),
        rng.uniform(-2.0, 3.0),
        rng.uniform(math.log(0.6), math.log(3.5)),
        rng.uniform(math.log(10.0), math.log(300.0)),
        _exact(rng),
    )


def _exact(rng: np.random.Generator) -> int:
    return int(rng.choice([1, 1, 2, 3, 4, 5, UNFITTED]))


def _corrector(rng: np.random.Generator, order: int) -> int:
    return 0 if rng.random() < 0.15 else order + int(rng.integers(0, 2))
