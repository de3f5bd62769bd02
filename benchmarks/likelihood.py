"""Evaluations needed for log-likelihoods of a given error, against torchdiffeq's dopri5 on the same equations.

    python benchmarks/likelihood.py --output results/likelihood.json

Exact divergence and the exact law at the noise end, so that the error is the solver's alone. For every tolerance on a
ladder: the root-mean-square error over the samples against the exact density, and the mean evaluations a sample. "NFE to
e" is read off by log-log interpolation. dopri5 runs in plain t (as likelihood code usually does) and in our chart
(straight lines, c half the data's standard deviation).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path

import torch
import torchdiffeq

import sdeflow as sf
from sdeflow.likelihood import value_and_divergence
from sdeflow.problems.problem import Problem

LADDER = [10.0 ** (-k / 2) for k in range(2, 17)]
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def adams(problem: Problem, process: sf.Process, x: torch.Tensor, tol: float) -> tuple[torch.Tensor, float]:
    found = sf.log_likelihood(
        problem.prediction(process),
        x,
        sf.Adams(rtol=tol, atol=tol),
        chart=sf.StraightLine(0.5 * problem.data_scale),
        prior=lambda z: problem.log_prob(z, process, process.t_max),
    )
    return found.log_prob, found.solution.evaluations.double().mean().item()


def dopri5(chart: sf.StraightLine | sf.PlainTime):
    def run(problem: Problem, process: sf.Process, x: torch.Tensor, tol: float) -> tuple[torch.Tensor, float]:
        bound, predict, calls = chart.bind(process), problem.prediction(process), 0

        def field(u: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            nonlocal calls
            calls += 1
            value, trace = value_and_divergence(lambda z: bound.drift(predict, u, z), state[0])
            return value, trace[:, 0]

        start, stop = process.t_min, process.t_max
        u = torch.stack([bound.u(start), bound.u(stop)])
        y = (bound.to_chart(start, x), x.new_zeros(len(x)))
        options = {"step_t": u[1:]}  # without it the last step leaves the interval
        z, integral = torchdiffeq.odeint(field, y, u, method="dopri5", rtol=tol, atol=tol, options=options)
        end = problem.log_prob(bound.from_chart(stop, z[1]), process, stop)
        return end + integral[1] + x[0].numel() * (bound.m(start).log() - bound.m(stop).log()), calls

    return run


def needed(points: list[tuple[float, float]], target: float) -> float | None:
    """Evaluations at which the error first reaches the target and stays, by log-log interpolation."""
    for n in range(len(points) - 1, 0, -1):
        (e0, n0), (e1, n1) = points[n - 1], points[n]
        if e1 <= target < e0:
            return math.exp(math.log(n0) + math.log(e0 / target) / math.log(e0 / e1) * math.log(n1 / n0))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluations needed for log-likelihoods of a given error.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    given = parser.parse_args()
    rows = []
    for problem in (sf.problems.gaussian(), sf.problems.ring()):
        for process in (sf.VP(), sf.EDM()):
            x = problem.sample(given.samples, seed=1, dtype=torch.float64)
            exact = problem.log_prob(x, process, process.t_min)
            methods = {
                "Adams": adams,
                "dopri5 in t": dopri5(sf.PlainTime()),
                "dopri5 in our chart": dopri5(sf.StraightLine(0.5 * problem.data_scale)),
            }
            for name, run in methods.items():
                points = []
                for tol in LADDER:
                    value, evaluations = run(problem, process, x, tol)
                    points.append(((value - exact).square().mean().sqrt().item(), evaluations))
                    if points[-1][0] < min(TARGETS):
                        break
                row = {
                    "problem": problem.name,
                    "process": type(process).__name__,
                    "method": name,
                    "needed": {f"{t:g}": needed(points, t) for t in TARGETS},
                    "points": points,
                }
                rows.append(row)
                shown = "/".join("–" if v is None else f"{v:.0f}" for v in row["needed"].values())
                print(f"{problem.name:9s} {row['process']:4s} {name:20s} {shown}", flush=True)
    if given.output:
        versions = {"torch": torch.__version__, "sdeflow": sf.__version__, "python": platform.python_version()}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"samples": given.samples, "seed": 1, "device": "cpu", "versions": versions, "rows": rows}
        given.output.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
