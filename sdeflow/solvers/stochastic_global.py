"""Global error control on Brownian paths: every sample is solved more and more tightly on its one path until two solves agree.

A local error control holds what a step adds; beside a border between two modes the drift multiplies that by any factor. With an error e
where the modes part, a sample goes astray if it is within e of the border, which a share ∝ e of them is, and then it is off by the
modes' distance Δ: the RMS over samples falls as Δ√e, however well the steps are chosen. On one path two solves can be compared, as
for flows (`global_error`): with T the tolerance, two solves at tolerances T₁ > T₂ and r = T₁/T₂,

    max_u  carry(u) |z₁(u) − z₂(u)|  ≤  ⅔T √(1 + r²)

makes a sample done. The two take steps of their own, so that their errors are two independent draws of sizes r : 1, and the difference's
RMS is √(1 + r²) times the better one's. Steps fall as T^{2/3}, and so does the longest one that is allowed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.solvers.base import Outcome, Task, merge, output_nodes
from sdeflow.solvers.control import rms
from sdeflow.solvers.global_error import AGREED, FIRST, refined
from sdeflow.solvers.stochastic_clocks import STRIDE, Clock, rho_where

if TYPE_CHECKING:
    from sdeflow.solvers.stochastic import AdditiveMethod

PLACES = 8
"""Where solves are compared if nothing is known of the data; else once in the longest step."""


def integrate(solver: AdditiveMethod, task: Task) -> Outcome:
    """What `global_error=True` does.

    Returns:
        An Outcome of the tighter solve of every sample, whose error estimate is the difference of its last two ends over √(1 + r²).
        Status NOT_CONVERGED where solves do not come to agree; where a tighter solve fails its status, with the states of the one before.
    """
    clock = solver.clock(task)
    times = _places(clock)
    shown = times
    if task.save_at is not None:
        nodes = merge(torch.cat([times.new_tensor([task.start]), times]), task.save_at)
        shown = nodes if task.save_at[0] == task.start else nodes[1:]
    at = output_nodes(shown, times)
    weight = clock.carry(clock.u(times)) * clock.units(times)

    def solve(task: Task, looser: float) -> Outcome:
        # where steps are as long as they may be, those of the two would be the same, and so the errors
        stride = STRIDE * (looser / FIRST) ** (2.0 / 3.0)
        return solver.once(replace(task, save_at=shown), looser, stride)

    def size(ratio: float) -> float:
        return math.sqrt(1.0 + ratio**2)

    def apart(before: Outcome, some: Tensor, after: Outcome) -> tuple[Tensor, Tensor]:
        return _apart(before, some, after, at, weight)

    rtol, atol = solver.rtol or 0.0, solver.atol or 0.0
    found, _ = refined(task, rtol, atol, solve, apart, size, lambda ratio: AGREED * size(ratio))
    assert found.states is not None
    found.states = None if task.save_at is None else found.states[output_nodes(shown, task.save_at)]
    return found


def _places(clock: Clock) -> Tensor:
    """Times at which solves are compared, the end the last."""
    start, stop = clock.start, clock.stop
    process = clock.equation.process
    if not clock.known or process is None:
        return torch.linspace(start, stop, PLACES + 1, dtype=torch.float64)[1:]
    first, last = clock.ends
    number = math.ceil(abs(last - first) / STRIDE)
    pace = torch.linspace(first, last, number + 1, dtype=torch.float64)[1:-1]
    times = process.time_of_rho(rho_where(pace, *clock.between)).clamp(min(start, stop), max(start, stop))
    return torch.cat([times, times.new_tensor([stop])])


def _apart(before: Outcome, some: Tensor, after: Outcome, at: list[int], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Largest carried difference along the paths, (n,), of the samples `some` of a solve from those of the next, and that of the ends."""
    assert before.states is not None and after.states is not None
    away = torch.stack([(after.states[n] - before.states[n][some]).detach().flatten(1) for n in at])
    gap = (rms(away) * weight[:, None].to(away.device)).amax(0)
    return gap, rms((after.x - before.x[some]).detach().flatten(1))
