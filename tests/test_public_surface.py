"""The public names are a promise: adding or removing one means changing this list."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import sdeflow as sf

PUBLIC = {
    "processes": "CosineVP DiscreteVP EDM Process RectifiedFlow SubVP VE VP",
    "predictions": "DataPrediction EDMPrediction FlowPrediction NoisePrediction Prediction ScorePrediction VPrediction",
    "networks": "Checkpointed ClassifierFree ClassifierGuidance Conditioned Inpaint",
    "equations": "Equation ForwardSDE ProbabilityFlowODE ReverseSDE",
    "charts": "BentLine LogSNR PlainTime SNRTime StraightLine Trigonometric chart_for",
    "grids": "Discrete InChart Karras Multiscale Nodes Power Quadratic UniformLogSNR UniformTime",
    "solvers": (
        "Adams DDIM DDPM DEIS DPMSolver DPMSolverPP Dopri5 EDMHeun ERSDE EulerAncestral FixedAdams Restart RungeKutta "
        "SASolver StochasticAdams TorchDiffEq TorchSDE Tsit5 UniPC as_torchsde"
    ),
    "solvers on paths": "EulerMaruyama ExponentialShARK GottaGoFast Milstein SEA SOSRA SRA1 SRA2 SRA3 ShARK StochasticHeun",
    "solving": "BrownianPath Solution Status data_scale sample_seeds solve tune",
    "likelihood": "Likelihood bits_per_dim decode encode log_likelihood",
    "diffusers": "diffusers",
    "errors": "InvalidInput MissingDependency SdeflowError SolveFailed",
    "problems": "problems",
}
NAMES = sorted(name for names in PUBLIC.values() for name in names.split())
PROBLEMS = ["digits", "from_points", "gaussian", "mixture64", "ring"]


def test_the_public_names_are_the_list():
    assert sorted(sf.__all__) == NAMES, "a name was added or removed: change PUBLIC here and docs/api.md with it"


def test_every_public_name_exists_once():
    assert len(set(sf.__all__)) == len(sf.__all__)
    assert [name for name in sf.__all__ if not hasattr(sf, name)] == []


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_offered(name: str):
    assert callable(getattr(sf.problems, name))


@pytest.mark.parametrize("name", NAMES)
def test_public_names_explain_themselves(name: str):
    text = inspect.getdoc(getattr(sf, name)) or ""
    assert len(text) > 10


def test_every_name_is_on_the_page_of_names():
    """docs/api.md mentions all of them; the solvers have a page of their own, which is generated."""
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "api.md").read_text(encoding="utf-8") + (docs / "solvers.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if not re.search(rf"`{name}\b|problems\.{name}\b|`{name}\(", text)] == []


def test_the_signature_of_solve():
    parameters = list(inspect.signature(sf.solve).parameters)
    assert parameters[:10] == [
        "equation",
        "solver",
        "x",
        "start",
        "stop",
        "save_at",
        "seed",
        "gradients",
        "on_failure",
        "progress",
    ]


def test_docstrings_are_whole():
    """No line of a docstring ends in a quotation mark whose partner opens the next: the trace of a bad line break."""
    package = Path(sf.__file__).parent
    broken = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                if re.search(r'"\n\s*"', ast.get_docstring(node, clean=False) or ""):
                    broken.append(f"{path.name}: {getattr(node, 'name', 'module')}")
    assert broken == []
