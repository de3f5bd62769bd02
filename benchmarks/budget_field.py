"""The field's fixed-grid solvers, each as run(equation, x, grid, steps) → (end states, calls); see budget.py.

`OURS` are this package's implementations of published formulae, each tested to have the order it claims
(tests/solvers/test_contract.py). `libraries()` are the samplers of diffusers, k-diffusion and azula themselves, fed the same
nodes in y = x/α, ρ = σ/α (azula: in its own α, σ); a library that is not installed is named and left out. ρ = ∞, where the
rectified flow starts, is outside what k-diffusion's and diffusers' samplers can be given; there only azula and `OURS` run.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

import sdeflow as sf
from sdeflow.counting import Counter, counting
from sdeflow.grids import Grid

GRIDS = [sf.UniformTime(), sf.UniformLogSNR(), sf.Karras(), sf.Quadratic(), sf.Power(power=3.0), sf.Karras(rho=3.0)]
SCALES = [0.25, 0.5, 1.0]
SCREENED, KEPT = 24, 8
"""Every peer runs on the first SCREENED test samples; the best KEPT of them on all, and the best of those counts."""

BATCH = 256
"""Test samples whose RMSE is one error. One sample that ends in another mode is all of its batch's RMSE, so errors are geometric means over batches;
that over all samples at once, `pooled`, is one to three such samples' wherever there are some."""


class Peer(NamedTuple):
    """A method of the field: run(equation, x, grid, steps), evaluations a step, the grids it is tried on."""

    run: Callable[[sf.ProbabilityFlowODE, Tensor, Grid, int], tuple[Tensor, int]]
    cost: int
    grids: list[Grid]


def native(make: Callable) -> Callable:
    """A solver of this package."""

    def run(equation, x, grid, steps):
        solution = sf.solve(equation, make(steps=steps, grid=grid), x, on_failure="return")
        return solution.x, solution.calls

    return run


OURS = {
    "DDIM": (sf.DDIM, 1),
    "DPM++2M": (partial(sf.DPMSolverPP, order=2), 1),
    "DPM++3M": (partial(sf.DPMSolverPP, order=3), 1),
    "DPM++2S": (partial(sf.DPMSolverPP, order=2, multistep=False), 2),
    "DPM++3S": (partial(sf.DPMSolverPP, order=3, multistep=False), 3),
    "DPM-2": (partial(sf.DPMSolver, order=2), 2),
    "DPM-3": (partial(sf.DPMSolver, order=3), 3),
    "UniPC2": (partial(sf.UniPC, order=2), 1),
    "UniPC3": (partial(sf.UniPC, order=3), 1),
    "UniPC4": (partial(sf.UniPC, order=4), 1),
    "DEIS2": (partial(sf.DEIS, order=2), 1),
    "DEIS3": (partial(sf.DEIS, order=3), 1),
    "DEIS4": (partial(sf.DEIS, order=4), 1),
    "EDMHeun": (sf.EDMHeun, 2),
    "Euler in t": (partial(sf.RungeKutta, "euler", chart=sf.PlainTime()), 1),
    "midpoint in t": (partial(sf.RungeKutta, "midpoint", chart=sf.PlainTime()), 2),
    "RK4 in t": (partial(sf.RungeKutta, "rk4", chart=sf.PlainTime()), 4),
}


def in_rho(sample: Callable) -> Callable:
    """sample(denoise, y, rho) works in y = x/α with denoise(y, ρ) = D; nodes come from the grid."""

    def run(equation, x, grid, steps):
        process, predict = equation.process, equation.predict
        t = grid.times(process, process.t_max, process.t_min, steps)
        rho, alpha = process.rho(t), process.alpha(t)
        if not bool(rho.isfinite().all()):
            raise sf.InvalidInput("ρ is infinite at the start")

        def denoise(y, sigma, **_):
            at = process.time_of_rho(sigma.flatten()[0].double()).clamp(process.t_min, process.t_max)
            return predict.data(y * process.alpha(at).to(y.dtype), at)

        with counting(Counter(x.shape[0], x.device)) as counter:
            y = sample(denoise, x / alpha[0].to(x.dtype), rho)
        return y * alpha[-1].to(x.dtype), counter.calls

    return run


