"""Against Hugging Face diffusers where it is right: the same table, times, network and noise give the same float32 samples."""

from __future__ import annotations

import itertools

import pytest
import torch

import sdeflow as sf
from sdeflow.brownian import BrownianPath

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PROCESS = sf.DiscreteVP.scaled_linear()
RING = sf.problems.ring(std=0.3)
NETWORK = RING.network(PROCESS, "noise")
X = PROCESS.prior((32, 2), seed=4) / PROCESS.sigma(PROCESS.t_max).item()


class Given(BrownianPath):
    """A path whose k-th interval has the given normal z_k."""

    def increments(self, grid):
        known = self.__dict__.setdefault("known", {})
        k = [known.setdefault(pair, len(known)) for pair in itertools.pairwise(grid.tolist())]
        W = torch.stack([self.__dict__["z"][i] for i in k]) * grid.diff().abs().sqrt().reshape(-1, 1, 1)
        return W, torch.zeros_like(W)


def theirs(scheduler, steps, noise=None, double=False):
    """(samples, integer times) of a diffusers scheduler; noise goes in through the keyword it offers.

    double: its coefficients in float64, where in float32 they cancel.
    """
    scheduler.set_timesteps(steps)
    if double:
        times = scheduler.timesteps.double()
        scheduler.sigmas = torch.cat([PROCESS.rho(times), PROCESS.rho(torch.zeros(1))])
    x = X * scheduler.init_noise_sigma
    for k, t in enumerate(scheduler.timesteps):
        output = NETWORK(scheduler.scale_model_input(x, t), torch.full((len(x),), float(t)))
        more = {} if noise is None else {"variance_noise": noise[k]}
        x = scheduler.step(output, t, x, **more).prev_sample
    return x, [float(t) for t in scheduler.timesteps]


def ours(make, times, noise=None, denoise=True):
    predict = sf.NoisePrediction(NETWORK, PROCESS)
    start, stop = times[0], times[-1]
    solver = make(grid=times, denoise=denoise)
    if noise is None:
        return sf.solve(sf.ProbabilityFlowODE(predict), solver, X, start=start, stop=stop).x
    path = Given(range(len(X)), (2,), torch.float32)
    path.__dict__["z"] = noise
    return sf.solve(sf.ReverseSDE(predict), solver, X, start=start, stop=stop, path=path).x


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 25])
def test_ddim(steps):
    want, times = theirs(diffusers.DDIMScheduler(**TABLE, clip_sample=False), steps)
    same(ours(sf.DDIM, times), want)


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(steps, variance):
    noise = torch.randn(steps, *X.shape, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.DDPMScheduler(**TABLE, clip_sample=False, variance_type=f"fixed_{variance}")
    scheduler.set_timesteps(steps)
    generator, x = torch.Generator().manual_seed(0), X
    for t in scheduler.timesteps:
        x = scheduler.step(NETWORK(x, torch.full((len(x),), float(t))), t, x, generator=generator).prev_sample
    drawn = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(X.shape, generator=drawn) for _ in range(steps)])
    times = [float(t) for t in scheduler.timesteps]
    same(ours(lambda **k: sf.DDPM(variance=variance, **k), times, noise), x)


@pytest.mark.parametrize("steps", [20, 40])
def test_dpmpp_2m(steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, solver_order=2, lower_order_final=False)
    want, times = theirs(scheduler, steps)
    same(ours(lambda **k: sf.DPMSolverPP(order=2, **k), times), want)


@pytest.mark.parametrize("steps", [20, 40])
def test_dpmpp_2m_heun_is_the_exact_integral(steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, solver_order=2, solver_type="heun", lower_order_final=False
    )
    want, times = theirs(scheduler, steps)
    same(ours(lambda **k: sf.DPMSolverPP(order=2, exact=True, **k), times), want)


@pytest.mark.parametrize("steps", [20, 40])
def test_sde_dpmpp_2m(steps):
    noise = torch.randn(steps, *X.shape, generator=torch.Generator().manual_seed(1))
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, solver_order=2, algorithm_type="sde-dpmsolver++", lower_order_final=False
    )
    want, times = theirs(scheduler, steps, noise)
    same(ours(lambda **k: sf.DPMSolverPP(order=2, sde=True, **k), times, noise), want)


@pytest.mark.parametrize("steps", [20, 40])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("predict", ["data", "noise"])
def test_unipc_2(steps, variant, predict):
    scheduler = diffusers.UniPCMultistepScheduler(
        **TABLE, solver_order=2, solver_type=variant, predict_x0=predict == "data", lower_order_final=False,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    want, times = theirs(scheduler, steps)
    same(ours(lambda **k: sf.UniPC(order=2, variant=variant, predict=predict, **k), [*times, 0.0], denoise=False), want)


@pytest.mark.parametrize("steps", [20, 40])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(steps, order):
    scheduler = diffusers.DEISMultistepScheduler(**TABLE, solver_order=order, lower_order_final=False)
    # order 3 takes differences of an antiderivative: their float32 coefficients are off by up to 2e-4 at 40 steps
    want, times = theirs(scheduler, steps, double=order == 3)
    make = lambda **k: sf.DEIS(order=order, variable="lambda", own_start=False, **k)  # noqa: E731
    same(ours(make, [*times, 0.0], denoise=False), want)


@pytest.mark.parametrize("steps", [10, 18])
def test_heun(steps):
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE)
    scheduler.set_timesteps(steps)
    predict = sf.NoisePrediction(NETWORK, PROCESS)
    times = [float(t) for t in dict.fromkeys(scheduler.timesteps.tolist())]
    x = start = X * scheduler.init_noise_sigma  # theirs is y = x/α
    for t in scheduler.timesteps:
        output = NETWORK(scheduler.scale_model_input(x, t), torch.full((len(x),), float(t)))
        x = scheduler.step(output, t, x).prev_sample
    ode = sf.ProbabilityFlowODE(predict)
    solver = sf.EDMHeun(grid=times, denoise=True)
    mine = sf.solve(ode, solver, start * PROCESS.alpha(times[0]).float(), start=times[0], stop=times[-1])
    assert mine.calls == len(scheduler.timesteps) == 2 * steps - 1
    same(mine.x, x)


def test_edm_is_heun_in_sigma_with_35_calls():
    # Karras et al., algorithm 2, written out on its own grid, with churn
    process, problem = sf.EDM(t_max=200.0), sf.problems.ring(std=0.3)
    n, churn = 18, 10.0
    i = torch.arange(n, dtype=torch.float64)
    sigma = (80.0 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    start = 80.0 * torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z = sf.random.standard_normal(sf.sample_seeds(9, 16), (2,), index=0, stream=2)
    assert z.shape == (16, 2)
    x, D = start, problem.denoise
    gamma = min(churn / n, 2**0.5 - 1)
    for k, (s, t) in enumerate(itertools.pairwise([*sigma.tolist(), 0.0])):
        z = sf.random.standard_normal(sf.sample_seeds(9, 16), (2,), index=k, stream=2)
        hat = s * (1 + gamma)
        x = x + (hat**2 - s**2) ** 0.5 * z
        d = (x - D(x, process, hat)) / hat
        euler = x + (t - hat) * d
        x = euler if t == 0.0 else x + (t - hat) * 0.5 * (d + (euler - D(euler, process, t)) / t)
    equation = sf.ReverseSDE(problem.prediction(process))
    run = sf.solve(equation, sf.EDMHeun(churn=churn, grid=sigma, denoise=True), start, start=80.0, stop=0.002, seed=9)
    assert run.calls == 35
    torch.testing.assert_close(run.x, x, rtol=0, atol=1e-9)
