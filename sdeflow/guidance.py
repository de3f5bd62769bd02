"""Guidance: predictions made of predictions.

Every wrapper is itself a `Prediction`, so wrappers nest and every equation and solver takes them. Each evaluation of a
network underneath counts; a classifier's do not.

Sources: Ho & Salimans 2022 (classifier-free), Dhariwal & Nichol 2021 (classifier), Lin et al. 2024 (rescale),
Kynkäänniemi et al. 2024 (interval), Song et al. 2021 and Lugmayr et al. 2022 (replacement).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput, finite
from sdeflow.networks import Conditioned, pullback, rows_of
from sdeflow.predictions import Prediction, VPrediction
from sdeflow.processes import Time, as_time, expand

Interval = tuple[float, float]


class Guided(Prediction):
    """Base of the wrappers: `evaluate(x, t)` answers in the target of `like`, at the process's own time."""

    def __init__(self, inner: Prediction, like: Prediction):
        _need_prediction(inner, type(self).__name__)
        super().__init__(inner.network, inner.process, None, inner.dtype)
        self.like = like

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.like).__name__}, {self.process!r})"

    def linear(self, t: Tensor, p: Time, q: Time) -> tuple[Tensor, Tensor]:
        return self.like.linear(t, p, q)

    @abstractmethod
    def evaluate(self, x: Tensor, t: Time) -> Tensor:
        """The guided output at (x, t) in x's dtype."""

    def call(self, x: Tensor, network_time: Tensor) -> Tensor:
        return self.evaluate(x, _common(network_time))


class ClassifierFree(Guided):
    """Classifier-free guidance: out = out_u + scale·(out_c − out_u) = (1 + w)·out_c − w·out_u, scale = w + 1.

    Network outputs are combined, which is the same as combining D, ε̂ or the score, since all are linear in it.

    Args:
        conditional, unconditional: predictions on the same process; where their targets differ v is combined.
        scale: 1 is no guidance (and one evaluation); a number, or (batch,) one a sample.
        w: the other convention, scale = w + 1; give one of the two.
        rescale: φ in [0, 1]: out ← φ·out·std(out_c)/std(out) + (1 − φ)·out, std over each sample's elements.
        interval: (low, high) times between which guidance acts; elsewhere the conditional prediction is used alone, one
            evaluation. Rows of one batch at different times are all evaluated twice as soon as one of them is inside.
        batched: evaluate both in one call on a doubled batch. Needs predictions of one target whose networks are
            `Conditioned` on the same network with the same names.

    One evaluation of it is two evaluations of the network, batched or not.

    Raises:
        InvalidInput: no unconditional prediction, two processes, or settings that cannot be used.

    Example:
        >>> yes = sf.NoisePrediction(sf.Conditioned(network, label=labels), process)
        >>> no = sf.NoisePrediction(sf.Conditioned(network, label=10), process)
        >>> sf.ClassifierFree(yes, no, scale=3.0)
    """

    def __init__(
        self,
        conditional: Prediction,
        unconditional: Prediction | None = None,
        scale: float | Tensor | None = None,
        *,
        w: float | Tensor | None = None,
        rescale: float = 0.0,
        interval: Interval | None = None,
        batched: bool = False,
    ):
        if unconditional is None:
            raise InvalidInput(
                "classifier-free guidance needs a prediction without the condition as well; write sf.ClassifierFree("
                "conditional, sf.NoisePrediction(sf.Conditioned(network, label=<null>), process), scale=3.0)"
            )
        _need_prediction(conditional, "ClassifierFree")
        _need_prediction(unconditional, "ClassifierFree")
        a, b = conditional.process, unconditional.process
        if a is not b and a != b:
            raise InvalidInput(f"both predictions must be of one process; got {a!r} and {b!r}")
        if (scale is None) == (w is None):
            raise InvalidInput("give either scale or w (scale = w + 1), e.g. scale=3.0 or w=2.0")
        if not 0.0 <= rescale <= 1.0:
            raise InvalidInput(f"rescale must be in [0, 1]; got {rescale}. 0.7 is usual, 0 is off")
        same = _same_target(conditional, unconditional)
        super().__init__(conditional, conditional if same else _v_of(conditional))
        self.conditional, self.unconditional = conditional, unconditional
        self.scale = _finite_scale(w + 1 if w is not None else scale)
        self.rescale, self.interval = float(rescale), _check_interval(interval)
        self._same = same
        self._joint = _join(conditional, unconditional, same) if batched else None

    def evaluate(self, x: Tensor, t: Time) -> Tensor:
        t = as_time(t, x.device)
        inside = _inside(self.interval, t)
        if inside is False or (isinstance(self.scale, float) and self.scale == 1.0):
            return self._output(self.conditional, x, t)
        if self._joint is None:
            # a network may write its second output where it wrote its first
            null, given = self._output(self.unconditional, x, t).clone(), self._output(self.conditional, x, t)
        else:
            both = t if t.ndim == 0 else torch.cat([t, t])
            null, given = self._output(self._joint, torch.cat([x, x]), both).chunk(2)
        scale = self.scale if isinstance(self.scale, float) else _column(rows_of(self.scale, x, "scale"), x)
        out = null + scale * (given - null)
        if self.rescale:
            ratio = _std(given) / _std(out)
            out = out * _column(self.rescale * ratio + (1.0 - self.rescale), x)
        return out if inside is True else torch.where(_column(inside, x), out, given)

    def _output(self, predict: Prediction, x: Tensor, t: Tensor) -> Tensor:
        return predict.evaluate(x, t) if self._same else predict.v(x, t)


