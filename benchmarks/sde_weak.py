"""Network evaluations to a small error of the law: variances exactly, by propagation, and samples down to Monte-Carlo noise.

    OMP_NUM_THREADS=1 python benchmarks/sde_weak.py [variance] [adaptive] [samples] [--output benchmarks/results/sde_weak.json]

variance: the 16-D anisotropic Gaussian (standard deviations 0.05 … 2), VP, EDM and rectified flow. On it every sampler is an affine
map of its start and its noise; it is run on unit vectors in place of them, which gives the variance at the end exactly. The error is
the relative error of the variance, RMS over the 16 principal directions. Ours run on the rotated problem; the peers, which treat
elements alike and so do not see a rotation, in the principal axes. Peers that are not installed are left out, and what is in the output
file from another environment stays there.

adaptive: the same error for solvers that choose their steps, by Monte Carlo.

samples: sliced Wasserstein distance to exact samples on ring and digits (VP), divided by that of a fine solve on the same paths; the
evaluations at which it is within 10 %. The peers' formulae are run as implemented here (tests/solvers/test_conformance.py).

A crossing is where the error stays below from there on, interpolated on a log-log scale; for samples where the distance first is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import sdeflow as sf
from sdeflow.measure import exact_moments, exact_samples, projections, sliced_wasserstein
from sdeflow.measure.record import versions
from sdeflow.solvers.base import Solver

F64 = torch.float64
STD = torch.logspace(math.log10(0.05), math.log10(2.0), 16, dtype=F64)
TURN = torch.linalg.qr(torch.randn(16, 16, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
ROTATED = sf.problems.gaussian(mean=0.0, cov=TURN @ torch.diag(STD**2) @ TURN.T)
LEVELS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.001)
PROCESSES = {"VP": (sf.VP(), 1.0, 1e-3), "EDM": (sf.EDM(), 80.0, 0.002), "flow": (sf.RectifiedFlow(), 0.99, 1e-3)}
BUDGETS = (6, 8, 10, 12, 14, 16, 18, 20, 23, 26, 30, 34, 38, 43, 48, 54, 62, 70, 80, 90, 105, 120, 140, 160, 180, 200)
GRIDS = {
    "Karras 7": sf.Karras(),
    "Karras 10": sf.Karras(10.0),
    "even in λ": sf.UniformLogSNR(),
    "even in t": sf.UniformTime(),
    "Multiscale": sf.Multiscale(),
}


def crossing(runs: list[tuple[float, float]], level: float) -> float | None:
    """Evaluations from which the error stays below the level; None if it does not, the fewest if it always is."""
    last = max((i for i, (_, e) in enumerate(runs) if not e <= level), default=-1)
    if last + 1 >= len(runs):
        return None
    (n1, e1) = runs[last + 1]
    if last < 0 or not math.isfinite(runs[last][1]):
        return float(n1)
    (n0, e0) = runs[last]
    return round(n0 * (n1 / n0) ** (math.log(e0 / level) / math.log(e0 / max(e1, 1e-300))), 1)


def first_crossing(runs: list[tuple[float, float]], level: float) -> float | None:
    """Evaluations at which a distance first falls to the level; for distances that go up and down by chance once they are there."""
    first = next((i for i, (_, d) in enumerate(runs) if d <= level), len(runs))
    return crossing(runs[: first + 1], level)


def poly_exponential(process: sf.Process, start: float, stop: float, steps: int, power: float = 2.0) -> torch.Tensor:
    """k-diffusion's: ln σ even in the power of the place."""
    first, last = (process.rho(v).log() for v in (start, stop))
    ramp = torch.linspace(1.0, 0.0, steps + 1, dtype=F64) ** power
    return (last + (first - last) * ramp).exp()


