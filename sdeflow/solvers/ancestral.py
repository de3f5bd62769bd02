"""Samplers that set their own noise: DDPM, EDM's Heun with churn, ER-SDE and Restart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, InChart, Karras
from sdeflow.processes import Process
from sdeflow.solvers.base import Facts, Task, merge
from sdeflow.solvers.exponential import DiffusionMethod, Multistep, same_eta
from sdeflow.solvers.exponential_steps import Scheme, compiled, path_normals, points_of
from sdeflow.solvers.exponential_weights import Array, Points, Strength, linear_data, linear_noise
from sdeflow.solvers.linear import Normals, Plan, Stage


@dataclass(frozen=True, kw_only=True)
class DDPM(DiffusionMethod):
    """Ancestral sampling of Ho et al. 2020: the mean of q(x_t | x_s, x_0 = D) and one of two variances.

    With a = α_s²/α_t² and β = σ_s² − aσ_t², the variance of x_s given x_t (1 − a on a variance-preserving process):

        x_t = α_t β/σ_s² D + √a σ_t²/σ_s² x_s + √v z,   v = β̃ = β σ_t²/σ_s² ("small") or v = β ("large").

    Args:
        variance: "small", the posterior's for one known x_0 (DDIM with η = 1), or "large", for data N(0, 1).

    The equation must be `ReverseSDE(predict)`, η = 1, towards which both converge with weak order 1.
    """

    variance: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance not in ("small", "large"):
            raise InvalidInput(f'variance must be "small" or "large"; got {self.variance!r}')

    @property
    def facts(self) -> Facts:
        return Facts(f"DDPM ({self.variance})", None, 1, 1, 1, False, ("additive",), "diffusion", "Ho et al. 2020")

    def check(self, task: Task) -> None:
        super().check(task)
        same_eta("DDPM", 1.0, task)

    def plan(self, task: Task, times: Tensor) -> Plan:
        points = points_of(task, times, self.denoise)
        s, t = points[:-1], points[1:]
        h = t.lam - s.lam
        exact = linear_data(s, t, h)  # η = 1: A = e^{−h} σ_t/σ_s = √a σ_t²/σ_s², W = α_t (1 − e^{−2h}) = α_t β/σ_s²
        noise = exact.noise
        if self.variance == "large":  # the step to the clean data draws none
            noise = np.where(t.sigma > 0.0, s.sigma * np.sqrt(-np.expm1(-2.0 * h)), 0.0)
        coefficients = zip(exact.A.tolist(), exact.W.tolist(), noise.tolist(), strict=True)
        plan = [[Stage(n, A, [(n, W)], z, n)] for n, (A, W, z) in enumerate(coefficients)]
        return compiled(task, s.t.tolist(), np.zeros(len(s)), plan, path_normals(task, points, Strength.constant(1.0)))


@dataclass(frozen=True, kw_only=True)
class ERSDE(Multistep):
    """ER-SDE-Solver of Cui et al. 2023, orders 1 to 3: noise set by φ, D as a polynomial of degree order − 1 in ρ = σ/α.

    x_t = (α_tφ_t/α_sφ_s) x_s + α_t ∫ D dω + α_t √(ρ_t² − ρ_s²φ_t²/φ_s²) z, ω = φ_t/φ(ρ).

    Args:
        order: nodes.
        phi: φ(ρ) of a float64 tensor, differentiable, with φ/ρ growing; default ρ(e^{ρ^0.3} + 10), the paper's. ρ² is the
            reverse SDE.

    In this family 1 + η² = d ln φ/d ln ρ, whatever η the equation has (every η keeps the marginals).
    """

    order: int = 3
    phi: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.order, bool) or self.order not in (1, 2, 3):
            raise InvalidInput(f"ERSDE has orders 1 to 3; got order={self.order!r}. Write ERSDE(order=3, steps=...)")

    @property
    def facts(self) -> Facts:
        weak = min(self.order, 2)
        return Facts(f"ER-SDE-{self.order}", None, 1, weak, 1, False, ("additive",), "diffusion", "Cui et al. 2023")

    def scheme(self, task: Task) -> Scheme:
        phi = self.phi
        law = noise_of(log_phi if phi is None else lambda rho: phi(rho).log())
        return Scheme("data", self.order, 0, "rho", None, lambda s, t: law, False, self.lower_order_final)


def log_phi(rho: Tensor) -> Tensor:
    """ln φ of the paper's φ = ρ(e^{ρ^0.3} + 10), without overflow."""
    power = rho**0.3
    return rho.log() + torch.logaddexp(power, torch.full_like(power, math.log(10.0)))


