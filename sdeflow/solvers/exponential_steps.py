"""The stepper behind every exponential solver: a `Scheme` over a grid becomes a plan of scalars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.processes import Process
from sdeflow.solvers.base import Task, need_less_noise
from sdeflow.solvers.exponential_weights import (
    FLOW,
    Array,
    Form,
    Linear,
    Points,
    Strength,
    clocks,
    interpolating,
    linear_data,
    linear_noise,
    moments,
)
from sdeflow.solvers.fitted_weights import Linearised
from sdeflow.solvers.linear import Evaluations, Normals, PathNormals, Plan, Stage
from sdeflow.solvers.tableaux import KUTTA3, MIDPOINT, RK4, Tableau

Strengths = Callable[[Array, Array], Strength]
"""The noise of steps from λ_s to λ_t (n,), (n,)."""


@dataclass(frozen=True)
class Scheme:
    """Settings of the stepper.

    Attributes:
        form: "data": F = D; "noise": F = ε̂ (ODE only).
        predictor: nodes of the polynomial that predicts, the newest at the step's start.
        corrector: old nodes of the polynomial that corrects, beside the predicted one; 0 for none.
        clock: variable of the polynomials: "lambda", "rho", "t" or "share", or a function of λ.
        simple: None for the exact integrals throughout; "bh2" or "bh1" for half of B = W (the whole weight) or of
            B = W·h/(1 − e^{−h}) on the first difference where two nodes are used, as DPM-Solver++ and UniPC have it.
        strengths: the noise.
        own_start: start-up steps of the method's own order, instead of fewer nodes at first.
        lower_order_final: fewer nodes at last.
        look: θ, how far the network looks ahead along the noise, see `_looks`; 0 for not at all.
        share: of `predictor` and `corrector` nodes in the weights of a step of length |Δu|, the rest being of two
            nodes and one: steps (n,) → (n,), None for the former alone.
        scales: the data's scales to which the extrapolations are fitted (`fitted_weights`), None for not at all.
    """

    form: Form = "data"
    predictor: int = 1
    corrector: int = 0
    clock: str | Callable[[Array], Array] = "lambda"
    simple: Literal["bh1", "bh2"] | None = None
    strengths: Strengths = lambda s, t: FLOW
    own_start: bool = True
    lower_order_final: bool = False
    look: float = 0.0
    share: Callable[[Array], Array] | None = None
    scales: tuple[float, float] | None = None

    @property
    def order(self) -> int:
        """Global order on ODEs, with own_start."""
        return min(self.predictor + 1, self.corrector + 1) if self.corrector else self.predictor


def points_of(task: Task, times: Tensor, denoise: bool) -> Points:
    """The nodes, with the clean data behind them if asked for."""
    process = task.equation.process
    assert process is not None
    need_less_noise(task)
    points = Points.at(process, times)
    if points.sigma[0] <= 0.0:
        raise InvalidInput(
            f"the solve starts at t={task.start}, where σ = 0: there is no noise to predict; start a little later, e.g. "
            f"solve(..., start={max(1e-3 * task.stop, 1e-5):g})"
        )
    return points.clean() if denoise else points


def multistep_plan(scheme: Scheme, task: Task, points: Points) -> Plan:
    """Compile a multistep method (a one-step one included) over the nodes."""
    process = task.equation.process
    assert process is not None
    steps = len(points) - 1
    s, t = points[:-1], points[1:]
    strength = scheme.strengths(s.lam, t.lam)
    if scheme.form == "noise":
        exact = linear_noise(s, t)
        blind = _blind(points)
        if blind:
            first = linear_data(s[:1], t[:1])
            exact = Linear(
                *(np.append(f, e[1:]) for f, e in ((first.A, exact.A), (first.W, exact.W), (first.noise, exact.noise)))
            )
    else:
        decay = np.broadcast_to(strength.decay(s.lam, t.lam), s.lam.shape)
        if bool((decay < -1e-12).any()) or (task.equation.stochastic and not bool((decay > 0.0).any())):
            n = int(np.argmin(decay))
            raise InvalidInput(
                f"the noise of this solver is not positive: ∫η²dλ is {decay[n]:.3g} over the step from σ/α = {np.exp(-s.lam[n]):.3g} to "
                f"{np.exp(-t.lam[n]):.3g}. With φ of one's own φ/ρ must grow with ρ, as in ERSDE(phi=lambda rho: rho**2); without noise "
                "take sf.ProbabilityFlowODE"
            )
        exact, blind = linear_data(s, t, decay), False
    p, c = _orders(scheme, points, strength.noisy, blind)
    clock_of = strength if strength.clock is None else strength.clock
    looking = bool(scheme.look) and strength.noisy
    normals = path_normals(task, points, clock_of, looking) if strength.noisy else None
    if not looking and not c.any() and bool((p == 1).all()) and not blind:
        calls = _evaluations(task, s.t, np.full(steps, float(scheme.form == "noise")))
        return Plan.one_step(calls, exact.A, exact.W, exact.noise, normals)
    infinite = not (bool(np.isfinite(s.lam).all()) or blind)
    clock = "share" if infinite and scheme.clock in ("lambda", "rho") else scheme.clock
    weigh = _Weigher(scheme, points, exact, clock if callable(clock) else clocks(process, clock), clock)
    back = np.append(0, c[:-1])
    predict, correct = weigh.all(p, 0), weigh.all(back, 1)
    looks, every = (_looks(exact, scheme.look), 2) if looking else ([()] * steps, 1)
    length = np.abs(np.diff(weigh.u))
    if scheme.share is not None:
        share = scheme.share(length)
        predict = mixed(predict, weigh.all(np.minimum(p, 2), 0), share)
        correct = mixed(correct, weigh.all(np.minimum(back, 1), 1), np.append(0.0, share[:-1]))
    if scheme.scales is not None and np.median(length) > NEGLIGIBLE and (p > 0).all():
        draws = every if strength.noisy else 0
        predict = _fitted(scheme.scales, points, exact, predict, correct, weigh.slopes(p), looks, draws)

    A, noise = exact.A.tolist(), exact.noise.tolist()
    at = _Calls(points)
    plan: list[list[Stage]] = []
    for n in range(steps):
        e = at.node(n)
        if p[n] < 0:
            plan.append(_start(scheme.form, _START[-p[n]], process, points, n, at))
            continue
        ahead = Stage(e, A[n], _terms(at, predict[n], n), noise[n], every * n, look=looks[n])
        if n and c[n - 1]:
            back = Stage(e, A[n - 1], _terms(at, correct[n], n), noise[n - 1], every * (n - 1), False, looks[n])
            plan.append([back, ahead._replace(at=None, look=())])
        else:
            plan.append([ahead])
    q = np.full(len(at.t), float(scheme.form == "noise"))
    q[0] = q[0] * (not blind)
    return compiled(task, at.t, q, plan, normals)


NEGLIGIBLE = 0.12
"""Steps in λ up to which nothing is fitted. Looking ahead, the variance of a scale far from both ends is then right without it."""


def mixed(more: list[list[float]], fewer: list[list[float]], share: Array) -> list[list[float]]:
    """share·more + (1 − share)·fewer, a row a step, newest node first."""
    return [
        [q * a + (1.0 - q) * b for a, b in zip(m, f + [0.0] * (len(m) - len(f)), strict=True)]
        for m, f, q in zip(more, fewer, share.tolist(), strict=True)
    ]


def _fitted(
    scales: tuple[float, float],
    points: Points,
    exact: Linear,
    predict: list[list[float]],
    correct: list[list[float]],
    slope: Array,
    looks: list[tuple[tuple[float, int], ...]],
    draws: int,
) -> list[list[float]]:
    """The predictor's weights with the slope through the last two D taken δ_n more, see `fitted_weights`."""
    law = Linearised(
        alpha=tuple(points.alpha.tolist()),
        sigma=tuple(points.sigma.tolist()),
        A=tuple(exact.A.tolist()),
        noise=tuple(exact.noise.tolist()),
        predict=tuple(map(tuple, predict)),
        correct=tuple(map(tuple, correct)),
        slope=tuple(slope.tolist()),
        looks=tuple(looks),
        draws=draws,
    )
    found = []
    for w, more in zip(predict, (law.fitted(*scales) * slope).tolist(), strict=True):
        found.append([w[0] + more, w[1] - more, *w[2:]] if more else w)
    return found


