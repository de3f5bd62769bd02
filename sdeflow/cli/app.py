"""The commands, as typer shows them. Typer reads the signatures, so annotations here are real objects."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import sdeflow as sf
from sdeflow import report
from sdeflow.cli import strings
from sdeflow.cli.plan import Comparison, Efforts, choose
from sdeflow.errors import InvalidInput, MissingDependency
from sdeflow.measure import Record
from sdeflow.sweep import Run, sweep

COMPARED = {
    "ode": (
        "TorchDiffEq('dopri5')",
        "TorchDiffEq('bosh3')",
        "TorchDiffEq('dopri8')",
        "TorchDiffEq('rk4')",
        "TorchDiffEq('dopri5', chart=PlainTime())",
        "DDIM",
        "DPMSolverPP(order=2)",
        "UniPC(order=3)",
        "Adams",
    ),
    "sde": (
        "TorchSDE('euler')",
        "TorchSDE('heun')",
        "TorchSDE('srk')",
        "DDIM(eta=1.0)",
        "DPMSolverPP(order=2, sde=True)",
        "StochasticAdams",
    ),
}
"""What `sdeflow compare` runs when no solver is named."""


def build() -> Any:
    """The command line as a callable.

    Raises:
        MissingDependency: typer or rich is not installed.
    """
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        raise MissingDependency("the command line needs typer and rich; write: pip install 'sdeflow[cli]'") from error
    app = typer.Typer(
        help="Solve the differential equations of diffusion models, and measure what each solve cost and how wrong it was.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for add in (_add_compare, _add_sample, _add_solvers, _add_report):
        add(app, typer)
    return app


def _add_compare(app: Any, typer: Any) -> None:
    @app.command()
    def compare(
        problem: str = typer.Option("digits", "--problem", "-p", help="digits, gaussian, mixture64 or ring"),
        process: str = typer.Option("VP", help='VP, EDM, RectifiedFlow, …; with settings: "VP(beta_max=12)"'),
        equation: str = typer.Option("both", help="ode, sde or both"),
        solver: list[str] = typer.Option(
            [], "--solver", "-s", help="such as dopri5, srk or \"TorchDiffEq('rk4', steps=20)\"; may be repeated"
        ),
        tolerances: str = typer.Option("1e-1,1e-2,1e-3,1e-4,1e-5", help="for methods that choose their steps"),
        steps: str = typer.Option("5,10,20,40,80", help="for methods on a fixed grid"),
        samples: int = typer.Option(64, help="samples of an ODE run"),
        law_samples: int = typer.Option(512, help="samples of an SDE run, whose end states are compared as a law"),
        eta: float = typer.Option(1.0, help="η of the reverse SDE"),
        seed: int = typer.Option(0, help="of start states, noise and statistics"),
        threads: int = typer.Option(1, help="of torch; 1 makes times comparable"),
        output: Path = typer.Option(Path("results/compare"), "--output", "-o", help="folder of records and figure"),
    ) -> None:
        """Measure error against network evaluations, and draw the figure.

        Finished runs are appended to records.jsonl in the output folder at once and are not made again: an interrupted comparison is
        finished by the same command.
        """
        efforts = Efforts(
            strings.parse_numbers(tolerances, float, "--tolerances"), strings.parse_numbers(steps, int, "--steps")
        )
        if equation not in ("ode", "sde", "both"):
            raise InvalidInput(f"--equation {equation!r}: choose ode, sde or both")
        if threads < 1:
            raise InvalidInput(f"--threads {threads}: expected a number ≥ 1")
        torch.set_num_threads(threads)
        target = strings.parse(problem, strings.problems(), "problem").build()
        forward = strings.parse(process, strings.processes(), "process").build()
        with _bar() as bar:
            runs = []
            for kind in ("ode", "sde") if equation == "both" else (equation,):
                size = samples if kind == "ode" else law_samples
                plan = Comparison(target, forward, kind, eta, size, seed, announce=bar.say)
                runs += [plan.run(one) for one in choose(solver or COMPARED[kind], kind, efforts)]
            if not runs:
                raise InvalidInput(f"none of {', '.join(solver)} solves the equation asked for (--equation {equation})")
            output.mkdir(parents=True, exist_ok=True)
            records = bar.follow(runs, output / "records.jsonl")
        _show(records)
        _write(records, output)


def _add_report(app: Any, typer: Any) -> None:
    @app.command(name="report")
    def show(folder: Path = typer.Argument(..., help="a folder with records.jsonl")) -> None:
        """Print the table and draw the figure of records made earlier."""
        from sdeflow.sweep import read

        records = read(folder / "records.jsonl")
        if not records:
            raise InvalidInput(f"{folder / 'records.jsonl'} holds no records; write: sdeflow compare --output {folder}")
        _show(records)
        _write(records, folder)


def _add_sample(app: Any, typer: Any) -> None:
    @app.command()
    def sample(
        problem: str = typer.Option("digits", "--problem", "-p", help="digits, gaussian, mixture64 or ring"),
        process: str = typer.Option("VP", help="as in compare"),
        solver: str = typer.Option(
            "TorchDiffEq('dopri5', rtol=1e-3, atol=1e-3)", "--solver", "-s", help="with its settings"
        ),
        eta: float = typer.Option(0.0, help="0: the probability-flow ODE; above: the reverse SDE with this η"),
        samples: int = typer.Option(64, help="how many"),
        label: int = typer.Option(-1, help="one class only; −1 for all"),
        save_at: str = typer.Option("", help="times whose states are saved too, from noise to data: 0.5,0.1"),
        seed: int = typer.Option(0, help="of start states and noise"),
        output: Path = typer.Option(Path("results/sample"), "--output", "-o", help="folder of states and picture"),
    ) -> None:
        """Solve, save the states and draw them."""
        import numpy as np

        target = strings.parse(problem, strings.problems(), "problem").build()
        forward = strings.parse(process, strings.processes(), "process").build()
        predict = target.prediction(forward, label=None if label < 0 else label)
        equation = sf.ProbabilityFlowODE(predict) if eta == 0 else sf.ReverseSDE(predict, eta=eta)
        method = strings.read_solver(solver, "sde" if eta > 0 else "ode")
        if method is None:
            raise InvalidInput(
                f"{solver!r} does not solve {'SDEs' if eta > 0 else 'ODEs'}; write --eta {0 if eta > 0 else 1}"
            )
        times = strings.parse_numbers(save_at, float, "--save-at") + [equation.stop] if save_at else None
        if samples < 1:
            raise InvalidInput(f"--samples {samples}: expected a number ≥ 1")
        output.mkdir(parents=True, exist_ok=True)
        x = forward.prior((samples, *target.event_shape), seed=seed)
        solution = sf.solve(equation, method.build(), x, save_at=times, seed=seed if eta > 0 else None)
        np.savez(
            output / "states.npz",
            x=solution.x.numpy(),
            t=solution.t.numpy(),
            states=solution.states.numpy(),
            evaluations=solution.evaluations.numpy(),
            status=solution.status.numpy(),
        )
        typer.echo(f"{solution.summary()}, {solution.wall_time:.2f} s")
        typer.echo(f"states   {output / 'states.npz'}")
        truth = target.sample(2000, seed=seed + 1).numpy() if target.dim == 2 else None
        typer.echo(f"picture  {report.picture(solution.x.numpy(), output / 'samples.png', truth)}")


def _add_solvers(app: Any, typer: Any) -> None:
    @app.command()
    def solvers(
        markdown: Path = typer.Option(None, help="write the table to this file instead, as Markdown"),
    ) -> None:
        """List every solver with what it claims: the same facts the tests prove."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        if markdown is not None:
            markdown.write_text(strings.solver_page(), encoding="utf-8")
            typer.echo(f"wrote {markdown}")
            return
        table = Table(*strings.SOLVER_COLUMNS, box=box.SIMPLE_HEAD)
        for row in strings.solver_rows():
            table.add_row(*row)
        _console(Console).print(table)


