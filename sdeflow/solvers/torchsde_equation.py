"""Equations and noise as torchsde sees them."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
import torchsde
from torch import Tensor

from sdeflow.equations import Equation
from sdeflow.errors import InvalidInput
from sdeflow.random import standard_normal
from sdeflow.solvers.base import Task

STEP_STREAM = 2
"""Random stream of the steps, apart from those of priors, data and paths."""


class TorchsdeEquation:
    """f, g, noise_type and sde_type on a forward clock: what `torchsde.sdeint` takes. Made by `as_torchsde`.

    f(s, y) and g(s, y) with y (batch, d). The last drifts are remembered by (s, y itself), because srk asks for the same
    one several times; the count of evaluations is what is really evaluated.
    """

    def __init__(
        self,
        drift: Callable[[Tensor, Tensor], Tensor],
        diffusion: Callable[[Tensor, Tensor], Tensor],
        noise_type: str,
        sde_type: str,
        sign: float,
        event: tuple[int, ...] | None,
        remembered: int = 4,
    ):
        self.noise_type, self.sde_type = noise_type, sde_type
        self._drift, self._diffusion, self._sign, self._event = drift, diffusion, sign, event
        self._memo: deque[tuple[float, Tensor, Tensor]] = deque(maxlen=remembered)

    def _state(self, y: Tensor) -> Tensor:
        return y if self._event is None else y.reshape(-1, *self._event)

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """The drift along the forward clock, (batch, d)."""
        at = float(s)
        for known, state, value in self._memo:
            if state is y and known == at:
                return value
        value = (self._sign * self._drift(self._sign * s, self._state(y))).reshape(y.shape)
        self._memo.append((at, y, value))
        return value

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """The diffusion: (batch, d) for diagonal noise, (batch, d, m) for others."""
        value = self._diffusion(self._sign * s, self._state(y))
        if self.noise_type == "general":
            return value.expand(y.shape[0], *value.shape[-2:])
        state = self._state(y)
        value = value.expand(state.shape).reshape(y.shape)
        return value[..., None] if self.noise_type == "scalar" else value


class AdditiveEquation(TorchsdeEquation):
    """Additive noise without its (batch, d, d) matrix: the same g on the diagonal, known by its products alone."""

    def g_prod(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
        value = self._diffusion(self._sign * s, self._state(y))
        return (value * self._state(v)).reshape(y.shape)


def as_torchsde(
    equation: Equation,
    backward: bool | None = None,
    event: tuple[int, ...] | None = None,
    sde_type: Literal["ito", "stratonovich"] | None = None,
) -> TorchsdeEquation:
    """An SDE as the object `torchsde.sdeint` solves; on the clock s = −t if it runs from large t to small.

    Additive noise is told as diagonal, which every method of the library takes without a bm.

    Args:
        equation: an equation with noise.
        backward: whether t decreases; default: as the equation's own start and stop say, else forward.
        event: the event's shape where it is not flat; states are then (batch, prod(event)).
        sde_type: "stratonovich" for the methods that need it, on additive noise only; default the equation's calculus.

    Raises:
        InvalidInput: the equation has no noise, or another calculus would change its meaning.

    Example:
        >>> torchsde.sdeint(sf.as_torchsde(sf.ReverseSDE(predict)), noise, torch.tensor([-1.0, -1e-3]), dt=0.01, method="srk")
    """
    if not isinstance(equation, Equation) or not equation.stochastic:
        raise InvalidInput(f"as_torchsde needs an equation with noise; got {equation!r}. ODEs go to torchdiffeq.odeint")
    if sde_type is not None and sde_type != equation.calculus and equation.noise != "additive":
        raise InvalidInput(
            f"{equation!r} is {equation.calculus}; with noise that depends on the state it is another equation as {sde_type}"
        )
    if backward is None:
        backward = equation.start is not None and equation.stop is not None and equation.start > equation.stop
    kind = "diagonal" if equation.noise == "additive" else equation.noise
    sign = -1.0 if backward else 1.0
    return TorchsdeEquation(equation.drift, equation.diffusion, kind, sde_type or equation.calculus, sign, event)


# --- noise


class _Noise(torchsde.BaseBrownian):
    """Increments as torchsde asks for them: W over [ta, tb], and U = h(W/2 + H) = ∫(w − w(ta)) du on demand."""

    def __init__(
        self, draw: Callable[[float, float, bool], tuple[Tensor, Tensor | None]], shape: tuple[int, int], like: Tensor
    ):
        self._draw, self._shape, self._like = draw, torch.Size(shape), like

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        ta, tb = (0.0, float(ta)) if tb is None else (float(ta), float(tb))
        W, H = self._draw(ta, tb, return_U)
        return W if H is None else (W, (0.5 * W + H) * (tb - ta))

    def __repr__(self) -> str:
        return f"_Noise{tuple(self._shape)}"

    @property
    def dtype(self):
        return self._like.dtype

    @property
    def device(self):
        return self._like.device

    @property
    def shape(self):
        return self._shape

    @property
    def levy_area_approximation(self):
        return "space-time"


def along(path: Any, sign: float, shape: tuple[int, int], like: Tensor) -> _Noise:
    """The noise of a path: increment(s, t) → (W, H), in the clock u = sign·s."""

    def draw(ta: float, tb: float, area: bool) -> tuple[Tensor, Tensor | None]:
        W, H = (v.reshape(shape).to(like) for v in path.increment(sign * ta, sign * tb))
        return W, H if area else None

    return _Noise(draw, shape, like)


def stepwise(seeds: Tensor, s: Tensor, shape: tuple[int, int], like: Tensor) -> _Noise:
    """Independent normals for the steps of a grid, keyed by (seed, number of the step)."""
    number = {at: n for n, at in enumerate(s.tolist())}

    def draw(ta: float, tb: float, area: bool) -> tuple[Tensor, Tensor | None]:
        z = standard_normal(
            seeds, (2 if area else 1, shape[1]), number[ta], STEP_STREAM, dtype=like.dtype, device=like.device
        ) * math.sqrt(tb - ta)
        return z[:, 0], z[:, 1] / math.sqrt(12.0) if area else None

    return _Noise(draw, shape, like)


def library_interval(task: Task, s: Tensor, channels: int, like: Tensor, levy: str) -> torchsde.BrownianInterval:
    seeds = task.seeds
    assert seeds is not None
    digest = hashlib.blake2b(seeds.cpu().numpy().tobytes(), digest_size=8).digest()
    step = ((s[-1] - s[0]) / (s.numel() - 1)).item()
    return torchsde.BrownianInterval(
        t0=s[0].item(),
        t1=s[-1].item(),
        size=(task.batch, channels),
        dtype=like.dtype,
        device=like.device,
        entropy=int.from_bytes(digest, "little"),
        dt=step,
        levy_area_approximation=levy,
    )
