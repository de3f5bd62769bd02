"""A fixed budget of evaluations: sf.tune against the field's fixed-grid solvers with their grid chosen in hindsight.

    python benchmarks/budget.py --stage peers        # the field; slow, once
    python benchmarks/budget.py --stage tuned        # sf.tune on every cell, and the transfer table
    python benchmarks/budget.py --stage untuned      # sf.StochasticAdams, which asks the network nothing beforehand; minutes
    python benchmarks/budget.py --table              # the tables of docs/budget.md

Results are kept row by row in --folder (budget_peers.json, budget.json); what is there is not run again, so that a stopped run goes
on where it was. Remove rows to run them again.

Peers are those of budget_field.py: diffusers', k-diffusion's and azula's own samplers where installed, and this package's
implementations of published formulae, on every grid of GRIDS. "Handed our coordinates" are the generic methods of the peers (Euler,
midpoint, Heun, RK4, Dopri5, Adams–Bashforth 2 to 5) in the straight-line chart, for several c, on uniform grids of the chart and on
GRIDS. Hindsight means: the
smallest error on the test samples themselves. A method may use fewer evaluations than the budget, never more. The tuned solver sees
pilot samples of another seed only.

Errors are end-point RMSE over batches of 256, their geometric mean over eight batches, and over all 2048 samples ("pooled"): of the exact flow
(float64) against a tight Adams solve, of the trained networks (32 samples) against 1000 even steps of their own flow, the network in float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from budget_field import BATCH, KEPT, SCREENED, charted, errors, field, hindsight, version
from cells import PROBLEMS, PROCESSES
from torch import Tensor

import sdeflow as sf
from sdeflow.grids import Nodes
from sdeflow.solvers.base import Solver
from sdeflow.solvers.fixed_adams import FittedAdams
from sdeflow.tune import search

BUDGETS = [5, 6, 8, 10, 15, 20, 30, 50]
ORDER = [10, 20, 5, 50, 15, 8, 30, 6]
"""Budgets in the order they are run, so that a run cut short has spread itself over all cells."""
NETWORKS = ("noise", "v")
NETWORK_BUDGETS = [5, 10, 20]
SAMPLES, NETWORK_SAMPLES, PILOTS = 2048, 32, 32
SEEDS = {"test": 1, "pilot": 99}
BOUNDS = {5: (0.7, 0.9), 6: (0.7, 0.9), 8: (0.7, 0.9), 10: (0.7, 0.9)}
"""What the ratios to the field and to the field in our chart should be; (0.2, 0.35) from 15 evaluations on."""
TRANSFERRED = (10, 20, 50)


class Cell:
    """One flow: its equation, pilot starts, and part(n): equation, starts and true ends of n test samples."""

    def __init__(self, name: str):
        self.name = name
        problem, process = name.split("/")
        self.network = problem == "network"
        if self.network:
            self._load(process)
        else:
            self._exact(problem, process)

    def _exact(self, problem_name: str, process_name: str) -> None:
        process, problem = PROCESSES[process_name](), PROBLEMS[problem_name]()
        self.equation = sf.ProbabilityFlowODE(problem.prediction(process))
        self.x, self.pilot = (
            process.prior((n, problem.dim), seed=SEEDS[which], dtype=torch.float64)
            for n, which in ((SAMPLES, "test"), (PILOTS, "pilot"))
        )
        self.end = sf.solve(self.equation, sf.Adams(rtol=1e-10, atol=1e-10), self.x).x

    def part(self, n: int | None) -> tuple[sf.ProbabilityFlowODE, Tensor, Tensor]:
        if not self.network:
            return self.equation, self.x[:n], self.end[:n]
        n = min(n or NETWORK_SAMPLES, NETWORK_SAMPLES if n is None else NETWORK_SAMPLES // 4)
        return self.conditioned(n, torch.float32), self.x[:n].float(), self.end[:n]

    def _load(self, target: str) -> None:
        from digits_network import load, split

        labels = split()[3]

        def conditioned(n: int, dtype: torch.dtype, first: int = 0) -> sf.ProbabilityFlowODE:
            return sf.ProbabilityFlowODE(load(target, labels[first : first + n], load={"torch_dtype": dtype}))

        self.conditioned: Callable = conditioned
        exact = conditioned(NETWORK_SAMPLES, torch.float64)
        process = exact.process
        assert process is not None
        self.x = process.prior((NETWORK_SAMPLES, 1, 8, 8), seed=SEEDS["test"], dtype=torch.float64)
        # a network's output wiggles in t with the period of its time embedding, which an adaptive solver takes for noise and steps
        # over: only steps short beside that period are exact
        tight = sf.FixedAdams(order=4, steps=1000, grid=sf.UniformLogSNR())
        with torch.no_grad():
            self.end = sf.solve(exact, tight, self.x).x
        # other samples of other classes: the pilot's labels follow those of the test
        self.pilot = process.prior((PILOTS, 1, 8, 8), seed=SEEDS["pilot"], dtype=torch.float32)
        self.equation = conditioned(PILOTS, torch.float32, first=NETWORK_SAMPLES)


def peers(cell: Cell, budget: int) -> dict:
    """The best of the field, and of the field in our chart."""
    kinds = {"field": field(), "handed": charted()}
    return {kind: hindsight(cell.part, budget, of) for kind, of in kinds.items()}


def tuned(cell: Cell, budget: int) -> tuple[dict, FittedAdams]:
    """sf.tune on the pilot, its errors on the test samples, and the solver itself."""
    began = time.perf_counter()
    tuning = search(cell.equation, budget, cell.pilot)
    seconds = time.perf_counter() - began
    solver = tuning.solver
    assert isinstance(solver.grid, Nodes) and isinstance(solver.chart, sf.StraightLine)
    row = errors_of(solver, cell) | {
        "pilot": tuning.pilot_error,
        "flips": tuning.flip_error,
        "order": solver.order,
        "corrector": solver.corrector,
        "c": solver.chart.c,
        "times": list(solver.grid.values),
        "cost_in_solves": tuning.evaluations / budget,
        "seconds": round(seconds, 2),
    }
    return row, solver


def untuned(cell: Cell, budget: int) -> dict:
    """The solver of few steps that nothing is tuned for, on the same samples."""
    return errors_of(sf.StochasticAdams(steps=budget), cell)


def errors_of(solver: Solver, cell: Cell) -> dict[str, float]:
    """The two errors over the test samples, and the median over them of a sample's own."""
    equation, x, end = cell.part(None)
    with torch.no_grad():
        reached = sf.solve(equation, solver, x, on_failure="return").x
    own = (reached.double() - end).flatten(1).square().mean(1).sqrt()
    error, pooled = errors(reached, end)
    return {"error": error, "pooled": pooled, "median": own.median().item()}


