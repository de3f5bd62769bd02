"""Global error control: every sample is solved more and more tightly until two solves agree all along its path.

A local error control cannot know how the flow will carry what it allows. Beside a border between two modes it is carried further than
anything seen on the way, and two solves that both end in the wrong mode agree there. They do not agree on the way: samples stay
near a border the longer the closer they are to it, and leave it the sooner the further a solve has moved them, so that the two
are apart in between by the share of the modes' distance that the error is of the distance to the border. Hence, with T the
tolerance and z(u) the state in the chart, a sample is done when

    max_u  carry(u) |z'(u) − z(u)|  ≤  ⅔T,     |·| the RMS over elements, carry as for local errors,

for the two latest of its solves, at tolerances 2 T, 0.8 T, 0.2 T, 0.05 T, …: the difference is the error of the looser one, and the
tighter one is the result. Comparing ends alone would miss the samples that both have lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.counting import Part
from sdeflow.solution import Status
from sdeflow.solvers.base import Outcome, Task
from sdeflow.solvers.control import Flow, rms

if TYPE_CHECKING:
    from sdeflow.solvers.adams import Adams

FIRST, SECOND, TIGHTER = 2.0, 0.8, 0.25
"""Tolerances of the first two solves, and of every further one in units of the one before."""
AGREED = 2.0 / 3.0
"""Difference that is allowed, of the tolerance: the looser solve's error is at most a third of its own tolerance."""
ROUNDS = 12
"""Solves at most. The last one's tolerance is 8e-7 of what was asked."""
PLACES = 32
"""Where solves are compared: evenly in the clock."""


def integrate(solver: Adams, task: Task) -> Outcome:
    """What `Adams(global_error=True)` does.

    Returns:
        An Outcome whose error estimate is the last two ends' difference over the ratio of their tolerances less 1. Status
        NOT_CONVERGED where solves do not come to agree, with the tightest solve's states; where a tighter solve fails its status,
        with the states of the one before.
    """
    flow = Flow.of(task, solver.chart)
    places = _places(flow, task)

    def solve(task: Task, looser: float) -> Outcome:
        return solver.once(task, looser, dense=True)

    def apart(before: Outcome, some: Tensor, after: Outcome) -> tuple[Tensor, Tensor]:
        return _apart(flow, places, before, some, after)

    found, solves = refined(
        task, solver.rtol, solver.atol, solve, apart, lambda ratio: ratio - 1.0, lambda ratio: AGREED
    )
    found.dense = _joined([(rows, arrived, by.dense) for rows, arrived, by in solves]) if solver.dense else None
    return found


def refined(
    task: Task,
    rtol: float,
    atol: float,
    solve: Callable[[Task, float], Outcome],
    apart: Callable[[Outcome, Tensor, Outcome], tuple[Tensor, Tensor]],
    size: Callable[[float], float],
    limit: Callable[[float], float],
) -> tuple[Outcome, list[tuple[Tensor, Tensor, Outcome]]]:
    """Solve more and more tightly the samples whose last two solves do not agree.

    Args:
        rtol, atol: the tolerance T.
        solve: (task, looser) → its outcome with tolerances so many times as large.
        apart: (before, some, after) → how far the samples `some` of a solve are from those of the next along the path, and at the end.
        size: ratio of the two tolerances → the end's difference over the better one's error.
        limit: that ratio → over T, how far apart two solves that agree may be.

    Returns:
        The outcome, and (rows of the task, which of the solve's samples arrived, the solve) of the second and all later ones.
    """
    rows = torch.arange(task.batch, device=task.x.device)
    before, after = solve(replace(task, save_at=None, progress=None), FIRST), solve(task, SECOND)
    found = replace(after)  # a copy: `after` is still to be compared with
    solves, some, factor, ratio = [(rows, rows, after)], rows, SECOND, FIRST / SECOND
    found.error_estimate = torch.zeros_like(found.status, dtype=torch.float64)
    for turn in range(2, ROUNDS + 1):
        gap, end = apart(before, some, after)
        found.error_estimate = found.error_estimate.index_put((rows,), end / size(ratio))
        allowed = limit(ratio) * (atol + rtol * rms(after.x.detach().flatten(1)))
        some = (~(gap <= allowed) & (after.status == Status.SUCCESS)).nonzero().flatten()
        if not some.numel():
            break
        rows = rows[some]
        if turn == ROUNDS:
            found.status = found.status.index_put((rows,), torch.full_like(rows, Status.NOT_CONVERGED))
            break
        factor, ratio = TIGHTER * factor, 1.0 / TIGHTER
        before, after = after, solve(_part(task, rows), factor)
        arrived = (after.status == Status.SUCCESS).nonzero().flatten()
        solves.append((rows[arrived], arrived, after))
        _replace(found, rows, after, arrived)
    task.counter.restrict(None)
    return found, solves


def _part(task: Task, rows: Tensor) -> Task:
    """The task for the samples `rows` alone, on their own paths."""
    seeds = None if task.seeds is None else task.seeds[rows]
    path = None if task.path is None else task.path.restrict(rows)
    return replace(task, x=task.x[rows], seeds=seeds, path=path, counter=Part(task.counter, rows), progress=None)


def _places(flow: Flow, task: Task) -> list[tuple[float, Tensor]]:
    """(t, u) at which solves are compared, the end the last."""
    first, last = flow.u(torch.tensor([task.start, task.stop], dtype=torch.float64))
    u = first + (last - first) * torch.linspace(0.0, 1.0, PLACES + 1, dtype=torch.float64)[1:]
    t = flow.t(u).tolist()
    t[-1] = task.stop
    return list(zip(t, u, strict=True))


def _apart(flow: Flow, places: list[tuple[float, Tensor]], before: Outcome, some: Tensor, after: Outcome):
    """Largest carried difference along the paths, (n,), of the samples `some` of a solve from those of the next, and that of the ends."""
    gap = torch.zeros_like(some, dtype=torch.float64)
    if before.dense is None or after.dense is None:  # no step was accepted, of any sample
        return gap + torch.inf, gap + torch.nan
    for t, u in places:
        away = flow.z(t, (after.dense(t) - before.dense(t)[some]).detach())
        gap = gap.maximum(rms(away) * flow.carry(u).to(gap.device))
    return gap, rms((after.x - before.x[some]).detach().flatten(1))


def _replace(found: Outcome, rows: Tensor, by: Outcome, arrived: Tensor) -> None:
    """Write the results of a solve of some samples: the states of those that arrived."""
    for name in ("status", "accepted", "rejected"):
        setattr(found, name, getattr(found, name).index_put((rows,), getattr(by, name)))
    found.x = found.x.index_put((rows[arrived],), by.x[arrived])
    if found.states is not None and by.states is not None:
        found.states = found.states.index_put((_all(found.states), rows[arrived]), by.states[:, arrived])


def _all(states: Tensor) -> Tensor:
    return torch.arange(states.shape[0], device=states.device)[:, None]


def _joined(parts: list) -> Callable[[float | Tensor], Tensor]:
    """state(t) of the last solve of every sample."""
    (_, _, whole), *others = parts

    def state(t: float | Tensor) -> Tensor:
        x = whole(t)
        for rows, arrived, dense in others:
            if rows.numel():
                x = x.index_put((rows,), dense(t)[arrived])
        return x

    return state