def noise_of(log_phi: Callable[[Tensor], Tensor]) -> Strength:
    """∫η²dλ = Δ ln(φ/ρ) and 1 + η² = d ln φ/d ln ρ."""

    def log_ratio(lam: Array) -> Array:
        # ρ = 0: nothing depends on it, since σ_t = 0; ρ = ∞: all is forgotten
        ends = np.isfinite(lam)
        log_rho = torch.from_numpy(-np.where(ends, lam, 0.0))
        return np.where(ends, (log_phi(log_rho.exp()) - log_rho).numpy(), np.where(lam > 0, 0.0, np.inf))

    def growth(lam: Array) -> Array:
        with torch.inference_mode(False), torch.enable_grad():
            log_rho = torch.from_numpy(-lam).requires_grad_(True)
            (slope,) = torch.autograd.grad(log_phi(log_rho.exp()).sum(), log_rho)
        return slope.numpy()

    return Strength(lambda a, b: np.where(b == np.inf, 0.0, log_ratio(a) - log_ratio(b)), growth, True)


class _Heun:
    """Stages of Heun's method in y = x/α over ρ, where dy/dρ = ε̂."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        self.form: list[float] = []
        self.draws = 0

    def call(self, t: Array | float, form: float = 1.0) -> int:
        self.calls.append(float(t))
        self.form.append(form)
        return len(self.calls) - 1

    def noise(self, s: Points, t: Points, strength: float) -> Stage:
        """Forward from ρ_s to ρ_t > ρ_s: x ← (α_t/α_s) x + strength·α_t √(ρ_t² − ρ_s²) z."""
        self.draws += 1
        ratio = float(s.sigma * t.alpha / (t.sigma * s.alpha))  # ρ_s/ρ_t
        return Stage(
            None, float(t.alpha / s.alpha), (), strength * float(t.sigma) * math.sqrt(1.0 - ratio**2), self.draws - 1
        )

    def step(self, s: Points, t: Points) -> list[Stage]:
        """x_t = (α_t/α_s) x_s + α_t(ρ_t − ρ_s) ½(ε̂_s + ε̂_1), ε̂_1 at the Euler step; Euler alone to σ = 0."""
        if s.alpha < 1e-6 * s.sigma:  # ε̂ says nothing: one exponential step with D
            exact, first = linear_data(s, t), self.call(s.t, 0.0)
            return [Stage(first, float(exact.A), [(first, float(exact.W))])]
        exact, first = linear_noise(s, t), self.call(s.t)
        A, W = float(exact.A), float(exact.W)
        euler = Stage(first, A, [(first, W)])
        if t.sigma == 0.0:
            return [euler]
        second = self.call(t.t)
        return [euler, Stage(second, A, [(first, 0.5 * W), (second, 0.5 * W)], anchor=False)]


@dataclass(frozen=True, kw_only=True)
class EDMHeun(DiffusionMethod):
    """Heun's method with churn, Karras et al. 2022, algorithm 2, in ρ = σ/α for any process.

    Args:
        churn: S_churn: before each step ρ is raised to ρ̂ = (1 + γ)ρ by noise, γ = min(S_churn/steps, √2 − 1), but never
            beyond the process's t_max. 0 is Heun's method for the flow; otherwise the equation must be a
            `ReverseSDE`, whose own η does not matter (churn sets the noise; every amount keeps the marginals).
        churn_min, churn_max: the range of ρ with churn.
        churn_noise: S_noise, the factor on the noise.

    Two calls a step; with `denoise`, or a stop at σ = 0, the step to 0 is one call, so that EDM's "18 steps" are 35 calls.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.churn >= 0.0 and self.churn_min <= self.churn_max and self.churn_noise >= 0.0):
            raise InvalidInput(
                f"EDMHeun needs churn ≥ 0, churn_min ≤ churn_max and churn_noise ≥ 0; got {self.churn}, {self.churn_min}, "
                f"{self.churn_max}, {self.churn_noise}"
            )

    @property
    def facts(self) -> Facts:
        noise = ("additive",) if self.churn else ("none",)
        order, weak = (None, 2) if self.churn else (2, None)
        name = "EDM Heun with churn" if self.churn else "EDM Heun"
        return Facts(name, order, None, weak, 2, False, noise, "diffusion", "Karras et al. 2022")

    def rule(self, task: Task) -> Grid:
        return _edm_rule(task)

    def plan(self, task: Task, times: Tensor) -> Plan:
        points, heun, plan = points_of(task, times, self.denoise), _Heun(), []
        process = task.equation.process
        assert process is not None
        gamma = min(self.churn / (len(points) - 1), math.sqrt(2.0) - 1.0)
        with np.errstate(divide="ignore"):
            rho = points.sigma / points.alpha
        churned = gamma > 0.0
        higher = _raised(process, points, gamma) if churned else points
        for n in range(len(points) - 1):
            s, stages = points[n], []
            if churned and self.churn_min <= rho[n] <= self.churn_max and higher.lam[n] < s.lam:
                stages.append(heun.noise(s, higher[n], self.churn_noise))
                s = higher[n]
            plan.append(stages + heun.step(s, points[n + 1]))
        return compiled(task, heun.calls, np.array(heun.form), plan, Normals(task, heun.draws) if heun.draws else None)


