"""solve: check everything once, then let the solver work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdeflow.counting import Counter, counting
from sdeflow.equations import Equation, check_additive
from sdeflow.errors import InvalidInput, SolveFailed, finite
from sdeflow.networks import device_of
from sdeflow.random import sample_seeds
from sdeflow.solution import Solution, Status
from sdeflow.solvers.base import Solver, Task

SINGLE = 2.0**-23
"""Output times that differ by this share or less from an end of the interval are that end: they were float32 numbers."""


def solve(
    equation: Equation,
    solver: Solver,
    x: Tensor,
    start: float | None = None,
    stop: float | None = None,
    save_at: Sequence[float] | Tensor | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    gradients: bool = False,
    on_failure: str = "raise",
    progress: bool | Callable[[float], None] = False,
    path: object = None,
) -> Solution:
    """Solve an equation from state x at `start` to `stop`.

    Args:
        equation: any `Equation`; `ProbabilityFlowODE`, `ReverseSDE`, `ForwardSDE`.
        solver: a solver object with its settings, e.g. `TorchDiffEq("dopri5", rtol=1e-5, atol=1e-5)`.
        x: start states (batch, *event), a floating tensor.
        start, stop: times, in either order; default: the equation's own (a reverse equation runs from t_max to t_min).
        save_at: output times between start and stop, in order of travel; default: the end alone. On a fixed grid they are nodes: a node
            nearer than a twentieth of a step gives way to one.
        seed: for SDEs: an integer (each sample derives its own from it and its row) or one seed a sample. Default 0.
            The noise of a sample depends on its seed alone, not on the rest of the batch. An ODE has no noise, and leaves seed and path unused.
        gradients: keep the graph, so that the result can be differentiated.
        on_failure: "raise" a `SolveFailed` carrying the partial solution when any sample fails, or "return" it.
        progress: True for a line on stderr, or a function of the fraction done.
        path: a Brownian path to drive an SDE with, in place of `seed`.

    Returns:
        A `Solution`.

    Raises:
        InvalidInput: an argument cannot be used.
        SolveFailed: a sample did not reach `stop` and on_failure is "raise".
    """
    task = _task(equation, solver, x, start, stop, save_at, seed, gradients, on_failure, progress, path)
    solver.check(task)
    began = time.perf_counter()
    with counting(task.counter), torch.set_grad_enabled(gradients):
        outcome = solver.integrate(task)
    seconds = time.perf_counter() - began
    if progress is True:
        print(file=sys.stderr)
    solution = Solution(
        x=outcome.x,
        t=task.save_at if task.save_at is not None else torch.tensor([task.stop], dtype=torch.float64),
        states=outcome.x[None] if outcome.states is None else outcome.states,
        calls=task.counter.calls,
        evaluations=task.counter.evaluations,
        accepted=outcome.accepted,
        rejected=outcome.rejected,
        status=outcome.status,
        wall_time=seconds,
        error_estimate=outcome.error_estimate,
        dense=outcome.dense,
    )
    if on_failure == "raise" and not bool(solution.success.all()):
        raise SolveFailed(_failure(solution) + _hint(solution, task), solution)
    return solution


def _task(equation, solver, x, start, stop, save_at, seed, gradients, on_failure, progress, path) -> Task:
    if not isinstance(equation, Equation):
        raise InvalidInput(
            f"equation must be an Equation; got {type(equation).__name__}. Write sf.Equation(drift) or "
            "sf.ProbabilityFlowODE(predict)"
        )
    if not isinstance(solver, Solver):
        raise InvalidInput(
            f'solver must be a solver object; got {solver!r}. Write e.g. sf.TorchDiffEq("dopri5", rtol=1e-5, atol=1e-5)'
        )
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInput(f"x must be a floating tensor of shape (batch, *event); got {given}. Write x.float()")
    if x.ndim < 2 or x.shape[0] == 0 or x[0].numel() == 0:
        raise InvalidInput(
            f"x must have shape (batch, *event) with at least one sample and one element; got {tuple(x.shape)}. One "
            "sample: write x[None]"
        )
    if on_failure not in ("raise", "return"):
        raise InvalidInput(f'on_failure must be "raise" or "return"; got {on_failure!r}')
    start, stop = _interval(equation, start, stop)
    _check_device(equation, x)
    check_additive(equation, start, x)
    seeds = None
    if equation.stochastic:
        if path is None:
            seeds = sample_seeds(0 if seed is None else seed, x.shape[0], x.device)
        elif seed is not None:
            raise InvalidInput("both seed and path were given, and a path holds its own seeds; leave one out")
    return Task(
        equation=equation,
        x=x if gradients else x.detach(),
        start=start,
        stop=stop,
        save_at=_outputs(save_at, start, stop),
        seeds=seeds,
        path=path,
        gradients=gradients,
        counter=Counter(x.shape[0], x.device),
        progress=_bar if progress is True else (progress or None),
    )


def _interval(equation: Equation, start: float | None, stop: float | None) -> tuple[float, float]:
    start = equation.start if start is None else start
    stop = equation.stop if stop is None else stop
    if start is None or stop is None:
        raise InvalidInput("this equation has no interval of its own; write solve(..., start=0.0, stop=1.0)")
    for name, value in (("start", start), ("stop", stop)):
        if not finite(value) and not (
            isinstance(value, Tensor) and value.numel() == 1 and bool(value.isfinite().all())
        ):
            raise InvalidInput(f"{name} must be a finite number; got {value!r}")
    start, stop = float(start), float(stop)
    if start == stop:
        raise InvalidInput(f"start and stop must be different; got {start} for both")
    process = equation.process
    if process is not None:
        slack = 1e-9 * (process.t_max - process.t_min)
        for name, value in (("start", start), ("stop", stop)):
            if not process.t_min - slack <= value <= process.t_max + slack:
                raise InvalidInput(
                    f"{name}={value} is outside [{process.t_min}, {process.t_max}], where {process!r} is defined; "
                    "choose a time inside, "
                    f"or widen it: {type(process).__name__}(..., t_min=..., t_max=...)"
                )
    return start, stop


def _outputs(save_at: Sequence[float] | Tensor | None, start: float, stop: float) -> Tensor | None:
    if save_at is None:
        return None
    try:
        times = torch.as_tensor(save_at, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"save_at must be a list of times; got {save_at!r}. Write save_at=[0.5, 0.1]") from None
    if times.ndim == 0:
        raise InvalidInput(f"save_at must be a list of times; got {save_at!r}. Write save_at=[{save_at}]")
    for end in (start, stop):
        times = torch.where((times - end).abs() <= SINGLE * abs(end), end, times)
    low, high, way = min(start, stop), max(start, stop), 1.0 if stop > start else -1.0
    if (
        times.ndim != 1
        or times.numel() == 0
        or not bool(((times >= low) & (times <= high)).all())
        or not bool((times.diff() * way > 0).all())
    ):
        raise InvalidInput(
            f"save_at must list times between start={start} and stop={stop} in the order of travel, none twice; got "
            f"{times.flatten()[:8].tolist()}"
        )
    return times


def _check_device(equation: Equation, x: Tensor) -> None:
    device = device_of(getattr(equation.predict, "network", None))
    # "cuda" is any of them
    if device is not None and device != x.device and (device.index is not None or device.type != x.device.type):
        raise InvalidInput(
            f"the network is on {device}, the state on {x.device}; write solve(..., x.to({str(device)!r}))"
        )


def _bar(fraction: float) -> None:
    filled = int(30 * fraction)
    print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {100 * fraction:5.1f} %", end="", file=sys.stderr, flush=True)


def _failure(solution: Solution) -> str:
    failed = (~solution.success).nonzero().flatten()
    reasons = sorted({Status(int(code)).name for code in solution.status[failed]})
    return (
        f"{failed.numel()} of {solution.status.numel()} samples did not reach the end ({', '.join(reasons)}; first "
        f"failed row {int(failed[0])}); {solution.summary()}. "
        'The partial solution is in this exception\'s .solution; write solve(..., on_failure="return") to get it '
        "without the exception"
    )


def _hint(solution: Solution, task: Task) -> str:
    """What to write where a coefficient of the process is 0 at an end of the interval, if that may be why samples failed."""
    process, inside = task.equation.process, 1e-3 * (task.stop - task.start)
    if process is None or not bool((solution.status == Status.NON_FINITE).any()):
        return ""
    for name, t, other in (("start", task.start, task.start + inside), ("stop", task.stop, task.stop - inside)):
        for letter, value in (("α", process.alpha(t)), ("σ", process.sigma(t))):
            if value.item() < 1e-12:
                return f". {letter} is 0 at {name}={t:g}, where D, ε̂ or the coefficients of an SDE may be infinite: try solve(..., {name}={other:g})"
    return ""
