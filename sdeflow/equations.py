"""Ordinary and stochastic differential equations: dx = drift(t, x) dt + diffusion(t, x) dw.

`drift` and `diffusion` are all that generic solvers see. Diffusion equations also show their `process` and `predict`,
which solvers
with an exact linear part need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sdeflow import counting
from sdeflow.charts import BoundChart, Chart, PlainTime
from sdeflow.errors import InvalidInput, finite
from sdeflow.networks import trainable
from sdeflow.predictions import Prediction, version_of
from sdeflow.processes import Process, Time, as_time, expand

Noise = Literal["none", "additive", "diagonal", "scalar", "general"]
NOISES: tuple[Noise, ...] = ("none", "additive", "diagonal", "scalar", "general")
Field = Callable[[Tensor, Tensor], Tensor]


class Equation:
    """An ODE or SDE of the user's own: dx = drift(t, x) dt + diffusion(t, x) dw.

    Args:
        drift: drift(t, x), x (batch, *event), t float64, 0-d or, from solvers with steps of each sample's own,
            (batch, 1, ..., 1) of x's
            dimensions, so that `torch.cos(t) * x` is right for both; returns x's shape, floating numbers.
        diffusion: diffusion(t, x), or None for an ODE. What it returns depends on `noise`.
        noise: "diagonal": each element has its own Brownian motion, diffusion broadcasts against x and may depend on
            it; "additive": the
            same, but independent of x; "scalar": one Brownian motion a sample, diffusion shaped as x; "general":
            (batch, d, m) for
            flattened states (batch, d) and m Brownian motions.
        start, stop: the interval `solve` uses when none is given; either order.
        calculus: "ito" or "stratonovich".

    One evaluation is one call of `drift`, or, where the drift calls predictions, what those count.

    Example:
        >>> bank = Equation(lambda t, x: 0.04 * x)
        >>> noise = Equation(lambda t, x: -x, lambda t, x: 0.5, noise="additive")
    """

    process: Process | None = None
    predict: Prediction | None = None
    eta: float = 0.0

    def __init__(
        self,
        drift: Field,
        diffusion: Callable[[Tensor, Tensor], Tensor | float] | None = None,
        noise: Noise = "diagonal",
        start: float | None = None,
        stop: float | None = None,
        calculus: Literal["ito", "stratonovich"] = "ito",
    ):
        if not callable(drift) or not (diffusion is None or callable(diffusion)):
            raise InvalidInput(
                "drift and diffusion must be functions of (t, x); write sf.Equation(lambda t, x: 0.04 * x)"
            )
        if noise not in NOISES or (noise == "none") != (diffusion is None and noise == "none"):
            raise InvalidInput(
                f"noise must be one of {', '.join(NOISES[1:])} for an equation with a diffusion; got {noise!r}"
            )
        if calculus not in ("ito", "stratonovich"):
            raise InvalidInput(f'calculus must be "ito" or "stratonovich"; got {calculus!r}')
        self._drift, self._diffusion = drift, diffusion
        self._flat = False  # whether the drift is written for times (batch,) rather than (batch, 1, ..., 1)
        self.noise: Noise = "none" if diffusion is None else noise
        self.start, self.stop, self.calculus = start, stop, calculus

    def __repr__(self) -> str:
        return f"Equation({'ODE' if self.noise == 'none' else f'{self.noise} noise'})"

    @property
    def stochastic(self) -> bool:
        """True for an SDE."""
        return self.noise != "none"

    def parameters(self) -> tuple[Tensor, ...]:
        """What wants a gradient in the prediction, or in a drift that is a module: what adjoints differentiate by."""
        return trainable(getattr(self, "_drift", None) if self.predict is None else self.predict)

    def drift(self, t: Time, x: Tensor) -> Tensor:
        """drift(t, x), shaped as x (batch, *event); counted as one evaluation a sample unless predictions inside
        counted.

        Raises:
            InvalidInput: the function returned another shape than x's, or changed x or t in place.
        """
        calls, t = counting.before(), as_time(t, x.device)
        versions = version_of(x), version_of(t)
        value = self._called(t, x.clone() if x.is_inference() else x)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(
                f"drift(t, x) returned {got} for a state of shape {tuple(x.shape)}; it must return a tensor of the "
                "state's shape"
            )
        if not value.is_floating_point():
            raise InvalidInput(
                f"drift(t, x) returned {value.dtype}, expected floating numbers; write lambda t, x: drift(t, x).to(x.dtype)"
            )
        if (version_of(x), version_of(t)) != versions:
            raise InvalidInput(
                "drift(t, x) changed its input in place, which is the solver's own; write "
                "lambda t, x: drift(t.clone(), x.clone())"
            )
        counting.after(calls, x.shape[0])
        return value.to(x.dtype, copy=True)  # a drift may write its next value where it wrote this one

    def _called(self, t: Time, x: Tensor) -> Tensor:
        """The user's drift; one written for times (batch,), as `t[:, None] * x`, is found out at its first call."""
        t = as_time(t, x.device)
        if t.ndim == 0 or self._flat:
            return self._drift(t, x)
        try:
            value = self._drift(_beside(t, x), x)
            if getattr(value, "shape", None) == x.shape:
                return value
        except (RuntimeError, IndexError):
            pass
        value = self._drift(t, x)
        if getattr(value, "shape", None) == x.shape:
            self._flat = True
        return value

    def diffusion(self, t: Time, x: Tensor) -> Tensor:
        """diffusion(t, x) in x's dtype: broadcastable to x, or (batch, d, m) for general noise; zeros (0-d) for an
        ODE.

        Raises:
            InvalidInput: the function returned what does not fit the noise.
        """
        if self._diffusion is None:
            return x.new_zeros(())
        t = as_time(t, x.device)
        try:
            value = self._diffusion(_beside(t, x), x)
        except (RuntimeError, IndexError):
            if t.ndim == 0:
                raise
            value = None
        if t.ndim and not _fits(value, x, self.noise):
            value = self._diffusion(t, x)  # written for times (batch,), as `t[:, None]`
        if isinstance(value, int | float):
            value = x.new_tensor(value)
        if not isinstance(value, Tensor) or not _fits(value, x, self.noise):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            wanted = (
                f"(batch, d, m) = ({x.shape[0]}, {x[0].numel()}, m)"
                if self.noise == "general"
                else f"a number or a tensor that broadcasts to {tuple(x.shape)}"
            )
            raise InvalidInput(
                f"diffusion(t, x) returned {got} for a state of shape {tuple(x.shape)} and {self.noise} noise; it must "
                f"return {wanted}"
            )
        return value.to(x.dtype)


