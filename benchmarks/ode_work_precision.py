"""Work against precision of adaptive ODE solvers on exact problems: evaluations needed for an end-point error.

    python benchmarks/ode_work_precision.py --out benchmarks/results/ode_work_precision.json

Every solver runs over a ladder of tolerances; NFE to reach an error is interpolated log-log where the error falls below
it for good; mean and maximum over the samples are given. The adaptive peers of adaptive_peers.py run in t, in log-SNR and in our
coordinates (u, z), always told to end on a step and never evaluated outside the interval; k-diffusion's in its own. The
fixed-grid solvers of the field run over their grids. float64 throughout; the reference is dopri8 at 1e-11. Cells already in the
output file are kept: delete it to start anew.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from adaptive_peers import Coordinates, TooMany, peers
from budget_field import OURS
from cells import PROBLEMS, PROCESSES

import sdeflow as sf

TARGETS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
TOLERANCES = [10.0 ** (-0.5 * i) for i in range(1, 16)]
STEPS = [5, 6, 8, 10, 12, 15, 20, 26, 34, 45, 60, 80, 110, 150, 200]
GRIDS = [sf.UniformTime(), sf.UniformLogSNR(), sf.Karras(), sf.Quadratic()]
FIXED = {
    name: OURS[name.replace(" Heun", "Heun")]
    for name in (
        *("DDIM", "DPM++2M", "DPM++3M", "DPM++2S", "DPM++3S", "DPM-3"),
        *("UniPC2", "UniPC3", "DEIS3", "DEIS4", "EDM Heun", "RK4 in t"),
    )
}
"""The fixed-grid solvers of diffusers, k-diffusion and azula: our implementations of their formulae, at the order each claims, and
evaluations a step."""


def nfe_to(points, targets):
    """points (error, nfe): the nfe from which on the error stays below each target, log-log interpolated, None if never."""
    points, found = sorted(points, key=lambda p: p[1]), []
    for target in targets:
        i = len(points)
        while i > 0 and points[i - 1][0] <= target:
            i -= 1
        if i == len(points):
            found.append(None)
        elif i == 0:
            found.append(points[0][1])
        else:
            (e0, n0), (e1, n1) = points[i - 1][:2], points[i][:2]
            share = math.log(target / e0) / math.log(max(e1, 1e-300) / e0)
            found.append(math.exp(math.log(n0) + share * math.log(n1 / n0)))
    return found


def ladder(run, truth, tolerances):
    """(error, mean NFE, max NFE, tolerance or steps) over the tolerances, as far as the peer gets, and why it got no further."""
    points, stopped = [], None
    for tol in tolerances:
        try:
            x, nfe = run(tol)
        except (TooMany, AssertionError, RuntimeError, ValueError) as error:
            stopped = f"{type(error).__name__}: {error}"[:120]
            break
        error = (x - truth).square().mean().sqrt().item()
        nfe = torch.as_tensor(nfe, dtype=torch.float64)
        if math.isfinite(error):
            points.append((error, nfe.mean().item(), nfe.max().item(), tol))
    return points, stopped


def cell(problem, process, batch, seed):
    """All solvers on one problem and process: list of records."""
    predict = problem.prediction(process)
    x = process.prior((batch, problem.dim), seed=seed, dtype=torch.float64)
    ode = sf.ProbabilityFlowODE(predict)
    straight = sf.StraightLine()
    flow = Coordinates(straight, predict, x)
    flow.calls = -100_000
    span = torch.tensor([flow.u0, flow.u1], dtype=torch.float64)
    truth = flow.x(
        torchdiffeq.odeint(flow, flow.z0, span, rtol=1e-11, atol=1e-11, method="dopri8", options={"step_t": span[1:]})[
            -1
        ]
    )

    def native(solver):
        def run(tol):
            s = sf.solve(ode, solver(rtol=tol, atol=tol), x)
            return s.x, s.evaluations

        return run

    def fixed(make, cost, grid):
        def run(n):
            s = sf.solve(ode, make(steps=max(1, n // cost), grid=grid), x, on_failure="return")
            return s.x, float(s.calls)

        return run

    solvers: list[tuple[str, str, Callable, list]] = [
        ("sdeflow Adams", "ours", native(sf.Adams), TOLERANCES),
        ("sdeflow Tsit5", "ours", native(sf.Tsit5), TOLERANCES),
    ]
    generic, special = peers()
    for label, chart in (("t", sf.PlainTime()), ("log-SNR", sf.LogSNR()), ("ours", straight)):
        solvers += [(name, label, partial(run, chart, predict, x), TOLERANCES) for name, run in generic]
    solvers += [(name, "its own", partial(run, None, predict, x), TOLERANCES) for name, run in special]
    for name, (make, cost) in FIXED.items():
        solvers += [(name, f"{type(grid).__name__} grid", fixed(make, cost, grid), STEPS) for grid in GRIDS]
    records = []
    for name, coordinates, run, rungs in solvers:
        began = time.perf_counter()
        points, stopped = ladder(run, truth, rungs)
        records.append(
            {
                "solver": name,
                "coordinates": coordinates,
                "points": points,
                "stopped": stopped,
                "nfe": nfe_to([p[:2] for p in points], TARGETS),
                "nfe_max": nfe_to([(p[0], p[2]) for p in points], TARGETS),
                "seconds": round(time.perf_counter() - began, 2),
            }
        )
    return records


def best(records, keep):
    """The fewest evaluations for every target among the records kept, and whose they are."""
    out = []
    for i in range(len(TARGETS)):
        have = [(r["nfe"][i], f"{r['solver']} in {r['coordinates']}") for r in records if keep(r) and r["nfe"][i]]
        out.append(min(have) if have else (None, None))
    return out


def summarise(name, records):
    """Print one cell and return its ratios."""
    ours = records[0]["nfe"]
    usual = best(records, lambda r: r["coordinates"] in ("t", "log-SNR", "its own"))
    handed = best(records, lambda r: r["coordinates"] == "ours" and not r["solver"].startswith("sdeflow"))
    grids = best(records, lambda r: r["coordinates"].endswith("grid"))
    any_kind = [min((p for p in pair if p[0]), default=(None, None)) for pair in zip(usual, grids, strict=True)]

    def row(label, values):
        print(f"{name:24s} {label:32s}", " ".join(f"{v:7.2f}" if v else "      –" for v in values), flush=True)

    ratio = {
        k: [o / p[0] if o and p[0] else None for o, p in zip(ours, peer, strict=True)]
        for k, peer in (("usual", usual), ("handed", handed), ("any", any_kind))
    }
    row("Adams, mean NFE", ours)
    row("best adaptive peer, t or log-SNR", [p[0] for p in usual])
    row("best adaptive peer, our chart", [p[0] for p in handed])
    row("ratio to the first (asked ≤ 0.4)", ratio["usual"])
    row("ratio to the second (≤ 0.5)", ratio["handed"])
    row("ratio to the best of any kind", ratio["any"])
    row("error/tolerance of ours, max", [max(p[0] / p[3] for p in records[0]["points"] if p[3] > 5e-7)])
    return {"usual": usual, "handed": handed, "any": any_kind, "ratio": ratio}


def rounded(value):
    """Figures to four digits: the file is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def main():
    """Run the cells and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--processes", nargs="*", default=list(PROCESSES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "targets": TARGETS,
        "batch": args.batch,
        "seed": args.seed,
        "device": platform.machine(),
        "versions": {
            "torch": torch.__version__,
            "torchdiffeq": torchdiffeq.__version__,
            "numpy": np.__version__,
            "sdeflow": sf.__version__,
        },
        "cells": {},
    }
    if args.out and args.out.exists():
        found["cells"] = json.loads(args.out.read_text())["cells"]
    for p in args.problems:
        for q in args.processes:
            if f"{p}/{q}" in found["cells"]:
                continue
            records = cell(PROBLEMS[p](), PROCESSES[q](), args.batch, args.seed)
            found["cells"][f"{p}/{q}"] = {"records": records, "summary": summarise(f"{p}/{q}", records)}
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(rounded(found)) + "\n")


if __name__ == "__main__":
    main()