def transfer(solver: FittedAdams, source: str, budget: int, found: dict, cells: Callable[[str], Cell]) -> None:
    """The errors of a solver tuned on `source`, run on the other problems of the same process."""
    for problem in PROBLEMS:
        target = f"{problem}/{source.split('/')[1]}"
        if target != source:
            row = found.setdefault(f"{source.split('/')[0]} on {target}", {})
            row[str(budget)] = errors_of(solver, cells(target))["error"]


def ratios(store: dict) -> list[dict]:
    """One row a cell and budget: errors, ratios and whether both bounds hold."""
    rows = []
    for name, at in store["tuned"].items():
        for budget, row in sorted(at.items(), key=lambda pair: int(pair[0])):
            peer = store["peers"].get(name, {}).get(budget)
            if peer is None:
                continue
            bound = BOUNDS.get(int(budget), (0.2, 0.35))
            found = {"cell": name, "budget": int(budget), "tuned": row, "peers": peer, "ratio": {}, "held": {}}
            for error in ("error", "pooled"):
                to = tuple(row[error] / peer[kind][error] for kind in ("field", "handed"))
                found["ratio"][error], found["held"][error] = to, tuple(r <= b for r, b in zip(to, bound, strict=True))
            rows.append(found | {"untuned": store["untuned"][name][budget]})
    return rows