class ClassifierGuidance(Guided):
    """Classifier guidance: score + scale·∇ₓ log p(y | x_t), so ε̂ − scale·σ∇ and D + scale·(σ²/α)∇.

    Where α = 0 the state says nothing of y and no gradient is added.

    Args:
        predict: the prediction to guide.
        log_prob: log_prob(x, t) → (batch,), differentiable in x (batch, *event); t (batch,) is the process's time. Each
            row must depend on its own sample alone.
        scale: a number, or (batch,) one a sample.
        interval: (low, high) times between which guidance acts.
    """

    def __init__(
        self,
        predict: Prediction,
        log_prob: Callable[[Tensor, Tensor], Tensor],
        scale: float | Tensor = 1.0,
        *,
        interval: Interval | None = None,
    ):
        _need_prediction(predict, "ClassifierGuidance")
        if not callable(log_prob):
            raise InvalidInput(
                "log_prob must be a function of (x, t); write e.g. lambda x, t: "
                "classifier(x, t).log_softmax(1)[:, label]"
            )
        super().__init__(predict, _v_of(predict))
        self.predict, self.log_prob, self.scale = predict, log_prob, _finite_scale(scale)
        self.interval = _check_interval(interval)

    def evaluate(self, x: Tensor, t: Time) -> Tensor:
        t = as_time(t, x.device)
        v, inside = self.predict.v(x, t), _inside(self.interval, t)
        if inside is False:
            return v
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        # v = αε̂ − σD moves by −(ασ + σ³/α) times the gradient
        weight = -sigma * (alpha**2 + sigma**2) / torch.where(alpha > 0, alpha, torch.inf)
        if inside is not True:
            weight = torch.where(inside, weight, 0.0)
        scale = self.scale if isinstance(self.scale, float) else _column(rows_of(self.scale, x, "scale"), x)
        return v + scale * expand(weight, x) * self.gradient(x, t)

    def gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """∇ₓ log p(y | x) at time t, shaped as x."""
        times = t.expand(x.shape[0])

        def values_at(x: Tensor) -> Tensor:
            values = self.log_prob(x, times)
            if values.shape != (x.shape[0],):
                raise InvalidInput(
                    f"log_prob returned shape {tuple(values.shape)} for a batch of {x.shape[0]}; it must return one "
                    "number a sample, (batch,)"
                )
            return values

        values, pull = pullback(values_at, x)
        return pull(torch.ones_like(values))


class Inpaint(Guided):
    """Inpainting by replacement: D ← mask·known + (1 − mask)·D.

    Where the mask is 1 the flow then carries the state along α·known + σ·ε with the ε it started from (and every reverse
    SDE keeps the law N(α·known, σ²)), so the network always sees the known part at the noise level of the rest, and
    nothing need be pasted between steps. The rest follows the network's own D: replacement, not exact conditioning.

    Args:
        predict: the prediction to constrain.
        known: the known data, broadcastable to x or (batch, *event).
        mask: 1 where known, 0 where free, broadcastable to x; values between blend.
    """

    def __init__(self, predict: Prediction, known: Tensor, mask: Tensor):
        _need_prediction(predict, "Inpaint")
        super().__init__(predict, _v_of(predict))
        if not isinstance(known, Tensor) or not isinstance(mask, Tensor) or not known.is_floating_point():
            raise InvalidInput("known and mask must be tensors shaped as one sample or as the batch, known floating")
        if bool(((mask < 0) | (mask > 1)).any()):
            raise InvalidInput("mask must hold values in [0, 1]: 1 where the data are known, 0 where they are free")
        self.predict, self.known, self.mask = predict, known, mask

    def evaluate(self, x: Tensor, t: Time) -> Tensor:
        t = as_time(t, x.device)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        known, mask = (_event(value, x, name) for name, value in (("known", self.known), ("mask", self.mask)))
        # v = αε̂ − σD with ε̂ = (x − αD)/σ and D = known
        fixed = expand(alpha / sigma, x) * x - expand((alpha**2 + sigma**2) / sigma, x) * known
        # a sum would spread an infinite `fixed` (σ = 0) to where nothing is known
        free = self.predict.v(x, t)
        return torch.where(mask == 0, free, free + mask * (fixed - free))