def k_diffusion(name: str, **settings) -> Callable:
    """A sampler of k-diffusion."""

    def sample(denoise, y, rho):
        from k_diffusion import sampling

        return getattr(sampling, name)(denoise, y, rho.to(y.dtype), disable=True, **settings)

    return in_rho(sample)


def diffusers(name: str, **settings) -> Callable:
    """A scheduler of diffusers, its own update on our nodes: α = 1/√(1+ρ²), σ = ρα, so that its state is αy."""

    def sample(denoise, y, rho):
        import diffusers as library

        made = getattr(library, name)(
            num_train_timesteps=1000, beta_schedule="linear", final_sigmas_type="sigma_min", lower_order_final=False,
            prediction_type="epsilon", **settings,
        )  # fmt: skip
        steps = rho.numel() - 1
        made.set_timesteps(steps)
        made.sigmas, made.timesteps, made.num_inference_steps = rho, torch.arange(steps, 0, -1), steps
        scale = (1.0 + rho**2).rsqrt().to(y.dtype)
        x = y * scale[0]
        for k in range(steps):
            clean = denoise(x / scale[k], rho[k])
            x = made.step((x / scale[k] - clean) / rho[k].to(y.dtype), made.timesteps[k], x).prev_sample
        return x / scale[-1]

    return in_rho(sample)


def azula(name: str, **settings) -> Callable:
    """A sampler of azula on the process's own α, σ: its times 1 … 0 stand for our nodes."""

    def run(equation, x, grid, steps):
        from azula import sample
        from azula.denoise import Denoiser, DiracPosterior

        process, predict = equation.process, equation.predict
        times = grid.times(process, process.t_max, process.t_min, steps)

        def at(t):
            return times[((1.0 - t.double()) * steps).round().long().clamp(0, steps)]

        class Schedule(torch.nn.Module):
            def forward(self, t):
                return process.alpha(at(t)).to(x.dtype), process.sigma(at(t)).to(x.dtype)

        class Exact(Denoiser):
            def __init__(self):
                super().__init__()
                self.schedule = Schedule()

            def forward(self, y, t, **_):
                return DiracPosterior(mean=predict.data(y, at(t).flatten()[0]))

        sampler = getattr(sample, name)(Exact(), steps=steps, silent=True, dtype=torch.float64, **settings)
        with counting(Counter(x.shape[0], x.device)) as counter:
            return sampler(x), counter.calls

    return run


def libraries() -> dict[str, tuple[Callable, int]]:
    """The samplers of the installed libraries: name → (run, evaluations a step)."""
    found: dict[str, dict[str, tuple[Callable, int]]] = {
        "k-diffusion": {
            "euler": (k_diffusion("sample_euler"), 1),
            "heun": (k_diffusion("sample_heun"), 2),
            "dpm_2": (k_diffusion("sample_dpm_2"), 2),
            "lms 4": (k_diffusion("sample_lms", order=4), 1),
            "dpmpp_2m": (k_diffusion("sample_dpmpp_2m"), 1),
            "dpmpp_2s": (k_diffusion("sample_dpmpp_2s_ancestral", eta=0.0), 2),
        },
        "diffusers": {
            "DPMSolver++ 2M": (diffusers("DPMSolverMultistepScheduler", solver_order=2), 1),
            "DPMSolver++ 3M": (diffusers("DPMSolverMultistepScheduler", solver_order=3), 1),
            "UniPC 2": (diffusers("UniPCMultistepScheduler", solver_order=2), 1),
            "UniPC 3": (diffusers("UniPCMultistepScheduler", solver_order=3), 1),
        },
        "azula": {
            "DDIM": (azula("DDIMSampler"), 1),
            "Heun": (azula("HeunSampler"), 2),
            "zAB 2": (azula("zABSampler", order=2), 1),
            "zAB 3": (azula("zABSampler", order=3), 1),
            "xEAB 2": (azula("xEABSampler", order=2), 1),
            "xEAB 3": (azula("xEABSampler", order=3), 1),
            "REAB 3": (azula("REABSampler", order=3), 1),
        },
    }
    kept = {}
    for library, methods in found.items():
        if version(library) is None:
            print(f"{library} is not installed: left out", flush=True)
            continue
        kept |= {f"{library}: {name}": method for name, method in methods.items()}
    return kept


