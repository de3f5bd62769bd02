"""Strings become objects and nothing else happens; the commands do what they say."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import sdeflow as sf
from sdeflow import sweep
from sdeflow.__main__ import main
from sdeflow.cli import strings
from sdeflow.cli.app import COMPARED
from sdeflow.cli.plan import Efforts, choose
from sdeflow.cli.strings import parse, parse_numbers
from sdeflow.errors import InvalidInput, MissingDependency


class Thing:
    def __init__(self, *args, **settings):
        self.args, self.settings = args, settings


def refuse(size: int = 1):
    return size


NAMES = {"Thing": Thing, "rk4": Thing, "Sized": refuse}
INNER = {"Chart": lambda c=1.0: ("chart", c)}


def test_a_bare_name_is_a_constructor():
    spec = parse("rk4", NAMES, "solver")
    assert spec.build().settings == {}
    assert spec.build(steps=3).settings == {"steps": 3}


def test_settings_are_literals_and_known_constructors():
    thing = parse(
        "Thing('x', -2, rtol=1e-4, grid=[1, 0.5], flag=True, chart=Chart(c=0.5), other=Chart)", NAMES, "solver", INNER
    )
    built = thing.build()
    assert built.args == ("x", -2)
    assert built.settings == {
        "rtol": 1e-4,
        "grid": [1, 0.5],
        "flag": True,
        "chart": ("chart", 0.5),
        "other": ("chart", 1.0),
    }


def test_later_settings_win():
    assert parse("Thing(steps=3)", NAMES, "solver").build(steps=5).settings == {"steps": 5}


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    with pytest.raises(InvalidInput, match=r"unknown solver 'rk5'; did you mean rk4\? choose from: rk4, Sized, Thing"):
        parse("rk5", NAMES, "solver")


@pytest.mark.parametrize(
    "text",
    [
        "Thing(a=__import__('os'))",
        "Thing(a=(lambda: 1)())",
        "Thing(a=open)",
        "Thing(**{'a': 1})",
        "Thing(*[1])",
        "Thing.build()",
        "Thing(1)(2)",
        "Thing(a=[x for x in (1,)])",
        "rk4; rk4",
        "",
    ],
)
def test_nothing_but_settings_is_evaluated(text: str):
    with pytest.raises(InvalidInput):
        parse(text, NAMES, "solver", INNER)


def test_a_wrong_setting_names_the_string():
    with pytest.raises(InvalidInput, match=r"'Sized\(colour=1\)': .*unexpected keyword argument 'colour'"):
        parse("Sized(colour=1)", NAMES, "solver").build()


def test_numbers():
    assert parse_numbers("5,10, 20", int, "--steps") == [5, 10, 20]
    assert parse_numbers("1e-1,1e-2", float, "--tolerances") == [0.1, 0.01]
    for bad in ("", "5,x", "5,-1", "0", "2.5"):
        with pytest.raises(InvalidInput, match="--steps"):
            parse_numbers(bad, int, "--steps")


# --- what names stand for


def test_every_exported_solver_is_in_the_list_with_its_facts():
    rows = strings.solver_rows()
    assert {row[0].split("(")[0] for row in rows} == set(strings.solvers())
    assert all(len(row) == len(strings.SOLVER_COLUMNS) for row in rows)
    rk4 = next(row for row in rows if row[0] == "RungeKutta('rk4')")
    assert rk4[2] == "4" and rk4[5] == "4"


def test_every_listed_string_is_one_the_command_line_reads():
    for row in strings.solver_rows():
        specs = [strings.read_solver(row[0], kind) for kind in ("ode", "sde")]
        assert any(spec is not None and strings.at_any_effort(spec) is not None for spec in specs), row[0]


def test_the_solver_page_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "solvers.md"
    assert page.read_text(encoding="utf-8") == strings.solver_page(), "run: make docs"


def test_efforts_are_spread_where_the_string_gives_none():
    efforts = Efforts(tolerances=(1e-2, 1e-3), steps=(4, 8))
    assert [s.steps for s in choose(["RungeKutta('rk4')"], "ode", efforts)] == [4, 8]
    assert [s.steps for s in choose(["RungeKutta('rk4', steps=3)"], "ode", efforts)] == [3]


def test_a_method_by_its_bare_name_is_the_backend_that_solves_the_equation():
    efforts = Efforts(tolerances=(1e-2,), steps=(4,))
    assert choose(["dopri5", "srk"], "ode", efforts) == [sf.TorchDiffEq("dopri5", rtol=1e-2, atol=1e-2)]
    assert choose(["dopri5", "srk"], "sde", efforts) == [sf.TorchSDE("srk", steps=4)]
    both = [choose(["midpoint(steps=3)"], kind, efforts) for kind in ("ode", "sde")]
    assert both == [[sf.TorchDiffEq("midpoint", steps=3)], [sf.TorchSDE("midpoint", steps=3)]]


def test_charts_and_grids_are_settings():
    (solver,) = choose(["TorchDiffEq('dopri5', rtol=1e-2, chart=StraightLine(c=0.3))"], "ode", Efforts())
    assert solver == sf.TorchDiffEq("dopri5", rtol=1e-2, chart=sf.StraightLine(c=0.3))


def test_solvers_go_to_the_equations_they_solve():
    efforts = Efforts(steps=(4,))
    texts = ["RungeKutta('rk4')", "DDIM(eta=1.0)", "DPMSolverPP(sde=True)"]
    assert [type(s).__name__ for s in choose(texts, "ode", efforts)] == ["RungeKutta", "DPMSolverPP"]
    assert [type(s).__name__ for s in choose(texts, "sde", efforts)] == ["DDIM", "DPMSolverPP"]


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_the_default_solvers_exist_and_solve_their_equation(kind: str):
    for text in COMPARED[kind]:
        assert choose([text], kind, Efforts()), text


# --- the commands

SMALL = ["-p", "gaussian", "--samples", "8", "--law-samples", "16", "--steps", "3,6", "--tolerances", "1e-1,1e-2"]


def in_new_process(*arguments: object, timeout: float = 200.0) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "sdeflow", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False)


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process, which spares importing torch each time."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["sdeflow", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run


def test_compare_ends_with_records_table_and_figure(command, tmp_path: Path):
    ran = command("compare", *SMALL, "-s", "RungeKutta('heun')", "-s", "DPMSolverPP(sde=True)", "-o", tmp_path)
    assert ran.returncode == 0, ran.stderr
    records = sweep.read(tmp_path / "records.jsonl")
    assert [(r.equation["type"], r.solver["type"], r.solver["steps"]) for r in records] == [
        ("ProbabilityFlowODE", "RungeKutta", 3),
        ("ProbabilityFlowODE", "RungeKutta", 6),
        ("ProbabilityFlowODE", "DPMSolverPP", 3),
        ("ProbabilityFlowODE", "DPMSolverPP", 6),
        ("ReverseSDE", "DPMSolverPP", 3),
        ("ReverseSDE", "DPMSolverPP", 6),
    ]
    assert records[0].error.value > records[1].error.value
    for file in ("table.md", "work_precision.png", "work_precision.pdf"):
        assert (tmp_path / file).stat().st_size > 300
        assert str(tmp_path / file) in ran.stdout
    assert f"{records[1].error.value:.2e}" in ran.stdout

    again = command("compare", *SMALL, "-s", "RungeKutta('heun')", "-o", tmp_path)
    assert "2 of 2 runs were found" in again.stderr
    assert sweep.read(tmp_path / "records.jsonl") == records


def everything_but_time(path: Path) -> list[dict]:
    """Records as data, without the one thing that two runs may differ in."""
    return [{k: v for k, v in vars(r).items() if k != "wall_time"} for r in sweep.read(path)]


def test_a_killed_comparison_is_finished_with_the_same_records(tmp_path: Path):
    """SIGKILL after the second record and in the middle of a line: the same command ends with an undisturbed run's records."""
    what = ["compare", "-p", "gaussian", "--samples", "64", "--equation", "ode", "--steps", "2,300,350,400,450,500"]
    what += ["-s", "DDIM", "-s", "RungeKutta('heun')"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    file = killed / "records.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "sdeflow", *what, "-o", str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 200
    while not (file.exists() and file.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < end, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    early = file.read_bytes()
    assert 2 <= early.count(b"\n") < 12, "killed too late to show anything"
    file.write_bytes(early + early.splitlines(keepends=True)[0][:100])  # and a line cut short, as a full disk would

    assert in_new_process(*what, "-o", killed).returncode == 0
    assert in_new_process(*what, "-o", whole).returncode == 0
    assert file.read_bytes().startswith(early)
    assert everything_but_time(file) == everything_but_time(whole / "records.jsonl")
    assert len(everything_but_time(file)) == 12


def test_report_redraws_from_records_alone(command, tmp_path: Path, make_record):
    for n in (5, 10):
        sweep.append(tmp_path / "records.jsonl", make_record(steps=n))
    ran = command("report", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "work_precision.png").exists() and "rk4" in ran.stdout


def test_sample_saves_the_states_that_solve_gives(command, tmp_path: Path):
    import numpy as np

    ran = command(
        "sample",
        "-p",
        "ring",
        "--samples",
        "50",
        "-s",
        "DDIM(steps=8)",
        "--save-at",
        "0.5,0.1",
        "--seed",
        "3",
        "-o",
        tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "states.npz") as file:
        saved = dict(file)
    process = sf.VP()
    predict = sf.problems.ring().prediction(process)
    own = sf.solve(
        sf.ProbabilityFlowODE(predict),
        sf.DDIM(steps=8),
        process.prior((50, 2), seed=3),
        save_at=[0.5, 0.1, process.t_min],
    )
    assert np.array_equal(saved["states"], own.states.numpy()) and saved["states"].shape == (3, 50, 2)
    assert np.array_equal(saved["t"], own.t.numpy())
    assert np.array_equal(saved["evaluations"], own.evaluations.numpy())
    assert (tmp_path / "samples.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "-s", "dopri6"], "unknown solver 'dopri6'"),
        (["compare", "-p", "digit"], "did you mean digits?"),
        (["compare", "--process", "VQ"], "unknown process 'VQ'"),
        (["compare", "--equation", "pde"], "choose ode, sde or both"),
        (["compare", "--steps", "5,x"], "--steps '5,x'"),
        (["compare", "-s", "DDIM(eta=7, steps=3)"], "0 ≤ eta ≤ 1"),
        (["sample", "-s", "DDIM"], "needs steps="),
        (["sample", "--samples", "-3", "-s", "DDIM(steps=3)"], "--samples -3"),
        (["report", "nowhere"], "holds no records"),
    ],
)
def test_mistakes_are_one_line_with_the_choices(command, arguments, said, tmp_path: Path):
    ran = command(*arguments, *(["-o", tmp_path] if arguments[0] != "report" else []))
    assert ran.returncode == 2
    assert said in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize("named", ["compare", "sample"])
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_solved(command, tmp_path: Path, named):
    (tmp_path / "file").write_text("")
    ran = command(named, "-p", "ring", "-s", "DDIM(steps=3)", "-o", tmp_path / "file" / "folder")
    assert ran.returncode == 2
    assert (
        ran.stderr.strip().splitlines()[-1].startswith("sdeflow: Not a directory: ") and "Traceback" not in ran.stderr
    )


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_gives_the_install_command(missing: str):
    code = f"import sys; sys.modules[{missing!r}] = None; from sdeflow.__main__ import main; main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 2
    assert ran.stderr.strip() == "sdeflow: the command line needs typer and rich; write: pip install 'sdeflow[cli]'"


def test_figures_without_matplotlib_give_the_install_command(monkeypatch: pytest.MonkeyPatch):
    from sdeflow import report

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"pip install 'sdeflow\[cli\]'"):
        report._pyplot()


@pytest.mark.parametrize("eta", ["-1", "nan"])
def test_sample_refuses_a_strength_that_is_none(command, tmp_path: Path, eta):
    ran = command("sample", "-p", "ring", "-s", "DDIM(steps=5)", "--eta", eta, "-o", tmp_path)
    assert ran.returncode != 0 and "eta" in ran.stderr and not (tmp_path / "states.npz").exists()
