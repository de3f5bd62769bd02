"""The adaptive reverse-SDE solver of Jolicoeur-Martineau et al. 2021, as published and with its bias cured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.brownian import BrownianPath
from sdeflow.errors import InvalidInput
from sdeflow.processes import expand
from sdeflow.random import standard_normal
from sdeflow.solvers.base import Facts, Outcome, Solver, Task
from sdeflow.solvers.control import Attempt, check_tolerances, drive, rms
from sdeflow.solvers.stochastic import NoDense, path_of
from sdeflow.solvers.stochastic_clocks import Clock

FRESH_STREAM = 3
"""Random stream of the normals drawn anew at every try."""


@dataclass(frozen=True, kw_only=True)
class GottaGoFast(Solver):
    """x′ = x + hf(t, x) + g(t)W, x̃ = x + hf(t + h, x′) + g(t + h)W, x″ = ½(x′ + x̃), in the equation's own time.

    δ = max(ε_abs, ε_rel max(|x′|, |x′_prev|)), E = ‖(x″ − x′)/δ‖₂/√n per sample; x″ is accepted if E ≤ 1, and
    h ← θ h E^{−r} either way. The first step is the native loop's own guess instead of a fixed 0.01.

    Args:
        rtol, atol: ε_rel and ε_abs (published: 0.01…0.05, and 0.0078 for images in [−1, 1]).
        bridge: True asks the sample's Brownian path again after a rejection, over the shorter step. False draws fresh noise, as
            published: W is then selected for being small, which biases the law, most in few dimensions.
        safety, exponent: θ and r.
        max_steps: tries allowed a sample.
    """

    rtol: float = 0.05
    atol: float = 0.0078
    bridge: bool = True
    safety: float = 0.9
    exponent: float = 0.9
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_tolerances("GottaGoFast", self.rtol, self.atol, self.max_steps)
        if not (0.0 < self.safety < 1.0 and 0.5 <= self.exponent <= 1.0):
            raise InvalidInput(
                f"safety must lie in (0, 1) and exponent in [0.5, 1]; got {self.safety} and {self.exponent}"
            )

    @property
    def facts(self) -> Facts:
        name = "Gotta Go Fast" if self.bridge else "Gotta Go Fast (fresh noise)"
        strong = 1.0 if self.bridge else None
        return Facts(name, None, strong, 1.0, 2.0, True, ("additive",), "drift", "Jolicoeur-Martineau et al. 2021")

    def integrate(self, task: Task) -> Outcome:
        clock = Clock.plain(task, None)
        if not self.bridge and task.seeds is None:
            raise InvalidInput(
                "GottaGoFast(bridge=False) draws fresh noise, which no path holds; give seed=, not path="
            )
        seeds = task.seeds if task.seeds is not None else path_of(task).seeds
        stepper = _Stepper(self, clock, path_of(task), seeds)
        return drive(clock, task, stepper, self.rtol, self.atol, self.max_steps)


class _Stepper(NoDense):
    def __init__(self, solver: GottaGoFast, clock: Clock, path: BrownianPath, seeds: Tensor):
        self.solver, self.clock, self.path, self.seeds, self.tries = solver, clock, path, seeds, 0

    def begin(self, u: Tensor, z: Tensor, f: Tensor) -> None:
        self.previous = self.euler = z

    def attempt(self, u: Tensor, z: Tensor, step: Tensor, end: Tensor, allowed: Tensor) -> Attempt:
        solver, clock, h = self.solver, self.clock, expand(step, z)
        if solver.bridge:
            W = self.path.increment(u, end)[0].flatten(1).to(z.dtype)
        else:
            fresh = standard_normal(self.seeds, z.shape[1:], self.tries, FRESH_STREAM, z.dtype, z.device)
            W = h.abs().sqrt() * fresh
        self.tries += 1
        self.euler = z + h * clock.rhs(u, z) + clock.noise(u, z) * W
        tilde = z + h * clock.rhs(end, self.euler) + clock.noise(end, z) * W
        heun = 0.5 * (self.euler + tilde)
        delta = (solver.rtol * torch.maximum(self.euler.abs(), self.previous.abs())).clamp_min(solver.atol)
        # gradients are those of the steps taken, not of their choice
        error = rms(((heun - self.euler) / delta).detach())
        change = solver.safety * error.clamp_min(1e-6) ** -solver.exponent
        return Attempt(heun, error, change, change)

    def commit(self, ok: Tensor) -> None:
        self.previous = torch.where(ok[:, None], self.euler, self.previous)

    def keep(self, rows: Tensor) -> None:
        self.previous, self.euler, self.seeds = self.previous[rows], self.euler[rows], self.seeds[rows]
        self.path = self.path.restrict(rows)