def rho_grids(process: sf.Process, start: float, stop: float) -> dict[str, Callable[[int], torch.Tensor]]:
    def of(grid: sf.Karras) -> Callable[[int], torch.Tensor]:
        return lambda n: process.rho(grid.times(process, start, stop, n))

    found = {name: of(grid) for name, grid in GRIDS.items()}
    found["polyexponential 2"] = lambda n: poly_exponential(process, start, stop, n)
    return found


# --- the peers, as affine maps in y = x/α and ρ = σ/α


def denoise(y: torch.Tensor, rho: torch.Tensor, **_) -> torch.Tensor:
    return STD**2 / (STD**2 + rho.reshape(-1)[0] ** 2) * y


def columns(rho: torch.Tensor, draws: int) -> torch.Tensor:
    """Row 0 the start's standard deviation; a row for every draw."""
    x = torch.zeros(1 + draws, 16, dtype=F64)
    x[0] = (STD**2 + rho[0] ** 2).sqrt()
    return x


def unit(x: torch.Tensor, draw: int) -> torch.Tensor:
    z = torch.zeros_like(x)
    z[1 + draw] = 1.0
    return z


def kdiffusion(name: str, **settings) -> Callable:
    def run(rho: torch.Tensor, eta: float) -> torch.Tensor:
        from k_diffusion import sampling

        x, calls = columns(rho, len(rho)), itertools.count()
        return getattr(sampling, name)(
            denoise, x, rho, disable=True, eta=eta**2, noise_sampler=lambda a, b: unit(x, next(calls)), **settings
        )

    return run


def kdiffusion_two_stage(rho: torch.Tensor, eta: float) -> torch.Tensor:
    """sample_dpmpp_sde asks for the noise to the middle and then for that to the end, which holds the first."""
    from k_diffusion import sampling

    x, calls, first = columns(rho, 2 * len(rho)), itertools.count(), []

    def noise(a, b):
        n, end = divmod(next(calls), 2)
        if not end:
            first.append(abs(float(a) - float(b)))
            return unit(x, 2 * n)
        share = first[-1] / abs(float(a) - float(b))
        return math.sqrt(share) * unit(x, 2 * n) + math.sqrt(1.0 - share) * unit(x, 2 * n + 1)

    return sampling.sample_dpmpp_sde(denoise, x, rho, disable=True, eta=eta, noise_sampler=noise)


