"""Pilot samples made ready, and what a candidate does to them: run with the network, or modelled without."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.counting import Counter, counting
from sdeflow.equations import ReverseSDE
from sdeflow.errors import InvalidInput
from sdeflow.grids import Nodes
from sdeflow.solvers.fixed_adams import FittedAdams, FixedAdams, data_weights
from sdeflow.tune import borders
from sdeflow.tune.borders import Borders
from sdeflow.tune.candidates import Candidate
from sdeflow.tune.fit import STRAY, Move, Output, Pilot, fit, modelled, solved
from sdeflow.tune.paths import Paths

MOST_SOLVES, TIGHT = 100, 12
"""Full solves' worth of evaluations a pilot sample may spend; on the tight solve."""
SHORT = (18, 60)
"""Evaluations of the solves that look for borders: two budgets, between these."""
BESIDE = 30
"""Fewest evaluations of the solves beside a border."""
SHARE = 4
"""One in SHARE of the rows starts on borders, another near them, the rest are the pilot's own."""
VALUES, MODELLED_VALUES = 4096, 512
"""Components the fit sees, over all samples, and the model: more cost time and add nothing to fifty weights."""
LARGEST = 10.0
"""A sample that has flipped counts as this many medians: how often samples flip is known better from the borders."""
BATCH = 256
"""Samples whose RMS error is minimised: a flip rarer than one in BATCH hardly counts, one more frequent decides."""


class Result(NamedTuple):
    """A candidate with its fitted weights, the pilot's error, how often samples flip and the mean square error by flips."""

    solver: FittedAdams
    pilot: float
    flip_rate: float
    flips: float

    @property
    def expected(self) -> float:
        """exp E log of the RMS end-point error of BATCH samples: a share p of the batches has no flip, the others share `flips`."""
        if not (0.0 < self.pilot < math.inf and math.isfinite(self.flips)):
            return math.inf
        p = math.exp(-BATCH * self.flip_rate)
        with_flips = math.hypot(self.pilot, math.sqrt(self.flips / max(1.0 - p, 1e-300)))
        return math.exp(p * math.log(self.pilot) + (1.0 - p) * math.log(with_flips))


@dataclass(frozen=True)
class Trial:
    """The pilot ready for candidates of `budget` evaluations; preparing it cost `evaluations` a sample."""

    equation: ReverseSDE
    budget: int
    pilot: Pilot
    evaluations: int

    @classmethod
    def prepared(
        cls, equation: ReverseSDE, budget: int, pilot: Tensor, counter: Counter, rng: np.random.Generator
    ) -> Trial:
        """The true paths and, where the evaluations and the pilot suffice, the borders."""
        n, start, found = len(pilot), pilot, None
        first = last = n
        kept = rng.permutation(pilot[0].numel())[: max(1, VALUES // n)]
        kept = torch.from_numpy(np.sort(kept)).to(pilot.device)
        short = min(max(2 * budget, SHORT[0]), SHORT[1])
        beside, spent = max(short, BESIDE), 0
        looking = borders.cost(short) + 2 * beside
        if n >= 2 * SHARE and looking <= 0.6 * MOST_SOLVES * budget:
            found = Borders.found(equation, pilot, short, beside, kept)
            spent, first, last = looking, n - 2 * (n // SHARE), n - n // SHARE
            start = torch.cat([pilot[:first], found.start[first:last], found.near[last:]])
        with counting(counter):
            paths = Paths.along(equation, start, TIGHT * budget, kept)
        if not np.isfinite(paths.end).all():
            raise InvalidInput(
                f"the network returns NaN or infinity on the pilot, even with {TIGHT * budget} evaluations a sample. "
                "sf.solve(equation, sf.Adams(rtol=1e-3, atol=1e-3), pilot) shows when and on which samples"
            )
        return cls(equation, budget, Pilot(start, kept, paths, found, first, last), spent + TIGHT * budget)

    def run(self, candidate: Candidate) -> Result:
        """Fit and measure with the network: one full solve. Infinite errors when it fails."""
        solver, times = self._adams(candidate)
        return self._result(candidate, solver, times, slice(None), *solved(self.equation, times, self.pilot))

    def modelled(self, candidate: Candidate) -> Result:
        """The same from the true paths alone, in some of the components."""
        solver, times = self._adams(candidate)
        part = slice(None, None, max(1, self.pilot.kept.numel() * len(self.pilot.start) // MODELLED_VALUES))
        return self._result(candidate, solver, times, part, *modelled(times, self.pilot, part))

    def _adams(self, candidate: Candidate) -> tuple[FixedAdams, Tensor]:
        """The candidate on data of this scale, before its weights are fitted, and its times."""
        paths = self.pilot.paths
        solver = candidate.solver(paths.process, paths.start, paths.stop, self.budget, paths.scale)
        assert isinstance(solver.grid, Nodes)
        return solver, torch.tensor(solver.grid.values, dtype=torch.float64)

    def _result(
        self, candidate: Candidate, solver: FixedAdams, times: Tensor, part: slice, output: Output, move: Move
    ) -> Result:
        assert solver.chart is not None and solver.corrector is not None
        pilot, process = self.pilot, self.pilot.paths.process
        adams = data_weights(process, times, solver.chart, solver.order, solver.corrector)
        clock = solver.chart.bind(process).u(times).numpy()
        try:
            fitted = fit(output, move, times, clock, adams, candidate.exact, pilot, part)
        except (np.linalg.LinAlgError, ValueError):  # NaN or infinity
            return Result(_with(solver, adams), math.inf, 0.0, 0.0)
        error = np.square(self._counted(fitted.error[: pilot.first])).mean()
        often, flips = 0.0, 0.0
        if pilot.borders is not None:
            error += pilot.borders.tails(self._counted(fitted.error[pilot.last :]), slice(pilot.last, None))
            often, flips = pilot.borders.flips(fitted.displaced, slice(pilot.first, pilot.last))
        return Result(_with(solver, fitted.weights), math.sqrt(error), often, flips)

    def _counted(self, error: np.ndarray) -> np.ndarray:
        flipped = error > STRAY[0] * self.pilot.paths.scale
        return np.where(flipped, np.minimum(error, LARGEST * np.median(error)), error)


def _with(solver: FixedAdams, weights: np.ndarray) -> FittedAdams:
    rows = tuple(tuple(row[:n].tolist()) for n, row in enumerate(weights, start=1))
    return FittedAdams(**{field.name: getattr(solver, field.name) for field in fields(solver)}, weights=rows)
