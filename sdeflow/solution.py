"""What a solve returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput


class Status(IntEnum):
    """How one sample ended. `solution.status` holds these as int64."""

    SUCCESS = 0
    NON_FINITE = 1
    STEP_UNDERFLOW = 2
    MAX_STEPS = 3
    NOT_CONVERGED = 4


@dataclass(frozen=True)
class Solution:
    """Result of `solve`.

    Attributes:
        x: end state, (batch, *event), dtype and device of the start; for a failed sample its last state, where sdeflow's own methods on
            fixed grids go on to the end with what is not finite.
        t: the times of `states`, float64, (n,): `save_at` if given, else the one end time.
        states: states at `t`, (n, batch, *event); NaN where a failed sample did not arrive. With `save_at`, those before a solver's
            `denoise`, which is a step from `stop` on to clean data: `x` alone has it.
        calls: batched forward passes of the network.
        evaluations: network evaluations of every sample, int64 (batch,): rejected steps, probes and the second half
            of guidance included.
        accepted: accepted steps of every sample, int64 (batch,).
        rejected: rejected steps of every sample, int64 (batch,).
        status: `Status` codes, int64 (batch,).
        wall_time: seconds the solve took.
        error_estimate: estimated end-point error of every sample (RMS over its elements), (batch,), if asked for.
    """

    x: Tensor
    t: Tensor
    states: Tensor
    calls: int
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor
    status: Tensor
    wall_time: float
    error_estimate: Tensor | None = None
    dense: Callable[[float | Tensor], Tensor] | None = field(default=None, repr=False)

    @property
    def success(self) -> Tensor:
        """True for every sample that reached the end, (batch,) bool."""
        return self.status == Status.SUCCESS

    def at(self, t: float | Tensor) -> Tensor:
        """State at time t inside the solved interval, (batch, *event), by the solver's own interpolant.

        Raises:
            InvalidInput: the solver kept no interpolant; ask with `dense=True` where the solver offers it, else
                `save_at`.
        """
        if self.dense is None:
            raise InvalidInput(
                "this solution holds no interpolant: the solver offers none or was not asked for one; "
                "write solver(..., dense=True) where it is offered, or solve(..., save_at=[t, ...])"
            )
        return self.dense(t)

    def summary(self) -> str:
        """One line: samples per status, evaluations, steps."""
        codes, counts = torch.unique(self.status, return_counts=True)
        ended = ", ".join(f"{int(n)} {Status(int(c)).name}" for c, n in zip(codes, counts, strict=True))
        mean = self.evaluations.double().mean().item() if self.evaluations.numel() else 0.0
        return f"{ended}; {mean:.1f} evaluations a sample in {self.calls} calls"
