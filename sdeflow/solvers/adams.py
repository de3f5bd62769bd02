"""Variable-step, variable-order Adams, per sample: the adaptive solver for probability-flow ODEs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from sdeflow.charts import Chart
from sdeflow.errors import InvalidInput
from sdeflow.solvers import global_error
from sdeflow.solvers.base import Facts, Outcome, Solver, Task, bmm
from sdeflow.solvers.control import Attempt, Flow, News, Stepper, Trace, check_tolerances, drive, rms
from sdeflow.solvers.stochastic_adams_stepper import Control, check_control, integrate_noisy

MAX_ORDER = 12
SAFETY = 0.55
LESS = SAFETY**-3
"""Accepted steps aim at an error of SAFETY^{k+1}; the first step is held to that too, as no estimate checks it afterwards."""
FALL = 0.4
"""Least ratio of the error of order k + 1 to that of order k that is believed before it has been seen. The orders of one step fall faster
than those of the next: with 0.1 the fourth step made ten times the error of any later one."""
MANY = 100
"""Tries after which low order means that f is rough."""
FAR = 8.0
"""Ratio of the data's scale to the chart's beyond which errors are not those of the tolerance any more: at 8 their median is 2 to 4 times it, at
16 7 to 25 times, at 1/32 1.3 to 5 times (`benchmarks/tolerance.py`)."""
COARSER = 2.5
"""Ratio of the tolerances of the two solves of an error estimate: the second costs 0.7 to 0.95 of the first. Larger ratios lose
samples that only the looser solve sends to another mode."""
GROW, START, KEEP, SHRINK = 2.0, 3.0, 0.5, 0.3
"""Bounds on the step's change: at most GROW (START while the order still rises at
every step) and at least KEEP after an accepted step, at least SHRINK after a rejected one."""


@dataclass(frozen=True)
class Adams(Solver):
    """Adams–Bashforth–Moulton of order 1 to `max_order`, steps and order chosen for every sample by itself.

    In a chart's (u, z), dz/du = f. With P_k the polynomial through f at the last k nodes and u⁺ = u + h the new node,

        predict   z* = z + ∫P_k,          evaluate   f* = f(u⁺, z*),
        correct   z⁺ = z* + γ_k r_k,      r_k = f* − P_k(u⁺),    γ_k = ∫N_k / N_k(u⁺),   N_k(u) = Π_{i<k}(u − u_i),

    which is the Adams–Moulton formula of order k + 1: one evaluation a step (`pece=True`: a second one, at z⁺, for the
    history). Its difference to the formula of order k, η_k r_k, is the error estimate, and η_{k∓1} r_{k∓1} tell what
    the neighbouring orders would have made. The state is carried on at the higher order, so the error at the end comes
    out proportional to the tolerance.

    Args:
        rtol, atol: the error at the end aimed at, atol + rtol·|x| (RMS over a sample's elements, RMS over samples).
        max_order: highest k, 1 to 12.
        max_steps: tries of a step, accepted or not, before a sample stops with status MAX_STEPS.
        chart: None for `sf.chart_for` of the network on diffusion equations and t on any other ODE.
        coupled: one step size and order for the whole batch, by its largest error: for networks that take one scalar t.
        dense: keep the steps for `solution.at(t)`, by the corrector's own polynomial.
        error_estimate: solve a second time, 2.5 times more loosely, and report the difference over 1.5 as each sample's
            estimated error. Evaluations of both are counted.
        pece: evaluate again after correcting. Costs twice and, on the problems measured, gains less.
        control: on a `ReverseSDE` with η > 0, which error the tolerance is of: "weak", of the law, or "strong", of the path; see
            `StochasticAdamsStepper`; "strong" is of order 1, so below 1e-2 take `sf.ExponentialShARK`. There the chart is trigonometric, the
            order at most 3, and dense, error_estimate, global_error and pece are not to be had.
        global_error: solve every sample more and more tightly until two solves agree all along its path, so that no sample is
            lost to another mode: RMSE at the end 0.08 to 2.4 times the tolerance on problems where a plain solve has up to 95,
            for 2.0 to 6.5 times its evaluations. Brings an error estimate; keeps all steps meanwhile. Status NOT_CONVERGED where
            solves do not come to agree. See `sdeflow.solvers.global_error`.

    Reference: Krogh 1969; Shampine & Gordon 1975. Weights are those of Lagrange's polynomials on every sample's own
    nodes, integrated by Gauss quadrature, exact for them.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    max_order: int = 10
    max_steps: int = 10_000
    chart: Chart | None = None
    coupled: bool = False
    pece: bool = False
    dense: bool = False
    error_estimate: bool = False
    control: Control = "weak"
    global_error: bool = False

    def __post_init__(self) -> None:
        check_tolerances("Adams", self.rtol, self.atol, self.max_steps)
        if not isinstance(self.max_order, int) or not 1 <= self.max_order <= MAX_ORDER:
            raise InvalidInput(f"max_order must be an integer from 1 to {MAX_ORDER}; got {self.max_order!r}")
        check_control(self.control)

    @property
    def facts(self) -> Facts:
        return Facts(
            name="Adams",
            order=None,
            strong=None,
            weak=None,
            evaluations=None,
            adaptive=True,
            noise=("none", "additive"),
            face="drift",
            reference="Shampine & Gordon 1975",
        )

    def integrate(self, task: Task) -> Outcome:
        if task.equation.stochastic:
            return integrate_noisy(self, task)
        if self.global_error:
            outcome = global_error.integrate(self, task)
        else:
            outcome = self.once(task)
            if self.error_estimate:
                outcome.error_estimate = self._compare(task, outcome)
        if self.chart is None:
            _warn_of_scale(Flow.of(task, None), outcome)
        return outcome

    def once(self, task: Task, looser: float = 1.0, dense: bool = False) -> Outcome:
        """One plain solve of a flow, with tolerances so many times as large; `dense` keeps its steps anyway."""
        flow = Flow.of(task, self.chart, one_time=self.coupled)
        stepper = AdamsStepper(flow, self.max_order, self.pece, self.coupled, task.gradients)
        rtol, atol = looser * self.rtol, looser * self.atol
        return drive(flow, task, stepper, rtol, atol, self.max_steps, self.coupled, self.dense or dense)

    def _compare(self, task: Task, outcome: Outcome) -> Tensor:
        """The end's error, (batch,), from a second, looser solve: errors are proportional to tolerances.

        With tolerances COARSER times as large an error of the same sign is COARSER times as large, and the two ends
        differ by COARSER − 1 errors of the better one.
        """
        other = self.once(replace(task, save_at=None, progress=None), COARSER)
        gap = rms((other.x - outcome.x).detach().flatten(1)) / (COARSER - 1.0)
        return torch.where((outcome.status == 0) & (other.status == 0), gap, torch.nan)


def _warn_of_scale(flow: Flow, outcome: Outcome) -> None:
    """Say so where the samples' scale is far from that of the chart nobody chose."""
    some = slice(None, 256)  # enough to know the scale by
    x = outcome.x[some].detach()[outcome.status[some] == 0].flatten(1).double()
    if flow.chart is None or len(x) < 8:
        return
    scale, rho = x.var(0).mean().sqrt().item(), flow.chart.process.rho(torch.tensor(flow.stop)).item()
    if rho < 0.1 * scale and not 1.0 / FAR < scale / flow.scale < FAR:
        warnings.warn(
            f"the samples' scale is {scale:.2g}, that of the default chart {flow.scale:g}: errors may be many times the "
            f"tolerance. Write chart=sf.{type(flow.chart.chart).__name__}(c={scale:.2g}), or c=sf.data_scale(equation, pilot)",
            stacklevel=4,
        )


@lru_cache(maxsize=32)
def gauss(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre nodes and weights on [0, 1], exact to degree 2·points − 1."""
    x, w = np.polynomial.legendre.leggauss(points)
    return 0.5 * (x + 1.0), 0.5 * w


def products(s: Tensor, used: Tensor) -> Tensor:
    """C_j = Π_{i≠j}(s_j − s_i) over the nodes i in use (1.0, others 0.0), (R, n), for all j, of nodes s (R, n)."""
    gap = s[:, None] - s
    gap.diagonal().fill_(1.0)
    return torch.addcmul(1.0 - used, gap, used).prod(1)


def weights(s: Tensor, age: Tensor, near: Tensor, oldest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Everything a step needs from its nodes, in units of the step: the new node is 1, the present one 0, all others < 0.

    Lagrange's form: with N(v) = Π(v − s_i) the integrand of node j is N(v) / ((v − s_j) C_j), and no Gauss point v in (0, 1)
    meets a node.

    Args:
        s: (R, n), the nodes in any order.
        age: (R, n), 0 for the newest node, 1 for the one before, …
        near: (3, n), k − 1, k, k + 1 for orders k ≥ 1.
        oldest: (3, n), s of ages k − 2, k − 1, k (the first is not used where k = 1).

    Returns:
        rows (4, R, n): weights on the values f of ∫P_k, P_{k−1}(1), P_k(1), P_{k+1}(1) (P_0 = 0);
        gamma (n,): γ_k; eta (3, n): η_{k−1}, η_k, η_{k+1} with η_m = ∫(v − 1)N_{m−1} / N_m(1), η_0 = 0.
    """
    k = near[1]
    v, rule = _rule(s.shape[0] // 2 + 1, s.dtype, s.device)
    used = (age < k).to(s.dtype)  # a float, as a product with it is much faster than torch.where
    E = v - s  # (Q + 1, R, n), the last point being 1
    N = torch.addcmul(1.0 - used, E, used).prod(1)
    ends = v - oldest
    N1 = N / ends[:, 1]
    # where k = 1, N_{−1} is anything: its weight is η_0
    stack = torch.stack([N1 / ends[:, 0], N1, N], 1)
    area, lean = (rule @ stack.flatten(1)).reshape(2, 3, -1)
    top = torch.stack([N1[-1], N[-1], N[-1] * ends[-1, 2]])
    C = products(s, used)
    rows = s.new_empty(4, *s.shape)
    torch.div(((rule[0, :, None] * N)[:, None] / E).sum(0), C, out=rows[0])
    share = used / (E[-1] * C)
    rows[0] *= used
    torch.mul(share, top[1], out=rows[2])
    torch.mul(share, (s - oldest[1]) * top[0], out=rows[1])
    # the node k + 1 back joins the others here, and its own factor is not among those of its product
    last = (age == k).to(s.dtype)
    share += last / (E[-1] * C)
    torch.div(share * top[2], s - oldest[2] + last, out=rows[3])
    eta = lean / top
    return rows, area[2] / top[1], torch.where(near > 0, eta, 0.0)


@lru_cache(maxsize=64)
def _rule(points: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gauss points and the point 1, (Q + 1, 1, 1), with the weights of ∫₀¹· and ∫₀¹(v − 1)·, (2, Q + 1)."""
    nodes, w = gauss(points)
    v, w = np.append(nodes, 1.0), np.append(w, 0.0)
    return tuple(
        torch.as_tensor(a, dtype=dtype, device=device) for a in (v[:, None, None], np.stack([w, w * (v - 1.0)]))
    )  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _arange(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device)


@lru_cache(maxsize=8)
def _around(device: torch.device) -> Tensor:
    return torch.arange(-1, 2, device=device)[:, None]


def _wrap(index: Tensor, n: int) -> Tensor:
    """index mod n for −n ≤ index < n, in place: integer division is slow."""
    return index.add_((index < 0) * n)


class AdamsStepper(Stepper):
    """The history of every sample, as a ring of slots, and the choice of order."""

    stretch = 1.2
    """Steps aim at SAFETY^{k+1} of the allowed error, so that one a fifth longer to land is still at (1.2·SAFETY)^{k+1} of it."""

    def __init__(self, flow: Flow, max_order: int, pece: bool, coupled: bool, gradients: bool):
        self.flow, self.max_order, self.pece, self.coupled, self.gradients = flow, max_order, pece, coupled, gradients

    def begin(self, u: Tensor, z: Tensor, f: Tensor) -> None:
        """See `Stepper`."""
        n, d = z.shape
        start, stop = (self.flow.u(t).to(u) for t in (self.flow.start, self.flow.stop))
        # places of slots never filled: behind the start, each its own, so that nothing is divided by 0
        self.nowhere = 2.0 * start - stop, start - stop
        self.U = u.new_empty(0, n)
        self.F = z.new_empty(n, 0, d)
        self.head = torch.zeros(n, dtype=torch.int64, device=u.device)
        self._widen(4)
        self.U[0] = u
        self.F = self._put(self.F, self.head, f)
        self.count = torch.ones_like(self.head)
        self.k = torch.ones_like(self.head)
        self.young = torch.ones_like(self.head, dtype=torch.bool)
        self.starting = True
        self.noisy = self.refused = False
        self.noise, self.tries = torch.zeros_like(u), torch.zeros_like(self.head)
        self.last_error, self.last_step = torch.zeros_like(u), torch.ones_like(u)
        self.top, self.turns = 1, 0

    def _put(self, F: Tensor, slot: Tensor, f: Tensor) -> Tensor:
        if self.gradients:
            return F.index_put((_arange(F.shape[0], F.device), slot), f)
        F.view(-1, F.shape[2]).index_copy_(0, slot + self.offsets, f)
        return F

    def _widen(self, slots: int) -> None:
        """More slots, the newest node's being the last of the old ones."""
        old, n = self.U.shape
        order = (self.head + 1 + _arange(old, self.head.device)[:, None]).remainder(max(old, 1))  # oldest first
        first, span = self.nowhere
        far = first + span * torch.arange(old, slots, dtype=self.U.dtype, device=self.U.device)
        self.U = torch.cat([self.U.gather(0, order), far[:, None].expand(-1, n)])
        F = self.F.gather(1, order.T[:, :, None].expand(-1, -1, self.F.shape[2]))
        self.F = torch.nn.functional.pad(F, (0, 0, 0, slots - old))
        self.head = torch.full_like(self.head, max(old - 1, 0))
        self._number()

    def _number(self) -> None:
        """Where every sample's slots are in the flattened F."""
        n, slots, _ = self.F.shape
        self.offsets = torch.arange(0, n * slots, slots, device=self.F.device)
        self.bag = None

    def _sums(self, rows: Tensor) -> Tensor:
        """Σ_j rows_mj f_j, (n, 4, d), of rows (4, R, n)."""
        w = rows.permute(2, 0, 1).to(self.F.dtype).contiguous()
        if self.gradients or self.F.device.type != "cpu":
            return bmm(w, self.F)
        # on a processor the same sums cost a third to a half of bmm's time
        n, m, slots = w.shape
        if self.bag is None:
            index = (self.offsets[:, None, None] + _arange(slots, w.device)).expand(n, m, slots).reshape(-1)
            self.bag = index, torch.arange(0, n * m * slots, slots)
        index, starts = self.bag
        flat = torch.nn.functional.embedding_bag(
            index, self.F.view(n * slots, -1), starts, mode="sum", per_sample_weights=w.view(-1)
        )
        return flat.view(n, m, -1)

    def _weights(self, *nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`weights` of all samples."""
        if self.coupled:  # one clock and one order between all
            rows, gamma, eta = weights(*(v[:, :1] for v in nodes))
            return rows.expand(-1, -1, nodes[0].shape[1]), gamma, eta
        return weights(*nodes)

    def attempt(self, u: Tensor, z: Tensor, step: Tensor, end: Tensor, allowed: Tensor) -> Attempt:
        """See `Stepper`."""
        K = min(self.top + 2, self.max_order + 1)
        if self.U.shape[0] < K + 1:  # one slot is spare, for the evaluation under way
            self._widen(min(K + 1, self.max_order + 1) + 1)
        slots = self.U.shape[0]
        age = _wrap(self.head - _arange(slots, u.device)[:, None], slots)
        near = self.k + _around(u.device)
        s = (self.U - u).div_(step)
        oldest = s.gather(0, _wrap(self.head + 1 - near.clamp_min(1), slots))
        rows, gamma, eta = self._weights(s, age, near, oldest)
        Y = self._sums(rows)
        z_star = torch.addcmul(z, Y[:, 0], step.to(z.dtype)[:, None])
        f = self.flow.rhs(end, z_star)
        slope = rms(Y[:, 2].detach()) if self.starting and not self.flow.natural else None
        # in place saves memory that would be new, and so slow, at every step
        r = f[:, None] - Y[:, 1:] if self.gradients else Y[:, 1:].sub_(f[:, None]).neg_()
        z_new = torch.addcmul(z_star, r[:, 1], (step * gamma).to(z.dtype)[:, None])
        size = rms(r.detach()).T
        if self.noisy:
            size = self._without_noise(size, rows)
        error = size * (eta * (step / allowed)).abs_()
        self.residual, self.gain, self.error, self.step = size[1], rows[2], error[1], step
        self.end, self.f, self.z_new = end, f, z_new
        if self.starting:
            # η₁r₁ measures Euler's error ½h²z″. The step ends with the trapezoidal rule, whose error is smaller by
            # h z‴/6z″: ½h in a chart (see `first_step`), unknown elsewhere and taken as |f* − f|/|f|
            less = LESS * step.abs() if slope is None else rms(r[:, 1].detach()) / slope.clamp_min(1e-300)
            error = torch.where(self.count == 1, error * less.clamp_max(1.0), error)
        return self._judge(z_new, error, near)

    def _judge(self, z: Tensor, error: Tensor, near: Tensor) -> Attempt:
        """Choose the order that allows the largest step; error (3, n) is that of k − 1, k, k + 1 over the allowed."""
        k = self.k
        broken = None
        if self.coupled:
            broken = ~(error[1] < math.inf)
            error = torch.where(broken, 0.0, error).amax(1, keepdim=True).expand_as(error)
        possible = (near >= 1) & (near <= self.count.clamp_max(self.max_order))
        power = near + 1.0
        if self.starting:
            # while every step has raised the order nothing is known of k + 1: errors are taken to fall as they did, and after
            # the first step, whose error is that of the trapezoidal rule times 12 (in a chart) or 6, see `attempt`, by just that
            young = self.young & (error[1] <= 1.0) & (k == self.count) & (k < self.max_order)
            seen = (error[1] / error[0]).clamp(FALL, 1.0)
            fall = torch.where(k == 1, 1.0 / 12.0 if self.flow.natural else 1.0 / 6.0, seen)
            guess = torch.where(young, error[1] * fall, error[2])
            error = torch.stack([error[0], error[1], guess])
            possible = possible | (young & (near == k + 1))
            possible = possible & ~(young & (k == 1) & (near == 1))
            power = torch.where(self.young, power.clamp_min(3.0), power)
        factor = error.clamp_min(1e-30).pow_(power.reciprocal_().neg_()).mul_(SAFETY)
        # the order rises after accepted steps alone
        possible[2] &= error[1] <= 1.0
        best, which = torch.where(possible, factor, 0.0).max(0)
        self.next = torch.where(best > 0, which.add_(k).sub_(1), k)
        grow = torch.where(self.young, START, GROW) if self.starting else GROW
        if broken is not None:
            self.next = torch.where(broken.any(), k, self.next)
            error = torch.where(broken, math.nan, error)
        return Attempt(z, error[1], best.clamp_min(KEEP).clamp_max(grow), best.clamp(SHRINK, 0.9))

    def commit(self, ok: Tensor) -> News:
        """See `Stepper`."""
        f = self.f
        if self.pece:
            f = self.flow.rhs(self.end, self.z_new)
        ring = self.U.shape[0]
        head = _wrap(self.head + (1 - ring), ring)
        # a rejected evaluation goes to the spare slot too, where nothing weighs on it
        self.U.scatter_(0, head[None], torch.where(ok, self.end, self.nowhere[0] + 50.0 * self.nowhere[1])[None])
        self.F = self._put(self.F, head, f)
        self.spare = head
        self.head = torch.where(ok, head, self.head)
        self.count = torch.where(ok, (self.count + 1).clamp_max_(ring - 1), self.count)
        self.k = self.next
        if self.starting:
            # a first step tried again is still a first step
            self.young = self.young & (self.k == self.count) & (ok | (self.count == 1))
        self.turns += 1
        news = torch.stack([self.k.amax(), self.young.any(), ~ok.all(), ~(self.error < math.inf).all()])
        return news, partial(self._heed, ok, f)

    def _heed(self, ok: Tensor, f: Tensor, news: list[int]) -> None:
        top, starting, refused, broken = news
        if broken:  # 0·NaN is NaN
            self.F = self._put(self.F, self.spare, torch.where(ok[:, None], f, 0.0))
        self.top, self.starting = top, bool(starting)
        if refused or self.refused or self.turns >= MANY:
            self._suspect(ok)
        self.refused = bool(refused)

    def _suspect(self, ok: Tensor) -> None:
        """Look for noise in f where steps are refused again and again.

        Truncation errors fall at least as h², an error made by noise of size δ in f as h. Where the third refusal in a row
        or a later one finds the latter, δ is what the residual says: |r_k|² = δ²(1 + Σℓ²), ℓ the weights of P_k(u⁺). So it is
        where after MANY steps the order is still ≤ 2: on steps that small a smooth f would let it rise.
        """
        slow = self.error > self.last_error * (self.step / self.last_step).abs() ** 1.5
        noise = 0.8 * self.residual / (1.0 + self.gain.square().sum(0)).sqrt()
        found = ~ok & (self.tries >= 2) & slow
        if self.turns >= MANY and self.max_order > 2:
            found = found | (self.k <= 2)
        found = found & noise.isfinite()
        self.noise = torch.where(found, torch.maximum(self.noise, noise), self.noise)
        self.tries = torch.where(ok, 0, self.tries + 1)
        self.last_error, self.last_step = self.error, self.step
        self.noisy = self.noisy or bool(found.any())

    def _without_noise(self, size: Tensor, rows: Tensor) -> Tensor:
        """The residuals (3, n) less what the noise found explains, twice over: chasing it would shrink steps for ever.

        A residual below the noise says that the noise is smaller (it was a jump, or it has ended).
        """
        gain = (1.0 + rows[1:].square().sum(1)).sqrt()
        self.noise = self.noise.minimum(2.0 * size[1] / gain[1])
        return (size.square() - (2.0 * self.noise * gain).square()).clamp_min(0.0).sqrt().maximum(0.01 * size)

    def keep(self, rows: Tensor) -> None:
        """See `Stepper`."""
        self.U, self.F = self.U[:, rows], self.F[rows]
        for name in ("head", "count", "k", "young", "noise", "tries", "last_error", "last_step"):
            setattr(self, name, getattr(self, name)[rows])
        self._number()

    def payload(self) -> tuple[Tensor, ...]:
        """See `Stepper`: the new value of f, the order, and f at the start (which only first steps need)."""
        rows = torch.arange(len(self.k), device=self.k.device)
        return self.f, self.k, self.F[rows, self.head]

    def interpolate(self, trace: Trace, piece: Tensor, u: Tensor) -> Tensor:
        """See `Stepper`: z(u) = z_n + ∫ of the polynomial through f at n + 1, n, …, n − k + 1.

        Piece j of a sample ends at its node j + 1, so the nodes behind it are the ends of the pieces before it, and the
        start of its first piece.
        """
        f, order, f_start = trace.payload
        first, k = trace.first[piece], order[piece]
        K = int(k.max()) + 1
        back = torch.arange(K, device=u.device)
        index = piece[:, None] - back
        inside = index >= first[:, None]
        index = torch.where(inside, index, first[:, None])
        nodes = torch.where(inside, trace.end[index], trace.start[index])
        values = torch.where(inside[:, :, None], f[index], f_start[index])
        start, h = trace.start[piece], (trace.end - trace.start)[piece]
        # in units of the step, from its start
        s = ((nodes - start[:, None]) / h[:, None]).T
        used = (back <= k[:, None]).T.to(u.dtype)
        v, rule = _rule(K // 2 + 1, s.dtype, s.device)
        share = ((u - start) / h).clamp(1e-200, 1.0)
        E = v * share - s
        E[-1] = 1.0  # the last point has no weight here, and may be a node
        N = torch.addcmul(1.0 - used, E, used).prod(1)
        w = share * (rule[0, :, None, None] * (N[:, None] / E)).sum(0) / products(s, used)
        w = torch.where(used > 0, w, 0.0).T
        return trace.z[piece] + bmm((w * h[:, None]).to(values.dtype)[:, None], values)[:, 0]