def compiled(task: Task, t: list[float], q: Array, plan: list[list[Stage]], normals: Normals | None = None) -> Plan:
    """The plan for calls at times t with F = (1 − q) D + q ε̂."""
    return Plan(_evaluations(task, np.array(t), q), plan, normals)


def _evaluations(task: Task, t: Array, q: Array) -> Evaluations:
    want = torch.from_numpy(q)
    return Evaluations(task, torch.from_numpy(t), 1.0 - want, want)


LOOK = 24.0**-0.5
"""θ of `_looks`: the variance of a linear equation is then of order 3 and more."""


def _looks(exact: Linear, theta: float) -> list[tuple[tuple[float, int], ...]]:
    """Where the network is called: at x_n + Σ c z, a point of x_n's own law that follows the noise more smoothly.

    The noise s_{n−1}z_{n−1} of the step behind is in x_n, that of the step ahead, s_n z_n, is A_n times ŝ = s_n/A_n at x_n.
    With r = ŝ²/s² (s = s_{n−1}), a = θ√r, b = θ/√r and ζ_n a normal of its own

        x̃_n = x_n − a s z_{n−1} + b ŝ z_n + √v ζ_n,    v = (2a − a²) s² − b² ŝ²,

    so that x̃_n and x_n are equal in law up to O(h²) and no nonlinear mean is moved. On dx = κ(u)x du + g(u)dw a method of order
    three or more makes the variance at the end wrong by h²(1/12 − 2θ²)∫κ²g²G²du and a term of the end (G the response to an
    impulse), which is what the jumps of the noise do in the history; hence θ² = 1/24.
    Where steps change much a is cut to ½ and to 2r/(1 + r), beyond which v < 0. docs/weak.md has the derivation.
    """
    s, ahead = exact.noise[:-1], exact.noise[1:]
    found: list[tuple[tuple[float, int], ...]] = [()]
    with np.errstate(divide="ignore", invalid="ignore"):
        hat = np.where(ahead > 0.0, ahead / exact.A[1:], 0.0)
        r = (hat / s) ** 2
        a = np.minimum(np.minimum(theta * np.sqrt(r), 0.5), 2.0 * r / (1.0 + r))
        b = np.where(a > 0.0, a / r, 0.0)
    v = np.maximum((2.0 * a - a**2) * s**2 - (b * hat) ** 2, 0.0)
    for n, row in enumerate(zip((-a * s).tolist(), (b * hat).tolist(), np.sqrt(v).tolist(), strict=True), 1):
        found.append(tuple((c, k) for c, k in zip(row, (2 * n - 2, 2 * n, 2 * n + 1), strict=True) if c))
    return found


