"""Does the tolerance mean the error on the path? Strong errors of the adaptive SDE solvers against the tolerance asked for.

    OMP_NUM_THREADS=1 python benchmarks/strong_tolerance.py --output benchmarks/results/strong_tolerance.json
    python benchmarks/strong_tolerance.py --table

Every exact problem under every process, reverse SDEs of η = 1 and 0.4, tolerances 1e-1 … 1e-4 (atol, rtol = 0), float64. A sample's
error is the RMS over its elements of its distance at the end from a fine solve on the same Brownian path. That is done by two
methods; samples in which these differ by more than half a tolerance are left out at that tolerance, and counted ("unsure"). Beside the
RMS over samples stand the median, the geometric mean, the RMS without the worst twentieth, and how many samples are more than 20
tolerances off ("lost"): one sample that ends in another mode outweighs all others.

A reference belongs to a clock, for paths run in it: solvers in t have one, ExponentialShARK another, Adams a third (at η = 1 that of
SNRTime, in which ShARK can make one; at other η nothing of order 1.5 shares it, so that Adams is measured at 1 alone).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from cells import PROBLEMS

import sdeflow as sf
from sdeflow.measure.record import versions
from sdeflow.solvers import stochastic_tableaux as tableaux

# the SDEs of the flow cannot start where α = 0
PROCESSES = {"VP": sf.VP, "EDM": sf.EDM, "RectifiedFlow": lambda: sf.RectifiedFlow(t_max=0.99)}
TOLERANCES = [1e-1, 1e-2, 1e-3, 1e-4]
SAMPLES = {"gaussian": 64, "ring": 64, "mixture64": 64, "digits": 32}
SEED, FINE, LOST, WORST = 5, 2400, 20.0, 0.05
LONG = 40_000
"""Steps that Adams needs at 1e-4, and is given in one cell."""


@dataclass(frozen=True, kw_only=True)
class Other(sf.ExponentialShARK):
    """Another method in ExponentialShARK's clock, to check its references by."""

    tableau: ClassVar[tableaux.AdditiveTableau] = tableaux.SRA1


def solvers(c: float, eta: float, everywhere: bool) -> dict[str, dict]:
    """clock: its two references and its solvers, each a function of the tolerance and the tolerances it is run at."""
    plain = {
        cls.__name__: (lambda a, cls=cls: cls(rtol=0.0, atol=a), TOLERANCES)
        for cls in (sf.SRA1, sf.SRA2, sf.SRA3, sf.SOSRA, sf.ShARK)
    }
    # as published but for the bridge, without which there is no path to be near; of order 1
    plain["GottaGoFast"] = (lambda a: sf.GottaGoFast(rtol=0.0, atol=a), TOLERANCES[:3])
    grid = sf.InChart(sf.StraightLine(c))
    found = {
        "u": {
            "fine": (sf.ExponentialShARK(c=c, steps=FINE), Other(c=c, steps=FINE)),
            "solvers": {"ExponentialShARK": (lambda a: sf.ExponentialShARK(c=c, rtol=0.0, atol=a), TOLERANCES)},
        },
        "t": {"fine": (sf.ShARK(steps=FINE, grid=grid), sf.SRA1(steps=FINE, grid=grid)), "solvers": plain},
    }
    if eta == 1.0:
        ours = {"chart": sf.SNRTime(), "grid": sf.InChart(sf.StraightLine(0.5 * c))}
        adams = lambda a: sf.Adams(  # noqa: E731
            rtol=0.0, atol=a, control="strong", chart=sf.Trigonometric(c), max_steps=LONG
        )
        found["τ"] = {
            "fine": (sf.ShARK(steps=FINE, **ours), sf.SRA1(steps=FINE, **ours)),
            "solvers": {'Adams(control="strong")': (adams, TOLERANCES if everywhere else TOLERANCES[:3])},
        }
    return found


def statistics(error: torch.Tensor) -> dict:
    """Of errors (n,) in units of the tolerance."""
    rms = lambda e: e.square().mean().sqrt().item()  # noqa: E731
    kept = error.sort().values[: len(error) - math.ceil(WORST * len(error))]
    return {
        "rms": rms(error),
        "without_worst": rms(kept),
        "median": error.median().item(),
        "geometric": error.clamp_min(1e-12).log().mean().exp().item(),
        "lost": int((error > LOST).sum()),
    }


