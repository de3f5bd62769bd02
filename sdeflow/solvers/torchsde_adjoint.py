"""Gradients of an SDE solve by torchsde's adjoint SDE (Li et al. 2020), on the steps the solve took.

For dy = f ds + g ∘ dw the adjoint a = ∂L/∂y obeys da = −(∂f/∂y)ᵀa ds − (∂g/∂y)ᵀa ∘ dw along the same path, and
∂L/∂θ = ∫ (∂f/∂θ)ᵀa ds + (∂g/∂θ)ᵀa ∘ dw. It is solved backwards together with y, from the states the solve gives out: nothing else
is kept, however many steps there are. The equation and its steps are the library's; the loop over the steps is here, as it is
for the solve itself, because the library's runs on even steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchsde._brownian.derived import ReverseBrownian
from torchsde._core import methods as library
from torchsde._core.adjoint_sde import AdjointSDE
from torchsde._core.base_sde import ForwardSDE as LibrarySDE

from sdeflow.solvers.torchsde_equation import TorchsdeEquation

METHODS = {
    ("ito", "diagonal"): "milstein",
    ("ito", "scalar"): "euler",
    ("ito", "general"): "euler",
    ("stratonovich", "diagonal"): "midpoint",
    ("stratonovich", "scalar"): "midpoint",
    ("stratonovich", "general"): "midpoint",
}
"""The library's choices of the adjoint's method. Additive noise is additive for the adjoint's y and absent from a, so both
calculi are one there and Heun's method, of order 2 in the drift, serves (the library would take Euler's)."""


@dataclass
class Trace:
    """What a solve leaves for its adjoint: the ends of its steps on the forward clock, and which of them were given out.

    Attributes:
        s: clock at the ends of the steps, the start first.
        given: indices into s of the states given out, in order; the end last.
        states: those states, (batch, d) each.
        dead: samples that had failed by then, (batch,) bool each.
        times: the output times those states belong to, None for an end that was not asked for.
    """

    s: list[Tensor]
    given: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    dead: list[Tensor] = field(default_factory=list)
    times: list[float | None] = field(default_factory=list)

    def give(self, y: Tensor, dead: Tensor, time: float | None) -> None:
        """The state at the end of the last step is given out."""
        self.given.append(len(self.s) - 1)
        self.states.append(y)
        self.dead.append(dead)
        self.times.append(time)


@dataclass(frozen=True)
class Adjoint:
    """The backward equation of one solve, on the noise `bm` of the solve."""

    equation: Callable[[str], TorchsdeEquation]
    noise: str
    calculus: str
    bm: Any

    def stepper(self, params: Sequence[Tensor], y: Tensor) -> Any:
        """The library's solver object of the adjoint equation."""
        calculus = "stratonovich" if self.noise == "additive" else self.calculus
        method = "heun" if self.noise == "additive" else METHODS[calculus, self.noise]
        shapes = [y.shape, y.shape, *(p.shape for p in params)]
        sde = AdjointSDE(LibrarySDE(self.equation(calculus)), list(params), shapes)
        settings = {"dt": 0.0, "adaptive": False, "rtol": 0.0, "atol": 0.0, "dt_min": 0.0, "options": {}}
        return library.select(method=method, sde_type=calculus)(sde=sde, bm=ReverseBrownian(self.bm), **settings)


class _Solve(torch.autograd.Function):
    """(start, parameters) to the states given out, (k, batch, d)."""

    @staticmethod
    def forward(ctx: Any, walk: Callable[[], Trace], adjoint: Adjoint, y: Tensor, *params: Tensor) -> Tensor:
        trace = walk()
        states = torch.stack(trace.states)
        ctx.adjoint, ctx.s, ctx.given, ctx.dead = adjoint, trace.s, trace.given, trace.dead[-1]
        ctx.save_for_backward(states, *params)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        states, *params = ctx.saved_tensors
        (grad,), s = grads, ctx.s
        # a sample that failed has no gradient: with y = 0 and a = 0 it adds nothing to the parameters' either
        alive = ~ctx.dead[:, None]
        states, grad = (torch.where(alive, v, 0.0) for v in (states, grad))
        stepper = ctx.adjoint.stepper(params, states[0])
        a = torch.zeros_like(states[0])
        sums = [torch.zeros_like(p) for p in params]
        ends = [*reversed(ctx.given), 0]
        for k in range(len(ctx.given)):
            # at every state given out, y is that state again and its own gradient joins
            at = len(ctx.given) - 1 - k
            y, a = states[at], a + grad[at]
            flat = torch.cat([v.reshape(-1).to(y) for v in (y, a, *sums)])[None]
            for n in range(ends[k], ends[k + 1], -1):
                flat, _ = stepper.step(-s[n], -s[n - 1], flat, ())
            y, a, sums = _split(flat, y, params)
            a = torch.where(alive, a, 0.0)
        return None, None, a, *sums


def _split(flat: Tensor, y: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    sizes = [y.numel(), y.numel(), *(p.numel() for p in params)]
    y_, a, *sums = flat[0].split(sizes)
    return y_.reshape(y.shape), a.reshape(y.shape), [v.reshape(p.shape) for v, p in zip(sums, params, strict=True)]


def by_adjoint(walk: Callable[[], Trace], adjoint: Adjoint, y: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The states `walk` gives out, (k, batch, d), differentiable in y and the parameters by the adjoint SDE."""
    return _Solve.apply(walk, adjoint, y, *params)