def path_normals(task: Task, points: Points, strength: Strength, areas: bool = False) -> Normals:
    """The steps' normals from a Brownian path M in the clock τ = e^{2∫η²dλ}; with `areas` two a step.

    The noise of the exact step is σ_t e^{−E_t} (M(τ_t) − M(τ_s)) with E = ∫η²dλ from λ = 0, so the path belongs to the
    equation and not to the grid. A step to σ = 0 draws nothing.
    """
    lam = points.lam[: len(points) - (points.sigma[-1] == 0.0)]
    double = 2.0 * strength.decay(np.zeros_like(lam), lam)
    if len(lam) < 2 or double.max() > LARGEST:
        return Normals(task, (len(points) - 1) * (1 + areas))
    return PathNormals(task, torch.from_numpy(np.exp(double)), areas)


LARGEST = 55.0
"""ln τ beyond which a path has no more root cells (η well above 1): the steps' normals are then independent of the grid."""


class _Calls:
    """Times of the network calls in their order, and which call belongs to which node."""

    def __init__(self, points: Points):
        self.t: list[float] = []
        self.of_node: list[int] = []
        self._times = points.t.tolist()

    def node(self, n: int) -> int:
        self.of_node.append(len(self.t))
        return self.more(self._times[n])

    def more(self, t: float) -> int:
        self.t.append(t)
        return len(self.t) - 1


def _terms(at: _Calls, weights: list[float], newest: int) -> list[tuple[int, float]]:
    return [(at.of_node[newest - j], w) for j, w in enumerate(weights)]


_START = {2: MIDPOINT, 3: KUTTA3, 4: RK4}


