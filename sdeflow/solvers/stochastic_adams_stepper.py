"""Adams for reverse SDEs with a step and an order for every sample: `Adams` on an equation with η > 0.

In the trigonometric chart (z, A = cos θ, S = c sin θ, e^λ = A/S) a reverse SDE of strength η is, exactly,

    z_t = q (S_t/S_s) z_s + ∫ D dω + S_t e^{−η²λ_t} (M(τ_t) − M(τ_s)),   q = e^{−η²h},  ω = A_t e^{−(1+η²)(λ_t − λ)},  τ = e^{2η²λ},

M a Brownian motion in the clock τ. D, which has no noise of its own, is replaced by polynomials in θ whose integrals over ω are
exact; the noise is asked of the path again after a rejection, over the shorter interval, which is the bridge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from sdeflow.brownian import BrownianPath
from sdeflow.charts import StraightLine, Trigonometric
from sdeflow.errors import InvalidInput
from sdeflow.processes import expand
from sdeflow.solvers.base import Outcome, Task, bmm, need_less_noise
from sdeflow.solvers.control import Attempt, Flow, drive, rms
from sdeflow.solvers.exponential_weights import gauss
from sdeflow.solvers.stochastic import NoDense, path_of
from sdeflow.solvers.stochastic_clocks import even, rho_where

if TYPE_CHECKING:
    from sdeflow.solvers.adams import Adams

Control = Literal["strong", "weak"]
HIGHEST = 3
"""Nodes of the predictor: noise in D makes more of them worse, not better."""
SAFETY = 0.5
GROW, KEEP, SHRINK = 1.4, 0.7, 0.2
"""Bounds on the step's change. Even steps leave the smallest error of the law, so an accepted step changes it little."""
LARGEST_SCALE = 10.0, 100.0
"""R/c of `DataFlow`: of data, and of errors of some hundredths in ε̂."""
POINTS = 10
"""Of the quadrature over ω."""
LARGEST = 55.0
"""ln τ beyond which a path has no more cells."""


@dataclass(frozen=True)
class DataFlow(Flow):
    """A reverse SDE, asked for D instead of a drift; the state is that of the trigonometric chart.

    The clock is u = ¼ asinh(ρ̂/ℓ), ρ̂ = ρ/(1 + ρ/R), ρ = σ/α: even in λ between the scales ℓ and R of the data, finite at both ends.
    """

    c: float = 0.5
    low: float = 0.005
    high: float = 5.0

    @staticmethod
    def data(task: Task, chart: object, one_time: bool) -> DataFlow:
        """The task's; the chart gives the scale c.

        Raises:
            InvalidInput: the equation has no network, or the chart no scale.
        """
        equation = task.equation
        if equation.process is None or equation.predict is None:
            raise InvalidInput(
                f"Adams with noise needs the process and prediction of a reverse SDE, and {equation!r} has only a drift; take "
                "sf.ShARK(rtol=..., atol=...) or another solver of generic SDEs"
            )
        if not isinstance(chart, StraightLine | Trigonometric | None):
            raise InvalidInput(
                f"Adams with noise works in a trigonometric chart; got chart={chart!r}. Write chart=sf.Trigonometric(c) or leave it out"
            )
        need_less_noise(task)
        c = 0.5 if chart is None else chart.c
        bound = Trigonometric(c).bind(equation.process)
        # what an error of ε̂ makes of D looks like data of scale σ/α
        cancelled = max(equation.predict.cancelled(t).item() for t in (task.start, task.stop))
        high = min(max(LARGEST_SCALE[0] * c, cancelled), LARGEST_SCALE[1] * c)
        return DataFlow(equation, bound, task.start, task.stop, task.x.shape[1:], one_time, c, low=0.01 * c, high=high)

    def rhs(self, u: Tensor, z: Tensor) -> Tensor:
        """D at u (n,), z (n, d); one evaluation a sample."""
        assert self.equation.predict is not None
        t = self.t(u[0] if self.one_time else u)
        return self.equation.predict.data(self.x(t, z), t).flatten(1)

    def u(self, t: Tensor | float) -> Tensor:
        process = self.equation.process
        assert process is not None
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.clock(process.sigma(t), process.alpha(t))

    def clock(self, sigma: Tensor, alpha: Tensor) -> Tensor:
        """u where σ/α is this; either may be 0."""
        return 0.25 * even(sigma, alpha, self.low, self.high)

    def rho(self, u: Tensor) -> Tensor:
        """σ/α at u, ∞ at α = 0."""
        return rho_where(4.0 * u, self.low, self.high)

    def t(self, u: Tensor) -> Tensor:
        process = self.equation.process
        assert process is not None
        return process.time_of_rho(self.rho(u)).clamp(min(self.start, self.stop), max(self.start, self.stop))

    def carry(self, u: Tensor) -> Tensor:
        # 1 in the trigonometric chart, and x = z/m
        assert self.chart is not None
        return (1.0 / self.chart.m(self.stop).to(u.device)).expand_as(u)