class _Progress:
    """A bar over the runs of a sweep; says what is being solved."""

    def __init__(self, bar: Any):
        self._bar, self._task = bar, bar.add_task("planning", total=None)

    def say(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def follow(self, runs: list[Run], path: Path) -> list[Record]:
        self._bar.update(self._task, total=len(runs))
        records, found = [], 0
        for step in sweep(runs, path):
            records.append(step.record)
            found += not step.made
            self._bar.update(
                self._task, advance=1, description=f"{report.solver_name(step.record)} {report.effort(step.record)}"
            )
        if found:
            self._bar.console.print(f"{found} of {len(runs)} runs were found in {path} and not made again")
        return records


@contextlib.contextmanager
def _bar() -> Iterator[_Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Progress(bar)


def _show(records: list[Record]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = _console(Console)
    for title, group in report.grouped(records).items():
        table = Table(*report.COLUMNS, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for row in report.rows(group):
            table.add_row(*row)
        console.print(table)


def _console(make: Callable[..., Any]) -> Any:
    """A terminal's own width, and enough for the widest table where there is none (a pipe, a log)."""
    console = make()
    return console if console.is_terminal else make(width=150)


def _write(records: list[Record], folder: Path) -> None:
    table = folder / "table.md"
    table.write_text(report.markdown(records), encoding="utf-8")
    subjects = dict.fromkeys(report.subject(r) for r in records)
    title = next(iter(subjects)) if len(subjects) == 1 else ""
    figures = report.figure(report.points(records), folder / "work_precision.png", title)
    print(f"records  {folder / 'records.jsonl'}")
    print(f"table    {table}")
    print(f"figure   {', '.join(str(path) for path in figures)}")