def _orders(scheme: Scheme, points: Points, noisy: bool, blind: bool) -> tuple[Array, Array]:
    """For every step the number of predicting nodes (−r: a start-up step of order r) and of old correcting ones.

    Step i has i + 1 nodes and hence a local error of h^{i+2}, h^{i+3} with a corrector, where h^G is wanted of the
    first few steps, G the global order: the steps before that are Runge–Kutta steps of order G − 1. Noise caps the weak
    order at 2, for which fewer nodes do.
    """
    steps = len(points) - 1
    have = np.maximum(np.arange(steps) + 1 - blind, 1)
    p = np.minimum(scheme.predictor, have)
    c = np.minimum(scheme.corrector, have)
    if scheme.lower_order_final:
        left = steps - np.arange(steps)
        p, c = np.minimum(p, left), np.minimum(c, left)
    ends = ~np.isfinite(points.lam[1:])
    p[ends], c[ends] = 1, 0
    if blind:
        c[0] = 0
    G = scheme.order
    if scheme.own_start and not noisy and not blind and G > 2:
        first = min(G - 2 - bool(scheme.corrector), steps)
        starting = (np.arange(steps) < first) & ~ends
        p[starting], c[starting] = -(G - 1), 0
    c[-1] = 0
    return p, c


class _Weigher:
    """Weights of the polynomial through the last nodes, for many steps at once."""

    def __init__(self, scheme: Scheme, points: Points, exact: Linear, clock: Callable[[Array], Array], name: object):
        self.scheme, self.points, self.exact, self.clock = scheme, points, exact, clock
        self.simple = scheme.simple if name == "lambda" else None
        with np.errstate(over="ignore"):
            self.u = points.t if name == "t" else clock(points.lam)

    def all(self, counts: Array, ahead: int) -> list[list[float]]:
        """Weights of every step, newest node first.

        Args:
            counts: nodes at or before the start of the step, (steps,); 0 or less for none wanted.
            ahead: 0 for the step from n to n + 1; 1 for the step from n − 1 to n, whose end is one more node.
        """
        found: list[list[float]] = [[] for _ in range(len(counts))]
        for count in np.unique(counts[counts > 0]).tolist():
            n = np.flatnonzero(counts == count)
            for i, row in zip(n.tolist(), self._some(n - ahead, count, ahead).tolist(), strict=True):
                found[i] = row
        return found

    def slopes(self, counts: Array) -> Array:
        """S_n: the line through the last two F weighs them W + S_n and −S_n; 0 for steps of one node, (steps,)."""
        return np.array([-w[1] if len(w) > 1 else 0.0 for w in self.all(np.minimum(counts, 2), 0)])

    def _some(self, n: Array, count: int, ahead: int) -> Array:
        """For the steps n → n + 1 with `count` nodes up to n and, if ahead, the node n + 1."""
        W, p = self.exact.W[n], count + ahead
        if p == 1:
            return W[:, None]
        u_s, u_t = self.u[n], self.u[n + 1]
        r = np.stack([(self.u[n + ahead - j] - u_s) / (u_t - u_s) for j in range(p)], 1)
        if p == 2 and self.simple:
            B = W
            if self.simple == "bh1":
                h, end = u_t - u_s, self.points[n + 1]
                B = end.alpha * h if self.scheme.form == "data" else -end.sigma * h
            slope = 0.5 * B / (r[:, 0] - r[:, 1])  # of (F_newer − F_older), whose r is 0 and −r₀, or 1 and 0
            return np.stack([slope, W - slope] if ahead else [W + slope, -slope], 1)
        s, t = self.points[n], self.points[n + 1]
        mu = moments(s, t, self.scheme.form, self.clock, p, self.scheme.strengths(s.lam, t.lam))
        mu[:, 0] = W
        return interpolating(mu, r)


