"""Spend a fixed budget best: choose order, corrector, chart and grid of an Adams solver for one network.

One tight solve of a few pilot samples gives true paths; a linear model of the error (paths.py) ranks hundreds of candidates on
them without the network. The best are run on the pilot and refined by a local search. What is minimised is the expected mean square
end-point error of *other* samples: the pilot's own error, and the flips that it is too small to meet (borders.py). No exact
score is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.counting import Counter, counting
from sdeflow.equations import Equation, ReverseSDE
from sdeflow.errors import InvalidInput
from sdeflow.grids import Nodes
from sdeflow.solve import solve
from sdeflow.solvers.fixed_adams import FixedAdams
from sdeflow.tune import borders
from sdeflow.tune.borders import Borders
from sdeflow.tune.candidates import Candidate, draw
from sdeflow.tune.paths import Paths

MOST_PILOTS = 32
MOST_SOLVES, TIGHT, RUNS = 100, 20, 66
"""Full solves' worth of evaluations a pilot sample may spend; on the tight solve; candidates run at most."""
SHORT = (18, 60)
"""Evaluations of the solves that look for borders: three budgets, between these."""
BESIDE = 30
"""Fewest evaluations of the solves beside a border."""
MODELLED = 400
"""Candidates the model ranks."""


@dataclass(frozen=True)
class Tuning:
    """What `search` found.

    Attributes:
        solver: the tuned solver.
        pilot_error: RMS end-point error of the pilot samples against the tight solve.
        flip_error: RMS error expected of samples that flip to another mode; 0 where no borders were looked for.
        evaluations: network evaluations each pilot sample cost.
        candidates: candidates run on the pilot: (solver, expected RMS error), best first.
    """

    solver: FixedAdams
    pilot_error: float
    flip_error: float
    evaluations: int
    candidates: tuple[tuple[FixedAdams, float], ...]


def tune(
    equation: Equation,
    budget: int,
    pilot: Tensor,
    seed: int = 0,
    progress: bool | Callable[[float], None] = False,
) -> FixedAdams:
    """A fixed-grid Adams solver of `budget` evaluations a sample, chosen for this network.

    Args:
        equation: a `ProbabilityFlowODE`.
        budget: evaluations a sample of the solver, ≥ 2.
        pilot: start states of the pilot samples (n, *event) at t_max, e.g. `process.prior((32, *event), seed=...)`; at most 32 are used.
            Use other seeds for what you generate, or the pilot's error flatters. From 8 pilots and 5 evaluations on, a quarter
            of the rows serves to measure flips; see `sdeflow.tune.borders`.
        seed: of the search's own random numbers.
        progress: True for a line on stderr, or a function of the fraction done.

    Returns:
        A `FixedAdams` with its own times, for any number of samples; `solver.save(path)`, `FixedAdams.load(path)`.

    The search costs each pilot sample at most 100·budget evaluations. See `search` for the pilot's error and the cost.

    Raises:
        InvalidInput: the equation is no probability-flow ODE, or budget or pilot cannot be used.
    """
    return search(equation, budget, pilot, seed, progress).solver


def search(
    equation: Equation,
    budget: int,
    pilot: Tensor,
    seed: int = 0,
    progress: bool | Callable[[float], None] = False,
) -> Tuning:
    """`tune`, with what was tried, what it cost and the pilot's error. Arguments as there."""
    equation = _checked(equation, budget, pilot)
    report = progress if callable(progress) else (_line if progress else (lambda fraction: None))
    counter = Counter(min(len(pilot), MOST_PILOTS), pilot.device)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        trial = _Trial.prepared(equation, budget, pilot[:MOST_PILOTS].detach(), counter)
    prepared = trial.evaluations / budget
    runs = min(RUNS, int(MOST_SOLVES - prepared))
    report(prepared / (prepared + runs))
    found: dict[Candidate, tuple[float, float]] = {}

    def run(candidate: Candidate) -> float:
        if candidate not in found:
            found[candidate] = trial.errors(candidate)
            report((prepared + len(found)) / (prepared + runs))
        return math.hypot(*found[candidate])

    drawn = [draw(rng) for _ in range(MODELLED)]
    for candidate in sorted(drawn, key=lambda c: trial.paths.model(trial.solver(c), trial.rows))[
        : math.ceil(0.3 * runs)
    ]:
        run(candidate)
    _refine(run, found, runs, rng)
    if progress is True:
        print()
    ranked = sorted(found, key=run)
    best = ranked[0]
    tried = tuple((trial.solver(c), run(c)) for c in ranked)
    return Tuning(tried[0][0], *found[best], trial.evaluations + len(found) * budget, tried)


