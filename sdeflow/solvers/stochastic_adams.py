"""Exponential Adams for reverse SDEs, made for the law at the end: few evaluations to small errors of variances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, Multiscale
from sdeflow.solvers.base import Facts, Task
from sdeflow.solvers.exponential import Multistep
from sdeflow.solvers.exponential_steps import LOOK, Scheme
from sdeflow.solvers.exponential_weights import Array, Strength

FINEST, REACH = (0.004, 0.03), 0.13
"""The smallest scale n steps look after is REACH/n, between these: for n = 6 those under 0.02 cost the others, for n = 20 they are to be had."""
COARSEST = 2.0, 50.0
"""The largest scale, that of the data, or where an error of ε̂ of some hundredths hides D: with D = (x − σε̂)/α off by δσ/α, from σ/α = 1/δ."""
RESOLVED, UNRESOLVED = 0.4, 0.8
"""Steps in λ up to which a transition of the data (10 to 90 % of it take 2.2 in λ) is told by all nodes, and from which by two."""


def resolved(h: Array) -> Array:
    """How much of the higher order is taken at steps h of the clock: 1 where they are short, 0 where they are long."""
    return np.clip((UNRESOLVED - h) / (UNRESOLVED - RESOLVED), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class StochasticAdams(Multistep):
    """Adams for `ReverseSDE(predict, eta)`, any η: predictor and corrector on D, exact integrals, noise looked ahead.

        x_{n+1} = (σ_t/σ_s) e^{−η²h} x_n + (1+η²) σ_t e^{−η²λ_t} ∫ e^{(1+η²)λ} P(u) dλ + σ_t √(1−e^{−2η²h}) z_n

    with P the polynomial through the last D in the clock u of `Multiscale(low, high)`; the corrector integrates again with the new D,
    at the same noise and no further call, as SA-Solver does (Xue et al. 2023). What is new is where D is asked for: at a point of
    x_n's law whose share of the last noise is smaller by a, and which has as much of the noise to come. That takes out the
    h² term which the noise in the history leaves in the variance: weak order 3 on linear equations at one evaluation a step. What is left
    at long steps is taken out by fitting: two nodes predict and one corrects where steps are too long for more, and how far the predictor
    extrapolates is chosen, when the steps are planned, so that Gaussian data of every scale from low to high end with the right variance.
    On the flow (η = 0) the same fit makes what such data are multiplied by right.

    Args:
        predictor: nodes of the predictor, 1 … 4.
        corrector: old nodes of the corrector, 0 … 4 (beside the new one); 0 for none.
        look_ahead: ask for D there; False is the same method with D at x_n.
        fitted: do the two things just said; False has as many nodes in every step as asked for, and plain polynomials.
        low, high: scales of the data between which steps are even in λ, see `Multiscale`; they set u and the default grid, and
            what is fitted. low None is 0.13/steps, from 0.004 to 0.03: fewer steps do not reach down as far. high None is 2, and for networks
            that predict the noise or the score σ/α at the start, up to 50: what they say of the data is off by that many times their error.
        steps: number of steps, which is the number of evaluations.
        grid: another rule for placing them, or the times themselves.

    On the flow there is no noise, and the order is min(predictor, corrector) + 1; beyond three nodes with `own_start`, whose Runge–Kutta
    steps are of another kind, nothing is fitted there.
    """

    predictor: int = 3
    corrector: int = 2
    look_ahead: bool = True
    fitted: bool = True
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.predictor, bool) or self.predictor not in range(1, 5):
            raise InvalidInput(f"StochasticAdams needs 1 ≤ predictor ≤ 4; got {self.predictor!r}")
        if isinstance(self.corrector, bool) or self.corrector not in range(5):
            raise InvalidInput(f"StochasticAdams needs 0 ≤ corrector ≤ 4; got {self.corrector!r}")
        self._between(2.0)

    def _between(self, high: float) -> Multiscale:
        """The clock and default grid, up to `high` where no other scale was asked for; refuses scales that make none."""
        assert self.steps is not None
        low = min(max(REACH / self.steps, FINEST[0]), FINEST[1]) if self.low is None else self.low
        return Multiscale(low, high if self.high is None else self.high)

    def _multiscale(self, task: Task) -> Multiscale:
        """That of a task: the error of a network's noise is like data of a large scale."""
        assert task.equation.predict is not None
        cancelled = max(task.equation.predict.cancelled(t).item() for t in (task.start, task.stop))
        return self._between(min(max(COARSEST[0], cancelled), COARSEST[1]))

    @property
    def facts(self) -> Facts:
        order = min(self.predictor, self.corrector) + 1 if self.corrector else self.predictor
        nodes = "" if (self.predictor, self.corrector) == (3, 2) else f" P{self.predictor}C{self.corrector}"
        return Facts(
            f"Stochastic Adams{nodes}{'' if self.look_ahead else ', not looking ahead'}",
            order, 1, min(order, 2), 1, False, ("none", "additive"), "diffusion", "here, after Xue et al. 2023",
        )  # fmt: skip

    def rule(self, task: Task) -> Grid:
        return self._multiscale(task)

    def scheme(self, task: Task) -> Scheme:
        grid, law = self._multiscale(task), Strength.constant(task.equation.eta)

        def clock(lam: Array) -> Array:
            return grid.clock(torch.from_numpy(np.ascontiguousarray(lam))).numpy()

        return Scheme(
            "data", self.predictor, self.corrector, clock, None, lambda s, t: law, self.own_start,
            self.lower_order_final, LOOK if self.look_ahead else 0.0,
            resolved if self.fitted and self.predictor > 2 else None, (grid.low, grid.high) if self.fitted else None,
        )  # fmt: skip
