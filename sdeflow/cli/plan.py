"""What `sdeflow compare` measures: every solver at every effort, as runs of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from sdeflow.cli.strings import Spec, read_solver
from sdeflow.equations import Equation, ProbabilityFlowODE, ReverseSDE
from sdeflow.errors import InvalidInput
from sdeflow.measure import Truth, measure, prepare, run_key
from sdeflow.problems import Problem
from sdeflow.processes import Process
from sdeflow.report import EFFORT
from sdeflow.solvers.base import Solver
from sdeflow.sweep import Run

NOISE = {"ode": "none", "sde": "additive"}
"""The noise of the two kinds of equation that are compared."""


@dataclass(frozen=True)
class Efforts:
    """The efforts to try where a solver string gives none.

    Attributes:
        tolerances: rtol = atol, for methods that choose their steps.
        steps: for methods on a fixed grid.
    """

    tolerances: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    steps: Sequence[int] = (5, 10, 20, 40, 80)


def spread(spec: Spec, efforts: Efforts) -> list[Solver]:
    """The solvers of one string: itself if it says how hard to work, else one for each tolerance or number of steps.

    Raises:
        InvalidInput: the solver takes neither steps nor tolerances.
    """
    if any(name in (spec.settings or {}) for name in EFFORT):
        return [spec.build()]
    try:
        spec.build(steps=efforts.steps[0])
    except InvalidInput as refused:
        try:
            return [spec.build(rtol=tolerance, atol=tolerance) for tolerance in efforts.tolerances]
        except InvalidInput:
            raise refused from None
    return [spec.build(steps=steps) for steps in efforts.steps]


def choose(texts: Sequence[str], kind: str, efforts: Efforts) -> list[Solver]:
    """The solvers of several strings that can solve an equation of a kind, "ode" or "sde".

    Raises:
        InvalidInput: a string names no solver, or settings the solver refuses.
    """
    specs = [spec for spec in (read_solver(text, kind) for text in texts) if spec is not None]
    return [solver for spec in specs for solver in spread(spec, efforts) if NOISE[kind] in solver.facts.noise]


@dataclass(frozen=True)
class Comparison:
    """One problem and process under one equation, with what every run of it shares.

    Attributes:
        problem, process: the truth.
        kind: "ode" for the probability-flow ODE, "sde" for the reverse SDE.
        eta: η of the reverse SDE.
        samples, seed, dtype: of every run.
        announce: told in words what is being done when it is not a run: making the reference.
    """

    problem: Problem
    process: Process
    kind: str
    eta: float = 1.0
    samples: int = 256
    seed: int = 0
    dtype: torch.dtype = torch.float64
    announce: Callable[[str], None] = field(default=lambda text: None, compare=False)

    @cached_property
    def equation(self) -> Equation:
        """The equation, with the problem's exact network."""
        predict = self.problem.prediction(self.process)
        return ProbabilityFlowODE(predict) if self.kind == "ode" else ReverseSDE(predict, eta=self.eta)

    @cached_property
    def truth(self) -> Truth:
        """Start states and what the ends are compared with: made when the first run needs it."""
        self.announce("solving the reference" if self.kind == "ode" else "drawing exact samples")
        return prepare(self.problem, self.process, self.equation, self.samples, self.seed, dtype=self.dtype)

    def run(self, solver: Solver) -> Run:
        """The run of one solver."""
        equation, shared = self.equation, (self.samples, self.seed)
        assert equation.start is not None
        assert equation.stop is not None
        initial = "marginal" if equation.stochastic else "prior"
        return Run(
            run_key(self.problem, equation, solver, *shared, equation.start, equation.stop, initial, self.dtype, "cpu"),
            lambda: measure(
                self.problem,
                self.process,
                equation,
                solver,
                *shared,
                initial=initial,
                dtype=self.dtype,
                truth=self.truth,
            ),
        )
