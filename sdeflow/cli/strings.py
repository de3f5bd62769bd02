"""Strings to objects: what the command line may name, and nothing else is evaluated."""

from __future__ import annotations

import ast
import contextlib
import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import sdeflow as sf
from sdeflow.charts import Chart
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid
from sdeflow.solvers.base import Solver

# --- reading

Names = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Spec:
    """A constructor and its settings, read from a string such as "Adams(rtol=1e-4)" and not yet called.

    Attributes:
        text: the string.
        make: the constructor.
        arguments, settings: what the string gives it.
    """

    text: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    settings: Mapping[str, Any] | None = None

    def build(self, **more: Any) -> Any:
        """The object, with further settings.

        Raises:
            InvalidInput: the constructor refuses the settings.
        """
        try:
            return self.make(*self.arguments, **{**(self.settings or {}), **more})
        except TypeError as error:
            raise InvalidInput(f"{self.text!r}: {error}") from error


def parse(text: str, names: Names, what: str, inner: Names | None = None) -> Spec:
    """Read "Name" or "Name(1, key=2.0, chart=PlainTime())"; nothing is evaluated but literals and known names.

    Args:
        text: the string.
        names: the constructors it may name.
        what: what they make, for messages: "solver".
        inner: the constructors that settings may call.

    Raises:
        InvalidInput: an unknown name (the message lists the choices), or no expression of this form.
    """
    form = f'write e.g. {next(iter(names))} or "{next(iter(names))}(name=value)"'
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise InvalidInput(f"{what} {text!r} cannot be read: {error.msg}; {form}") from error
    if isinstance(node, ast.Name):
        return Spec(text, _look_up(node.id, names, what))
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise InvalidInput(f"{what} {text!r} is not a name with settings; {form}")
    arguments, settings = _arguments(node, inner or {}, text)
    return Spec(text, _look_up(node.func.id, names, what), arguments, settings)


def _look_up(name: str, names: Names, what: str) -> Callable[..., Any]:
    if name in names:
        return names[name]
    folded = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), list(folded), n=1)
    hint = f"did you mean {folded[near[0]]}? " if near else ""
    raise InvalidInput(f"unknown {what} {name!r}; {hint}choose from: {', '.join(sorted(names, key=str.lower))}")


