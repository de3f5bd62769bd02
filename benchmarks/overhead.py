"""Microseconds a network evaluation costs beyond the network: our fixed-grid solvers, bare loops and peers, interleaved.

    python benchmarks/overhead.py [--rounds 30] [--out benchmarks/results/overhead.json]

The network returns its input, so all the time is overhead: whole solves of 100 evaluations, set-up included, float32,
one thread, processor time. In every round all contenders run once, one after the other; the least time of each counts, so
that a machine busy with other work slows all alike or none. The bare loops are written by hand for their method, with
coefficients as Python floats computed before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchdiffeq

import sdeflow as sf

EVALUATIONS = 100
SHAPES = [(256, 2), (256, 64), (4096, 64)]
PROCESS = sf.DiscreteVP.scaled_linear()
T = torch.linspace(999.0, 9.0, EVALUATIONS + 1, dtype=torch.float64)
A, S, L = (c.tolist() for c in (PROCESS.alpha(T), PROCESS.sigma(T), PROCESS.half_log_snr(T)))


def network(x, t):
    return x


def bare_ddim(x):
    for n in range(EVALUATIONS):
        eps = network(x, T[n].expand(x.shape[0]))
        x0 = (x - S[n] * eps) / A[n]
        x = A[n + 1] * x0 + S[n + 1] * eps
    return x


def bare_2m(x):
    old = h0 = None
    for n in range(EVALUATIONS):
        x0 = (x - S[n] * network(x, T[n].expand(x.shape[0]))) / A[n]
        h = L[n + 1] - L[n]
        mean = x0 if old is None else x0 + (h / (2.0 * h0)) * (x0 - old)
        x = (S[n + 1] / S[n]) * x - (A[n + 1] * math.expm1(-h)) * mean
        old, h0 = x0, h
    return x


DA, DS = PROCESS.alpha_dot(T), PROCESS.sigma_dot(T)
F = (DA / PROCESS.alpha(T)).tolist()
G = (DS - PROCESS.sigma(T) * DA / PROCESS.alpha(T)).tolist()
H = T.diff().tolist()


def bare_euler(x):
    for n in range(EVALUATIONS):
        eps = network(x, T[n].expand(x.shape[0]))
        x = x + H[n] * (F[n] * x + G[n] * eps)
    return x


def torchdiffeq_euler() -> Callable:
    # coefficients looked up by step, so that only the solver is timed
    class Drift:
        def __call__(self, t, x):
            n = self.n
            self.n += 1
            return F[n] * x + G[n] * network(x, T[n].expand(x.shape[0]))

    drift = Drift()

    def run(x):
        drift.n = 0
        return torchdiffeq.odeint(drift, x, T, method="euler")[-1]

    return run


def scheduler(name: str, **settings) -> Callable:
    import diffusers

    made = getattr(diffusers, name)(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings
    )

    def run(x):
        made.set_timesteps(EVALUATIONS)
        for t in made.timesteps:
            x = made.step(network(x, t.expand(x.shape[0])), t, x).prev_sample
        return x

    return run


def kdiffusion(name: str) -> Callable:
    from k_diffusion import sampling

    sigmas = PROCESS.rho(T).float()

    def model(y, sigma):
        return y - sigma[:, None] * network(y, sigma)

    def run(x):
        return getattr(sampling, name)(model, x, sigmas, disable=True)

    return run


def ours(solver) -> Callable:
    equation = sf.ProbabilityFlowODE(sf.NoisePrediction(network, PROCESS))
    stop = T[-1].item()
    return lambda x: sf.solve(equation, solver, x, stop=stop).x


def contenders() -> dict[str, dict[str, Callable]]:
    """method → who → run. A peer that is not installed is left out, and said so."""
    table: dict[str, dict[str, Callable]] = {
        "DDIM": {"bare": bare_ddim, "sdeflow": ours(sf.DDIM(grid=T))},
        "DPM-Solver++2M": {"bare": bare_2m, "sdeflow": ours(sf.DPMSolverPP(order=2, grid=T))},
        "Euler in t": {
            "bare": bare_euler,
            "sdeflow": ours(sf.RungeKutta("euler", grid=T, chart=sf.PlainTime())),
            "torchdiffeq": torchdiffeq_euler(),
        },
    }
    peers = [
        ("DDIM", "diffusers", lambda: scheduler("DDIMScheduler", clip_sample=False)),
        ("DPM-Solver++2M", "diffusers", lambda: scheduler("DPMSolverMultistepScheduler")),
        ("DDIM", "k-diffusion", lambda: kdiffusion("sample_euler")),
        ("DPM-Solver++2M", "k-diffusion", lambda: kdiffusion("sample_dpmpp_2m")),
    ]
    for method, who, make in peers:
        try:
            table[method][who] = make()
        except ImportError as error:
            print(f"{who} left out: {error}")
    return table


def measure(shape: tuple[int, int], runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds + 1):
        for who, run in runs.items():
            began = time.process_time()
            run(x)
            best[who] = min(best[who], time.process_time() - began)
    return {who: 1e6 * seconds / EVALUATIONS for who, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for method, runs in contenders().items():
            for shape in SHAPES:
                rounds = max(3, args.rounds * 256 * 8 // max(256 * 8, shape[0] * shape[1]))
                micros = measure(shape, runs, rounds)
                rows.append({"method": method, "shape": list(shape), "us_per_evaluation": micros})
                print(
                    f"{method:16} {shape!s:12}",
                    "  ".join(f"{w} {v:.1f} ({v / micros['bare']:.2f}x)" for w, v in micros.items()),
                )
    versions = {"torch": torch.__version__, "python": platform.python_version(), "sdeflow": sf.__version__}
    record = {
        "device": f"CPU, one thread, {platform.machine()}",
        "versions": versions,
        "evaluations": EVALUATIONS,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