def cell(name: str, problem, process, eta: float, everywhere: bool) -> list[dict]:
    """One row for every solver and tolerance."""
    equation = sf.ReverseSDE(problem.prediction(process), eta=eta)
    n, c = SAMPLES[name], float(problem.data_scale)
    x = process.prior((n, problem.dim), seed=SEED, dtype=torch.float64)
    path = sf.BrownianPath(sf.sample_seeds(SEED, n), (problem.dim,), dtype=torch.float64)
    rows = []
    for clock in solvers(c, eta, everywhere).values():
        fine, other = (sf.solve(equation, solver, x, path=path).x for solver in clock["fine"])
        differ = (fine - other).square().mean(1).sqrt()
        for solver, (make, tolerances) in clock["solvers"].items():
            for tolerance in tolerances:
                run = sf.solve(equation, make(tolerance), x, path=path, on_failure="return")
                error = (run.x - fine).square().mean(1).sqrt() / tolerance
                sure = (differ <= 0.5 * tolerance) & run.success
                rows.append(
                    {"solver": solver, "tolerance": tolerance}
                    | statistics(error[sure])
                    | {
                        "unsure": int((differ > 0.5 * tolerance).sum()),
                        "failed": int((~run.success).sum()),
                        "references_differ": differ.median().item() / tolerance,
                        "evaluations": run.evaluations.double().mean().item(),
                        "rejected": (run.rejected.sum() / (run.rejected + run.accepted).sum()).item(),
                    }
                )
    return rows


# --- tables


def within(value: float) -> bool:
    """A factor of 5."""
    return 0.2 <= value <= 5.0


def table(record: dict) -> str:
    """A row for every solver and tolerance: over all cells, the shares within a factor 5 and the range."""
    lines = [
        "| solver | tolerance | cells | median error within 5 | from … to | without the worst 5 % | RMS of all | lost samples | evaluations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float], list[dict]] = {}
    for rows in record["cells"].values():
        for row in rows:
            groups.setdefault((row["solver"], row["tolerance"]), []).append(row)
    for (solver, tolerance), rows in groups.items():
        count = {key: sum(within(row[key]) for row in rows) for key in ("median", "without_worst", "rms")}
        low, high = (f(row["median"] for row in rows) for f in (min, max))
        lost = sum(row["lost"] for row in rows)
        spent = sorted(row["evaluations"] for row in rows)
        lines.append(
            f"| `{solver}` | {tolerance:g} | {len(rows)} | {count['median']} | {low:.2f} … {high:.2f} | {count['without_worst']} | "
            f"{count['rms']} | {lost} | {spent[0]:.0f} … {spent[-1]:.0f} |"
        )
    return "\n".join(lines)


def outside(record: dict) -> str:
    """Every cell whose error without the worst twentieth is not within a factor 5."""
    return "\n".join(
        f"{place} {row['solver']} {row['tolerance']:g}: median {row['median']:.2f}, without worst {row['without_worst']:.2f}, RMS "
        f"{row['rms']:.2f}, lost {row['lost']}, unsure {row['unsure']}, failed {row['failed']}"
        for place, rows in record["cells"].items()
        for row in rows
        if not within(row["without_worst"])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/strong_tolerance.json"))
    parser.add_argument("--table", action="store_true", help="print the tables of the file instead of measuring")
    options = parser.parse_args()
    if options.table:
        record = json.loads(options.output.read_text(encoding="utf-8"))
        print(table(record), outside(record), sep="\n\n")
        return
    torch.set_num_threads(1)
    cells, began = {}, time.perf_counter()
    for name, problem in PROBLEMS.items():
        for process_name, process in PROCESSES.items():
            for eta in (1.0, 0.4):
                place = f"{name}/{process_name}/{eta:g}"
                everywhere = place == "gaussian/VP/1"
                cells[place] = cell(name, problem(), process(), eta, everywhere)
                for row in cells[place]:
                    words = ("median", "without_worst", "rms", "lost", "unsure", "evaluations")
                    print(place, row["solver"], row["tolerance"], *(f"{w} {row[w]:.3g}" for w in words), flush=True)
                print(f"{time.perf_counter() - began:.0f} s", flush=True)
    record = {"samples": SAMPLES, "seed": SEED, "fine": FINE, "versions": versions(), "cells": cells}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