def _event(value: Tensor, x: Tensor, name: str) -> Tensor:
    if value.ndim == x.ndim and value.shape[0] != 1:
        value = rows_of(value, x, name)
    return value.to(x.device, x.dtype)


def _need_prediction(predict: Any, owner: str) -> None:
    if not isinstance(predict, Prediction):
        raise InvalidInput(
            f"{owner} wraps a prediction; got {type(predict).__name__}. Write "
            f"sf.{owner}(sf.NoisePrediction(network, process), ...)"
        )


def _finite_scale(scale: Any) -> float | Tensor:
    if isinstance(scale, Tensor) and scale.ndim == 1 and bool(scale.isfinite().all()):
        return scale
    if finite(scale):
        return float(scale)
    raise InvalidInput(f"the guidance scale must be a finite number, or a (batch,) tensor of them; got {scale!r}")


def _check_interval(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    low, high = (float(end) for end in interval)
    if not low <= high:
        raise InvalidInput(f"interval must be (low, high) in the process's time; got {interval}")
    return low, high


def _inside(interval: Interval | None, t: Tensor) -> bool | Tensor:
    if interval is None:
        return True
    inside = (t >= interval[0]) & (t <= interval[1])
    if bool(inside.all()):
        return True
    return inside if bool(inside.any()) else False


def _target(predict: Prediction) -> Prediction:
    while isinstance(predict, Guided):
        predict = predict.like
    return predict


def _same_target(a: Prediction, b: Prediction) -> bool:
    a, b = _target(a), _target(b)
    return type(a) is type(b) and getattr(a, "sigma_data", None) == getattr(b, "sigma_data", None)


def _v_of(predict: Prediction) -> Prediction:
    return VPrediction(predict.network, predict.process)


class _Pair(torch.nn.Module):
    """Two `Conditioned` of one network as one call on [x, x]."""

    def __init__(self, given: Conditioned, null: Conditioned):
        super().__init__()
        self.given, self.null = given, null

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = x[: x.shape[0] // 2]
        null, given = self.null.rows(half), self.given.rows(half)
        both = {name: _stack(null[name], given[name], name) for name in given}
        return self.given.network(x, t, **both)


def _stack(null: Any, given: Any, name: str) -> Any:
    if isinstance(null, Tensor) and isinstance(given, Tensor):
        return torch.cat([null.to(given.dtype), given])
    if isinstance(null, dict) and isinstance(given, dict):
        return {key: _stack(null[key], given[key], f"{name}.{key}") for key in given}
    if null is given or null == given:
        return given
    raise InvalidInput(f"{name} differs between the two predictions and is no tensor; write batched=False")


def _join(conditional: Prediction, unconditional: Prediction, same: bool) -> Prediction:
    given, null = conditional.network, unconditional.network
    wrapped = isinstance(conditional, Guided) or isinstance(unconditional, Guided)
    if (
        wrapped
        or not same
        or not isinstance(given, Conditioned)
        or not isinstance(null, Conditioned)
        or given.network is not null.network
        or given.conditions.keys() != null.conditions.keys()
    ):
        raise InvalidInput(
            "batched guidance needs two plain predictions of one target whose networks are sf.Conditioned(network, "
            "name=...) of one network with the same names; write that, or batched=False"
        )
    joint = copy.copy(conditional)
    joint.network = _Pair(given, null)
    return joint


def _common(t: Tensor) -> Tensor:
    """One 0-d time where all rows share it by construction (an expanded tensor): coefficients are then computed once."""
    return t[0] if t.ndim == 1 and t.shape[0] and t.stride(0) == 0 else t


def _std(x: Tensor) -> Tensor:
    return x.flatten(1).std(1)


def _column(value: Tensor, x: Tensor) -> Tensor:
    value = value.to(x.device) if value.dtype == torch.bool else value.to(x.device, x.dtype)
    return value if value.ndim == 0 else value.reshape(-1, *(1,) * (x.ndim - 1))