def _checked(equation: Equation, budget: int, pilot: Tensor) -> ReverseSDE:
    if not isinstance(equation, ReverseSDE) or equation.eta != 0:
        raise InvalidInput(f"tune needs a probability-flow ODE; got {equation!r}. Write sf.ProbabilityFlowODE(predict)")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 2:
        raise InvalidInput(f"budget must be an integer ≥ 2, the evaluations a sample may cost; got {budget!r}")
    if not isinstance(pilot, Tensor) or pilot.ndim < 2 or not pilot.is_floating_point() or pilot.shape[0] < 2:
        given = tuple(pilot.shape) if isinstance(pilot, Tensor) else type(pilot).__name__
        raise InvalidInput(
            f"pilot must be at least 2 start states (n, *event), a floating tensor; got {given}. Write "
            "pilot=process.prior((32, *event), seed=1234)"
        )
    return equation


def _refine(
    run: Callable[[Candidate], float],
    found: dict[Candidate, tuple[float, float]],
    runs: int,
    rng: np.random.Generator,
) -> None:
    """A (1 + 1) evolution strategy from the best candidate, its spread by the one-fifth rule."""
    spread = 0.35
    while len(found) < runs:
        best = min(found, key=run)
        spread *= 1.5 if run(best.moved(rng, spread)) < run(best) else 0.9
        spread = min(max(spread, 0.02), 0.6)


@dataclass(frozen=True)
class _Trial:
    """The pilot ready for candidates: the first `rows` are its samples, the others (if any) start on borders."""

    equation: ReverseSDE
    budget: int
    start: Tensor
    rows: int
    paths: Paths
    borders: Borders | None
    evaluations: int

    @classmethod
    def prepared(cls, equation: ReverseSDE, budget: int, pilot: Tensor, counter: Counter) -> _Trial:
        """The true paths and, where the evaluations and the pilot suffice, the borders."""
        n, start, rows, found = len(pilot), pilot, len(pilot), None
        short = min(max(3 * budget, SHORT[0]), SHORT[1])
        beside, tight = max(short, BESIDE), TIGHT * budget
        spent = 0
        if n >= 8 and borders.cost(short) + 2 * beside <= 0.6 * MOST_SOLVES * budget:
            found = Borders.found(equation, pilot, short, beside)
            spent, rows = borders.cost(short) + 2 * beside, n - n // 4
            start = torch.cat([pilot[:rows], found.start[rows:]])
        with counting(counter):
            paths = Paths.along(equation, start, tight)
        return cls(equation, budget, start, rows, paths, found, spent + tight)

    def solver(self, candidate: Candidate) -> FixedAdams:
        """The candidate on data of this scale."""
        paths = self.paths
        return candidate.solver(paths.process, paths.start, paths.stop, self.budget, paths.scale)

    def errors(self, candidate: Candidate) -> tuple[float, float]:
        """(RMS end-point error of the pilot's samples, RMS error expected by flips): one full solve; infinite when it fails."""
        paths, solver = self.paths, self.solver(candidate)
        assert isinstance(solver.grid, Nodes) and solver.chart is not None
        times = torch.tensor(solver.grid.values[1:], dtype=torch.float64)
        solution = solve(self.equation, solver, self.start, paths.start, paths.stop, save_at=times, on_failure="return")
        x = solution.states.flatten(2).double().cpu()
        error = (x[-1] - paths.end.flatten(1).cpu())[: self.rows].square().mean().sqrt().item()
        if not (math.isfinite(error) and bool(x.isfinite().all())):
            return math.inf, 0.0
        if self.borders is None:
            return error, 0.0
        m = solver.chart.bind(paths.process).m(times)
        nodes = list((m[:, None, None] * x).numpy())
        return error, math.sqrt(self.borders.flips(nodes, paths, solver, slice(self.rows, None)))


def _line(fraction: float) -> None:
    print(f"\rtuning {100 * fraction:5.1f} %", end="", flush=True)
