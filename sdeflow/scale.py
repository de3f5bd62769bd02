"""The scale of the data a network has learnt, for the charts' c."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.equations import Equation, ProbabilityFlowODE, ReverseSDE
from sdeflow.errors import InvalidInput
from sdeflow.grids import UniformLogSNR
from sdeflow.solve import solve
from sdeflow.solvers.exponential import UniPC


def data_scale(equation: Equation, pilot: Tensor, steps: int = 20) -> float:
    """s = (mean over components of the variance over samples of x at the data end)^½, from a coarse solve of the network's flow.

    The charts `StraightLine(c)` and `Trigonometric(c)` suit data of scale c, within a factor of 2 or 3; their default 0.5 is for data in
    [−1, 1]. Write `sf.Adams(chart=sf.StraightLine(c=sf.data_scale(equation, pilot)))` for data of any other scale.

    Args:
        equation: a `ProbabilityFlowODE` or `ReverseSDE`; its flow (η = 0) is solved.
        pilot: start states at t_max (n, *event), n ≥ 2, e.g. `process.prior((32, *event), seed=1234)`.
        steps: of UniPC of order 2, even in λ, a rule that needs no c. Each pilot sample costs so many evaluations.

    The error is that of a variance from n samples, about s/√(2n·k) with k independent components, and the coarse solve's.

    Raises:
        InvalidInput: no diffusion equation, fewer than two samples, or the network gives NaN or infinity.
    """
    if not isinstance(equation, ReverseSDE) or equation.predict is None:
        raise InvalidInput(
            f"data_scale needs a diffusion equation; got {equation!r}. Write sf.ProbabilityFlowODE(predict)"
        )
    check_pilot(pilot)
    flow = ProbabilityFlowODE(equation.predict)
    with torch.no_grad():
        end = solve(flow, UniPC(order=2, steps=steps, grid=UniformLogSNR()), pilot, on_failure="return").x
    scale = end.flatten(1).cpu().double().var(0).mean().sqrt().item()
    if not 0.0 < scale < float("inf"):
        raise InvalidInput(f"the pilot's ends have scale {scale}: the network's samples are constant, NaN or infinite")
    return scale


def check_pilot(pilot: Tensor) -> None:
    """Refuse what are not at least two start states."""
    if not isinstance(pilot, Tensor) or pilot.ndim < 2 or not pilot.is_floating_point() or pilot.shape[0] < 2:
        given = tuple(pilot.shape) if isinstance(pilot, Tensor) else type(pilot).__name__
        raise InvalidInput(
            f"pilot must be at least 2 start states (n, *event), a floating tensor; got {given}. Write "
            "pilot=process.prior((32, *event), seed=1234)"
        )
