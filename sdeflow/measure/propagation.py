"""Exact moments of what a solver returns: on Gaussian data every fixed-grid method is an affine map of its start and its noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdeflow.brownian import BrownianPath, Time
from sdeflow.counting import Counter, counting
from sdeflow.equations import Equation
from sdeflow.errors import InvalidInput
from sdeflow.random import sample_seeds, standard_normal
from sdeflow.solution import Status
from sdeflow.solve import solve
from sdeflow.solvers.base import Facts, Outcome, Solver, Task
from sdeflow.solvers.linear import LinearMethod

TRIAL_STREAM = 104
"""Random stream of the trial that checks the map to be affine."""


@dataclass(frozen=True)
class Moments:
    """The law a solver produces, exactly.

    Attributes:
        mean: float64 (d,).
        cov: float64 (d, d).
        evaluations: network evaluations a sample.
    """

    mean: Tensor
    cov: Tensor
    evaluations: int

    def variance_errors(self, exact: Tensor) -> Tensor:
        """(eᵢᵀ C eᵢ)/vᵢ − 1, float64 (d,): relative errors of the variance along the axes eᵢ of the exact covariance (d, d),
        whose variances vᵢ are in ascending order."""
        v, axes = torch.linalg.eigh(exact.double())
        return (axes * (self.cov @ axes)).sum(0) / v - 1.0

    def variance_error(self, exact: Tensor) -> float:
        """Their root mean square."""
        return self.variance_errors(exact).square().mean().sqrt().item()


def exact_moments(
    equation: Equation,
    solver: Solver,
    mean: Tensor,
    cov: Tensor,
    start: float | None = None,
    stop: float | None = None,
) -> Moments:
    """Mean and covariance at `stop` of a solver begun with N(mean, cov), exact to rounding: no Monte Carlo.

    On an affine equation a fixed-grid solver returns x = m + M₀ z₀ + Σ_k M_k z_k with independent standard normal z of d elements. The solver
    itself is run on unit vectors in place of them, one sample each, which gives the columns of every M; then cov = Σ_k M_k M_kᵀ. One
    sample more, with all z at random, checks that the map is affine.

    Args:
        equation: one whose drift is affine in x: a diffusion equation on a `GaussianProblem`, an Ornstein–Uhlenbeck equation, ….
        solver: any with steps fixed beforehand that draws its noise from the solve's seeds or path; every solver here does.
        mean, cov: (d,) and (d, d) at `start`.

    Raises:
        InvalidInput: the equation is not affine, or the solver chooses its steps or makes its noise in another way.

    Example:
        >>> law = exact_moments(equation, sf.SASolver(steps=20), *problem.moments(process, process.t_max))
        >>> law.variance_error(problem.moments(process, process.t_min)[1])
    """
    if solver.facts.adaptive:
        raise InvalidInput(
            f"{solver.facts.name} chooses its steps by what it sees, so its map is not affine; give it steps="
        )
    mean, cov = mean.double().cpu(), cov.double().cpu()
    runner = _Columns(solver, cov)
    path = BrownianPath([0], (mean.numel(),), torch.float64) if equation.stochastic else None
    run = solve(equation, runner, mean[None], start, stop, path=path)
    x, M = runner.columns[0], runner.columns[1:] - runner.columns[0]
    trial = x + runner.trial @ M
    if not torch.allclose(run.x[0], trial, rtol=1e-7, atol=1e-9 * float(M.abs().max() + x.abs().max())):
        gap = float((run.x[0] - trial).abs().max())
        raise InvalidInput(
            f"{solver.facts.name} on {equation!r} is not an affine map of its start and noise (a random trial is {gap:.1e} off); "
            "exact moments need Gaussian data, e.g. sf.problems.gaussian(), and a solver whose noise comes from the solve's seeds"
        )
    return Moments(x, M.T @ M, runner.evaluations)


class _Columns(Solver):
    """Runs a solver on unit vectors: row 0 is the mean, rows 1 … d the start's, then d of each normal, and the trial last."""

    def __init__(self, solver: Solver, cov: Tensor):
        self.solver = solver
        values, axes = torch.linalg.eigh(cov)
        self.root = (axes * values.clamp_min(0.0).sqrt()).T

    @property
    def facts(self) -> Facts:
        return self.solver.facts

    def check(self, task: Task) -> None:
        self.solver.check(task)

    def integrate(self, task: Task) -> Outcome:
        d = task.x.shape[1]
        names = list(self._run(task, _Units(d)).names)  # finds out what is drawn
        rows = 1 + d * (1 + len(names))
        trial = standard_normal(sample_seeds(0, 1), (rows - 1,), stream=TRIAL_STREAM, dtype=torch.float64)[0]
        x = task.x.expand(rows + 1, d).clone()
        x[1 : d + 1] += self.root
        x[rows] += trial[:d] @ self.root
        self._run(replace(task, x=x), _Units(d, names, trial[d:]))
        self.columns, self.trial = self.end[:rows], trial
        task.counter.record(1)
        constant = task.constant
        return Outcome(self.end[rows:], constant(Status.SUCCESS), constant(1), constant(0))

    def _run(self, task: Task, units: _Units) -> _Units:
        counter, solver = Counter(task.batch, task.x.device), self.solver
        with counting(counter):
            task = replace(task, counter=counter)
            if isinstance(solver, LinearMethod):
                times = solver.times(task)
                plan, x = solver.init(task, times), task.x
                plan.normals = units
                for n in range(solver.total(plan, times)):
                    x, plan = solver.step(task, plan, n, x)
                self.end = x
            else:
                path = _UnitPath(units, task.batch) if task.equation.stochastic else None
                self.end = solver.integrate(replace(task, path=path)).x
        self.evaluations = int(counter.evaluations[0])
        return units