@dataclass(frozen=True)
class ExactStep:
    """Everything of the exact step s → t but D: z_t = a z_s + ∫ D dω + b (M(τ_t) − M(τ_s)).

    Attributes:
        a, b: (n,).
        begin, end: τ_s and τ_t, (n,).
        noise: ν, the standard deviation of b (M(τ_t) − M(τ_s)), (n,).
        largest: that of the noise so far at the end or half-way, whichever is more: towards σ = 0 the noise dies out, (n,).
        blind: whether it goes to σ = 0 from more than 2ℓ: D = x there, so it would check nothing, (n,) bool.
        nodes: the clock at the quadrature points, in units of the step: (POINTS, n).
        measure: their weights, (POINTS, n).
    """

    a: Tensor
    b: Tensor
    begin: Tensor
    end: Tensor
    noise: Tensor
    largest: Tensor
    blind: Tensor
    nodes: Tensor
    measure: Tensor

    @staticmethod
    def of(flow: DataFlow, s: Tensor, t: Tensor) -> ExactStep:
        """The step from clock readings s (n,) to t (n,)."""
        c, eta2 = flow.c, flow.equation.eta**2
        rho_s, rho_t = flow.rho(s), flow.rho(t)
        lam_s, lam_t, h = -rho_s.log(), -rho_t.log(), (rho_s / rho_t).log()
        A_t, S_s, S_t = c / torch.hypot(rho_t, torch.full_like(t, c)), _sine(rho_s, c), _sine(rho_t, c)
        lost = -torch.expm1(-(1.0 + eta2) * h)
        x, w = (torch.as_tensor(v, dtype=s.dtype, device=s.device)[:, None] for v in gauss(POINTS))
        # ρ = ρ_t (ω/A_t)^{−1/(1+η²)}; to σ = 0 it is 0 throughout
        rho = rho_t * (1.0 - (1.0 - x) * lost) ** (-1.0 / (1.0 + eta2))
        one = torch.ones_like(rho)
        middle = flow.rho(0.5 * (s + t))
        half_way = _sine(middle, c) * (-torch.expm1(-2.0 * eta2 * (rho_s / middle).log())).sqrt()
        noise = S_t * (-torch.expm1(-2.0 * eta2 * h)).sqrt()
        return ExactStep(
            a=S_t / S_s * (-eta2 * h).exp(),
            b=S_t * (-eta2 * lam_t).exp(),
            begin=(2.0 * eta2 * lam_s).exp(),
            # where σ = 0 the noise is gone, and any τ does that the path can reach
            end=(2.0 * eta2 * lam_t).clamp_max(LARGEST).exp(),
            noise=noise,
            largest=torch.maximum(noise, half_way),
            blind=(rho_t == 0.0) & (rho_s > 2.0 * flow.low),
            nodes=(flow.clock(rho, one) - s) / (t - s),
            measure=w * A_t * lost,
        )


def _sine(rho: Tensor, c: float) -> Tensor:
    """c sin θ = cρ/√(c² + ρ²), c at ρ = ∞."""
    return c / torch.hypot(c / rho, torch.ones_like(rho))


class Weights(NamedTuple):
    """What a step needs of its nodes.

    Attributes:
        rows: (4, K, n) weights on the K values of D in ∫P_k dω and in P_{k−1}, P_k, P_{k+1} at the new node, P_m the polynomial through
            the last m.
        gamma, eta: (3, n) ∫N_m dω/N_m(1) and ∫(v − 1)N_{m−1}dω/N_m(1) for m = k − 1, k, k + 1, N_m(v) = Π_{i<m}(v − s_i).
    """

    rows: Tensor
    gamma: Tensor
    eta: Tensor


def weights(s: Tensor, k: Tensor, step: ExactStep) -> Weights:
    """The weights for the last nodes s (K, n), newest first and in units of the step (the new node is 1, the present one 0), and
    orders k (n,), 1 ≤ k < K."""
    K, n = s.shape
    table = s.new_zeros(K, K, n)  # row m: divided difference over the nodes 0 … m
    table[0, 0] = 1.0
    for m in range(1, K):
        gap = s[:m] - s[m]
        table[m, :m] = table[m - 1, :m] / gap
        table[m, m] = (-gap).prod(0).reciprocal()
    v = torch.cat([step.nodes, torch.ones_like(step.nodes[:1])])
    N = torch.cat([torch.ones_like(v)[None], (v - s[:, None]).cumprod(0)])
    inner, top = N[:, :-1], N[:, -1]
    area = (step.measure * inner).sum(1)
    lean = torch.cat([torch.zeros_like(area[:1]), (step.measure * (step.nodes - 1.0) * inner[:-1]).sum(1)])
    size = torch.arange(K, device=s.device)[:, None]
    near = k + torch.arange(-1, 2, device=s.device)[:, None]
    rows = [(table * (area[:K] * (size < k))[:, None]).sum(0)]
    rows += [(table * (top[:K] * (size < m))[:, None]).sum(0) for m in near]
    return Weights(torch.stack(rows), (area / top).gather(0, near), (lean / top).gather(0, near))