def _raised(process: Process, points: Points, gamma: float) -> Points:
    t = process.time(torch.from_numpy(points.lam - math.log1p(gamma)))
    return Points.at(process, t.clamp(max=process.t_max))


def _edm_rule(task: Task) -> Grid:
    process = task.equation.process
    assert process is not None
    # ρ is infinite where α = 0, and the grid in it with ρ
    return InChart() if process.alpha(task.start) < 1e-6 * process.sigma(task.start) else Karras()


@dataclass(frozen=True, kw_only=True)
class Restart(DiffusionMethod):
    """Restart sampling of Xu et al. 2023: Heun's method for the flow, with loops back up by fresh noise.

    Args:
        loops: (low, high, repeats, steps) each: on reaching ρ = low, add noise up to ρ = high and come back down by
            `steps` Heun steps on a Karras grid, `repeats` times.

    Needs a `ReverseSDE` (for its seeds; its η does not matter). Weak order 2 when the loops' steps grow with `steps`.
    """

    loops: tuple[tuple[float, float, int, int], ...] = ((0.06, 0.3, 2, 3),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for loop in self.loops:
            if len(loop) != 4 or not (0.0 < loop[0] < loop[1] and loop[2] >= 1 and loop[3] >= 1):
                raise InvalidInput(
                    f"a loop is (low, high, repeats, steps) with 0 < low < high in σ/α; got {loop}. Write "
                    "Restart(steps=18, loops=((0.06, 0.3, 2, 3),))"
                )

    @property
    def facts(self) -> Facts:
        return Facts("Restart", None, None, 2, None, False, ("additive",), "diffusion", "Xu et al. 2023")

    def rule(self, task: Task) -> Grid:
        return _edm_rule(task)

    def times(self, task: Task) -> Tensor:
        process = task.equation.process
        assert process is not None
        times = super().times(task)
        lows = process.time_of_rho(
            torch.tensor(sorted({loop[0] for loop in self.loops}, reverse=True), dtype=torch.float64)
        )
        if bool(((lows >= times[0]) | (lows <= times[-1])).any()):
            raise InvalidInput(
                f"the loops restart at t={[round(v, 4) for v in lows.tolist()]}, which must lie between start={task.start} "
                f"and stop={task.stop}"
            )
        return merge(times, lows, near=0.0)

    def plan(self, task: Task, times: Tensor) -> Plan:
        process = task.equation.process
        assert process is not None
        points, heun, plan = points_of(task, times, self.denoise), _Heun(), []
        for n in range(len(points) - 1):
            stages = heun.step(points[n], points[n + 1])
            for low, high, repeats, steps in self.loops:
                t_low = process.time_of_rho(torch.tensor(low, dtype=torch.float64)).item()
                if abs(t_low - points.t[n + 1]) > 1e-9 * abs(t_low):
                    continue
                top = min(process.time_of_rho(torch.tensor(high, dtype=torch.float64)).item(), process.t_max)
                nodes = Points.at(process, Karras().times(process, top, t_low, steps))
                for _ in range(repeats):
                    stages.append(heun.noise(points[n + 1], nodes[0], 1.0))
                    for i in range(steps):
                        stages += heun.step(nodes[i], nodes[i + 1])
            plan.append(stages)
        return compiled(task, heun.calls, np.array(heun.form), plan, Normals(task, heun.draws) if heun.draws else None)