def azula_ito(rho: torch.Tensor, eta: float) -> torch.Tensor:
    from azula import sample
    from azula.denoise import Denoiser, DiracPosterior

    class Schedule(torch.nn.Module):
        def forward(self, t):
            sigma = rho[((1.0 - t) * (len(rho) - 1)).round().long()]
            return torch.ones_like(sigma), sigma

    class Exact(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = Schedule()

        def forward(self, y, t, **_):
            return DiracPosterior(mean=denoise(y, self.schedule(t)[1]))

    calls, kept = itertools.count(), torch.randn_like
    torch.randn_like = lambda z, **_: unit(z, next(calls))
    try:
        return sample.ItoSampler(Exact(), eta=eta, steps=len(rho) - 1, silent=True, dtype=F64)(columns(rho, len(rho)))
    finally:
        torch.randn_like = kept


def diffusers(name: str, **settings) -> Callable:
    def run(rho: torch.Tensor, eta: float) -> torch.Tensor:
        import diffusers as library
        from diffusers.schedulers import scheduling_sasolver

        steps = len(rho) - 1
        made = getattr(library, name)(beta_schedule="linear", lower_order_final=False, **settings)
        made.tau_func = lambda t: eta  # SA-Solver's own default is 1 in the middle of its time indices and 0 elsewhere
        made.set_timesteps(steps)
        made.sigmas, made.timesteps, made.num_inference_steps = rho, torch.arange(steps, 0, -1), steps
        scale, kept = (1.0 + rho**2).rsqrt(), scheduling_sasolver.randn_tensor
        y = columns(rho, steps) * scale[0]
        try:
            for k in range(steps):
                eps = (y / scale[k] - denoise(y / scale[k], rho[k])) / rho[k]
                z = unit(y, k)
                scheduling_sasolver.randn_tensor = lambda *_, z=z, **__: z
                more = {} if name.startswith("SA") else {"variance_noise": z}
                y = made.step(eps, made.timesteps[k], y, **more).prev_sample
        finally:
            scheduling_sasolver.randn_tensor = kept
        return y / scale[-1]

    return run


SDE_2M = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}
ETAS = (1.0, 0.7, 0.4, 0.0)
PEERS: list[tuple[str, str, int, Callable, tuple[float, ...]]] = [
    ("SDE-DPM++ 2M midpoint", "k-diffusion", 1, kdiffusion("sample_dpmpp_2m_sde"), ETAS),
    ("SDE-DPM++ 2M heun", "k-diffusion", 1, kdiffusion("sample_dpmpp_2m_sde", solver_type="heun"), (1.0,)),
    ("SDE-DPM++ 3M", "k-diffusion", 1, kdiffusion("sample_dpmpp_3m_sde"), ETAS),
    ("SDE-DPM++ 2S", "k-diffusion", 2, kdiffusion_two_stage, (1.0,)),
    ("Itô sampler", "azula", 1, azula_ito, ETAS),
    ("SDE-DPM++ 2M", "diffusers", 1, diffusers("DPMSolverMultistepScheduler", solver_order=2, **SDE_2M), (1.0,)),
    ("SDE-DPM++ 3M", "diffusers", 1, diffusers("DPMSolverMultistepScheduler", solver_order=3, **SDE_2M), (1.0,)),
    ("SA-Solver P2C2", "diffusers", 1, diffusers("SASolverScheduler", predictor_order=2, corrector_order=2), (1.0,)),
    ("SA-Solver P3C3", "diffusers", 1, diffusers("SASolverScheduler", predictor_order=3, corrector_order=3), ETAS),
    ("SA-Solver P3C4", "diffusers", 1, diffusers("SASolverScheduler", predictor_order=3, corrector_order=4), ETAS),
]
OURS: list[tuple[str, Callable[[int], Solver]]] = [
    ("StochasticAdams", lambda n: sf.StochasticAdams(steps=n)),
    ("StochasticAdams, not looking ahead", lambda n: sf.StochasticAdams(steps=n, look_ahead=False)),
    ("StochasticAdams(fitted=False)", lambda n: sf.StochasticAdams(steps=n, fitted=False)),
    (
        "StochasticAdams(fitted=False), not looking ahead",
        lambda n: sf.StochasticAdams(steps=n, fitted=False, look_ahead=False),
    ),
]


def variance_error_of_columns(y: torch.Tensor, rho_end: torch.Tensor) -> float:
    return (y.square().sum(0) / (STD**2 + rho_end**2) - 1.0).square().mean().sqrt().item()


def row(process, method, library, grid, eta, runs) -> dict:
    to = {f"{level:g}": crossing(runs, level) for level in LEVELS}
    print(f"{process:5s} {library:12s} {method:42s} {grid:18s} η={eta:<4g} {list(to.values())}", flush=True)
    return {
        "process": process, "method": method, "library": library, "grid": grid, "eta": eta, "runs": runs,
        "evaluations to": to,
    }  # fmt: skip


