"""Diffusers' networks as network(x, t, **conditions), and one of them with its scheduler as a prediction."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sdeflow.diffusers.schedules import network_time, process_of, target_of
from sdeflow.errors import InvalidInput
from sdeflow.networks import Conditioned
from sdeflow.predictions import Prediction
from sdeflow.processes import RectifiedFlow

TRANSFORMERS = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
"""Diffusers' transformers whose time and output are known to be ours: others count time from the other end, or in other units."""


def prediction_of(model: Any, scheduler: Any, **conditions: Any) -> Prediction:
    """A bare diffusers model and its scheduler as a prediction.

    Args:
        model: a `UNet2DModel`, `UNet2DConditionModel`, one of the transformers of DiT, PixArt, Stable Diffusion 3 and Flux, or one of your own
            called as model(x, timestep, …) with `config.in_channels`; compiled and with adapters as well.
        scheduler: gives process and prediction type.
        conditions: further arguments of the model, one row a sample, see `Conditioned`. Numbers in `cross_attention_kwargs` and its
            like, such as the {"scale": 0.5} of adapters, are given as they are. Flux's `txt_ids` and `img_ids` have no rows of samples.

    Raises:
        InvalidInput: a transformer of diffusers that is none of these, or a scheduler without a process.
    """
    process = process_of(scheduler)
    flow = isinstance(process, RectifiedFlow)
    numbers, rows = _numbers(conditions)
    if kind_of(model) == "FluxTransformer2DModel":
        network: torch.nn.Module = FluxDenoiser(model, numbers)
        for name in ("txt_ids", "img_ids"):
            if isinstance(rows.get(name), Tensor) and rows[name].ndim == 2:
                rows[name] = rows[name][None]
    else:
        network = Denoiser(model, _channels(model), numbers)
    return target_of(scheduler, flow=flow)(Conditioned(network, **rows), process, network_time(scheduler))


class Denoiser(torch.nn.Module):
    """model(x, timestep, **conditions) → its sample, without the channels of a learned variance.

    Args:
        model: a UNet or transformer of diffusers.
        channels: of the state.
        numbers: settings within arguments that are dicts, the same for all samples.
    """

    def __init__(self, model: torch.nn.Module, channels: int, numbers: dict[str, dict[str, Any]] | None = None):
        super().__init__()
        self.model, self.channels, self.numbers = model, channels, numbers or {}
        # transformers take their time as the third or fourth argument
        self.named = "timestep" in inspect.signature(bare(model).forward).parameters

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        conditions = _merged(conditions, self.numbers)
        if self.named:
            return self.model(x, timestep=t, **conditions, return_dict=False)[0][:, : self.channels]
        return self.model(x, t, **conditions, return_dict=False)[0][:, : self.channels]


class FluxDenoiser(torch.nn.Module):
    """Flux: states (batch, tokens, channels), time in [0, 1], and positions of text and image that are the same for all samples."""

    def __init__(self, model: torch.nn.Module, numbers: dict[str, dict[str, Any]] | None = None):
        super().__init__()
        self.model, self.numbers = model, numbers or {}

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        conditions = _merged(conditions, self.numbers)
        ids = {name: conditions.pop(name)[0] for name in ("txt_ids", "img_ids")}
        return self.model(hidden_states=x, timestep=t / 1000.0, **ids, **conditions, return_dict=False)[0]


def bare(model: Any) -> Any:
    """The network that a compiled one, or peft's model with adapters, stands around."""
    inner = getattr(model, "_orig_mod", model)
    base = getattr(inner, "get_base_model", None)
    return inner if base is None else bare(base())


def kind_of(model: Any) -> str:
    """The class of a network by name."""
    return type(bare(model)).__name__


def _channels(model: Any) -> int:
    kind = type(bare(model))
    if kind.__module__.startswith("diffusers.") and "UNet" not in kind.__name__ and kind.__name__ not in TRANSFORMERS:
        raise InvalidInput(
            f"prediction_of knows diffusers' UNets and {', '.join(TRANSFORMERS)}, not {kind.__name__}, whose time may run the other way or "
            "in other units; write sf.FlowPrediction(lambda x, t: model(x, timestep=<its own>, ...)[0], sf.RectifiedFlow())"
        )
    channels = getattr(getattr(model, "config", None), "in_channels", None)
    if channels is None:
        raise InvalidInput(
            f"{kind.__name__} has no config.in_channels, as diffusers' models have; write sf.NoisePrediction(lambda x, t: ..., "
            "sf.diffusers.process_of(scheduler))"
        )
    return int(channels)


def _numbers(conditions: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(numbers within arguments for the attention layers, all other conditions)."""
    numbers, rows = {}, dict(conditions)
    for name, value in conditions.items():
        if name.endswith("attention_kwargs") and isinstance(value, dict):
            numbers[name] = {key: entry for key, entry in value.items() if isinstance(entry, int | float)}
            rows[name] = {key: entry for key, entry in value.items() if key not in numbers[name]}
    return numbers, rows


def _merged(conditions: dict[str, Any], numbers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    # a copy every time: diffusers takes the scale out of the dict it is given
    return conditions | {name: conditions.get(name, {}) | own for name, own in numbers.items()}