class StochasticAdamsStepper(NoDense):
    """Predict with the last k of D, evaluate, correct with the new one; choose k and the step by what the new one says.

    With ξ the step's noise and P_k the polynomial through the last k of D,

        z* = a z + ∫P_k dω + ξ,   r_k = D(z*) − P_k(θ⁺),   z⁺ = z* + γ_k r_k,

    and η_k r_k is the difference to the formula of order k. The noises ξ_0, ξ_1, … of the steps that ended at the nodes 0, 1, … make D jump
    there by about κν_j each, κ the size of ∂D/∂z; so of r_k = D* − Σℓ_i D_i

        |r_k|² = s_k² + B_k κ²ν²,    B_k = 1 + Σ_j (1 − ℓ_0 − … − ℓ_j)² ν_j²/ν²

    and s_k is truncation. That falls with the order and the noise grows, so r_{k+1} is taken for noise, κ is averaged over the tries,
    and of r_k only what exceeds the noise by two standard deviations is s_k. In the step itself ξ should have the weight W/2 (W =
    ∫dω) and has γ_k, and ξ_j should have W and lacks the weight of the nodes behind it, e_j.
    The local error, ν̄ being the larger of ν and its value half-way:

        "strong": (η_k² s_k² + κ²[W²ν̄²/12 + (γ_k − W/2)²ν² + Σ e_j²ν_j²])^½: the path between the nodes is not known;
        "weak":   |η_k| s_k + (κ|(γ_k − W/2)ν² − Σ e_jν_j²| + κ²W²ν̄²/24)/|z|: half the relative error of the variance; even steps leave
                  the second term alone (docs/weak.md), 9 times as large at order 1.
    """

    def __init__(self, flow: DataFlow, path: BrownianPath, max_order: int, control: Control):
        self.flow, self.path, self.control = flow, path, control
        self.span = abs(float(flow.u(flow.stop)) - float(flow.u(flow.start)))
        self.highest = min(max_order, HIGHEST)

    def begin(self, u: Tensor, z: Tensor, f: Tensor) -> None:
        """See `Stepper`."""
        self.U, self.F, self.V = u[:, None], f[:, None], torch.zeros_like(u)[:, None]
        self.count, self.k = torch.ones_like(u, dtype=torch.int64), torch.ones_like(u, dtype=torch.int64)
        self.kappa2 = self.tried = torch.full_like(u, torch.nan)

    def attempt(self, u: Tensor, z: Tensor, step: Tensor, end: Tensor, allowed: Tensor) -> Attempt:
        """See `Stepper`."""
        exact = ExactStep.of(self.flow, u, end)
        back = torch.arange(self.highest + 1, device=u.device)
        s = u.new_zeros(len(u), self.highest + 1)
        s[:, : self.U.shape[1]] = (self.U - u[:, None]) / step[:, None]
        s = torch.where(back < self.count[:, None], s, -1e3 - back)  # nodes there are not: nothing weighs on them
        near = weights(s.T.contiguous(), self.k, exact)
        Y = bmm(near.rows[:, : self.F.shape[1]].permute(2, 0, 1).to(z.dtype), self.F)
        W, _ = self.path.increment(exact.begin, exact.end)
        noise = W.flatten(1).to(z.dtype) * expand(exact.b, z)
        z_star = expand(exact.a, z) * z + Y[:, 0] + noise
        f = self.flow.rhs(end, z_star)
        r = f[:, None] - Y[:, 1:]
        z_new = z_star + expand(near.gamma[1], z) * r[:, 1]
        self.end, self.f, self.v = end, f, exact.noise.square()
        # errors of single steps add up as squares: each may make its share of the square
        share = (step.abs() / self.span).sqrt()
        return self._judge(z_new, rms(r.detach()).T, exact, near, allowed * share)

    def _judge(self, z: Tensor, size: Tensor, step: ExactStep, near: Weights, allowed: Tensor) -> Attempt:
        """Which order allows the largest step; size (3, n) of r at k − 1, k, k + 1."""
        order = self.k + torch.arange(-1, 2, device=self.k.device)[:, None]
        possible = (order >= 1) & (order <= self.highest) & (order <= self.count)
        nu2, W, gamma = step.noise.square().clamp_min(1e-300), step.measure.sum(0), near.gamma[1]
        history = self.V.T  # (K, n) variances of the noises that made the nodes jump
        behind = 1.0 - near.rows[1:, : len(history)].cumsum(1)
        B = 1.0 + (behind.square() * history).sum(1) / nu2
        # of no use before there is a node more than the order needs: then all of r is truncation, and noise at most r_1
        known = self.k < self.count
        seen = torch.where(known, size[2].square() / (B[2] * nu2), torch.nan)
        kappa2 = torch.where(known, 0.5 * (seen + torch.where(self.kappa2.isnan(), seen, self.kappa2)), self.kappa2)
        delta2 = torch.where(kappa2.isnan(), size[1].square(), kappa2 * nu2)
        inside = torch.where(kappa2.isnan(), delta2, kappa2 * step.largest.square())  # κ²ν̄²
        threshold = torch.where(kappa2.isnan(), 0.0, (1.0 + 2.0 * math.sqrt(2.0 / z.shape[1])) * delta2)
        smooth = near.eta.abs() * (size.square() - B * threshold).clamp_min(0.0).sqrt()
        held = near.rows[0] - gamma * near.rows[2]
        lack = (held.sum(0) - held.cumsum(0))[: len(history)]
        if self.control == "strong":
            uneven = (gamma - 0.5 * W).square() + (lack.square() * history).sum(0) / nu2
            error = (smooth.square() + W.square() * inside / 12.0 + uneven * delta2).sqrt()
            power = torch.ones_like(smooth)
        else:
            lopsided = ((gamma - 0.5 * W) * nu2 - (lack * history).sum(0)).abs() * (delta2 / nu2).sqrt()
            even = torch.where(order == 1, 9.0, 1.0) * W.square() * inside / 24.0
            error = smooth + (lopsided + even) / rms(z.detach()).clamp_min(self.flow.c)
            power = order + 0.5
        self.tried = kappa2
        error = torch.where(step.blind, 2.0, error / allowed)
        factor = torch.where(possible, SAFETY * error.clamp_min(1e-12) ** (-1.0 / power), 0.0).nan_to_num(nan=0.0)
        ok = error[1] <= 1.0
        best, which = torch.where(ok | (order <= self.k), factor, 0.0).max(0)
        self.next = torch.where(best > 0, self.k - 1 + which, self.k)
        return Attempt(z, error[1], best.clamp(KEEP, GROW), best.clamp(SHRINK, 0.9))

    def commit(self, ok: Tensor) -> None:
        """See `Stepper`."""
        keep = self.highest + 1
        U, F = torch.cat([self.end[:, None], self.U], 1)[:, :keep], torch.cat([self.f[:, None], self.F], 1)[:, :keep]
        V = torch.cat([self.v[:, None], self.V], 1)[:, :keep]
        more = U.shape[1] - self.U.shape[1]
        self.V = torch.where(ok[:, None], V, torch.nn.functional.pad(self.V, (0, more)))
        self.U = torch.where(ok[:, None], U, torch.nn.functional.pad(self.U, (0, more)))
        self.F = torch.where(ok[:, None, None], F, torch.nn.functional.pad(self.F, (0, 0, 0, more)))
        self.count = torch.where(ok, (self.count + 1).clamp_max(keep), self.count)
        self.k, self.kappa2 = self.next, self.tried

    def keep(self, rows: Tensor) -> None:
        """See `Stepper`."""
        self.U, self.F, self.V = self.U[rows], self.F[rows], self.V[rows]
        self.count, self.k = self.count[rows], self.k[rows]
        self.kappa2, self.path = self.kappa2[rows], self.path.restrict(rows)