def peers(name: str) -> list[dict]:
    process, start, stop = PROCESSES[name]
    rows, missing = [], set()
    for method, library, cost, run, etas in PEERS:
        for (grid, rho), eta in itertools.product(rho_grids(process, start, stop).items(), etas):
            if library in missing or (eta < 1.0 and grid not in ("even in λ", "polyexponential 2", "Multiscale")):
                continue
            try:
                runs = [
                    (n * cost, variance_error_of_columns(run(rho(n), eta), rho(n)[-1]))
                    for n in (b // cost for b in BUDGETS[:: 1 if eta == 1.0 else 2])
                ]
            except ImportError as error:
                print(f"{library} left out: {error}")
                missing.add(library)
                continue
            rows.append(row(name, method, library, grid, eta, runs))
    return rows


def ours(name: str) -> list[dict]:
    process, start, stop = PROCESSES[name]
    exact, begin = ROTATED.moments(process, stop)[1], ROTATED.moments(process, start)
    predict, rows = ROTATED.prediction(process), []

    def runs_of(make, eta, budgets):
        equation = sf.ReverseSDE(predict, eta=eta) if eta else sf.ProbabilityFlowODE(predict)
        laws = [exact_moments(equation, make(n), *begin, start=start, stop=stop) for n in budgets]
        return [(law.evaluations, law.variance_error(exact)) for law in laws]

    for method, make in OURS:
        for eta in ETAS if method == "StochasticAdams" else (1.0,):
            budgets = [b for b in BUDGETS if b <= 80]
            rows.append(row(name, method, "sdeflow", "Multiscale", eta, runs_of(make, eta, budgets)))
    srk = [b for b in BUDGETS if b >= 40]
    made = lambda n: sf.TorchSDE("srk", steps=n // 2, chart=sf.LogSNR())  # noqa: E731
    rows.append(row(name, "srk, additive", "torchsde", "even in λ", 1.0, runs_of(made, 1.0, srk)))
    return rows


# --- samples


def fixed(process: sf.Process) -> dict[str, Callable[[int], Solver]]:
    lam, karras = sf.UniformLogSNR(), sf.Karras()

    def poly(n):
        times = process.time_of_rho(poly_exponential(process, process.t_max, process.t_min, n))
        times[0], times[-1] = process.t_max, process.t_min
        return sf.DPMSolverPP(order=2, sde=True, grid=times)

    return {
        "StochasticAdams": lambda n: sf.StochasticAdams(steps=n),
        "StochasticAdams(fitted=False)": lambda n: sf.StochasticAdams(steps=n, fitted=False),
        "StochasticAdams(predictor=2, corrector=1, fitted=False, low=0.02)": lambda n: sf.StochasticAdams(
            steps=n, predictor=2, corrector=1, fitted=False, low=0.02
        ),
        "SDE-DPM++ 2M, even in λ": lambda n: sf.DPMSolverPP(order=2, sde=True, steps=n, grid=lam),
        "SDE-DPM++ 2M, polyexponential 2": poly,
        "SDE-DPM++ 2M, Karras": lambda n: sf.DPMSolverPP(order=2, sde=True, steps=n, grid=karras),
        "SA-Solver P2C2, even in λ": lambda n: sf.SASolver(predictor=2, corrector=1, steps=n, grid=lam),
        "SA-Solver P3C3, even in λ": lambda n: sf.SASolver(predictor=3, corrector=2, steps=n, grid=lam),
    }


def adaptive() -> dict[str, tuple[Callable[[float], Solver], tuple[float, ...]]]:
    return {
        'Adams(control="weak")': (lambda tol: sf.Adams(rtol=tol, atol=tol), (0.2, 0.1, 0.05, 0.025)),
        "GottaGoFast": (lambda tol: sf.GottaGoFast(rtol=tol, atol=tol), (0.2, 0.1, 0.05)),
    }


def samples(problem, count: int, repeats: int, budgets: tuple[int, ...]) -> dict:
    process = sf.VP()
    directions, predict = projections(problem.dim, 64), problem.prediction(process)
    exact = [exact_samples(problem, process, process.t_min, count, 100 + r) for r in range(repeats + 8)]
    start = [exact_samples(problem, process, process.t_max, count, 500 + r).float() for r in range(repeats)]
    pairs = [sliced_wasserstein(exact[r], exact[r + 1], directions) for r in range(repeats + 7)]
    found = {"samples": count, "repeats": repeats, "distance of exact samples": sum(pairs) / len(pairs), "rows": []}

    def distance(equation, solver) -> tuple[float, float]:
        runs = [sf.solve(equation, solver, start[r], seed=r if equation.stochastic else None) for r in range(repeats)]
        far = [sliced_wasserstein(run.x.double(), exact[r], directions) for r, run in enumerate(runs)]
        return runs[0].evaluations.double().mean().item(), sum(far) / repeats

    equation = sf.ReverseSDE(predict)
    floor = found["distance of a fine solve"] = distance(equation, sf.StochasticAdams(steps=80))[1]
    table = {k: [make(n) for n in budgets] for k, make in fixed(process).items()}
    table |= {k: [make(tol) for tol in tols] for k, (make, tols) in adaptive().items()}
    for method, solvers in table.items():
        runs = sorted((n, d / floor) for n, d in (distance(equation, s) for s in solvers))
        at = first_crossing(runs, 1.1)
        print(f"{problem.name} {method:52s} {at}", [(round(n, 1), round(d, 3)) for n, d in runs], flush=True)
        found["rows"].append({"method": method, "runs": runs, "evaluations to 1.1": at})
    return found


def adaptive_variance(count: int = 1000) -> list[dict]:
    """Variance errors of adaptive solvers on the Gaussian (VP), by Monte Carlo against a fine solve on the same paths, whose law is exact."""
    process, rows = sf.VP(), []
    equation = sf.ReverseSDE(ROTATED.prediction(process))
    start = exact_samples(ROTATED, process, process.t_max, count, 7)
    axes, exact = TURN, STD**2 + process.rho(process.t_min) ** 2
    alpha = process.alpha(torch.tensor(process.t_min, dtype=F64))
    fine = sf.solve(equation, sf.StochasticAdams(steps=300), start, seed=1).x @ axes / alpha
    for method, (make, tolerances) in adaptive().items():
        for tolerance in tolerances if method == "GottaGoFast" else (0.1, 0.03, 0.01, 0.003):
            run = sf.solve(equation, make(tolerance), start, seed=1, on_failure="return")
            x = run.x @ axes / alpha
            # the fine solve tells of the sample's own deviation where the paths are one; GottaGoFast's clock is another
            known = fine.square().mean(0) if method.startswith("Adams") else exact
            error = ((x.square().mean(0) - known) / exact).square().mean().sqrt().item()
            found = {"method": method, "tolerance": tolerance, "evaluations": run.evaluations.double().mean().item()}
            rows.append(
                found | {"rejected": run.rejected.double().mean().item(), "variance error": error, "samples": count}
            )
            print(rows[-1], flush=True)
    return rows


def written(value, deep: int = 0) -> str:
    """JSON with a row a line and four digits."""
    if deep == 2 or not isinstance(value, dict | list):
        return json.dumps(rounded(value), ensure_ascii=False)
    pairs = value.items() if isinstance(value, dict) else ((None, v) for v in value)
    lines = [(f"{json.dumps(k)}: " if k is not None else "") + written(v, deep + 1) for k, v in pairs]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return left + "\n" + ",\n".join(lines) + "\n" + right


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", default=[], choices=["variance", "adaptive", "samples", []], help="default: all of them"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sde_weak.json"))
    options = parser.parse_args()
    options.parts = options.parts or ["variance", "adaptive", "samples"]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.perf_counter()
    record = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    record.setdefault("versions", {}).update(versions())
    if "variance" in options.parts:
        with torch.no_grad():
            new = [r for name in PROCESSES for r in ours(name) + peers(name)]
        libraries = {r["library"] for r in new}
        record["variance"] = [r for r in record.get("variance", []) if r["library"] not in libraries] + new
    if "adaptive" in options.parts:
        record["adaptive"] = adaptive_variance()
    if "samples" in options.parts:
        record["samples"] = {
            "ring": samples(sf.problems.ring(), 2048, 12, (5, 6, 7, 8, 9, 10, 12, 14, 17)),
            "digits": samples(sf.problems.digits(), 1024, 6, (5, 6, 7, 8, 9, 10, 12, 14, 17)),
        }
    print(f"{time.perf_counter() - began:.0f} s")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(written(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
