"""Weak errors on shared paths: the method and a fine solve see one noise, so that most of the Monte-Carlo error cancels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from sdeflow.equations import Equation
from sdeflow.errors import InvalidInput
from sdeflow.measure.errors import REFERENCE_MARGIN
from sdeflow.measure.statistics import Estimate, bootstrap, derived_seed
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver

Function = Callable[[Tensor], Tensor]


def mean_square(x: Tensor) -> Tensor:
    """|x|²/d of every sample, (n,)."""
    return x.flatten(1).square().mean(1)


def mean_element(x: Tensor) -> Tensor:
    """The mean over a sample's elements, (n,)."""
    return x.flatten(1).mean(1)


def weak_errors(
    equation: Equation,
    solver: Solver,
    fine: Solver,
    finest: Solver,
    x: Tensor,
    functions: Mapping[str, Function] | None = None,
    seed: int = 0,
    start: float | None = None,
    stop: float | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> dict[str, Estimate]:
    """E φ(x̂) − E φ(x) for functions φ of the end state, x̂ by `solver` and x by `finest` on the same Brownian paths.

    Var(φ(x̂) − φ(x)) is of the order of the strong error squared, where independent runs would have 2 Var φ: fewer samples by that ratio.
    The references are two; what they differ by, on the same paths, is the floor: three times |E φ(fine) − E φ(finest)| or of its
    standard error, whichever is more.

    Args:
        fine, finest: two solvers of much smaller steps. All three must draw their noise from the solve's seed on one clock, so that one
            seed is one path: the exponential samplers do, and path solvers in one chart.
        x: start states (n, *event), n ≥ 2.
        functions: by name, (n, *event) → (n,), smooth; default mean_element and mean_square.
        level, resamples: of the BCa intervals over samples.

    Returns:
        An `Estimate` a function: `value` is signed, `resolved` when the interval leaves out 0 and |value| is above the floor.

    Raises:
        InvalidInput: a function returns another shape than (n,).
    """
    functions = {"mean": mean_element, "mean_square": mean_square} if functions is None else functions
    ends = [
        solve(equation, s, x, start=start, stop=stop, seed=seed if equation.stochastic else None).x
        for s in (solver, fine, finest)
    ]
    found = {}
    for name, function in functions.items():
        values = [function(end.detach().double().cpu()) for end in ends]
        for v in values:
            if v.shape != x.shape[:1]:
                raise InvalidInput(
                    f"{name} must return one number a sample, ({x.shape[0]},); got shape {tuple(v.shape)}"
                )
        difference, check = values[0] - values[2], values[1] - values[2]
        low, high = bootstrap([difference], _mean, level, resamples, derived_seed(seed, "bootstrap"))
        floor = REFERENCE_MARGIN * max(abs(check.mean().item()), check.std().item() / len(check) ** 0.5)
        value = difference.mean().item()
        found[name] = Estimate(name, value, low, high, floor, low * high > 0 and abs(value) > floor)
    return found


def _mean(mean: Tensor) -> Tensor:
    return mean[:, 0]