def check_additive(equation: Equation, t: float, x: Tensor) -> None:
    """Refuse an equation of the user's own whose noise is said to be additive and depends on the state at time t.

    Methods for additive noise would solve another equation, without a sign of it.

    Raises:
        InvalidInput: the diffusion at x and at other states differ.
    """
    if equation.noise != "additive" or getattr(equation, "_diffusion", None) is None:
        return
    with torch.no_grad():
        here, there = (equation.diffusion(t, y) for y in (x, 1.1 * x + 0.1))
    if here.shape != there.shape or not torch.equal(here.nan_to_num(), there.nan_to_num()):
        raise InvalidInput(
            f'{equation!r} is said to have additive noise, but diffusion(t, x) changes with x; write sf.Equation(drift, diffusion, noise="diagonal")'
        )


def _beside(t: Time, x: Tensor) -> Tensor:
    """t as the user's functions get it: times of the samples (batch,) stand beside their samples, (batch, 1, ..., 1).

    Left as (batch,), `torch.cos(t) * x` would fail, or, where the last dimension is as long as the batch, be silently
    wrong.
    """
    t = as_time(t, x.device)
    return t if t.ndim == 0 else t.reshape(-1, *(1,) * (x.ndim - 1))


def _fits(value: object, x: Tensor, noise: Noise) -> bool:
    if not isinstance(value, Tensor):
        return isinstance(value, int | float) and noise != "general"
    if noise == "general":
        return value.ndim == 3 and value.shape[:2] == (x.shape[0], x[0].numel())
    return value.ndim <= x.ndim and all(
        n in (1, m) for n, m in zip(reversed(value.shape), reversed(x.shape), strict=False)
    )


