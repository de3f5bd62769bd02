"""The adaptive ODE solvers of other libraries, each as run(chart, predict, x, tol) → (end point, evaluations).

A library that is not installed is left out, and said so. All get the right side dz/du of a chart as a function of a scalar
clock, counted, clamped to the interval and told where it ends. Evaluations are the number of calls, since these solvers
share one step over the batch; torchode and diffrax under `vmap` give every sample steps of its own, and their calls are counted as if
samples that are done cost nothing, which favours them: both go on evaluating the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torchdiffeq
from scipy.integrate import ode as scipy_ode
from scipy.integrate import solve_ivp

import sdeflow as sf

CALLS = 600
"""A peer's ladder ends where it needs more calls than this."""
TORCHDIFFEQ = ["dopri5", "bosh3", "dopri8", "adaptive_heun", "fehlberg2"]
SCIPY = ["RK45", "RK23", "DOP853", "LSODA"]


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

    z0 = flow.z0.flatten().numpy()
    if method == "vode Adams":
        made = scipy_ode(f).set_integrator("vode", method="adams", rtol=tol, atol=tol, nsteps=CALLS)
        end = made.set_initial_value(z0, flow.u0).integrate(flow.u1)
        if not made.successful():
            raise RuntimeError("vode gave up")
    else:
        end = solve_ivp(f, (flow.u0, flow.u1), z0, method=method, rtol=tol, atol=tol).y[:, -1]
    return flow.x(torch.from_numpy(end.copy()).reshape(x.shape)), flow.calls


def run_torchode(method, chart, predict, x, tol):
    import torchode

    flow = Coordinates(chart, predict, x)
    sign = math.copysign(1.0, flow.u1 - flow.u0)  # torchode solves forwards only

    def f(s, z):
        return sign * flow(flow.u0 + sign * s, z)

    term = torchode.ODETerm(f)
    step, control = getattr(torchode, method)(term=term), torchode.IntegralController(tol, tol, term=term)
    length = torch.full((len(x), 1), abs(flow.u1 - flow.u0), dtype=torch.float64)
    problem = torchode.InitialValueProblem(y0=flow.z0, t_eval=length, t_start=torch.zeros(len(x), dtype=torch.float64))
    done = torchode.AutoDiffAdjoint(step, control, max_steps=CALLS).solve(problem)
    if not bool((done.status == 0).all()):
        raise RuntimeError("torchode gave up")
    # its n_f_evals is the batch's; a sample's own is what its own steps cost: both methods keep the last stage
    own = done.stats["n_steps"].double() * (6 if method in ("Dopri5", "Tsit5") else 2) + 2
    return flow.x(done.ys[:, -1]), own.clamp_max(flow.calls)


class Diffrax:
    """diffrax with the network called back on the host; compiled once for a chart and reused over tolerances."""

    def __init__(self, method: str, each: bool):
        self.method, self.each, self.made = method, each, {}

    def __call__(self, chart, predict, x, tol):
        import jax

        flow = Coordinates(chart, predict, x)
        key = (chart, predict)
        if key not in self.made:
            self.made[key] = self._solver()
        solve, self.flow = self.made[key], flow
        z, calls, ok = jax.block_until_ready(solve(flow.z0.numpy(), flow.u0, flow.u1, tol))
        if flow.calls > CALLS or not bool(np.all(ok)):
            raise TooMany
        calls = torch.from_numpy(np.array(calls, dtype=np.float64))
        return flow.x(torch.from_numpy(np.array(z))), calls if self.each else float(flow.calls)

    def _solver(self):
        import diffrax
        import jax

        jax.config.update("jax_enable_x64", True)
        method = getattr(diffrax, self.method)()
        stages = {"Tsit5": 6, "Dopri5": 6, "Dopri8": 13, "Bosh3": 3}[self.method]

        def host(u, z):
            if self.flow.calls >= CALLS:
                return np.full_like(z, np.nan)
            u = torch.from_numpy(np.array(u))
            self.flow.calls += 1
            u = u.clamp(self.flow.low, self.flow.high)
            return self.flow.bound.drift(self.flow.predict, u, torch.from_numpy(np.array(z))).numpy()

        def field(u, z, _):
            out = jax.ShapeDtypeStruct(z.shape, z.dtype)
            return jax.pure_callback(host, out, u, z, vmap_method="broadcast_all")

        def one(z, u0, u1, tol):
            found = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                method,
                u0,
                u1,
                None,
                z,
                stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
                max_steps=CALLS,
                throw=False,
            )
            return found.ys[-1], found.stats["num_steps"] * stages + 1, found.result == diffrax.RESULTS.successful

        if self.each:
            return jax.jit(jax.vmap(one, in_axes=(0, None, None, None)))
        return jax.jit(one)


def run_kdiffusion(chart, predict, x, tol):
    """DPM-Solver-12/23 adaptive, in its own variable σ/α."""
    from k_diffusion import sampling

    flow = Coordinates(sf.LogSNR(), predict, x)
    process = predict.process

    def denoise(y, sigma):
        flow.calls += 1
        if flow.calls > CALLS:
            raise TooMany
        t = process.time_of_rho(sigma[0].clamp(*rho))
        return predict.data(y * process.alpha(t), t)

    rho = [process.rho(t).item() for t in reversed(flow.ends)]
    z = sampling.sample_dpm_adaptive(denoise, flow.z0, *rho, disable=True, rtol=tol, atol=tol)
    return flow.x(z), flow.calls


def peers() -> tuple[list[tuple[str, Callable]], list[tuple[str, Callable]]]:
    """(name, run) of generic solvers, for every chart, and of solvers with coordinates of their own."""
    generic = [(f"torchdiffeq {m}", partial(run_torchdiffeq, m)) for m in TORCHDIFFEQ]
    generic += [(f"scipy {m}", partial(run_scipy, m)) for m in [*SCIPY, "vode Adams"]]
    own: list[tuple[str, Callable]] = []
    try:
        import torchode  # noqa: F401

        generic += [(f"torchode {m}", partial(run_torchode, m)) for m in ("Dopri5", "Tsit5")]
    except ImportError as error:
        print(f"torchode left out: {error}")
    try:
        import diffrax  # noqa: F401

        generic += [(f"diffrax {m}", Diffrax(m, False)) for m in ("Tsit5", "Dopri8")]
        generic += [("diffrax Tsit5, vmap", Diffrax("Tsit5", True))]
    except ImportError as error:
        print(f"diffrax left out: {error}")
    try:
        import k_diffusion  # noqa: F401

        own += [("k-diffusion dpm_adaptive", run_kdiffusion)]
    except ImportError as error:
        print(f"k-diffusion left out: {error}")
    return generic, own
