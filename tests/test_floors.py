"""The layout shows the mathematics: a file imports only from floors below its own, and the core imports no extra."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sdeflow"

# Lowest first. A name is a module of the package; "solvers.*" is every file of that folder not named elsewhere.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("counting", "random", "solution", "brownian_plan"),
    ("brownian_torchsde",),
    ("processes", "brownian", "networks"),
    ("predictions",),
    ("charts", "networks"),
    ("grids", "equations", "guidance"),
    ("problems.*",),
    ("solvers.base", "solvers.control"),
    ("solvers.linear", "solvers.tableaux"),
    ("solvers.exponential_weights", "solvers.fitted_weights"),
    ("solvers.exponential_steps",),
    ("solvers.*",),
    ("solve",),
    ("tune.candidates", "scale"),
    ("tune.paths",),
    ("tune.borders",),
    ("tune.fit",),
    ("tune.trial",),
    ("tune", "likelihood", "diffusers"),
    ("measure.*",),
    ("sweep",),
    ("report",),
    ("cli.*",),
)
TOP = len(FLOORS) - 1  # the command line looks names up where the user does, in the package itself
# These only gather names for the user; they stand above everything they gather.
FACES = {"sdeflow", "sdeflow.solvers", "sdeflow.__main__"}
# Third-party packages every installation has. Everything else is an extra and may only be imported inside a function.
CORE = {"torch", "torchdiffeq", "torchsde", "numpy"}
EXTRAS = {"typer", "click", "rich", "matplotlib", "sklearn", "scipy", "ot", "diffusers", "transformers", "peft"}


def name_of(path: Path) -> str:
    parts = ("sdeflow", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int | None:
    """The floor of a module, None when the table does not place it."""
    inner = module.removeprefix("sdeflow.")
    while inner:
        for pattern in (inner, f"{inner}.*"):
            for floor, names in enumerate(FLOORS):
                if pattern in names:
                    return floor
        inner = inner.rpartition(".")[0]
    return None


def imports(tree: ast.Module, *, top_level: bool = False) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name) of the imports that run; those under `if TYPE_CHECKING` do not."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting.extend(ast.iter_child_nodes(node))


def modules() -> dict[str, ast.Module]:
    return {name_of(p): ast.parse(p.read_text(encoding="utf-8"), str(p)) for p in sorted(PACKAGE.rglob("*.py"))}


def internal(tree: ast.Module, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of this package) for every import from it; `from sdeflow import solve` means the module."""
    for line, module, name in imports(tree):
        if module.split(".")[0] == "sdeflow":
            yield line, f"{module}.{name}" if f"{module}.{name}" in known else module


def violations(parsed: dict[str, ast.Module]) -> list[str]:
    found = []
    for module, tree in parsed.items():
        if module in FACES:
            continue
        floor = floor_of(module)
        if floor is None:
            found.append(f"{module} has no floor: add it to FLOORS")
            continue
        for line, target in internal(tree, set(parsed)):
            if target in FACES and floor < TOP:
                found.append(f"{module}:{line} imports {target}, which stands above it: import the module itself")
                continue
            if target in FACES:
                continue
            below = floor_of(target)
            siblings = module.rpartition(".")[0] == target.rpartition(".")[0] != "sdeflow"
            inside = target == module.rpartition(".")[0] or siblings or target.startswith(f"{module}.")
            if below is None or below > floor or (below == floor and not inside):
                found.append(f"{module}:{line} (floor {floor}) imports {target} (floor {below})")
    return found


def test_every_import_comes_from_a_floor_below():
    assert violations(modules()) == []


def test_files_of_one_folder_do_not_import_each_other_in_a_circle():
    parsed = modules()
    graph = {m: {t for _, t in internal(tree, set(parsed)) if t != m} for m, tree in parsed.items() if m not in FACES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_the_table_itself_finds_an_upward_and_a_sideways_import():
    source = "from sdeflow.solve import solve\nfrom sdeflow import random\n"
    parsed = modules() | {"sdeflow.counting": ast.parse(source)}
    text = "\n".join(violations(parsed))
    assert "sdeflow.counting:1 (floor 1) imports sdeflow.solve" in text
    assert "sdeflow.counting:2 (floor 1) imports sdeflow.random (floor 1)" in text


def test_an_unplaced_file_is_reported():
    assert any("sdeflow.elsewhere has no floor" in v for v in violations({"sdeflow.elsewhere": ast.parse("")}))


def test_extras_are_imported_inside_functions_only():
    found = []
    for module, tree in modules().items():
        for line, target, _ in imports(tree, top_level=True):
            root = target.split(".")[0]
            if root not in CORE and root != "sdeflow" and root not in sys.stdlib_module_names:
                found.append(f"{module}:{line} imports {target}")
    assert found == []


def test_importing_sdeflow_loads_no_extra_of_its_own():
    """scipy is exempt here: torchdiffeq imports it itself."""
    code = f"import sys, sdeflow; print(sorted({EXTRAS - {'scipy'}!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == "[]"
