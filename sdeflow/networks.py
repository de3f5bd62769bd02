"""Networks made of networks: conditions bound to them, activations recomputed instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdeflow import counting
from sdeflow.errors import InvalidInput


def device_of(network: Any) -> torch.device | None:
    """Where a module computes: where its parameters are, or where accelerate's hooks bring them for every call; None without either."""
    if not isinstance(network, torch.nn.Module):
        return None
    for module in network.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameter = next(network.parameters(), None)
    return None if parameter is None else parameter.device


class Conditioned(torch.nn.Module):
    """`network(x, t, **conditions)` as a `network(x, t)`.

    Args:
        network: called as network(x, t, **conditions).
        conditions: a number, a 0-d tensor or a tensor of one row holds for all samples; a tensor (batch, …) holds one
            row a sample, and rows follow their samples when finished ones leave the batch; a dict holds any of these;
            anything else is passed on as it is.

    Example:
        >>> sf.NoisePrediction(sf.Conditioned(network, label=torch.tensor([3, 5])), process)
    """

    def __init__(self, network: Any, **conditions: Any):
        super().__init__()
        if not callable(network):
            raise InvalidInput(f"network must be callable as network(x, t, ...); got {type(network).__name__}")
        self.network: Any = network
        self.conditions = conditions

    def __repr__(self) -> str:
        return f"Conditioned({type(self.network).__name__}, {', '.join(self.conditions)})"

    def rows(self, x: Tensor) -> dict[str, Any]:
        """The conditions of the samples now in the batch x (batch, *event); numbers become (batch,) tensors."""
        return {name: rows_of(value, x, name) for name, value in self.conditions.items()}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, **self.rows(x))


class Checkpointed(torch.nn.Module):
    """A network whose activations are recomputed in the backward pass instead of kept: memory for a second forward pass.

    The recomputation is not counted: it happens after the solve.

    Example:
        >>> predict = sf.NoisePrediction(sf.Checkpointed(network), process)
        >>> sf.solve(sf.ProbabilityFlowODE(predict), solver, x, gradients=True).x.sum().backward()
    """

    def __init__(self, network: Any):
        super().__init__()
        if not callable(network):
            raise InvalidInput(f"network must be callable as network(x, t); got {type(network).__name__}")
        self.network: Any = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return checkpoint(self.network, x, t, use_reentrant=False) if torch.is_grad_enabled() else self.network(x, t)


def rows_of(value: Any, x: Tensor, name: str) -> Any:
    """The rows of a per-sample value that belong to the samples now in x (batch, *event).

    Numbers and single rows are repeated; what is no number, tensor or dict is returned as it is.

    Raises:
        InvalidInput: a tensor with another number of rows than x.
    """
    if isinstance(value, dict):
        return {key: rows_of(entry, x, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return value
    value = torch.as_tensor(value, device=x.device)
    if value.ndim == 0 or value.shape[0] == 1:
        return value.expand(x.shape[0], *value.shape[1:])
    counter = counting.current()
    if counter is not None and counter.rows is not None and value.shape[0] == counter.batch:
        value = value[counter.rows.to(value.device)]
    if value.shape[0] != x.shape[0]:
        raise InvalidInput(
            f"{name} holds {value.shape[0]} rows for a batch of {x.shape[0]}; give one row a sample, or one number for "
            "all"
        )
    return value


def trainable(*parts: Any) -> tuple[Tensor, ...]:
    """The tensors that want a gradient in parts: of modules (and the conditions bound in them), of whatever else has
    `parameters()`, in dicts, and tensors themselves; each once."""
    found: dict[int, Tensor] = {}
    for part in parts:
        inside: tuple[Any, ...] = ()
        if isinstance(part, Tensor):
            inside = (part,)
        elif isinstance(part, dict):
            inside = trainable(*part.values())
        elif callable(getattr(part, "parameters", None)) and not isinstance(part, type):
            inside = tuple(part.parameters())
            if isinstance(part, torch.nn.Module):
                bound = (module.conditions for module in part.modules() if isinstance(module, Conditioned))
                inside += trainable(*bound)
        found |= {id(tensor): tensor for tensor in inside if tensor.requires_grad}
    return tuple(found.values())


def pullback(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(y, v ↦ vᵀ ∂y/∂x) for y = function(x), v shaped as y; differentiable itself where gradients are on.

    By torch.func, or, where the function holds what torch.func refuses (activation checkpoints, autograd functions without
    `setup_context`), by plain autograd, which takes everything that can be trained but does not work in inference mode.
    """
    tracked = torch.is_grad_enabled()
    try:
        value, pull, *_ = torch.func.vjp(function, x)
        return value, lambda v: pull(v)[0]
    except RuntimeError:
        if torch.is_inference_mode_enabled():
            raise
    with torch.enable_grad():
        x = x if tracked and x.requires_grad else x.detach().requires_grad_()
        value = function(x)

    def pull_back(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(
            value, x, v, retain_graph=True, create_graph=tracked, allow_unused=True, materialize_grads=True
        )
        return found

    return (value if tracked else value.detach()), pull_back