class _Units:
    """Named normals: z_name is the unit matrix in d rows of its own, the trial's numbers in the last row, 0 elsewhere.

    Without names they are all 0, and the names asked for are collected.
    """

    def __init__(self, d: int, names: Sequence[Any] = (), trial: Tensor | None = None):
        self.d, self.trial, self.names = d, trial, {name: k for k, name in enumerate(names)}

    def __call__(self, name: Any) -> Tensor:
        d, k = self.d, self.names.setdefault(name, len(self.names))
        if self.trial is None:
            return torch.zeros(1, d, dtype=torch.float64)
        z = torch.zeros(2 + d + self.trial.numel(), d, dtype=torch.float64)
        z[1 + d * (k + 1) : 1 + d * (k + 2)] = torch.eye(d, dtype=torch.float64)
        z[-1] = self.trial[d * k : d * (k + 1)]
        return z


class _UnitPath(BrownianPath):
    """A path whose W and H over every interval asked for are such normals; the intervals must not overlap."""

    def __init__(self, units: _Units, batch: int):
        super().__init__([0] * batch, (units.d,), torch.float64)
        self._units = units

    def increment(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        a, b = float(s), float(t)
        low, high = min(a, b), max(a, b)
        for left, right, _ in self._units.names:
            if left < high and low < right and (left, right) != (low, high):
                raise InvalidInput(
                    f"the solver asks for the path over [{low:g}, {high:g}] and over [{left:g}, {right:g}], which overlap; exact moments "
                    "need a solver whose steps follow one another"
                )
        W, H = self._units((low, high, "W")), self._units((low, high, "H"))
        return W * math.copysign(math.sqrt(high - low), b - a), H * math.sqrt((high - low) / 12.0)

    def increments(self, grid: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
        pairs = itertools.pairwise(torch.as_tensor(grid).tolist())
        W, H = zip(*(self.increment(s, t) for s, t in pairs), strict=True)
        return torch.stack(W), torch.stack(H)
