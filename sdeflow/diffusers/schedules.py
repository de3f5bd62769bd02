"""What a diffusers scheduler says of its model: the process, what the network predicts, the times of its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.predictions import DataPrediction, FlowPrediction, NoisePrediction, Prediction, VPrediction
from sdeflow.processes import DiscreteVP, Process, RectifiedFlow

TARGETS: dict[str, type[Prediction]] = {
    "epsilon": NoisePrediction,
    "sample": DataPrediction,
    "v_prediction": VPrediction,
    "flow_prediction": FlowPrediction,
}
"""Diffusers' names of what a network predicts."""


def process_of(scheduler: Any, flow: bool | None = None) -> Process:
    """The process behind a diffusers scheduler: its table ᾱ as `DiscreteVP`, or `RectifiedFlow`.

    Args:
        scheduler: any scheduler.
        flow: whether the network is a flow-matching one; None to believe the scheduler.

    Raises:
        InvalidInput: the scheduler is of the other sort, or says nothing of a process.
    """
    name = type(scheduler).__name__
    if flow is not None and flow != is_flow(scheduler):
        wanted = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
        raise InvalidInput(
            f"the pipeline's network is {'a flow-matching' if flow else 'no flow-matching'} network, its scheduler a "
            f"{name}; write pipe.scheduler = {wanted}.from_pretrained(<model>, subfolder='scheduler')"
        )
    if is_flow(scheduler):
        if scheduler.config.get("invert_sigmas"):
            raise InvalidInput("a scheduler with invert_sigmas=True runs time the other way, which is not supported")
        return RectifiedFlow(t_min=1e-4)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise InvalidInput(
            f"{name} holds no alphas_cumprod, so the process cannot be read off it; write the process yourself, e.g. "
            "sf.EDMPrediction(network, sf.EDM())"
        )
    return DiscreteVP(torch.as_tensor(table).double())


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is of flow matching."""
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"


def network_time(scheduler: Any) -> Callable[[Tensor], Tensor] | None:
    """What a network trained with this scheduler is given for t: σ·N of flow matching's N steps, else t itself."""
    if not is_flow(scheduler):
        return None
    steps = float(scheduler.config.get("num_train_timesteps", 1000))
    return lambda t: steps * t


def target_of(scheduler: Any, flow: bool | None = None) -> type[Prediction]:
    """The prediction class of a scheduler's `prediction_type`.

    Raises:
        InvalidInput: an unknown type, or one that does not fit.
    """
    name = scheduler.config.get("prediction_type", "flow_prediction" if flow else "epsilon")
    if name not in TARGETS or (flow is not None and (name == "flow_prediction") != flow):
        fits = ["flow_prediction"] if flow else [k for k in TARGETS if k != "flow_prediction"]
        raise InvalidInput(
            f"the scheduler says prediction_type={name!r}; this network needs one of {', '.join(fits)}. Write "
            f"pipe.scheduler = {type(scheduler).__name__}.from_config(pipe.scheduler.config, "
            f"prediction_type={fits[0]!r})"
        )
    return TARGETS[name]


def times_of(scheduler: Any, steps: int, shift: Callable[[int], dict[str, Any]] | None = None) -> Tensor:
    """Times of a scheduler's own steps, float64, largest first.

    Where the scheduler's last step ends at ᾱ_0 and not on clean data, time 0 is among them. Repeated times are listed once.
    """
    own = copy.deepcopy(scheduler)
    extra = shift(steps) if shift is not None else {}
    own.set_timesteps(**({} if "sigmas" in extra else {"num_inference_steps": steps}), **extra)
    sigmas = getattr(own, "sigmas", None)
    open_end = sigmas is not None and float(sigmas[-1]) > 0
    if sigmas is not None and is_flow(own):
        times = sigmas.double() if open_end else sigmas[:-1].double()
    else:
        times, last = own.timesteps.double(), getattr(own, "final_alpha_cumprod", None)
        if (open_end or (last is not None and float(last) < 1.0)) and times[-1] > 0:
            times = torch.cat([times, times.new_zeros(1)])
    # a scheduler of several calls a step, or with a first step taken twice, repeats times
    return times.unique_consecutive()
