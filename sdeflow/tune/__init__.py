"""Spend a fixed budget best: choose order, corrector, chart, grid and weights of an Adams solver for one network.

One tight solve of a few pilot samples gives true paths (paths.py), on which hundreds of candidates are fitted and ranked without the
network. The best are run on the pilot, their weights fitted on the way (fit.py), and refined by a local search. What is minimised
is the RMS end-point error expected of *other* samples, as a geometric mean over batches (trial.py): the pilot's own errors, each
sample's with weights fitted without it, errors near borders between modes, and the flips that a pilot is too small to meet
(borders.py). No exact score is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.counting import Counter
from sdeflow.equations import Equation, ReverseSDE
from sdeflow.errors import InvalidInput
from sdeflow.scale import check_pilot
from sdeflow.solvers.fixed_adams import FittedAdams
from sdeflow.tune.candidates import Candidate, draw
from sdeflow.tune.trial import MOST_SOLVES, Result, Trial

MOST_PILOTS = 32
RUNS = 60
"""Candidates run at most."""
MODELLED = (60, 300)
"""Candidates the model ranks: 4000 network calls' worth, between these."""
BEST = 0.3
"""Of the runs: the best modelled candidates; the others refine."""
BROOD = 3
"""Neighbours modelled for every one that is run."""


@dataclass(frozen=True)
class Tuning:
    """What `search` found.

    Attributes:
        solver: the tuned solver.
        pilot_error: RMS end-point error expected of samples that do not flip: of the pilot's against the tight solve, each with weights
            fitted without it, and of those near borders. Flipped ones count as ten medians.
        flip_error: RMS error expected of samples that flip to another mode; 0 where no borders were looked for.
        evaluations: network evaluations each pilot sample cost.
        candidates: candidates run on the pilot: (solver, expected RMS error), best first.
    """

    solver: FittedAdams
    pilot_error: float
    flip_error: float
    evaluations: int
    candidates: tuple[tuple[FittedAdams, float], ...]


def tune(
    equation: Equation,
    budget: int,
    pilot: Tensor,
    seed: int = 0,
    progress: bool | Callable[[float], None] = False,
) -> FittedAdams:
    """A fixed-grid Adams solver of `budget` evaluations a sample, chosen for this network and its weights fitted to it.

    Args:
        equation: a `ProbabilityFlowODE`.
        budget: evaluations a sample of the solver, ≥ 2.
        pilot: start states of the pilot samples (n, *event) at t_max, e.g. `process.prior((32, *event), seed=...)`; at most 32 are used,
            so conditions of one row a sample have to be of as many.
            Use other seeds for what you generate, or the pilot's error flatters. From 8 pilots and 5 evaluations on, half
            of the rows serve to measure flips and the errors near borders; see `sdeflow.tune.borders`.
        seed: of the search's own random numbers.
        progress: True for a line on stderr, or a function of the fraction done.

    Returns:
        A `FittedAdams`, for any number of samples; `solver.save(path)`, `FixedAdams.load(path)`.

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
        trial = Trial.prepared(equation, budget, pilot[:MOST_PILOTS].detach(), counter, rng)
    prepared = trial.evaluations / budget
    runs = min(RUNS, int(MOST_SOLVES - prepared))
    report(prepared / (prepared + runs))
    found: dict[Candidate, Result] = {}

    def run(candidate: Candidate) -> float:
        if candidate not in found:
            found[candidate] = trial.run(candidate)
            report((prepared + len(found)) / (prepared + runs))
        return found[candidate].expected

    def modelled(candidate: Candidate) -> float:
        return trial.modelled(candidate).expected

    drawn = [draw(rng) for _ in range(int(np.clip(4000 // budget, *MODELLED)))]
    with torch.no_grad(), np.errstate(all="ignore"):
        for candidate in sorted(drawn, key=modelled)[: math.ceil(BEST * runs)]:
            run(candidate)
        _refine(run, modelled, found, runs, rng)
    if progress is True:
        print()
    ranked = sorted(found.values(), key=lambda result: result.expected)
    best = ranked[0]
    if not math.isfinite(best.expected):
        raise InvalidInput(
            f"every one of {len(ranked)} solvers of {budget} evaluations failed on the pilot: the network returns NaN or infinity "
            "there. Run sf.solve(equation, sf.Adams(rtol=1e-3, atol=1e-3), pilot) to see where"
        )
    cost = trial.evaluations + len(found) * budget
    tried = tuple((result.solver, result.expected) for result in ranked)
    return Tuning(best.solver, best.pilot, math.sqrt(best.flips), cost, tried)


def _checked(equation: Equation, budget: int, pilot: Tensor) -> ReverseSDE:
    if not isinstance(equation, ReverseSDE) or equation.eta != 0:
        raise InvalidInput(f"tune needs a probability-flow ODE; got {equation!r}. Write sf.ProbabilityFlowODE(predict)")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 2:
        raise InvalidInput(f"budget must be an integer ≥ 2, the evaluations a sample may cost; got {budget!r}")
    check_pilot(pilot)
    return equation


def _refine(
    run: Callable[[Candidate], float],
    modelled: Callable[[Candidate], float],
    found: dict[Candidate, Result],
    runs: int,
    rng: np.random.Generator,
) -> None:
    """A (1 + 1) evolution strategy from the best candidate, its spread by the one-fifth rule, the model choosing the child."""
    spread = 0.35
    while len(found) < runs:
        best = min(found, key=run)
        child = min((best.moved(rng, spread) for _ in range(BROOD)), key=modelled)
        spread *= 1.5 if run(child) < run(best) else 0.9
        spread = min(max(spread, 0.02), 0.6)


def _line(fraction: float) -> None:
    print(f"\rtuning {100 * fraction:5.1f} %", end="", flush=True)