def _start(form: Form, tableau: Tableau, process, points: Points, n: int, at: _Calls) -> list[Stage]:
    """One Runge–Kutta step in the variable without a linear part: d(x/σ)/dv = D over v = e^λ, d(x/α)/dρ = ε̂ over ρ."""
    s, t = points[n], points[n + 1]
    sign = 1.0 if form == "data" else -1.0
    v_s, v_t = np.exp(sign * s.lam), np.exp(sign * t.lam)
    inner = np.array([ci for ci in tableau.c[1:] if ci < 1.0])
    v = v_s + inner * (v_t - v_s)
    stage = Points.at(process, process.time(torch.from_numpy(sign * np.log(v)))) if inner.size else None
    stages, calls, anchor = [], [at.of_node[n]], True
    unit = (lambda q: q.sigma) if form == "data" else (lambda q: q.alpha)
    k = 0
    for ci, row in zip((*tableau.c[1:], 1.0), (*tableau.a[1:], tableau.b), strict=True):
        end = t
        if ci < 1.0:
            assert stage is not None
            end, k = stage[k], k + 1
        m = float(unit(end))
        terms = [(e, m * float(v_t - v_s) * w) for e, w in zip(calls, row, strict=True)]
        stages.append(Stage(calls[-1], m / float(unit(s)), terms, anchor=anchor))
        anchor = False
        if len(calls) < tableau.stages:
            calls.append(at.more(float(end.t)))
    return stages


def _blind(points: Points) -> bool:
    """True where the start is so noisy that x alone tells ε̂ from ε̂: the first step is then taken with D."""
    return bool(points.alpha[0] < 1e-6 * points.sigma[0])


Single = list[tuple[Points, Array, Array]]
"""For every stage its end, A (n,) and the weights (n, calls so far)."""


def singlestep_plan(form: Form, order: int, task: Task, points: Points) -> Plan:
    """Compile the singlestep methods: inner points at r₁ = ½ (order 2) or r₁, r₂ = ⅓, ⅔ (order 3) of the step in λ.

    Order 2 ends with F at r₁ alone, order 3 with the line through F at 0 and r₂, whose value at r₂ comes from the line
    through 0 and r₁.
    """
    process = task.equation.process
    assert process is not None
    steps, at = len(points) - 1, _Calls(points)
    plan: list[list[Stage]] = []
    blind = int(form == "noise" and _blind(points))
    last = steps - (not np.isfinite(points.lam[-1]))  # the step to the clean data is one call of F
    pieces: list[tuple[Form, int, slice]] = [
        ("data", order, slice(0, blind)),
        (form, order, slice(blind, last)),
        (form, 1, slice(last, steps)),
    ]
    wants: list[float] = []
    for kind, stages, part in pieces:
        if part.start >= part.stop:
            continue
        ends = _single(kind, stages, process, points[:-1][part], points[1:][part])
        for n in range(part.start, part.stop):
            i, calls, done = n - part.start, [at.node(n)], []
            for k, (end, A, weights) in enumerate(ends):
                done.append(
                    Stage(calls[-1], float(A[i]), list(zip(calls, weights[i].tolist(), strict=True)), anchor=k == 0)
                )
                if k < stages - 1:
                    calls.append(at.more(float(end.t[i])))
            plan.append(done)
        wants += [float(kind == "noise")] * (len(at.t) - len(wants))
    return compiled(task, at.t, np.array(wants), plan)


def _single(form: Form, order: int, process: Process, s: Points, t: Points) -> Single:
    fractions = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}[order]
    share = not np.isfinite(s.lam).all()
    clock = clocks(process, "share" if share else "lambda")
    exact = linear_data if form == "data" else linear_noise

    def inner(r: float) -> Points:
        u = clock(s.lam) + r * (clock(t.lam) - clock(s.lam))
        lam = np.log1p(-u) - np.log(u) if share else u
        return Points.at(process, process.time(torch.from_numpy(lam)))

    ends = [inner(r) for r in fractions] + [t]
    parts = [exact(s, end) for end in ends]
    weights = [parts[0].W[:, None]]
    if order == 2:
        weights.append(np.stack([np.zeros(len(s)), parts[1].W], 1))
    elif order == 3:
        for i, node in ((1, 0), (2, 1)):  # lines through F at 0 and at inner point `node`
            mu = moments(s, ends[i], form, clock, 2)
            second = mu[:, 1] / (fractions[node] / (*fractions, 1.0)[i])
            weights.append(np.stack([parts[i].W - second] + [np.zeros(len(s))] * (i - 1) + [second], 1))
    return [(end, part.A, w) for end, part, w in zip(ends, parts, weights, strict=True)]
