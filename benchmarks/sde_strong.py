"""Network evaluations to a strong error: the exponential scheme and ShARK against torchsde's srk, on Brownian paths.

    OMP_NUM_THREADS=1 python benchmarks/sde_strong.py --output benchmarks/results/sde_strong.json

The strong error of a method is its RMS distance, on shared paths, from a fine solve in the same clock, and so on the same paths;
the fine solve of each method is checked against another method's. Evaluations are counted at the network, and interpolated
on a log-log scale between the runs. One sample beside a border of two modes can decide the RMS of 64, so that everything is done for
five seeds and the median over them is reported, all five beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch

import sdeflow as sf
from sdeflow.measure.record import versions

PROCESS = sf.VP(t_min=1e-2)
SAMPLES, SEEDS, FINE = 64, (3, 4, 5, 6, 7), 1024
STEPS = (8, 16, 32, 64, 128, 256)
LEVELS = (1e-2, 1e-3)


def crossing(runs: list[tuple[float, float]], level: float) -> float | None:
    """Evaluations where the error falls below the level for good, log-log interpolated; None if it does not."""
    for (n0, e0), (n1, e1) in reversed(list(zip(runs, runs[1:], strict=False))):
        if e0 >= level >= e1:
            return n0 * (n1 / n0) ** (math.log(e0 / level) / math.log(e0 / e1))
    return None


def methods(c: float) -> dict:
    """Name: (solver of a number of steps, another solver in the same clock for the reference)."""
    chart = sf.LogSNR()
    grid = sf.UniformLogSNR()
    return {
        "ExponentialShARK": (lambda n: sf.ExponentialShARK(steps=n, c=c), None),
        "ExponentialShARK, λ grid": (lambda n: sf.ExponentialShARK(steps=n, c=c, grid=grid), None),
        "ExponentialShARK, grid even in θ": (
            lambda n: sf.ExponentialShARK(steps=n, c=c, grid=sf.InChart(sf.Trigonometric(c))),
            None,
        ),
        "SRA3 in λ": (
            lambda n: sf.SRA3(steps=n, chart=chart, grid=grid),
            lambda n: sf.SRA1(steps=n, chart=chart, grid=grid),
        ),
        "torchsde srk in λ": (
            lambda n: sf.TorchSDE("srk", steps=n, chart=chart),
            lambda n: sf.SRA3(steps=n, chart=chart, grid=grid),
        ),
    }


def measure(problem, c: float, seed: int) -> list[dict]:
    equation = sf.ReverseSDE(problem.prediction(PROCESS))
    x = PROCESS.prior((SAMPLES, problem.dim), seed=seed, dtype=torch.float64)
    path = sf.BrownianPath(sf.sample_seeds(seed, SAMPLES), (problem.dim,), dtype=torch.float64)
    rows = []
    for name, (make, other) in methods(c).items():
        fine = sf.solve(equation, (other or make)(FINE), x, path=path).x
        check = (
            sf.solve(equation, make(FINE), x, path=path).x
            if other
            else sf.solve(equation, make(FINE // 2), x, path=path).x
        )
        runs = []
        for n in STEPS:
            run = sf.solve(equation, make(n), x, path=path)
            runs.append((run.evaluations.double().mean().item(), (run.x - fine).square().mean().sqrt().item()))
        rows.append(
            {
                "method": name,
                "reference disagreement": (fine - check).square().mean().sqrt().item(),
                "runs": runs,
                "evaluations to": {f"{level:g}": crossing(runs, level) for level in LEVELS},
            }
        )
        print(
            f"  {name:28s}",
            rows[-1]["evaluations to"],
            f"references differ {rows[-1]['reference disagreement']:.1e}",
            flush=True,
        )
    return rows


def summary(rows: tuple[dict, ...]) -> dict:
    """One method over the seeds: medians of the evaluations needed, a level not reached counting as infinitely many."""
    needed = {}
    for level in rows[0]["evaluations to"]:
        found = [row["evaluations to"][level] for row in rows]
        middle = statistics.median(math.inf if n is None else n for n in found)
        needed[level] = {"median": middle if middle < math.inf else None, "of seeds": found}
    row = {
        "method": rows[0]["method"],
        "evaluations to": needed,
        "seeds": [{k: r[k] for k in ("reference disagreement", "runs")} for r in rows],
    }
    print(f"  median: {row['method']:28s}", {level: n["median"] for level, n in needed.items()}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sde_strong.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    gaussian = sf.problems.gaussian(mean=[0.0, 0.0], std=[0.3, 1.2])
    record = {"seeds": SEEDS, "samples": SAMPLES, "process": repr(PROCESS), "versions": versions(), "problems": {}}
    for name, problem, c in (("gaussian", gaussian, 0.6), ("ring", sf.problems.ring(), 0.7)):
        print(name)
        of_seed = [measure(problem, c, seed) for seed in SEEDS]
        record["problems"][name] = [summary(rows) for rows in zip(*of_seed, strict=True)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
