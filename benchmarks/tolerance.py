"""Does the tolerance mean the error? End-point errors of Adams against the tolerance asked for, without and with global error
control, and its own estimate of them.

    python benchmarks/tolerance.py --out benchmarks/results/tolerance.json --figure docs/images/tolerance.png

Every exact problem under every process, tolerances 1e-1 … 1e-6 (rtol = atol), float64, 256 samples. A sample's error is RMS over its
elements, the batch's RMS over its samples. A sample counts as flipped if its error exceeds a quarter of the data's standard
deviation while the tolerance is below a twentieth: the flow carried it to another mode. The reference is Adams at 1e-10. Then the
trained digits networks, 32 samples in float32 against 1000 even steps in float64, to 1e-3. Last the mixture's data, scaled, in the
default chart and in that of their scale; there tolerances are shares of the scale.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch
from budget import NETWORKS, Cell
from cells import PROBLEMS, PROCESSES

import sdeflow as sf

TOLERANCES = [10.0**-k for k in range(1, 7)]


def rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def network(target: str) -> list[dict]:
    """One row a tolerance: errors of a plain solve and of one with global error control."""
    ode, x, truth = Cell(f"network/{target}").part(None)
    rows = []
    for tol in TOLERANCES[:3]:
        row = {"tolerance": tol}
        for key, checked in (("", False), ("_global", True)):
            with torch.no_grad():
                s = sf.solve(ode, sf.Adams(rtol=tol, atol=tol, global_error=checked), x)
            row |= {f"rmse{key}": rms(s.x - truth), f"evaluations{key}": s.evaluations.double().mean().item()}
        rows.append(row)
    return rows


def scaled(ratio: float) -> dict:
    """The 64-D mixture's data at `ratio` times the default chart's scale: errors over the tolerance, in that chart and in the data's own."""
    process, problem = sf.VP(t_min=1e-4), PROBLEMS["mixture64"]()
    mixture, by = problem.mixture, 0.5 * ratio / problem.data_scale
    data = replace(mixture, means=by * mixture.means, variances=by**2 * mixture.variances)
    ode = sf.ProbabilityFlowODE(sf.problems.Problem("scaled", data).prediction(process))
    x = process.prior((128, problem.dim), seed=5, dtype=torch.float64)
    own = sf.StraightLine(c=0.5 * ratio)
    truth = sf.solve(ode, sf.Adams(rtol=0.0, atol=0.5e-9 * ratio, chart=own), x).x
    row: dict = {"ratio": ratio}
    for tol in (1e-2, 1e-4):
        for name, chart in (("default", sf.StraightLine()), ("own", own)):
            s = sf.solve(ode, sf.Adams(rtol=0.0, atol=0.5 * ratio * tol, chart=chart), x)
            error = (s.x - truth).square().mean(1).sqrt() / (0.5 * ratio * tol)
            found = {"rmse": rms(error), "median": error.median().item()}
            row[f"{name} {tol:g}"] = found | {"evaluations": s.evaluations.double().mean().item()}
    return row


def cell(problem, process, samples: int, seed: int) -> list[dict]:
    """One row a tolerance."""
    ode = sf.ProbabilityFlowODE(problem.prediction(process))
    x = process.prior((samples, problem.dim), seed=seed, dtype=torch.float64)
    spread = (problem.moments()[1].trace() / problem.dim).sqrt().item()
    truth = sf.solve(ode, sf.Adams(rtol=1e-10, atol=1e-10), x).x
    rows = []
    for tol in TOLERANCES:
        alone = sf.solve(ode, sf.Adams(rtol=tol, atol=tol), x)
        both = sf.solve(ode, sf.Adams(rtol=tol, atol=tol, error_estimate=True), x)
        checked = sf.solve(ode, sf.Adams(rtol=tol, atol=tol, global_error=True), x)
        error = (both.x - truth).square().mean(1).sqrt()
        flipped = (error > 0.25 * spread) & (tol < 0.05 * spread)
        rows.append(
            {
                "tolerance": tol,
                "rmse": rms(error),
                "median": error.median().item(),
                "flipped": int(flipped.sum()),
                "rmse_without_flipped": rms(error[~flipped]),
                "estimate": rms(both.error_estimate),
                "evaluations": alone.evaluations.double().mean().item(),
                "evaluations_with_estimate": both.evaluations.double().mean().item(),
                "rmse_global": rms(checked.x - truth),
                "estimate_global": rms(checked.error_estimate),
                "evaluations_global": checked.evaluations.double().mean().item(),
            }
        )
    return rows


def draw(cells: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(16, 4.2), sharex=True)
    titles = (
        ("rmse", "end-point RMSE over the tolerance"),
        ("rmse_without_flipped", "the same without flipped samples"),
        ("rmse_global", "RMSE over the tolerance, global_error=True"),
        ("estimate", "estimated error over the true one"),
    )
    marks = dict(zip(PROCESSES, "os^", strict=True))
    colours = dict(zip(PROBLEMS, ("C0", "C1", "C2", "C3"), strict=True))
    for panel, (key, title) in zip(panels, titles, strict=True):
        for name, rows in cells.items():
            problem, process = name.split("/")
            under = "rmse" if key == "estimate" else "tolerance"
            panel.loglog(
                [r["tolerance"] for r in rows],
                [r[key] / r[under] for r in rows],
                marks[process] + "-",
                color=colours[problem],
                label=name,
                lw=1,
                ms=4,
            )
        panel.axhspan(1 / 3, 3, color="0.92", zorder=0)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("tolerance")
    panels[0].invert_xaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncol=6, loc="lower center")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tolerance.json"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = {}
    for problem_name, problem in PROBLEMS.items():
        for process_name, process in PROCESSES.items():
            rows = cells[f"{problem_name}/{process_name}"] = cell(problem(), process(), args.samples, args.seed)
            for key, label, under in (
                ("rmse", "RMSE/tolerance", "tolerance"),
                ("rmse_without_flipped", "without flipped", "tolerance"),
                ("flipped", "flipped", None),
                ("estimate", "estimate/RMSE", "rmse"),
                ("evaluations_with_estimate", "cost of it", "evaluations"),
                ("rmse_global", "RMSE global", "tolerance"),
                ("evaluations_global", "cost of it", "evaluations"),
            ):
                values = [r[key] / r[under] if under else r[key] for r in rows]
                print(f"{problem_name}/{process_name:14s} {label:16s}", *(f"{v:7.2f}" for v in values), flush=True)
    networks = {target: network(target) for target in NETWORKS}
    for target, rows in networks.items():
        for row in rows:
            print(f"network/{target}", *(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    scales = [scaled(2.0**k) for k in range(-5, 6)]
    for row in scales:
        print(
            *(f"{k} {v if k == 'ratio' else {a: round(b, 2) for a, b in v.items()}}" for k, v in row.items()),
            flush=True,
        )
    record = {
        "samples": args.samples,
        "seed": args.seed,
        "device": platform.machine(),
        "versions": {"torch": torch.__version__, "sdeflow": sf.__version__},
        "cells": cells,
        "networks": networks,
        "scales": scales,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.figure:
        draw(cells, args.figure)


if __name__ == "__main__":
    main()