class _DiffusionEquation(Equation):
    """An equation of a diffusion process, written in the process's own time."""

    def __init__(self, process: Process, predict: Prediction | None, noise: Noise, start: float, stop: float):
        self.process, self.predict = process, predict
        self.noise, self.calculus = noise, "ito"
        self.start, self.stop = start, stop

    def chart(self, chart: Chart) -> BoundChart:
        """`chart` bound to this equation's process."""
        assert self.process is not None
        return chart.bind(self.process)


class ForwardSDE(_DiffusionEquation):
    """dx = f x dt + g dw, from t_min to t_max by default. No network."""

    def __init__(self, process: Process):
        if not isinstance(process, Process):
            raise InvalidInput(
                f"ForwardSDE needs a process; got {type(process).__name__}. Write sf.ForwardSDE(sf.VP())"
            )
        super().__init__(process, None, "additive", process.t_min, process.t_max)
        self._process = process
        self.eta = 1.0

    def __repr__(self) -> str:
        return f"ForwardSDE({self._process!r})"

    def drift(self, t: Time, x: Tensor) -> Tensor:
        """f(t) x."""
        return expand(self._process.f(as_time(t, x.device)), x) * x

    def diffusion(self, t: Time, x: Tensor) -> Tensor:
        """g(t), broadcastable to x."""
        return expand(self._process.g(as_time(t, x.device)), x)


class ReverseSDE(_DiffusionEquation):
    """dx = [f x − (1+η²)/2 · g² s] dt + η g dw̄, solved from t_max down to t_min by default.

    η = 0 is the probability-flow ODE, η = 1 the reverse SDE of Anderson 1982; every η ≥ 0 keeps the marginals under the
    exact score.
    η² is the `eta` of k-diffusion's SDE samplers; DDIM's η multiplies the posterior standard deviation instead.
    """

    def __init__(self, predict: Prediction, eta: float = 1.0):
        if not isinstance(predict, Prediction):
            raise InvalidInput(
                f"{type(self).__name__} needs a prediction; got {type(predict).__name__}. Write "
                f"sf.{type(self).__name__}(sf.NoisePrediction(network, process))"
            )
        if not (finite(eta) and eta >= 0):
            raise InvalidInput(f"eta must be a finite number ≥ 0; got {eta!r}")
        process = predict.process
        super().__init__(process, predict, "additive" if eta > 0 else "none", process.t_max, process.t_min)
        self._bound, self._predict, self.eta = PlainTime().bind(process), predict, float(eta)

    def __repr__(self) -> str:
        return f"ReverseSDE({self._predict!r}, eta={self.eta:g})"

    def drift(self, t: Time, x: Tensor) -> Tensor:
        """f x − (1+η²)/2 · g² s at (t, x), shaped as x; one network call."""
        return self._bound.drift(self._predict, as_time(t, x.device), x, self.eta)

    def diffusion(self, t: Time, x: Tensor) -> Tensor:
        """η g(t), broadcastable to x."""
        return expand(self._bound.diffusion(as_time(t, x.device), self.eta), x)


class ProbabilityFlowODE(ReverseSDE):
    """dx = [f x − ½ g² s] dt = (α̇D + σ̇ε̂) dt: the deterministic flow with the process's marginals (Song et al.
    2021, eq. 13)."""

    def __init__(self, predict: Prediction):
        super().__init__(predict, eta=0.0)

    def __repr__(self) -> str:
        return f"ProbabilityFlowODE({self._predict!r})"
