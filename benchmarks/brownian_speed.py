"""What a Brownian path costs beside torch.randn and torchsde's BrownianInterval, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/brownian_speed.py --output benchmarks/results/brownian_speed.json

Everything is timed in turn within one run, and the best of some repeats is kept, or the median of some queries, so that other
work on the machine disturbs the ratios little. "dyadic" is a uniform grid of 2^k steps over [0, 1]; "general" one over
[0.001, 1], whose nodes are ends of no cell. `randn` draws as many numbers as a sweep returns, W and H.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchsde

import sdeflow as sf
from sdeflow.measure.record import versions

SIZES = {(256, 2): 128, (4096, 64): 16}
"""Batch and elements: steps of the sweep."""


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def queried(ways: list[Callable[[float, float], object]], pairs: list[list[float]]) -> list[float]:
    """Median seconds of a new query to each, asked in turn."""
    seconds = [[] for _ in ways]
    for s, t in pairs:
        for way, spent in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way(s, t)
            spent.append(time.perf_counter() - began)
    return [statistics.median(spent) for spent in seconds]


def interval(batch: int, dim: int, **settings) -> torchsde.BrownianInterval:
    return torchsde.BrownianInterval(
        0.0, 1.0, (batch, dim), levy_area_approximation="space-time", entropy=1, **settings
    )


def swept(bm, grid: torch.Tensor) -> None:
    for s, t in zip(grid.tolist(), grid[1:].tolist(), strict=False):
        bm(s, t, return_U=True)


def measure(batch: int, dim: int, steps: int, repeats: int, queries: int) -> dict[str, float]:
    """Milliseconds of every way to draw."""
    path = sf.BrownianPath(sf.sample_seeds(1, batch), (dim,))
    dyadic, general = (torch.linspace(a, 1.0, steps + 1, dtype=torch.float64) for a in (0.0, 0.001))
    draw = random.Random(0)
    pairs = [sorted((draw.random(), draw.random())) for _ in range(2 * queries)]
    own = torch.linspace(0.1, 0.9, batch, dtype=torch.float64)
    bm = interval(batch, dim)
    for s, t in pairs[:queries]:  # its tree as it is in use; every timed query is a new one
        bm(s, t, return_U=True)
    path.increment(0.1, 0.2)
    own_query, tree_query = queried([path.increment, lambda s, t: bm(s, t, return_U=True)], pairs[queries:])
    times = {
        "randn": best(lambda: torch.randn(steps, 2, batch, dim), repeats),
        "sweep, dyadic grid": best(lambda: path.increments(dyadic), repeats),
        "sweep, general grid": best(lambda: path.increments(general), repeats),
        "BrownianInterval with dt hint": best(lambda: swept(interval(batch, dim, dt=1.0 / steps), dyadic), repeats),
        "random access, path": own_query,
        "random access, BrownianInterval": tree_query,
        "randn, one step": best(lambda: torch.randn(2, batch, dim), repeats),
        "step with times of its own for every sample": best(lambda: path.increment(own, own + 0.013), repeats),
    }
    return {name: 1e3 * seconds for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/brownian_speed.json"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for (batch, dim), steps in SIZES.items():
        repeats = options.repeats if batch < 1000 else max(2, options.repeats // 2)
        ms = measure(batch, dim, steps, repeats, 40 if batch < 1000 else 8)
        ratios = {
            "dyadic sweep / randn": ms["sweep, dyadic grid"] / ms["randn"],
            "general sweep / randn": ms["sweep, general grid"] / ms["randn"],
            "BrownianInterval with hint / dyadic sweep": ms["BrownianInterval with dt hint"] / ms["sweep, dyadic grid"],
            "BrownianInterval with hint / general sweep": ms["BrownianInterval with dt hint"]
            / ms["sweep, general grid"],
            "step with own times / step of the general sweep": ms["step with times of its own for every sample"]
            / (ms["sweep, general grid"] / steps),
            "random access: BrownianInterval / path": ms["random access, BrownianInterval"] / ms["random access, path"],
        }
        rows.append({"batch": batch, "elements": dim, "steps": steps, "ms": ms, "ratios": ratios})
    record = {"seed": 1, "threads": 1, "device": "cpu", "versions": versions(), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['batch']}×{row['elements']}, {row['steps']} steps")
        for name, value in (*row["ms"].items(), *row["ratios"].items()):
            print(f"  {name:45s} {value:10.3f}")


if __name__ == "__main__":
    main()