def version(library: str) -> str | None:
    """The installed version."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def field() -> dict[str, Peer]:
    """Every method of the field on every grid, in its own variable."""
    own = {name: Peer(native(make), cost, GRIDS) for name, (make, cost) in OURS.items()}
    return own | {name: Peer(run, cost, GRIDS) for name, (run, cost) in libraries().items()}


def charted() -> dict[str, Peer]:
    """The field's generic methods in the straight-line chart."""
    found = {}
    for c in SCALES:
        chart = sf.StraightLine(c=c)
        grids = [sf.InChart(chart), *GRIDS]
        for order in (2, 3, 4, 5):
            found[f"Adams {order}, c={c}"] = Peer(
                native(partial(sf.FixedAdams, order=order, corrector=0, chart=chart)), 1, grids
            )
        for name, cost in (("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("dopri5", 7)):
            found[f"{name}, c={c}"] = Peer(native(partial(sf.RungeKutta, name, chart=chart)), cost, grids)
    return found


def errors(reached: Tensor, end: Tensor) -> tuple[float, float]:
    """End-point RMSE: the geometric mean over batches of BATCH samples, and that of all; infinite when not finite."""
    square = (reached - end).double().square().flatten(1).mean(1)
    batches = torch.stack([part.mean() for part in square.split(BATCH)])
    found = (0.5 * batches.log().mean().item(), 0.5 * square.mean().log().item())
    typical, pooled = (math.exp(v) if v < math.inf else math.inf for v in found)
    return typical, pooled


def hindsight(part: Callable[[int | None], tuple], budget: int, peers: dict[str, Peer]) -> dict:
    """The smallest errors any peer reaches on any of its grids with at most `budget` evaluations; `pooled` may be another peer's.

    Args:
        part: part(n) is (equation, x, end) of the first n test samples, part(None) of all.
    """
    screened = []
    for name, grid, steps in _settings(budget, peers):
        (error, _), calls = _measured(part(SCREENED), peers[name], grid, steps)
        if 0 < calls - budget < steps:  # evaluations of a start-up: fewer steps
            steps -= calls - budget
            (error, _), calls = _measured(part(SCREENED), peers[name], grid, steps)
        if calls <= budget and math.isfinite(error):
            screened.append((error, calls, name, grid, steps))
    best, pooled = {"error": math.inf}, math.inf
    for _, calls, name, grid, steps in sorted(screened, key=lambda row: row[0])[:KEPT]:
        (error, whole), _ = _measured(part(None), peers[name], grid, steps)
        pooled = min(pooled, whole)
        if error < best["error"]:
            best = {"error": error, "solver": name, "grid": repr(grid), "evaluations": calls}
    return best | {"pooled": pooled}


def _settings(budget: int, peers: dict[str, Peer]) -> Iterator[tuple[str, Grid, int]]:
    for name, peer in peers.items():
        # some two-call methods save a call on their last step
        for grid, steps in itertools.product(peer.grids, {budget // peer.cost, (budget + 1) // peer.cost} - {0}):
            yield name, grid, steps


def _measured(given: tuple, peer: Peer, grid: Grid, steps: int) -> tuple[tuple[float, float], int]:
    equation, x, end = given
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reached, calls = peer.run(equation, x, grid, steps)
    except (sf.InvalidInput, ValueError, IndexError, ZeroDivisionError):  # a grid beyond α = 0, or too short
        return (math.inf, math.inf), 0
    return errors(reached, end), calls
