"""One run as data: settings, cost, error. Reports are made from records and nothing else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.equations import Equation
from sdeflow.errors import InvalidInput
from sdeflow.measure.statistics import Estimate
from sdeflow.networks import Checkpointed, Conditioned
from sdeflow.predictions import Prediction
from sdeflow.problems import ExactNetwork, Problem
from sdeflow.processes import Process
from sdeflow.solvers.base import Solver

FORMAT = 1
"""Version of the record's layout and of what its key covers."""

_LONG = 32
"""Tensors up to this many elements are written out, longer ones by their digest."""


@dataclass(frozen=True)
class Record:
    """One solve of one problem, measured.

    Attributes:
        key: identity of the run, made from its settings by `run_key`; two runs with one key would give the same numbers.
        problem, process, equation, solver: what was solved and how, each a dictionary with a "type" and all settings.
        samples, seed, start, stop, initial: size of the batch, seed of all randomness, interval, and where the start states came from:
            "prior" (`process.prior`) or "marginal" (exact samples of p_start).
        dtype, device: of the state.
        calls: batched forward passes.
        evaluations_mean, evaluations_max: network evaluations a sample.
        accepted_mean, rejected_mean: steps a sample.
        status: number of samples by the name of their status. Errors are over the samples that succeeded.
        error: the error the run is judged by.
        others: further errors of the same end states.
        reference: what the errors are measured against.
        wall_time: seconds of the solve.
        versions: of sdeflow, python and the libraries; threads: torch's.
    """

    key: str
    problem: dict[str, Any]
    process: dict[str, Any]
    equation: dict[str, Any]
    solver: dict[str, Any]
    samples: int
    seed: int
    start: float
    stop: float
    initial: str
    dtype: str
    device: str
    calls: int
    evaluations_mean: float
    evaluations_max: int
    accepted_mean: float
    rejected_mean: float
    status: dict[str, int]
    error: Estimate
    others: tuple[Estimate, ...]
    reference: str
    wall_time: float
    versions: dict[str, str]
    threads: int
    format: int = FORMAT

    @property
    def complete(self) -> bool:
        """True when every sample succeeded."""
        return set(self.status) == {"SUCCESS"}

    def to_json(self) -> str:
        """One line of JSON; numbers that are not finite become null."""
        return json.dumps(_plain(asdict(self)), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record written by `to_json`; null becomes NaN where a number belongs.

        Raises:
            InvalidInput: the text is no record of this format.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise InvalidInput(
                    f"the record has format {data['format']}, this version reads {FORMAT}; measure again"
                )
            data["error"] = _estimate(data["error"])
            data["others"] = tuple(_estimate(e) for e in data["others"])
            for name in ("evaluations_mean", "accepted_mean", "rejected_mean", "wall_time"):
                data[name] = math.nan if data[name] is None else data[name]
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"not a record: {error}. Records are lines written by Record.to_json()") from error