def table(store: dict) -> str:
    """The tables of docs/budget.md; a ratio over its bound is bold."""
    head = (
        "| cell | NFE | tuned | median | best of the field | in our chart | ratio to the field | ratio in our chart "
        "| untuned | median |"
    )
    lines = [head, "| --- " * 10 + "|"]
    rows = ratios(store)
    for row in rows:
        found, peer = row["tuned"], row["peers"]
        shown = [
            f"{ratio:.2f}" if held else f"**{ratio:.2f}**"
            for ratio, held in zip(row["ratio"]["error"], row["held"]["error"], strict=True)
        ]
        lines.append(
            f"| {row['cell']} | {row['budget']} | {found['error']:.1e} | {found['median']:.1e} "
            f"| {peer['field']['error']:.1e} ({peer['field']['solver']}) "
            f"| {peer['handed']['error']:.1e} | {shown[0]} | {shown[1]} "
            f"| {row['untuned']['error']:.1e} | {row['untuned']['median']:.1e} |"
        )
    exact = [row for row in rows if not row["cell"].startswith("network")]
    for kind, i in (("field", 0), ("in our chart", 1)):
        held, pooled = (sum(row["held"][error][i] for row in exact) for error in ("error", "pooled"))
        lines.append(f"\nWithin the bound, {kind}: {held} of {len(exact)}; pooled {pooled}.")
    lines += ["", "| tuned on, run on | " + " | ".join(map(str, TRANSFERRED)) + " |", "| --- " * 4 + "|"]
    for name, at in store.get("transfer", {}).items():
        own = store["tuned"][name.split(" on ")[1]]
        cells = [f"{at[str(b)]:.1e} ({at[str(b)] / own[str(b)]['error']:.1f}×)" for b in TRANSFERRED]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def names() -> list[str]:
    """Every cell: problem/process, then network/target."""
    exact = [f"{problem}/{process}" for process in PROCESSES for problem in PROBLEMS]
    return exact + [f"network/{target}" for target in NETWORKS]


def run(stage: str, wanted: list[str], budgets: list[int], store: dict, save: Callable[[], None]) -> None:
    """Fill in what the store lacks."""
    built: dict[str, Cell] = {}

    def cells(name: str) -> Cell:
        if name not in built:
            built[name] = Cell(name)
        return built[name]

    for budget in budgets:
        for name in wanted:
            rows = store.setdefault(stage, {}).setdefault(name, {})
            if str(budget) not in rows and budget in (NETWORK_BUDGETS if name.startswith("network") else BUDGETS):
                if stage == "peers":
                    rows[str(budget)] = peers(cells(name), budget)
                elif stage == "untuned":
                    rows[str(budget)] = untuned(cells(name), budget)
                else:
                    rows[str(budget)], solver = tuned(cells(name), budget)
                    if budget in TRANSFERRED and not name.startswith("network"):
                        transfer(solver, name, budget, store.setdefault("transfer", {}), cells)
                save()
                print(name, budget, json.dumps(rows[str(budget)])[:230], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--stage", choices=("peers", "tuned", "untuned"))
    parser.add_argument("--cells", default=",".join(names()), help="problem/process or network/target, comma-separated")
    parser.add_argument("--budgets", default=",".join(map(str, ORDER)), help="evaluations, in the order to run them")
    parser.add_argument("--table", action="store_true", help="print the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = args.folder / "budget.json"
    files = {"peers": args.folder / "budget_peers.json", "tuned": own, "untuned": own}
    stores = {stage: json.loads(file.read_text("utf-8")) if file.exists() else {} for stage, file in files.items()}

    def save() -> None:
        args.folder.mkdir(parents=True, exist_ok=True)
        files[args.stage].write_text(json.dumps(store, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    if args.stage:
        store = stores[args.stage]
        versions = {name: version(name) for name in ("torch", "diffusers", "k-diffusion", "azula")}
        versions |= {"sdeflow": sf.__version__, "python": platform.python_version()}
        settings = {"samples": SAMPLES, "network_samples": NETWORK_SAMPLES, "pilots": PILOTS, "seeds": SEEDS}
        store["settings"] = settings | {"screened": SCREENED, "kept": KEPT, "batch": BATCH}
        store["versions"] = versions
        run(args.stage, args.cells.split(","), [int(b) for b in args.budgets.split(",")], store, save)
    if args.table:
        print(table(stores["tuned"] | {"peers": stores["peers"]["peers"]}))


if __name__ == "__main__":
    main()
