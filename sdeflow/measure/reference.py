"""Reference solutions that know how uncertain they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

from sdeflow.charts import Chart, LogSNR, StraightLine, Trigonometric
from sdeflow.equations import Equation
from sdeflow.errors import InvalidInput, MissingDependency
from sdeflow.measure.errors import sample_rmse
from sdeflow.problems import GaussianProblem, Problem


@dataclass(frozen=True)
class Reference:
    """An accurate end state.

    Attributes:
        x: float64, shaped as the start.
        uncertainty: RMS over a sample's elements, float64 (batch,): the disagreement of two independent solutions, or the rounding of the
            closed form.
        method: what made it.
    """

    x: Tensor
    uncertainty: Tensor
    method: str


def reference(
    equation: Equation,
    x: Tensor,
    start: float | None = None,
    stop: float | None = None,
    problem: Problem | None = None,
    tolerance: float = 1e-11,
) -> Reference:
    """The end state of an ODE, and how well it is known.

    A probability-flow ODE on a `GaussianProblem` has a closed form. Any other ODE is solved twice in float64, with nothing shared but
    its drift: torchdiffeq's dopri8 in the straight-line chart, and scipy's DOP853 in log-SNR (in the trigonometric chart where
    it starts at α = 0). An equation without a process is solved by both in its own time. The evaluations are not counted.

    Args:
        equation: an ODE.
        x: start states (batch, *event).
        start, stop: default: the equation's.
        problem: the problem behind the equation, for its closed form and its data scale.
        tolerance: the error aimed at; rtol and atol of both solvers are a tenth of it.

    Raises:
        InvalidInput: a stochastic equation, or no interval.
        MissingDependency: scipy is not installed.
    """
    if equation.stochastic:
        raise InvalidInput(
            "an SDE has no end state to refer to; compare laws (sliced_wasserstein) or paths (strong_error), or write "
            "sf.ProbabilityFlowODE(predict)"
        )
    start = equation.start if start is None else start
    stop = equation.stop if stop is None else stop
    if start is None or stop is None:
        raise InvalidInput(
            "this equation has no interval of its own; write reference(equation, x, start=0.0, stop=1.0)"
        )
    x = x.detach().double()
    process = equation.process
    if process is not None and isinstance(problem, GaussianProblem):
        exact = problem.flow(x, process, start, stop)
        # rounding, found by going another way: in two legs through the middle
        other = problem.flow(problem.flow(x, process, start, 0.5 * (start + stop)), process, 0.5 * (start + stop), stop)
        return Reference(exact, sample_rmse(exact, other), "closed form")
    c = problem.data_scale if problem is not None else 0.5
    if process is None:
        first, second = None, None
    else:
        first = StraightLine(c)
        second = LogSNR() if float(process.alpha(start)) > 0 and float(process.alpha(stop)) > 0 else Trigonometric(c)
    with torch.no_grad():
        # a solver's tolerance is of one step; the errors of all steps together come to a few times that
        a = _dopri8(equation, first, x, start, stop, 0.1 * tolerance)
        b = _dop853(equation, second, x, start, stop, 0.1 * tolerance)
    names = tuple("" if chart is None else f" in {type(chart).__name__}" for chart in (first, second))
    method = f"torchdiffeq dopri8{names[0]} and scipy DOP853{names[1]}, tolerance {tolerance:g}"
    return Reference(a, sample_rmse(a, b), method)


class _Field:
    """dz/du of an equation in a chart (its own time without one), and the ways in and out."""

    def __init__(self, equation: Equation, chart: Chart | None, start: float, stop: float):
        self.equation, self.start, self.stop = equation, start, stop
        self.bound = None if chart is None or equation.process is None else chart.bind(equation.process)
        self.u = (start, stop) if self.bound is None else (float(self.bound.u(start)), float(self.bound.u(stop)))

    def enter(self, x: Tensor) -> Tensor:
        return x if self.bound is None else self.bound.to_chart(self.start, x)

    def leave(self, z: Tensor) -> Tensor:
        return z if self.bound is None else self.bound.from_chart(self.stop, z)

    def __call__(self, u: float | Tensor, z: Tensor) -> Tensor:
        if self.bound is None or self.equation.predict is None:
            return self.equation.drift(u, z)
        return self.bound.drift(self.equation.predict, u, z)


def _dopri8(equation: Equation, chart: Chart | None, x: Tensor, start: float, stop: float, tolerance: float) -> Tensor:
    field = _Field(equation, chart, start, stop)
    u = torch.tensor(field.u, dtype=torch.float64, device=x.device)
    # without step_t the solver runs past the end, where the chart may not exist, and interpolates back to fourth order
    options = {"max_num_steps": 100000, "step_t": u[1:]}
    try:
        end = odeint(field, field.enter(x), u, rtol=tolerance, atol=tolerance, method="dopri8", options=options)
    except AssertionError as error:
        raise InvalidInput(_too_hard("torchdiffeq dopri8", error, tolerance)) from error
    assert isinstance(end, Tensor)
    return field.leave(end[-1])


def _dop853(equation: Equation, chart: Chart | None, x: Tensor, start: float, stop: float, tolerance: float) -> Tensor:
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise MissingDependency("the second reference solver needs scipy; write: pip install scipy") from error
    field = _Field(equation, chart, start, stop)

    def flat(u: float, z):
        return field(u, torch.from_numpy(z).to(x.device).reshape(x.shape)).cpu().numpy().ravel()

    z = field.enter(x).cpu().numpy().ravel()
    run = solve_ivp(flat, field.u, z, method="DOP853", rtol=max(tolerance, 3e-14), atol=tolerance)
    if not run.success or not math.isfinite(float(abs(run.y[:, -1]).max())):
        raise InvalidInput(_too_hard("scipy DOP853", run.message, tolerance))
    return field.leave(torch.from_numpy(run.y[:, -1]).to(x.device).reshape(x.shape))


def _too_hard(solver: str, reason: object, tolerance: float) -> str:
    return (
        f"the reference solver {solver} failed at tolerance {tolerance:g}: {reason}. Check that the drift is finite on the whole "
        "interval, or write reference(..., tolerance=1e-9)"
    )
