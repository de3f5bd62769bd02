"""A solver as JSON and back, as diffusers keeps a scheduler's settings."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from sdeflow.charts import Chart
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, Nodes
from sdeflow.solvers.base import FixedStep, Solver
from sdeflow.solvers.tableaux import Tableau

FUNCTION = "function"
"""Type under which a function among a solver's fields is written: by name alone, so that it cannot be read back."""


def describe(value: Any, skip: tuple[str, ...] = ("steps",)) -> Any:
    """A solver as JSON: its class and its fields, steps excepted.

    Raises:
        InvalidInput: a field is neither a plain value, a grid, a chart, a tableau nor a function.
    """
    if isinstance(value, Nodes):
        return {"type": "Nodes", "values": list(value.values)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init and f.name not in skip}
        return {"type": type(value).__name__} | {name: describe(entry, ()) for name, entry in fields.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [describe(entry, ()) for entry in value]
    if callable(value):
        return {"type": FUNCTION, "name": getattr(value, "__qualname__", type(value).__name__)}
    raise InvalidInput(
        f"{value!r} cannot be written to a scheduler's config; use a solver whose fields are numbers, strings, tuples, "
        "grids, charts or functions"
    )


def rebuild(value: Any) -> Any:
    """What `describe` described; the number of steps is 1.

    Raises:
        InvalidInput: a function, or an unknown class.
    """
    if not isinstance(value, dict):
        return tuple(rebuild(v) for v in value) if isinstance(value, list) else value
    if value.get("type") == FUNCTION:
        raise InvalidInput(
            f"the saved solver held the function {value.get('name')}, which a config cannot keep; give the solver again: "
            "SolverScheduler.from_config(config, solver=...), or SolverScheduler.from_pretrained(path, solver=...)"
        )
    fields = {name: rebuild(entry) for name, entry in value.items() if name != "type"}
    kinds = [Tableau, *(kind for base in (Solver, Grid, Chart) for kind in _subclasses(base))]
    for kind in kinds:
        if kind.__name__ == value.get("type"):
            return kind(**fields, **({"steps": 1} if _wants_steps(kind, fields) else {}))
    raise InvalidInput(
        f"no solver, grid or chart is called {value.get('type')!r}; if it is your own, import its module first"
    )


def of_model(config: dict[str, Any], diffusers: Any) -> dict[str, Any]:
    """Another scheduler's config as ours: its class's defaults written out, flow matching named, its shift under our name.

    Diffusers lets a class fill what another's config leaves at defaults with defaults of its own, and ours differ.

    Raises:
        InvalidInput: the scheduler has neither a table of β nor flow matching, or runs time the other way.
    """
    own = {name: value for name, value in config.items() if name != "_use_default_values"}
    if "solver" in own:
        return own
    kind = getattr(diffusers, str(own.get("_class_name")), None)
    if kind is not None:
        for name, parameter in inspect.signature(kind.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                own.setdefault(name, parameter.default)
    if "shift" in own and not {"beta_start", "prediction_type"} & own.keys():
        own["prediction_type"] = "flow_prediction"
    flow = own.get("prediction_type") == "flow_prediction"
    if flow and own.get("invert_sigmas"):
        raise InvalidInput("a scheduler with invert_sigmas=True runs time the other way, which is not supported")
    if not flow and "beta_start" not in own and (kind is not None or "sigma_min" in own):
        raise InvalidInput(
            f"the config of {own.get('_class_name', 'this scheduler')} has no table of β, so the process cannot be read off it; "
            "write sf.solve(sf.ProbabilityFlowODE(sf.EDMPrediction(network, sf.EDM())), solver, x)"
        )
    if flow and "flow_shift" in own:
        own.setdefault("shift", own["flow_shift"])
    return own


def _subclasses(kind: type) -> list[type]:
    return [c for child in kind.__subclasses__() for c in (child, *_subclasses(child))]


def _wants_steps(kind: type, fields: dict) -> bool:
    return issubclass(kind, Solver) and not isinstance(fields.get("grid"), Nodes) and fields.get("dt") is None


def as_solver(solver: Any) -> Solver:
    """A fixed-step solver from a solver, its class or its description; the number of steps is set later.

    Raises:
        InvalidInput: anything else.
    """
    if isinstance(solver, dict):
        solver = rebuild(solver)
    kind = solver if isinstance(solver, type) else type(solver)
    names = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    if not issubclass(kind, Solver) or not {"steps", "grid"} <= names:
        raise InvalidInput(_needed(kind.__name__))
    if isinstance(solver, type):
        solver = solver(steps=1)
    facts = solver.facts
    if facts.adaptive:
        raise InvalidInput(_needed(f"{kind.__name__} with steps of its own choice"))
    # a FixedStep method lays its calls out before the first; of the libraries' methods one iterates until it is content
    if facts.evaluations is None and not isinstance(solver, FixedStep):
        raise InvalidInput(
            f"{facts.name} iterates until its state settles, so its network calls cannot be listed beforehand, as a "
            'pipeline asks; write SolverScheduler(sf.TorchDiffEq("explicit_adams", steps=20)) or sf.FixedAdams(steps=20)'
        )
    return solver


def _needed(given: str) -> str:
    return (
        f"SolverScheduler needs a fixed-step solver, because a pipeline asks for its times beforehand; got {given}. "
        "Write SolverScheduler(sf.UniPC(order=3, steps=20)); adaptive solvers run on sf.diffusers.from_pipeline(pipe)"
    )
