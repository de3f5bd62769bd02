"""What adaptive solvers cost beyond the network, and the wall time with a network of 10 ms, interleaved in one run.

    python benchmarks/adaptive_overhead.py [--rounds 8] [--out benchmarks/results/adaptive_overhead.json]

Trivial network: the exact denoiser of N(0, ¼) under EDM's process, three small operations; whole solves at 1e-4, float32 and float64,
set-up included, processor time of one thread over the number of network calls; the least of the rounds counts. torchdiffeq's dopri5 runs by
itself in t and through `TorchDiffEq` in our chart. With the slow network the same is slept on for 10 ms a call, and the ratio of wall
times is set beside the ratio of calls.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchdiffeq

import sdeflow as sf

SHAPES = [(256, 64), (4096, 64)]
TOLERANCE = 1e-4
PROCESS = sf.EDM()


def trivial(x, t):
    return x * (0.25 / (0.25 + t * t))[:, None]


def slow(x, t):
    time.sleep(0.01)
    return trivial(x, t)


def contenders(network) -> dict[str, Callable]:
    """name → run(x), which returns the number of network calls."""
    ode = sf.ProbabilityFlowODE(sf.DataPrediction(network, PROCESS))
    span = torch.tensor([PROCESS.t_max, PROCESS.t_min], dtype=torch.float64)

    def ours(solver):
        return lambda x: sf.solve(ode, solver, x).calls

    def bare(x):
        calls = 0

        def drift(t, y):
            nonlocal calls
            calls += 1
            return ((y - network(y, t.expand(len(y)).to(y.dtype))) / t).to(y.dtype)

        torchdiffeq.odeint(drift, x, span.to(x.dtype), rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
        return calls

    both = {"rtol": TOLERANCE, "atol": TOLERANCE}
    return {
        "Adams": ours(sf.Adams(**both)),
        "Adams, coupled": ours(sf.Adams(**both, coupled=True)),
        "Tsit5": ours(sf.Tsit5(**both)),
        "TorchDiffEq dopri5, our chart": ours(sf.TorchDiffEq("dopri5", **both, chart=sf.StraightLine())),
        "torchdiffeq dopri5 in t": bare,
    }


def fastest(
    runs: dict[str, Callable], x: torch.Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[int, float]]:
    """name → (network calls, least seconds), the runs taking turns."""
    least, calls = dict.fromkeys(runs, math.inf), {}
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            calls[name] = run(x)
            least[name] = min(least[name], clock() - began)
    return {name: (calls[name], least[name]) for name in runs}


def overhead(shape, dtype, rounds: int) -> dict[str, dict[str, float]]:
    x = PROCESS.prior(shape, seed=0, dtype=dtype)
    found = fastest(contenders(trivial), x, rounds, time.process_time)
    return {name: {"calls": calls, "ms_per_call": 1e3 * seconds / calls} for name, (calls, seconds) in found.items()}


def slow_network(rounds: int) -> dict[str, dict[str, float]]:
    found = fastest(contenders(slow), PROCESS.prior(SHAPES[0], seed=0), rounds, time.perf_counter)
    return {name: {"calls": calls, "seconds": seconds} for name, (calls, seconds) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adaptive_overhead.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for shape in SHAPES:
            for dtype in (torch.float32, torch.float64):
                found = overhead(shape, dtype, args.rounds)
                rows.append({"shape": list(shape), "dtype": str(dtype), "solvers": found})
                cells = "  ".join(f"{n} {v['ms_per_call']:.2f} ms x {v['calls']}" for n, v in found.items())
                print(shape, dtype, cells, flush=True)
        waited = slow_network(3)
    peer = waited["torchdiffeq dopri5 in t"]
    for name, v in waited.items():
        v |= {"time_ratio": v["seconds"] / peer["seconds"], "calls_ratio": v["calls"] / peer["calls"]}
        print(
            f"10 ms network: {name:32s} {v['calls']:4d} calls, time {v['time_ratio']:.2f}, calls {v['calls_ratio']:.2f}"
        )
    record = {
        "device": f"CPU, one thread, {platform.machine()}",
        "versions": {"torch": torch.__version__, "torchdiffeq": torchdiffeq.__version__, "sdeflow": sf.__version__},
        "tolerance": TOLERANCE,
        "overhead": rows,
        "slow_network": waited,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