def _estimate(data: Mapping[str, Any]) -> Estimate:
    filled: dict[str, Any] = {k: math.nan if v is None else v for k, v in data.items()}
    return Estimate(**filled)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def run_key(
    problem: Problem,
    equation: Equation,
    solver: Solver,
    samples: int,
    seed: int,
    start: float,
    stop: float,
    initial: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> str:
    """Identity of a run: 16 hexadecimal digits of the SHA-256 of its settings.

    It covers the problem's parameters (not only its name), the process, the equation, every field of the solver, the number of samples, the seed,
    the interval, the start and the arithmetic; not the versions, the machine or what the solve gave.
    """
    settings = {
        "format": FORMAT,
        "problem": describe_problem(problem),
        "process": describe_process(equation.process),
        "equation": describe_equation(equation),
        "solver": describe(solver),
        "run": [samples, seed, float(start), float(stop), initial, str(dtype), torch.device(device).type],
    }
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(value: Any) -> Any:
    """An object as JSON: dataclasses by type and fields, tensors by their numbers or their digest, predictions and networks by what they
    are made of, functions by name and code, anything else by its repr."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Tensor | np.ndarray):
        t = torch.as_tensor(value).detach().cpu()
        return t.tolist() if t.numel() <= _LONG else f"{str(t.dtype)[6:]}{list(t.shape)}:{digest(t)}"
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Process):
        return describe_process(value)
    if isinstance(value, Prediction):
        return describe_prediction(value)
    if isinstance(value, ExactNetwork | torch.nn.Module):
        return describe_network(value)
    if isinstance(value, FunctionType):
        return f"{value.__name__}:{_written(value)}"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    return {"type": type(value).__name__, "repr": repr(value)}


def describe_problem(problem: Problem) -> dict[str, Any]:
    """A problem by name, size and the digest of its parameters."""
    m = problem.mixture
    cov = m.variances if m.axes is None else m.axes @ torch.diag_embed(m.variances.expand(m.components, -1)) @ m.axes.mT
    labels = () if problem.component_labels is None else (problem.component_labels,)
    return {
        "type": type(problem).__name__,
        "name": problem.name,
        "dim": problem.dim,
        "components": m.components,
        "digest": digest(*(_steps(v) for v in (m.means, cov, m.weights)), *labels),
    }


def describe_process(process: Process | None) -> Any:
    """A process by type and fields; one of the user's own functions by their values."""
    if process is None or is_dataclass(process):
        return describe(process)
    t = torch.linspace(process.t_min, process.t_max, 33, dtype=torch.float64)
    values = digest(_steps(process.alpha(t)), _steps(process.sigma(t)))
    return {"type": type(process).__name__, "t_min": process.t_min, "t_max": process.t_max, "digest": values}


def describe_equation(equation: Equation) -> dict[str, Any]:
    """An equation by type, η, and the prediction and network it asks."""
    described: dict[str, Any] = {"type": type(equation).__name__, "noise": equation.noise}
    if equation.process is not None:
        described["eta"] = float(equation.eta)
    return described if equation.predict is None else described | describe_prediction(equation.predict)


def describe_prediction(predict: Prediction) -> dict[str, Any]:
    """A prediction by type, network and settings: what guidance is made of and its scales, hooks, conditions."""
    exact = isinstance(predict.network, ExactNetwork)
    settings = {
        name: describe(value)
        for name, value in vars(predict).items()
        # an exact network computes in float64 unless told otherwise; names with _ follow from the others
        if not (name in ("network", "process", "like") or name[0] == "_" or value is None)
        and not (exact and value is torch.float64)
    }
    described = {"prediction": type(predict).__name__} | describe_network(predict.network)
    return described | {"settings": settings} if settings else described


def describe_network(network: Any) -> dict[str, Any]:
    """A network by name and what tells it from others: its truth, a module's parameters, a function's code."""
    described: dict[str, Any] = {"network": getattr(network, "__name__", type(network).__name__)}
    if isinstance(network, ExactNetwork):
        described["truth"] = describe_problem(network.problem)["digest"]
    elif isinstance(network, torch.nn.Module):
        described["parameters"] = digest(*network.state_dict().values())
    elif isinstance(network, FunctionType):
        described["code"] = _written(network)
    if isinstance(network, Conditioned | Checkpointed):
        described["of"] = describe_network(network.network)
    if isinstance(network, Conditioned):
        described["conditions"] = describe(network.conditions)
    return described


def _written(function: FunctionType, within: tuple[FunctionType, ...] = ()) -> str:
    """12 hexadecimal digits of a function's code, of its defaults, of what it closes over and of the globals it names."""

    def code(of: CodeType) -> list[Any]:
        consts = [code(c) if isinstance(c, CodeType) else _ordered(c) for c in of.co_consts]
        return [of.co_code.hex(), consts, of.co_names]

    def seen(value: Any) -> Any:
        if isinstance(value, FunctionType):
            return value.__name__ if value in (*within, function) else _written(value, (*within, function))
        if isinstance(value, list | tuple):
            return [seen(v) for v in value]
        if isinstance(value, Mapping):
            return {str(k): seen(v) for k, v in value.items()}
        if isinstance(value, ModuleType | type):
            return value.__name__
        described = describe(value)
        # an address would be another one in the next process
        return type(value).__name__ if isinstance(described, dict) and " at 0x" in str(described) else described

    names = function.__code__.co_names
    parts = [
        code(function.__code__),
        seen(function.__defaults__),
        seen(inspect.getclosurevars(function).nonlocals),
        seen({name: function.__globals__[name] for name in names if name in function.__globals__}),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _ordered(constant: object) -> str:
    # a set's own order is another one in the next process
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _steps(values: Tensor) -> Tensor:
    # one machine's last bits are not another's: a digest is of the largest number to 6 digits, and of all in millionths of it
    values = values.to(torch.float64).flatten()
    largest = values.abs().max().clamp_min(1e-300)
    return torch.cat(
        [(values / largest * 1e6).round(), torch.tensor([float(f"{largest.item():.5e}")], dtype=torch.float64)]
    )


def digest(*tensors: Tensor) -> str:
    """12 hexadecimal digits of the SHA-256 of the tensors' numbers."""
    state = hashlib.sha256()
    for t in tensors:
        t = t.detach().cpu().contiguous()
        state.update(f"{t.dtype}{tuple(t.shape)}".encode())
        state.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of everything a measured number may depend on."""
    found = {"python": platform.python_version()}
    for name in ("sdeflow", "torch", "torchdiffeq", "torchsde", "numpy", "scipy", "POT", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
