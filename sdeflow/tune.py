"""Spend a fixed budget best: choose order, corrector, chart and grid of an Adams solver for one network.

One tight solve of a few pilot samples gives D and ε̂ along true paths. From them the defect of any candidate (its
quadrature error on the true path) is known without the network, and a linear recursion carries it to the end: with
e_n = p_n − z(u_n) and W the candidate's weights,

    e_{n+1} = e_n + Σ_j W_nj J(u_j) e_j + Σ_j W_nj F(u_j) − (z(u_{n+1}) − z(u_n)),

J the Jacobian, taken as that of data with one scale (a denoiser known only through c). This ranks hundreds of candidates;
the best are then run on the pilot and refined by a local search on their true errors. No exact score is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sdeflow.charts import StraightLine
from sdeflow.counting import Counter, counting
from sdeflow.equations import Equation, ReverseSDE
from sdeflow.errors import InvalidInput
from sdeflow.grids import Nodes
from sdeflow.processes import Process
from sdeflow.solve import solve
from sdeflow.solvers.fixed_adams import FixedAdams, adams_weights, integrals

MOST_PILOTS = 32
TIGHT, FIRST, REFINED = 25, 20, 46
"""Full solves' worth of evaluations a pilot sample spends on: the tight solve, candidates from the model, refinement."""
MODELLED = 400
"""Candidates the model ranks."""
LOCAL = 6
"""Points of the local interpolant of D and ε̂ along the tight solve."""


@dataclass(frozen=True)
class Tuning:
    """What `search` found.

    Attributes:
        solver: the tuned solver.
        pilot_error: mean over the pilot samples of the RMS end-point error against the tight solve.
        evaluations: network evaluations each pilot sample cost.
        candidates: candidates run on the pilot: (solver, mean error), best first.
    """

    solver: FixedAdams
    pilot_error: float
    evaluations: int
    candidates: tuple[tuple[FixedAdams, float], ...]


@dataclass(frozen=True)
class _Point:
    """A candidate: grid density a + exp(−½((λ − μ)/w)²) in λ + log c₀ above −log k; chart StraightLine(c)."""

    order: int
    corrector: int
    log_c: float
    log_a: float
    mu: float
    log_w: float
    log_k: float


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
        pilot: start states of the pilot samples (n, *event) at t_max, e.g. `process.prior((24, *event), seed=...)`; at most 32 are used. Use
            other seeds for what you generate, or the pilot's error flatters.
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
    pilot = pilot[:MOST_PILOTS].detach()
    report = progress if callable(progress) else (_line if progress else (lambda fraction: None))
    counter = Counter(pilot.shape[0], pilot.device)
    rng = np.random.default_rng(seed)
    with torch.no_grad(), counting(counter):
        truth = _Truth.along(equation, pilot, TIGHT * budget)
    report(TIGHT / 100)
    runs: dict[_Point, float] = {}

    def run(point: _Point) -> float:
        if point not in runs:
            runs[point] = truth.error(equation, pilot, truth.solver(point, budget))
            report((TIGHT + len(runs)) / (TIGHT + FIRST + REFINED))
        return runs[point]

    drawn = [_draw(rng) for _ in range(MODELLED)]
    ranked = sorted(drawn, key=lambda point: truth.model(truth.solver(point, budget)))
    for point in ranked[:FIRST]:
        run(point)
    _refine(run, runs, rng)
    if progress is True:
        print()
    found = sorted(((truth.solver(p, budget), e) for p, e in runs.items()), key=lambda pair: pair[1])
    cost = int(counter.evaluations[0]) + len(runs) * budget
    return Tuning(found[0][0], found[0][1], cost, tuple(found))


def _checked(equation: Equation, budget: int, pilot: Tensor) -> ReverseSDE:
    if not isinstance(equation, ReverseSDE) or equation.eta != 0:
        raise InvalidInput(f"tune needs a probability-flow ODE; got {equation!r}. Write sf.ProbabilityFlowODE(predict)")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 2:
        raise InvalidInput(f"budget must be an integer ≥ 2, the evaluations a sample may cost; got {budget!r}")
    if not isinstance(pilot, Tensor) or pilot.ndim < 2 or not pilot.is_floating_point() or pilot.shape[0] < 2:
        given = tuple(pilot.shape) if isinstance(pilot, Tensor) else type(pilot).__name__
        raise InvalidInput(
            f"pilot must be at least 2 start states (n, *event), a floating tensor; got {given}. Write "
            "pilot=process.prior((24, *event), seed=1234)"
        )
    return equation


def _draw(rng: np.random.Generator) -> _Point:
    order = int(rng.integers(2, 6))
    return _Point(
        order,
        _corrector(rng, order),
        rng.uniform(math.log(0.4), math.log(2.0)),
        rng.uniform(math.log(0.02), math.log(2.0)),
        rng.uniform(-2.0, 3.0),
        rng.uniform(math.log(0.6), math.log(3.5)),
        rng.uniform(math.log(10.0), math.log(300.0)),
    )


def _corrector(rng: np.random.Generator, order: int) -> int:
    return 0 if rng.random() < 0.15 else order + int(rng.integers(0, 2))