def _arguments(call: ast.Call, inner: Names, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        raise InvalidInput(f"{text!r}: * and ** are not settings; write name=value")
    settings = {str(k.arg): _value(k.value, inner, text) for k in call.keywords}
    return tuple(_value(a, inner, text) for a in call.args), settings


def _value(node: ast.expr, inner: Names, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments, settings = _arguments(node, inner, text)
        return Spec(ast.unparse(node), _look_up(node.func.id, inner, "setting"), arguments, settings).build()
    if isinstance(node, ast.Name):
        return _look_up(node.id, inner, "setting")()
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise InvalidInput(
            f"{text!r}: {ast.unparse(node)} is no value; settings are numbers, strings, lists, or one of "
            f"{', '.join(sorted(inner))}"
        ) from error


def parse_numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    """Read "5,10,20" as positive numbers of one kind (int or float).

    Raises:
        InvalidInput: an entry is no positive number of that kind.
    """
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InvalidInput(f"{option} {text!r}: {error}; write numbers with commas between") from error
    if not values or not all(0 < value < float("inf") for value in values):
        raise InvalidInput(f"{option} {text!r}: expected positive numbers with commas between")
    return values


# --- what the names stand for


def processes() -> dict[str, Callable[..., Any]]:
    """The processes a string may name."""
    return {name: getattr(sf, name) for name in ("VP", "CosineVP", "SubVP", "VE", "EDM", "RectifiedFlow")}


def problems() -> dict[str, Callable[..., Any]]:
    """The problems a string may name."""
    return {name: getattr(sf.problems, name) for name in ("digits", "gaussian", "mixture64", "ring")}


def parts() -> dict[str, Callable[..., Any]]:
    """The charts and grids that settings of a solver may name."""
    return _exported(Chart, Grid)


def solvers() -> dict[str, Callable[..., Any]]:
    """The solver classes a string may name."""
    return _exported(Solver)


def methods(make: Callable[..., Any]) -> tuple[str, ...]:
    """The method names of a solver class that takes one, from the table in the file that defines it; else none."""
    if "method" not in getattr(make, "__dataclass_fields__", {}):
        return ()
    module = sys.modules[make.__module__]
    return tuple(getattr(module, "METHODS", None) or module.TABLEAUX)


def shorthands(kind: str) -> dict[str, Callable[..., Any]]:
    """The backend's methods by their bare names: for "ode" dopri5 is TorchDiffEq("dopri5"), for "sde" srk is TorchSDE("srk")."""
    make = solvers().get({"ode": "TorchDiffEq", "sde": "TorchSDE"}[kind])
    return {} if make is None else {method: partial(make, method) for method in methods(make)}


def read_solver(text: str, kind: str) -> Spec | None:
    """The solver a string names for an equation of a kind ("ode" or "sde"); None if it names one for the other kind only.

    Raises:
        InvalidInput: no solver of that name for either kind.
    """
    everything = {**solvers(), **shorthands("ode"), **shorthands("sde")}
    head = text.split("(")[0].strip()
    own = {**solvers(), **shorthands(kind)}
    spec = parse(text, own if head in own else everything, "solver", parts())
    return spec if head in own else None


def _exported(*kinds: type) -> dict[str, Callable[..., Any]]:
    values = ((name, getattr(sf, name)) for name in sf.__all__)
    return {name: value for name, value in values if isinstance(value, type) and issubclass(value, kinds)}


# --- every solver and what it claims

SOLVER_COLUMNS = (
    "solver",
    "method",
    "order",
    "strong",
    "weak",
    "evaluations a step",
    "steps",
    "noise",
    "needs",
    "from",
)


def variants() -> list[Spec]:
    """Every solver class, once for each of its methods, orders and kinds."""
    found = []
    for name, make in solvers().items():
        fields = getattr(make, "__dataclass_fields__", {})
        settings = [{"method": method} for method in methods(make)] or [{}]
        for field, values in (("order", (1, 2, 3, 4)), ("sde", (False, True))):
            if field in fields:
                settings = [{**one, field: value} for one in settings for value in values]
        for one in settings:
            said = ", ".join(repr(v) if k == "method" else f"{k}={v!r}" for k, v in one.items() if v is not False)
            found.append(Spec(f"{name}({said})" if said else name, make, (), one))
    return found


def at_any_effort(spec: Spec) -> Any:
    """The solver with a number of steps or a tolerance, to ask for its facts; None if its settings contradict each other."""
    for settings in ({"steps": 10}, {"rtol": 1e-3, "atol": 1e-3}):
        with contextlib.suppress(InvalidInput):
            return spec.build(**settings)
    return None


def solver_rows() -> list[tuple[str, ...]]:
    """The facts of every solver as text, in the order of SOLVER_COLUMNS."""
    rows = []
    for spec in variants():
        solver = at_any_effort(spec)
        if solver is not None:
            f = solver.facts
            orders = tuple("" if o is None else f"{o:g}" for o in (f.order, f.strong, f.weak, f.evaluations))
            noise = ", ".join("ODE" if n == "none" else str(n) for n in f.noise)
            needs = {"drift": "any equation", "diffusion": "a diffusion equation"}[f.face]
            rows.append((spec.text, f.name, *orders, "adaptive" if f.adaptive else "fixed", noise, needs, f.reference))
    return rows


def solver_page() -> str:
    """docs/solvers.md."""
    lines = [SOLVER_COLUMNS, ("---",) * len(SOLVER_COLUMNS)]
    lines += [(f"`{row[0]}`", *row[1:]) for row in solver_rows()]
    return SOLVER_PAGE + "".join(f"| {' | '.join(line)} |\n" for line in lines)


SOLVER_PAGE = """# Solvers and their facts

Written by `make docs` from the solvers' own `facts`; the contract tests prove the same facts. Order is that of the global error on ODEs;
strong and weak are orders on the noise the solver accepts (of `TorchSDE` on additive noise: on other noise euler's strong order is ½), blank
where none is claimed. Evaluations are network evaluations of one sample in one step, start-up and rejected steps aside.

"""
