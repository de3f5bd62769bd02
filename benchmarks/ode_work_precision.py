"""Work against precision of adaptive ODE solvers on exact problems: evaluations needed for an end-point error.

    python benchmarks/ode_work_precision.py --out benchmarks/results/ode_work_precision.json

Every solver runs over a ladder of tolerances; NFE to reach an error is interpolated log-log where the error falls below
it for good. Peers share one step size over the batch, so their NFE is the number of calls; ours differs by sample, and
its mean and maximum are given. Peers run in t, in log-SNR and in our coordinates (u, z), always told to end on a step
(torchdiffeq's step_t) and never evaluated outside the interval. float64 throughout; the reference is dopri8 at 1e-11.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from scipy.integrate import solve_ivp

import sdeflow as sf

TARGETS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
TOLERANCES = [10.0 ** (-0.5 * i) for i in range(1, 16)]
TORCHDIFFEQ = ["dopri5", "bosh3", "dopri8", "adaptive_heun", "fehlberg2"]
SCIPY = ["RK45", "DOP853", "LSODA"]
PROCESSES = {"VP": sf.VP, "EDM": sf.EDM, "RectifiedFlow": sf.RectifiedFlow}
PROBLEMS = {
    "ring": sf.problems.ring,
    "mixture64": sf.problems.mixture64,
    "digits": sf.problems.digits,
    "gaussian": sf.problems.gaussian,
}
CALLS = 600
"""A peer's ladder ends where it needs more calls than this."""


class TooMany(Exception):
    """The peer used up its calls."""


class Coordinates:
    """The probability-flow ODE in a chart, as a function of a scalar clock, counted and clamped to the interval."""

    def __init__(self, chart, predict, x):
        self.process, self.predict, self.bound = predict.process, predict, chart.bind(predict.process)
        ends = [self.process.t_max, self.process.t_min]
        if isinstance(chart, sf.LogSNR) and float(self.process.alpha(ends[0])) == 0.0:
            ends[0] = 1.0 - 1e-5  # log-SNR does not reach α = 0
        self.ends = ends
        self.u0, self.u1 = (self.bound.u(t).item() for t in ends)
        self.low, self.high = sorted((self.u0, self.u1))
        self.z0 = self.bound.to_chart(ends[0], x)
        self.calls = 0

    def __call__(self, u, z):
        self.calls += 1
        if self.calls > CALLS:
            raise TooMany
        u = torch.as_tensor(u, dtype=torch.float64).clamp(self.low, self.high)
        return self.bound.drift(self.predict, u, z)

    def x(self, z):
        return self.bound.from_chart(self.ends[1], z)


def run_torchdiffeq(method, chart, predict, x, tol):
    flow = Coordinates(chart, predict, x)
    span = torch.tensor([flow.u0, flow.u1], dtype=torch.float64)
    options = {"step_t": span[1:]}
    z = torchdiffeq.odeint(flow, flow.z0, span, rtol=tol, atol=tol, method=method, options=options)[-1]
    return flow.x(z), flow.calls


def run_scipy(method, chart, predict, x, tol):
    flow = Coordinates(chart, predict, x)

    def f(u, z):
        return flow(u, torch.from_numpy(z).reshape(x.shape)).flatten().numpy()

    done = solve_ivp(f, (flow.u0, flow.u1), flow.z0.flatten().numpy(), method=method, rtol=tol, atol=tol)
    return flow.x(torch.from_numpy(done.y[:, -1]).reshape(x.shape)), flow.calls


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
    """(error, mean NFE, max NFE, tolerance) over the tolerances, as far as the peer gets."""
    points = []
    for tol in tolerances:
        try:
            x, nfe = run(tol)
        except (TooMany, AssertionError, RuntimeError, ValueError):
            break
        error = (x - truth).square().mean().sqrt().item()
        nfe = torch.as_tensor(nfe, dtype=torch.float64)
        if math.isfinite(error):
            points.append((error, nfe.mean().item(), nfe.max().item(), tol))
    return points


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

    solvers: list[tuple[str, str, Callable]] = [
        ("sdeflow Adams", "ours", native(sf.Adams)),
        ("sdeflow Tsit5", "ours", native(sf.Tsit5)),
    ]
    for name, chart in (("t", sf.PlainTime()), ("log-SNR", sf.LogSNR()), ("ours", straight)):
        for library, methods, run in (("torchdiffeq", TORCHDIFFEQ, run_torchdiffeq), ("scipy", SCIPY, run_scipy)):
            for method in methods:
                solvers.append(
                    (f"{library} {method}", name, lambda tol, r=run, m=method, c=chart: r(m, c, predict, x, tol))
                )
    records = []
    for name, coordinates, run in solvers:
        began = time.perf_counter()
        points = ladder(run, truth, TOLERANCES)
        records.append(
            {
                "solver": name,
                "coordinates": coordinates,
                "points": points,
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
    usual = best(records, lambda r: r["coordinates"] != "ours")
    handed = best(records, lambda r: r["coordinates"] == "ours" and not r["solver"].startswith("sdeflow"))

    def row(label, values):
        print(f"{name:24s} {label:32s}", " ".join(f"{v:7.2f}" if v else "      –" for v in values), flush=True)

    ratio = {
        k: [o / p[0] if o and p[0] else None for o, p in zip(ours, peer, strict=True)]
        for k, peer in (("usual", usual), ("handed", handed))
    }
    row("Adams, mean NFE", ours)
    row("best adaptive peer, t or log-SNR", [p[0] for p in usual])
    row("best adaptive peer, our chart", [p[0] for p in handed])
    row("ratio to the first (asked ≤ 0.4)", ratio["usual"])
    row("ratio to the second (≤ 0.5)", ratio["handed"])
    row("error/tolerance of ours, max", [max(p[0] / p[3] for p in records[0]["points"] if p[3] > 5e-7)])
    return {"usual": usual, "handed": handed, "ratio": ratio}


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
    for p in args.problems:
        for q in args.processes:
            records = cell(PROBLEMS[p](), PROCESSES[q](), args.batch, args.seed)
            found["cells"][f"{p}/{q}"] = {"records": records, "summary": summarise(f"{p}/{q}", records)}
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