def check_control(control: object) -> None:
    """Refuse what is neither "strong" nor "weak".

    Raises:
        InvalidInput: so it is.
    """
    if control not in ("strong", "weak"):
        raise InvalidInput(
            f'control must be "strong" (error on the path) or "weak" (error of the law); got {control!r}'
        )


def integrate_noisy(solver: Adams, task: Task) -> Outcome:
    """What `Adams` does on an equation with noise.

    Raises:
        InvalidInput: the equation is no reverse SDE, or a setting makes no sense with noise.
    """
    instead = {
        "pece": "",
        "dense": ", and name the times with solve(..., save_at=[...])",
        "error_estimate": ", or take sf.ExponentialShARK(rtol=..., atol=..., global_error=True), which brings one",
        "global_error": ", or take sf.ExponentialShARK(rtol=..., atol=..., global_error=True)",
    }
    for setting, write in instead.items():
        if getattr(solver, setting):
            raise InvalidInput(f"Adams({setting}=True) is for ODEs; leave it out{write}")
    flow = DataFlow.data(task, solver.chart, solver.coupled)
    stepper = StochasticAdamsStepper(flow, path_of(task), solver.max_order, solver.control)
    return drive(flow, task, stepper, solver.rtol, solver.atol, solver.max_steps, solver.coupled)
