"""A fixed budget of evaluations: sf.tune against the field's fixed-grid solvers with their grid chosen in hindsight.

    python benchmarks/budget.py --out benchmarks/results/budget.json

The methods of the field are run in this package's own implementation of their published formulae, each at the order it
claims (tests/solvers/test_contract.py), so the peers are at their best: DDIM, DPM-Solver++ 2M/3M/2S/3S, DPM-Solver 2/3,
UniPC 2/3/4 (bh1 and bh2), DEIS 2/3/4, EDM's Heun, RK4, each on every grid of GRIDS in their own variables. "Handed
our coordinates" are the generic methods of the peers (Euler, midpoint, Heun, RK4, Dopri5, Adams–Bashforth 2 to 5) in the straight-line
chart, for several c, on uniform grids of the chart and on GRIDS. "Untuned" is our own predictor-corrector Adams on the same charts and
grids, to show what tuning adds. Hindsight means: the smallest error on the test samples themselves. A method may use fewer
evaluations than the budget, never more. The tuned solver sees pilot samples of another seed only.

Errors are end-point RMSE over the test batch (float64) against an Adams solve at 1e-10.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from functools import partial
from pathlib import Path

import torch

import sdeflow as sf
from sdeflow.tune import search

BUDGETS = [5, 6, 8, 10, 15, 20, 30, 50]
PROCESSES = {"VP": sf.VP, "EDM": sf.EDM, "RectifiedFlow": sf.RectifiedFlow}
PROBLEMS = {
    "gaussian": sf.problems.gaussian,
    "ring": sf.problems.ring,
    "mixture64": sf.problems.mixture64,
    "digits": sf.problems.digits,
}
GRIDS = [sf.UniformTime(), sf.UniformLogSNR(), sf.Karras(), sf.Quadratic(), sf.Power(power=3.0), sf.Karras(rho=3.0)]
OWN = {
    "DDIM": (sf.DDIM, 1),
    "DPM++2M": (partial(sf.DPMSolverPP, order=2), 1),
    "DPM++3M": (partial(sf.DPMSolverPP, order=3), 1),
    "DPM++2S": (partial(sf.DPMSolverPP, order=2, multistep=False), 2),
    "DPM++3S": (partial(sf.DPMSolverPP, order=3, multistep=False), 3),
    "DPM-2": (partial(sf.DPMSolver, order=2), 2),
    "DPM-3": (partial(sf.DPMSolver, order=3), 3),
    "UniPC2": (partial(sf.UniPC, order=2), 1),
    "UniPC3": (partial(sf.UniPC, order=3), 1),
    "UniPC4": (partial(sf.UniPC, order=4), 1),
    "DEIS2": (partial(sf.DEIS, order=2), 1),
    "DEIS3": (partial(sf.DEIS, order=3), 1),
    "DEIS4": (partial(sf.DEIS, order=4), 1),
    "EDMHeun": (sf.EDMHeun, 2),
    "RK4 in t": (partial(sf.RungeKutta, "rk4", chart=sf.PlainTime()), 4),
}
SCALES = [0.25, 0.5, 1.0]


def charted(correctors: bool) -> dict:
    """Solvers in the straight-line chart: name → (maker, evaluations a step, grids)."""
    found = {}
    for c in SCALES:
        chart = sf.StraightLine(c=c)
        grids = [sf.InChart(chart), *GRIDS]
        for order in (2, 3, 4, 5):
            made = partial(sf.FixedAdams, order=order, corrector=None if correctors else 0, chart=chart)
            found[f"Adams {order}, c={c}"] = (made, 1, grids)
        for name, cost in () if correctors else (("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("dopri5", 7)):
            found[f"{name}, c={c}"] = (partial(sf.RungeKutta, name, chart=chart), cost, grids)
    return found


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    value = (a - b).double().square().mean().sqrt().item()
    return value if math.isfinite(value) else math.inf


def best(equation, x, end, budget: int, makers: dict) -> dict:
    """The smallest error of any maker on any grid within the budget."""
    found = {"error": math.inf}
    for name, (make, cost, grids) in makers.items():
        for grid in grids:
            for steps in {budget // cost, (budget + 1) // cost} - {0}:  # EDM's Heun saves a call on its last step
                try:
                    run = sf.solve(equation, make(steps=steps, grid=grid), x, on_failure="return")
                except sf.InvalidInput:  # a grid that does not reach α = 0, a start-up that needs more steps
                    continue
                error = rmse(run.x, end)
                if run.calls <= budget and error < found["error"]:
                    found = {"error": error, "solver": name, "grid": repr(grid), "evaluations": run.calls}
    return found


def cell(problem_name: str, process_name: str, samples: int, pilots: int) -> tuple[dict, dict]:
    process, problem = PROCESSES[process_name](), PROBLEMS[problem_name]()
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    x = process.prior((samples, problem.dim), seed=1, dtype=torch.float64)
    end = sf.solve(equation, sf.Adams(rtol=1e-10, atol=1e-10), x).x
    pilot = process.prior((pilots, problem.dim), seed=99, dtype=torch.float64)
    own = {name: (make, cost, GRIDS) for name, (make, cost) in OWN.items()}
    rows, solvers = [], {}
    for budget in BUDGETS:
        began = time.perf_counter()
        tuning = search(equation, budget, pilot)
        seconds = time.perf_counter() - began
        solvers[budget] = tuning.solver
        error = rmse(sf.solve(equation, tuning.solver, x).x, end)
        peer, handed, untuned = (best(equation, x, end, budget, m) for m in (own, charted(False), charted(True)))
        rows.append(
            {
                "problem": problem_name,
                "process": process_name,
                "budget": budget,
                "tuned": error,
                "pilot": tuning.pilot_error,
                "order": tuning.solver.order,
                "corrector": tuning.solver.corrector,
                "c": tuning.solver.chart.c,
                "cost_in_solves": tuning.evaluations / budget,
                "tuning_seconds": round(seconds, 2),
                "best_peer": peer,
                "best_handed": handed,
                "best_untuned": untuned,
                "ratio_peer": error / peer["error"],
                "ratio_handed": error / handed["error"],
                "ratio_untuned": error / untuned["error"],
            }
        )
        print(
            f"{problem_name:10s} {process_name:14s} {budget:3d}  tuned {error:.1e}  peer {peer['error']:.1e} ({peer['solver']})"
            f"  handed {handed['error']:.1e} ({handed['solver']})  untuned {untuned['error']:.1e}"
            f"  ratios {error / peer['error']:.2f} {error / handed['error']:.2f}",
            flush=True,
        )
    return {"rows": rows}, {"solvers": solvers, "equation": equation, "x": x, "end": end}


def transfer(kept: dict) -> list[dict]:
    """Solvers tuned on one problem, run on the others of the same process."""
    rows = []
    for (source, process), given in kept.items():
        for (target, other), on in kept.items():
            if process == other and source != target:
                for budget in (10, 20, 50):
                    error = rmse(
                        sf.solve(on["equation"], given["solvers"][budget], on["x"], on_failure="return").x, on["end"]
                    )
                    rows.append(
                        {"tuned_on": source, "run_on": target, "process": process, "budget": budget, "error": error}
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/budget.json"))
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--processes", default=",".join(PROCESSES))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--pilots", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "sdeflow": sf.__version__, "python": platform.python_version()}
    result = {"samples": args.samples, "pilots": args.pilots, "seeds": {"test": 1, "pilot": 99}, "versions": versions}
    rows, kept = [], {}
    for process in args.processes.split(","):
        for problem in args.problems.split(","):
            found, kept[problem, process] = cell(problem, process, args.samples, args.pilots)
            rows += found["rows"]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    args.out.write_text(json.dumps({**result, "rows": rows, "transfer": transfer(kept)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
