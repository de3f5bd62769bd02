"""measure: solve once, compare with the truth, write it down."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.equations import Equation
from sdeflow.errors import InvalidInput
from sdeflow.guidance import Guided
from sdeflow.measure.errors import (
    energy_distance,
    energy_distance_estimate,
    moment_error,
    moment_error_estimate,
    monte_carlo_floor,
    projections,
    rmse,
    sample_rmse,
    sliced_wasserstein,
    sliced_wasserstein_estimate,
)
from sdeflow.measure.record import (
    Record,
    describe,
    describe_equation,
    describe_problem,
    describe_process,
    run_key,
    versions,
)
from sdeflow.measure.reference import Reference, reference
from sdeflow.measure.statistics import Estimate, derived_seed
from sdeflow.problems import ExactNetwork, GaussianProblem, Problem
from sdeflow.processes import Process
from sdeflow.random import sample_seeds, standard_normal
from sdeflow.solution import Solution, Status
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver

Initial = Literal["prior", "marginal"]
DIFFUSE_STREAM = 103
"""Random stream of the noise that takes exact data samples to p_t."""


@dataclass(frozen=True)
class Truth:
    """What the runs of one problem, process, equation and seed are compared with; made once for many solvers.

    Attributes:
        x: start states, (samples, *event).
        reference: the exact end states of an ODE, else None.
        exact: for an SDE, exact samples of the law at the end, float64 (samples, d), else None.
        floors: Monte-Carlo floors by the name of the error.
        moments: exact mean and covariance at the end of an SDE on a Gaussian, else None.
    """

    x: Tensor
    reference: Reference | None
    exact: Tensor | None
    floors: dict[str, float]
    moments: tuple[Tensor, Tensor] | None

    @property
    def method(self) -> str:
        """What the errors are measured against."""
        if self.reference is not None:
            return self.reference.method
        return "exact samples" if self.moments is None else "exact samples and exact moments"


def measure(
    problem: Problem,
    process: Process,
    equation: Equation,
    solver: Solver,
    samples: int = 256,
    seed: int = 0,
    start: float | None = None,
    stop: float | None = None,
    initial: Initial | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    level: float = 0.95,
    resamples: int = 1000,
    truth: Truth | None = None,
) -> Record:
    """Solve `equation` on `problem` and record cost and error.

    An ODE is judged by the RMSE of its end states against a reference. An SDE is judged by the sliced Wasserstein-2 distance of its
    end states from exact samples (on a Gaussian by the error of its moments), with the energy distance beside it.

    Args:
        problem, process: the truth; the equation must be one of this process and of this problem's network, or of a network trained on it.
        equation: `ProbabilityFlowODE`, `ReverseSDE` or `ForwardSDE`.
        solver: the solver.
        samples, seed: size of the batch, and the seed of start states, noise, comparison samples and bootstrap.
        start, stop: default: the equation's.
        initial: where start states come from: "prior" (default for ODEs: the map is exact from anywhere), or "marginal" (default for SDEs: exact
            samples of p_start, so that only the solver can be wrong).
        dtype, device: of the state.
        level, resamples: of the bootstrap intervals.
        truth: from `prepare` with the same arguments; made (and kept for the next call) when left out.

    Raises:
        InvalidInput: the equation is not one of this process, or fewer than 2 samples.
        MissingDependency: scipy (ODE references) or POT (sliced Wasserstein) is not installed.
    """
    start, stop, initial = _resolve(process, equation, samples, start, stop, initial)
    if truth is None:
        truth = _kept(problem, process, equation, samples, seed, start, stop, initial, dtype, device)
    solution = solve(
        equation,
        solver,
        truth.x,
        start=start,
        stop=stop,
        seed=seed if equation.stochastic else None,
        on_failure="return",
    )
    error, *others = compare(solution, truth, level, resamples, seed)
    names, counts = torch.unique(solution.status.cpu(), return_counts=True)
    evaluations = solution.evaluations.double()
    return Record(
        key=run_key(problem, equation, solver, samples, seed, start, stop, initial, dtype, device),
        problem=describe_problem(problem),
        process=describe_process(process),
        equation=describe_equation(equation),
        solver={"name": solver.facts.name} | describe(solver),
        samples=samples,
        seed=seed,
        start=start,
        stop=stop,
        initial=initial,
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        calls=solution.calls,
        evaluations_mean=evaluations.mean().item(),
        evaluations_max=int(evaluations.max()),
        accepted_mean=solution.accepted.double().mean().item(),
        rejected_mean=solution.rejected.double().mean().item(),
        status={Status(int(c)).name: int(n) for c, n in zip(names, counts, strict=True)},
        error=error,
        others=tuple(others),
        reference=truth.method,
        wall_time=solution.wall_time,
        versions=versions(),
        threads=torch.get_num_threads(),
    )


def prepare(
    problem: Problem,
    process: Process,
    equation: Equation,
    samples: int = 256,
    seed: int = 0,
    start: float | None = None,
    stop: float | None = None,
    initial: Initial | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Truth:
    """Start states and truth for `measure`, to be made once for many solvers; arguments as there."""
    start, stop, initial = _resolve(process, equation, samples, start, stop, initial)
    if initial == "prior":
        x = process.prior((samples, *problem.event_shape), seed=seed, dtype=dtype, device=device)
    else:
        x = exact_samples(problem, process, start, samples, derived_seed(seed, "start")).to(device, dtype)
    if not equation.stochastic:
        return Truth(x, reference(equation, x, start, stop, problem), None, {}, None)
    exact = exact_samples(problem, process, stop, samples, derived_seed(seed, "exact"))
    moments = None
    if isinstance(problem, GaussianProblem):
        begin = () if initial == "prior" else problem.moments(process, start)
        if stop < start:
            moments = problem.reverse_moments(process, equation.eta, start, stop, *begin)
        elif initial == "marginal":
            moments = problem.moments(process, stop)
    return Truth(x, None, exact, _floors(problem, process, stop, samples, seed, moments), moments)


def compare(
    solution: Solution, truth: Truth, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[Estimate]:
    """Every error of a solution against its truth, the one to judge by first. Samples that failed are left out."""
    good = solution.success.cpu()
    how = (level, resamples, derived_seed(seed, "bootstrap"))
    if int(good.sum()) < 2:
        name = (
            "rmse"
            if truth.reference is not None
            else ("moments" if truth.moments is not None else "sliced_wasserstein")
        )
        return [Estimate(name, math.nan, math.nan, math.nan, math.nan, False)]
    x = solution.x.detach().cpu()[good]
    if truth.reference is not None:
        exact, uncertainty = truth.reference.x.cpu()[good], truth.reference.uncertainty.cpu()[good]
        errors = sample_rmse(x, exact)
        worst, floor = errors.argmax(), uncertainty.max().item()
        return [
            rmse(x, exact, uncertainty, *how),
            Estimate("worst_sample", errors[worst].item(), math.nan, math.nan, floor, bool(errors[worst] > floor)),
        ]
    assert truth.exact is not None
    exact = truth.exact[good]
    found = [
        sliced_wasserstein_estimate(x, exact, truth.floors["sliced_wasserstein"], projections(exact.shape[1]), *how),
        energy_distance_estimate(x, exact, truth.floors["energy_distance"], *how),
    ]
    if truth.moments is not None:
        found.insert(0, moment_error_estimate(x, *truth.moments, truth.floors["moments"], *how))
    return found


def strong_error(
    equation: Equation,
    solver: Solver,
    fine: Solver,
    finest: Solver,
    x: Tensor,
    seed: int = 0,
    start: float | None = None,
    stop: float | None = None,
) -> Estimate:
    """Strong error of an SDE solver: RMS of its end states against those of `finest` on the same Brownian paths.

    Args:
        fine, finest: two solvers of much smaller steps; their disagreement is the uncertainty of the reference. All three must draw
            their noise from the solve's seed on one clock, so that one seed is one path: the exponential samplers do, and path solvers in
            one chart. On another clock the error is that of unrelated paths.
    """
    ends = [solve(equation, s, x, start=start, stop=stop, seed=seed).x for s in (solver, fine, finest)]
    return rmse(ends[0], ends[2], sample_rmse(ends[1], ends[2]), seed=derived_seed(seed, "bootstrap"), name="strong")


def exact_samples(problem: Problem, process: Process, t: float, n: int, seed: int) -> Tensor:
    """n exact samples of p_t, float64 (n, d)."""
    noise = standard_normal(sample_seeds(seed, n, "cpu"), (problem.dim,), stream=DIFFUSE_STREAM, dtype=torch.float64)
    return process.perturb(problem.sample(n, seed, torch.float64), t, noise)


def _floors(
    problem: Problem, process: Process, stop: float, samples: int, seed: int, moments: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    def draw(r: int, side: str) -> Tensor:
        return exact_samples(problem, process, stop, samples, derived_seed(seed, f"floor {side} {r}"))

    directions = projections(problem.dim)
    floors = {
        "sliced_wasserstein": monte_carlo_floor(lambda r: sliced_wasserstein(draw(r, "a"), draw(r, "b"), directions)),
        "energy_distance": monte_carlo_floor(lambda r: energy_distance(draw(r, "a"), draw(r, "b"))),
    }
    if moments is not None:
        mean, cov = moments
        root = torch.linalg.cholesky(cov)

        def gaussian(r: int) -> float:
            seeds = sample_seeds(derived_seed(seed, f"floor moments {r}"), samples, "cpu")
            noise = standard_normal(seeds, (problem.dim,), stream=DIFFUSE_STREAM, dtype=torch.float64)
            return moment_error(mean + noise @ root.T, mean, cov)

        floors["moments"] = monte_carlo_floor(gaussian)
    return floors


def _resolve(
    process: Process, equation: Equation, samples: int, start: float | None, stop: float | None, initial: Initial | None
) -> tuple[float, float, Initial]:
    if equation.process is None or describe_process(equation.process) != describe_process(process):
        raise InvalidInput(
            f"the equation's process is {equation.process!r}, the one to measure on is {process!r}; write "
            "measure(problem, process, sf.ProbabilityFlowODE(problem.prediction(process)), solver)"
        )
    if samples < 2:
        raise InvalidInput(f"samples must be at least 2, or there is no interval; got {samples}")
    start = equation.start if start is None else start
    stop = equation.stop if stop is None else stop
    if start is None or stop is None:
        raise InvalidInput("this equation has no interval of its own; write measure(..., start=1.0, stop=1e-3)")
    if initial is None:
        initial = "marginal" if equation.stochastic else "prior"
    if initial not in ("prior", "marginal"):
        raise InvalidInput(f'initial must be "prior" or "marginal"; got {initial!r}')
    if initial == "prior" and start != process.t_max:
        raise InvalidInput(
            f'the prior is the law at t_max={process.t_max}, not at start={start}; write initial="marginal"'
        )
    return float(start), float(stop), initial


# by settings; with the prediction, which is kept alive so that its id names it alone
_TRUTHS: OrderedDict[str, tuple[object, Truth]] = OrderedDict()


def _kept(problem, process, equation, samples, seed, start, stop, initial, dtype, device) -> Truth:
    """The truth of these settings, from the last few made: a reference costs more than the runs it serves."""
    predict = equation.predict
    # of an exact network and nothing around it the description says all
    known = predict is None or (isinstance(predict.network, ExactNetwork) and not isinstance(predict, Guided))
    own = None if known else id(predict)
    parts = (describe_problem(problem), describe_process(process), describe_equation(equation), own)
    name = repr((parts, samples, seed, start, stop, initial, dtype, torch.device(device)))
    if name not in _TRUTHS:
        truth = prepare(problem, process, equation, samples, seed, start, stop, initial, dtype, device)
        _TRUTHS[name] = (predict, truth)
        while len(_TRUTHS) > 4:
            _TRUTHS.popitem(last=False)
    return _TRUTHS[name][1]


def _device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
