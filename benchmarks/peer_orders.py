"""The order each sampler really has, ours and the peers', on a problem whose answer is known.

    python benchmarks/peer_orders.py [--out benchmarks/results/peer_orders]

ODE samplers run on a mixture of wide Gaussians under EDM (α = 1, σ = t) between σ = 10 and 0.1, on nodes uniform in log σ,
in float64; the end is compared with Dopri5 at 12 digits. SDE samplers run on Gaussian data, where every one of them is
an affine map of its start and its normals: feeding unit vectors in place of the normals gives the exact variance at the
end, and the weak order without Monte Carlo. The order is the slope between the two finest grids. A peer that is not
installed is left out of its table, and named.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import sdeflow as sf
from sdeflow.problems.mixture import Mixture
from sdeflow.problems.problem import Problem

F64 = torch.float64
TOP, BOTTOM = 10.0, 0.1
PROCESS = sf.EDM(t_min=1e-3, t_max=100.0)
WIDE = Problem("wide", Mixture.of(torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]]), std=0.7))
ONE = sf.problems.gaussian(mean=[0.0], std=[0.6])
ODE_STEPS, SDE_STEPS = (40, 80, 160), (40, 80, 160)


def grid(steps: int) -> torch.Tensor:
    nodes = torch.logspace(math.log10(TOP), math.log10(BOTTOM), steps + 1, dtype=F64)
    nodes[0], nodes[-1] = TOP, BOTTOM
    return nodes


class Unit(sf.BrownianPath):
    """A path whose k-th interval is √|t − s| in row k + 2 and 0 in all others."""

    def increments(self, grid):
        known = self.__dict__.setdefault("known", {})
        k = torch.tensor([known.setdefault(pair, len(known)) for pair in itertools.pairwise(grid.tolist())])
        rows = torch.arange(self.batch) - 2
        W = (k[:, None] == rows).to(F64) * grid.diff().abs().sqrt()[:, None]
        return W[:, :, None], torch.zeros_like(W)[:, :, None]


def ours(make: Callable) -> Callable:
    def run(problem, x, steps, noisy):
        predict = problem.prediction(PROCESS)
        solver = make(grid=grid(steps))
        if not noisy:
            return sf.solve(sf.ProbabilityFlowODE(predict), solver, x, start=TOP, stop=BOTTOM).x
        path = Unit(range(len(x)), x.shape[1:], F64)
        return sf.solve(sf.ReverseSDE(predict), solver, x, start=TOP, stop=BOTTOM, path=path).x

    return run


def kdiffusion(name: str, **settings) -> Callable:
    def run(problem, x, steps, noisy):
        from k_diffusion import sampling

        def model(y, sigma, **_):
            return problem.denoise(y, PROCESS, sigma[0])

        more = dict(settings)
        if noisy:
            calls = itertools.count()

            def unit(sigma, sigma_next):
                z = torch.zeros_like(x)
                z[next(calls) + 2] = 1.0
                return z

            more["noise_sampler"] = unit
        return getattr(sampling, name)(model, x, grid(steps), disable=True, **more)

    return run


def azula(name: str, **settings) -> Callable:
    def run(problem, x, steps, noisy):
        from azula import sample
        from azula.denoise import Denoiser, DiracPosterior

        class Schedule(torch.nn.Module):
            def forward(self, t):
                sigma = TOP**t * BOTTOM ** (1.0 - t)
                return torch.ones_like(sigma), sigma

        class Exact(Denoiser):
            def __init__(self):
                super().__init__()
                self.schedule = Schedule()

            def forward(self, y, t, **_):
                return DiracPosterior(mean=problem.denoise(y, PROCESS, self.schedule(t)[1].reshape(-1)[0]))

        sampler = getattr(sample, name)(Exact(), steps=steps, silent=True, dtype=F64, **settings)
        return sampler(x)

    return run


def diffusers(name: str, **settings) -> Callable:
    def run(problem, x, steps, noisy):
        import diffusers as library

        made = getattr(library, name)(
            num_train_timesteps=1000, beta_schedule="linear", final_sigmas_type="sigma_min", lower_order_final=False,
            prediction_type="epsilon", **settings,
        )  # fmt: skip
        made.set_timesteps(steps)
        # its own update on our nodes, in float64: α = 1/√(1+ρ²), σ = ρα, so that x is y α
        rho = grid(steps)
        made.sigmas = rho
        made.timesteps = torch.arange(steps, 0, -1)
        made.num_inference_steps = steps
        scale = (1.0 + rho**2).rsqrt()
        y = x * scale[0]
        for k in range(steps):
            clean = problem.denoise(y / scale[k], PROCESS, rho[k])
            eps = (y / scale[k] - clean) / rho[k]
            more = {}
            if noisy:
                z = torch.zeros_like(x)
                z[k + 2] = 1.0
                more["variance_noise"] = z
            y = made.step(eps, made.timesteps[k], y, **more).prev_sample
        return y / scale[-1]

    return run


ODE = [
    ("DPM-Solver++ 2M", 2, "sdeflow", ours(lambda **k: sf.DPMSolverPP(order=2, **k))),
    ("DPM-Solver++ 2M", 2, "diffusers", diffusers("DPMSolverMultistepScheduler", solver_order=2)),
    ("DPM-Solver++ 2M", 2, "k-diffusion", kdiffusion("sample_dpmpp_2m")),
    ("DPM-Solver++ 3M", 3, "sdeflow", ours(lambda **k: sf.DPMSolverPP(order=3, **k))),
    ("DPM-Solver++ 3M", 3, "diffusers", diffusers("DPMSolverMultistepScheduler", solver_order=3)),
    ("UniPC 2", 3, "sdeflow", ours(lambda **k: sf.UniPC(order=2, **k))),
    ("UniPC 2", 3, "diffusers", diffusers("UniPCMultistepScheduler", solver_order=2)),
    ("UniPC 3", 4, "sdeflow", ours(lambda **k: sf.UniPC(order=3, **k))),
    ("UniPC 3", 4, "diffusers", diffusers("UniPCMultistepScheduler", solver_order=3)),
    ("ε-multistep 3 (DEIS, LMS)", 3, "sdeflow", ours(lambda **k: sf.DEIS(order=3, variable="rho", **k))),
    ("ε-multistep 4 (DEIS, LMS)", 4, "sdeflow", ours(lambda **k: sf.DEIS(order=4, variable="rho", **k))),
    ("ε-multistep 4 (DEIS, LMS)", 4, "k-diffusion", kdiffusion("sample_lms", order=4)),
    ("Heun", 2, "sdeflow", ours(lambda **k: sf.EDMHeun(**k))),
    ("Heun", 2, "k-diffusion", kdiffusion("sample_heun")),
    ("Heun", 2, "azula", azula("HeunSampler")),
    ("Adams–Bashforth in ε, 3", 3, "azula", azula("zABSampler", order=3)),
    ("exponential Adams–Bashforth in x₀, 3", 3, "azula", azula("xEABSampler", order=3)),
    ("refined exponential Adams–Bashforth, 3", 3, "azula", azula("REABSampler", order=3)),
]
SDE = [
    ("Euler ancestral", 1, "sdeflow", ours(lambda **k: sf.EulerAncestral(**k))),
    ("Euler ancestral", 1, "k-diffusion", kdiffusion("sample_euler_ancestral")),
    ("SDE-DPM-Solver++ 2M", 2, "sdeflow", ours(lambda **k: sf.DPMSolverPP(order=2, sde=True, **k))),
    (
        "SDE-DPM-Solver++ 2M",
        2,
        "diffusers",
        diffusers("DPMSolverMultistepScheduler", solver_order=2, algorithm_type="sde-dpmsolver++"),
    ),
    ("SDE-DPM-Solver++ 2M", 2, "k-diffusion", kdiffusion("sample_dpmpp_2m_sde")),
    ("SDE-DPM-Solver++ 3M", 2, "sdeflow", ours(lambda **k: sf.DPMSolverPP(order=3, sde=True, **k))),
    (
        "SDE-DPM-Solver++ 3M",
        2,
        "diffusers",
        diffusers("DPMSolverMultistepScheduler", solver_order=3, algorithm_type="sde-dpmsolver++"),
    ),
    ("SDE-DPM-Solver++ 3M", 2, "k-diffusion", kdiffusion("sample_dpmpp_3m_sde")),
]


def ode_errors(run: Callable) -> list[float]:
    x = TOP * torch.randn(16, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    fine = sf.RungeKutta("dopri5", steps=400)
    truth = sf.solve(sf.ProbabilityFlowODE(WIDE.prediction(PROCESS)), fine, x, start=TOP, stop=BOTTOM).x
    return [(run(WIDE, x, n, False) - truth).square().mean().sqrt().item() for n in ODE_STEPS]


def sde_errors(run: Callable) -> list[float]:
    start = 0.36 + TOP**2  # the marginal's variance at the top; every method must end at the marginal's at the bottom
    errors = []
    for n in SDE_STEPS:
        x = torch.zeros(n + 2, 1, dtype=F64)
        x[1] = start**0.5
        y = run(ONE, x, n, True)
        errors.append(abs((y[1:] - y[0]).square().sum().item() - (0.36 + BOTTOM**2)))
    return errors


def table(kind: str, methods: list, errors: Callable) -> list[dict]:
    rows, missing = [], {}
    for method, claim, who, run in methods:
        try:
            e = errors(run)
        except ImportError as error:
            missing[who] = str(error)
            continue
        order = math.log2(e[-2] / e[-1])
        rows.append(
            {"kind": kind, "method": method, "claimed": claim, "library": who, "errors": e, "order": round(order, 2)}
        )
        print(f"{kind} {method:40} {who:12} claimed {claim}  observed {order:.2f}  {[f'{v:.1e}' for v in e]}")
    for who, why in missing.items():
        print(f"{who} left out: {why}")
    return rows


def markdown(rows: list[dict], versions: dict[str, str]) -> str:
    lines = [
        "# Observed orders",
        "",
        f"Written by `benchmarks/peer_orders.py`; {', '.join(f'{k} {v}' for k, v in versions.items())}; CPU, float64.",
        f"Errors at {', '.join(map(str, ODE_STEPS))} steps; ODE: end-point RMS error, global order; SDE: error of the variance, weak order.",
        "",
        "| | method | library | claimed | observed | errors |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        errors = ", ".join(f"{e:.1e}" for e in r["errors"])
        lines.append(f"| {r['kind']} | {r['method']} | {r['library']} | {r['claimed']} | {r['order']:.2f} | {errors} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peer_orders"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = table("ODE", ODE, ode_errors) + table("SDE", SDE, sde_errors)
    versions = {"python": platform.python_version(), "sdeflow": sf.__version__} | library_versions()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(
        json.dumps({"versions": versions, "rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    args.out.with_suffix(".md").write_text(markdown(rows, versions), encoding="utf-8")


def library_versions() -> dict[str, str]:
    """Of what is installed."""
    from importlib import metadata

    found = {}
    for name in ("torch", "diffusers", "k-diffusion", "azula"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