def _refine(run: Callable[[_Point], float], runs: dict[_Point, float], rng: np.random.Generator) -> None:
    """A (1 + 1) evolution strategy from the best point, its spread by the one-fifth rule; orders change now and then."""
    spread = 0.35
    limit = FIRST + REFINED
    while len(runs) < limit:
        best = min(runs, key=runs.__getitem__)
        order = best.order
        if rng.random() < 0.2:
            order = int(np.clip(order + rng.choice([-1, 1]), 1, 6))
        corrector = best.corrector if order == best.order else max(2, _corrector(rng, order))
        c, a, mu, w, k = spread * rng.standard_normal(5)
        trial = replace(
            best,
            order=order,
            corrector=corrector,
            log_c=best.log_c + 0.5 * c,
            log_a=best.log_a + a,
            mu=best.mu + mu,
            log_w=best.log_w + 0.5 * w,
            log_k=best.log_k + k,
        )
        spread *= 1.5 if run(trial) < runs[best] else 0.9
        spread = min(max(spread, 0.02), 0.6)


_TIGHT_GRID = _Point(5, 5, 0.0, math.log(0.3), 0.5, math.log(2.0), math.log(1e5))


@dataclass(frozen=True)
class _Truth:
    """The pilot's true paths, as D and ε̂ on the nodes of the tight solve, and its scale c₀."""

    process: Process
    start: float
    stop: float
    end: Tensor  # x at stop, (n, *event)
    clock: np.ndarray  # u of the tight solve's chart, decreasing, (M + 1,)
    data: np.ndarray  # D, (M + 1, n·d)
    noise: np.ndarray  # ε̂ of the corrected state
    scale: float

    @classmethod
    def along(cls, equation: ReverseSDE, x: Tensor, calls: int) -> _Truth:
        """Adams PEC of order 5 with `calls` evaluations, keeping D and ε̂ everywhere, in float64."""
        process, predict = equation.process, equation.predict
        assert process is not None and predict is not None
        start, stop = float(process.t_max), float(process.t_min)
        t = _times(process, start, stop, calls - 1, 0.0, _TIGHT_GRID)
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

    def solver(self, point: _Point, budget: int) -> FixedAdams:
        """The solver of a candidate."""
        shift = math.log(self.scale)
        t = _times(self.process, self.start, self.stop, budget, shift, point)
        chart = StraightLine(c=self.scale * math.exp(point.log_c))
        return FixedAdams(order=point.order, corrector=point.corrector, chart=chart, grid=Nodes(t))

    def error(self, equation: ReverseSDE, pilot: Tensor, solver: FixedAdams) -> float:
        """Mean over the pilot of the RMS end-point error: one full solve. Infinite when it fails.

        The mean, not the root mean square: a sample near a boundary between modes that lands on the other side would
        decide alone, and how many do so grows with the error of the others.
        """
        x = solve(equation, solver, pilot, start=self.start, stop=self.stop, on_failure="return").x
        error = (x.double() - self.end).flatten(1).square().mean(1).sqrt().mean().item()
        return error if math.isfinite(error) else math.inf

    def model(self, solver: FixedAdams) -> float:
        """The same error predicted from the tight solve alone."""
        assert (
            isinstance(solver.grid, Nodes) and isinstance(solver.chart, StraightLine) and solver.corrector is not None
        )
        t = torch.tensor(solver.grid.values, dtype=torch.float64)
        D, eps = self._at(t)
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
        return float(np.sqrt(np.square(end.reshape(len(self.end), -1)).mean(1)).mean())

    def _at(self, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """D and ε̂ at times t by local Lagrange interpolation in the tight solve's clock."""
        u = StraightLine().bind(self.process).u(t).numpy()
        first = np.searchsorted(-self.clock, -u) - LOCAL // 2
        at = np.clip(first, 0, self.clock.size - LOCAL)[:, None] + np.arange(LOCAL)
        nodes = self.clock[at]
        away = np.where(np.eye(LOCAL, dtype=bool), 1.0, nodes[:, :, None] - nodes[:, None, :])
        from_u = np.where(np.eye(LOCAL, dtype=bool), 1.0, u[:, None, None] - nodes[:, None, :])
        weight = (from_u / away).prod(2)
        return tuple(np.einsum("nk,nkf->nf", weight, values[at]) for values in (self.data, self.noise))


def _weighted(row: np.ndarray, slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for j in np.flatnonzero(row):
        total = total.add(slopes[j], alpha=float(row[j]))
    return total


def _times(process: Process, start: float, stop: float, steps: int, shift: float, point: _Point) -> Tensor:
    """Node times with the candidate's density in λ, from start to stop.

    Where the noise is k times the data and more, D hardly moves: that stretch belongs to the first step.
    """
    low = max(process.half_log_snr(start).item(), -point.log_k - shift)
    lam = np.linspace(low, process.half_log_snr(stop).item(), 2001)
    density = math.exp(point.log_a) + np.exp(-0.5 * ((lam + shift - point.mu) / math.exp(point.log_w)) ** 2)
    share = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    nodes = process.time(torch.from_numpy(np.interp(np.linspace(0.0, share[-1], steps + 1), share, lam))).clone()
    nodes[0], nodes[-1] = start, stop
    return nodes


def _line(fraction: float) -> None:
    print(f"\rtuning {100 * fraction:5.1f} %", end="", flush=True)
