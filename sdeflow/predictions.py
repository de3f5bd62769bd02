"""What a network says of x_t, brought to one form.

Every usual target is linear in the state and the network's output: D = E[x_0 | x_t] and ε̂ = (x − αD)/σ are
a x + b·output with coefficients of t alone. A `Prediction` therefore answers one question, `linear(t, p, q)`: the two
numbers that turn (x, output) into p·D + q·ε̂. Score s = −ε̂/σ, velocity dx/dt = α̇D + σ̇ε̂ and every drift follow,
each from one network call, without cancelling detours through another target.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow import counting
from sdeflow.errors import InvalidInput
from sdeflow.networks import trainable
from sdeflow.processes import Process, Time, as_time, expand

Network = Callable[..., Tensor]


class Prediction(ABC):
    """A network, the process it was trained on, and what its output means.

    Args:
        network: `network(x, t)` with x (batch, *event) and t (batch,); returns a tensor shaped as x.
        process: the forward process.
        time: maps t (float64, (batch,)) to what the network expects, e.g. `lambda t: 1000 * t`; default: t itself.
        dtype: dtype the network computes in; default: that of a module's first floating parameter, else the state's.
            Output is cast back to the
            state's dtype; time is cast to the network's dtype but never below float32 (999 is no bfloat16 number).

    All methods take x (batch, *event) and t (a float, a 0-d or a (batch,) tensor), call the network once and count one
    evaluation a sample.

    Raises:
        InvalidInput: the network returns something else than one tensor shaped as x, or changes its input in place.
    """

    def __init__(
        self,
        network: Network,
        process: Process,
        time: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not callable(network) or isinstance(network, type):
            given = f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__
            raise InvalidInput(f"network must be callable as network(x, t); got {given}")
        if not isinstance(process, Process):
            raise InvalidInput(
                f"process must be a Process, e.g. sf.VP(); got {type(process).__name__}. Write "
                f"{type(self).__name__}(network, sf.VP())"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise InvalidInput(f"dtype must be a floating dtype or None; got {dtype}")
        self.network, self.process, self.time, self.dtype = network, process, time, dtype

    def __repr__(self) -> str:
        name = getattr(self.network, "__name__", type(self.network).__name__)
        return f"{type(self).__name__}({name}, {self.process!r})"

    def parameters(self) -> tuple[Tensor, ...]:
        """What wants a gradient in the network, in predictions this one is made of, and among their settings."""
        return trainable(*vars(self).values())

    @abstractmethod
    def linear(self, t: Tensor, p: Time, q: Time) -> tuple[Tensor, Tensor]:
        """Coefficients (a, b), float64 of t's shape, with p·D + q·ε̂ = a·x + b·output."""

    def input_scale(self, t: Tensor) -> Tensor | None:
        """Factor on x before the network; None for 1."""
        return None

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given for t (batch,)."""
        return t if self.time is None else self.time(t)

    def evaluate(self, x: Tensor, t: Time) -> Tensor:
        """The network's raw output at (x, t) in x's dtype; one evaluation a sample."""
        t = _sample_times(t, x)
        scale = self.input_scale(t)
        if scale is not None:
            x = expand(scale, x) * x
        return self.call(x, self.network_time(t.expand(x.shape[0])))

    def call(self, x: Tensor, network_time: Tensor) -> Tensor:
        """The network at (scaled) x and its own time (batch,): casts, counts and checks; for solvers that prepared
        both."""
        dtype = self._compute_dtype(x)
        if network_time.is_floating_point():
            network_time = network_time.to(dtype if dtype.itemsize >= 4 else torch.float32)
        return _run(self.network, x, x.to(dtype), network_time).to(x.dtype)

    def caller(self, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`call` for states like x and times already in `time_dtype`, with all that never changes looked up once."""
        if type(self).call is not Prediction.call:
            return self.call
        network, inner, outer = self.network, self._compute_dtype(x), x.dtype

        def call(x: Tensor, network_time: Tensor) -> Tensor:
            output = _run(network, x, x if inner is outer else x.to(inner), network_time)
            return output if output.dtype is outer else output.to(outer)

        return call

    def time_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype `call` gives a floating network time in, for states like x: the network's, never below float32."""
        dtype = self._compute_dtype(x)
        return dtype if dtype.itemsize >= 4 else torch.float32

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.dtype or _module_dtype(self.network) or x.dtype

    def combine(self, x: Tensor, t: Time, p: Time, q: Time) -> Tensor:
        """p·D + q·ε̂ at (x, t), shaped as x."""
        t = _sample_times(t, x)
        a, b = self.linear(t, p, q)
        return expand(a, x) * x + expand(b, x) * self.evaluate(x, t)

    def pair(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """(D, ε̂) from one network call."""
        t = _sample_times(t, x)
        (ad, bd), (ae, be) = self.linear(t, 1.0, 0.0), self.linear(t, 0.0, 1.0)
        output = self.evaluate(x, t)
        return expand(ad, x) * x + expand(bd, x) * output, expand(ae, x) * x + expand(be, x) * output

    def data(self, x: Tensor, t: Time) -> Tensor:
        """D(x, t) = E[x_0 | x_t = x]."""
        return self.combine(x, t, 1.0, 0.0)

    def noise(self, x: Tensor, t: Time) -> Tensor:
        """ε̂(x, t) = (x − αD)/σ."""
        return self.combine(x, t, 0.0, 1.0)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """∇ log p_t(x) = −ε̂/σ."""
        return self.combine(x, t, 0.0, -1.0 / self.process.sigma(_sample_times(t, x)))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """dx/dt of the probability-flow ODE, α̇D + σ̇ε̂."""
        t = _sample_times(t, x)
        return self.combine(x, t, self.process.alpha_dot(t), self.process.sigma_dot(t))

    def cancelled(self, t: Time) -> Tensor:
        """|a|σ in D = a x + b·output, float64 of t's shape: how much noise, in D's units, the output has to take out of x.

        Of so much an error of the output, as a share, is an error of D. σ/α for noise and score; at most 1 for data, v, and
        velocities of a rectified flow.
        """
        t = as_time(t)
        return self.linear(t, 1.0, 0.0)[0].abs() * self.process.sigma(t)

    def v(self, x: Tensor, t: Time) -> Tensor:
        """The v target αε̂ − σD."""
        t = _sample_times(t, x)
        return self.combine(x, t, -self.process.sigma(t), self.process.alpha(t))


class DataPrediction(Prediction):
    """The network returns D = E[x_0 | x_t]."""

    def linear(self, t: Tensor, p: Time, q: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return q / sigma, p - q * alpha / sigma


class NoisePrediction(Prediction):
    """The network returns ε̂. Where α is 0, or 0 but for rounding (below 1e-12 σ), it says nothing of the data: D is then NaN."""

    def linear(self, t: Tensor, p: Time, q: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        inverse = _share(p, alpha, sigma)
        return inverse, q - sigma * inverse


class ScorePrediction(Prediction):
    """The network returns s = ∇ log p_t(x) = −ε̂/σ. Where α is 0, or below 1e-12 σ, it says nothing of the data: D is then NaN."""

    def linear(self, t: Tensor, p: Time, q: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        inverse = _share(p, alpha, sigma)
        return inverse, -sigma * (q - sigma * inverse)


class VPrediction(Prediction):
    """The network returns v = αε̂ − σD (Salimans & Ho 2022); for any process D = (αx − σv)/(α²+σ²), ε̂ = (σx +
    αv)/(α²+σ²)."""

    def linear(self, t: Tensor, p: Time, q: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        power = alpha**2 + sigma**2
        return (p * alpha + q * sigma) / power, (q * alpha - p * sigma) / power


class FlowPrediction(Prediction):
    """The network returns the velocity u = dx/dt = α̇D + σ̇ε̂ (flow matching, with data at t = 0).

    D = (σu − σ̇x)/(α̇σ − σ̇α), ε̂ = (αu − α̇x)/(σ̇α − α̇σ).
    """

    def linear(self, t: Tensor, p: Time, q: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma, da, ds = self.process.coefficients(t)
        turn = da * sigma - ds * alpha
        return (q * da - p * ds) / turn, (p * sigma - q * alpha) / turn


class EDMPrediction(Prediction):
    """The network is F of Karras et al. 2022, table 1: D = c_skip y + c_out F(c_in y, c_noise), y = x/α, ρ = σ/α.

    c_skip = σ_d²/(ρ²+σ_d²), c_out = ρσ_d/√(ρ²+σ_d²), c_in = 1/√(ρ²+σ_d²); the network's time is c_noise = ln(ρ)/4
    unless `time` says otherwise.
    """

    def __init__(
        self,
        network: Network,
        process: Process,
        sigma_data: float = 0.5,
        time: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(network, process, time, dtype)
        if not sigma_data > 0:
            raise InvalidInput(f"sigma_data must be positive; got {sigma_data}")
        self.sigma_data = float(sigma_data)

    def linear(self, t: Tensor, p: Time, q: Time) -> tuple[Tensor, Tensor]:
        # with σ and α kept apart nothing is divided by α: c_skip/α = σ_d²α/(σ²+σ_d²α²), c_out = σσ_d/√(σ²+σ_d²α²)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        power = sigma**2 + (self.sigma_data * alpha) ** 2
        skip, out = self.sigma_data**2 * alpha / power, sigma * self.sigma_data / power.sqrt()
        # 1 − α·skip = σ²/power: the coefficient of x in ε̂ is σ/power
        return p * skip + q * sigma / power, (p - q * alpha / sigma) * out

    def input_scale(self, t: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return (sigma**2 + (self.sigma_data * alpha) ** 2).rsqrt()

    def network_time(self, t: Tensor) -> Tensor:
        return -0.25 * self.process.half_log_snr(t) if self.time is None else self.time(t)


def _share(p: Time, alpha: Tensor, sigma: Tensor) -> Tensor:
    """p/α, and 0 where nothing of D is asked for, α = 0 included."""
    if isinstance(p, float) and p == 0.0:
        return torch.zeros_like(alpha)
    # the last ᾱ of a table, or a cosine, may be 0 but for rounding: x − σε̂ over it would be a number without meaning, 1e6 and more
    return p / torch.where(alpha < 1e-12 * sigma, 0.0, alpha)


def _module_dtype(network: Network) -> torch.dtype | None:
    if isinstance(network, torch.nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return None


def _sample_times(t: Time, x: Tensor) -> Tensor:
    """t as a 0-d or (batch,) tensor; (batch, 1, ..., 1), as drifts of the user's own are given it, is flattened."""
    t = as_time(t, x.device)
    if t.ndim < 2 and (t.ndim == 0 or t.shape[0] in (1, x.shape[0])):
        return t
    if t.shape != (x.shape[0], *(1,) * (t.ndim - 1)):
        raise InvalidInput(
            f"t must be a number, a 0-d tensor or one value a sample, ({x.shape[0]},); got shape {tuple(t.shape)}"
        )
    return t.flatten()


def _run(network: Network, x: Tensor, given: Tensor, t: Tensor) -> Tensor:
    """network(given, t), counted and checked; `given` is the state x in the network's dtype."""
    calls = counting.before()
    if given.is_inference():  # changes of these cannot be seen
        given = given.clone()
    x_version, t_version = version_of(given), version_of(t)
    output = network(given, t)
    counting.after(calls, x.shape[0])
    if not isinstance(output, Tensor) or output.shape != x.shape or not output.is_floating_point():
        raise InvalidInput(_bad_output(output, x))
    if version_of(given) != x_version or version_of(t) != t_version:
        changed = "x" if version_of(given) != x_version else "t"
        raise InvalidInput(
            f"the network changed its input {changed} in place, which is the solver's own; write "
            "lambda x, t: network(x.clone(), t.clone())"
        )
    if given.requires_grad and not output.requires_grad and torch.is_grad_enabled():
        warnings.warn(
            "the network's output carries no gradient to its input, so gradients and likelihoods leave the network out; "
            "let it run without torch.no_grad, torch.inference_mode and detach",
            stacklevel=2,
        )
    return output


def version_of(x: Tensor) -> int:
    """How often x was changed in place; tensors of inference mode do not say."""
    return 0 if x.is_inference() else x._version


def _bad_output(output: Any, x: Tensor) -> str:
    if isinstance(output, Tensor) and output.shape == x.shape:
        return f"the network returned {output.dtype}, expected floating numbers; write lambda x, t: network(x, t).to(x.dtype)"
    if isinstance(output, Tensor):
        return (
            f"the network returned shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}; it must return "
            "the state's shape. "
            "If it predicts a variance too, write lambda x, t: network(x, t)[:, :channels]"
        )
    hint = "return its output as one tensor"
    if isinstance(output, dict) and output:
        hint = f"write lambda x, t: network(x, t)[{next(iter(output))!r}]"
    elif hasattr(output, "sample"):
        hint = "write lambda x, t: network(x, t).sample"
    elif isinstance(output, tuple | list) and output:
        hint = "write lambda x, t: network(x, t)[0]"
    elif type(output).__module__ == "numpy":
        hint = "write lambda x, t: torch.from_numpy(network(x.numpy(), t.numpy()))"
    return f"the network returned {type(output).__name__}, expected one tensor shaped as the state; {hint}"
