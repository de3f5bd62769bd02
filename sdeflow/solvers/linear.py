"""Methods that are linear in the states and the network's outputs, compiled to scalars before the first step.

Every fixed-grid sampler here, whatever its name, alternates two things: a network call F = p·D + q·ε̂ = a x + b·output,
and a linear combination x ← A·anchor + Σ W_j F_j + s·z of an earlier state, the last few F and a normal z. A method
therefore is a list of `Stage`s with Python floats in them, computed in float64 for the whole grid; b is folded into the
W and a/b into one fused multiply-add, so that a step is the network call and a few fused operations.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.brownian import BrownianPath
from sdeflow.equations import Equation
from sdeflow.predictions import Prediction
from sdeflow.processes import as_time
from sdeflow.random import standard_normal
from sdeflow.solvers.base import FixedStep, Task

STEP_STREAM = 2
"""Random stream of the steps' normals, apart from those of priors and data."""
CHUNK_ELEMENTS = 1 << 18
"""Normals are made for several steps at once, up to this many elements."""

LOUD = 1e5
"""Loudness worth a warning. Usual grids reach 1e4, where few steps begin in noise far above the data."""


class Stage(NamedTuple):
    """F_at ← network(x), then x ← scale·anchor + Σ weight·F + noise·z_draw.

    Attributes:
        at: which evaluation of the plan (numbered in the order they happen), None for no network call.
        scale: A.
        terms: (evaluation, W) pairs.
        noise: s, 0 for none.
        draw: number of the normal z; the same number is the same normal.
        anchor: whether x (before the combination) becomes the anchor.
        look: (c, draw) pairs: the network is called at x + Σ c·z_draw, and F is what it says there.
    """

    at: int | None
    scale: float
    terms: Sequence[tuple[int, float]] = ()
    noise: float = 0.0
    draw: int = 0
    anchor: bool = True
    look: Sequence[tuple[float, int]] = ()


class Evaluations:
    """Network calls at known times: F = p·D + q·ε̂ = b·(output + ratio·x).

    Args:
        task: the solve.
        t: times of the calls, float64 (n,) on the CPU.
        p, q: what is wanted of each call, numbers or (n,).

    Attributes:
        ratio: a/b of every call.
        weight: b of every call.
        call, rows, scales: call i's output at x is call(x·scales[i], rows[i]); scales None for 1.
    """

    def __init__(self, task: Task, t: Tensor, p: float | Tensor = 1.0, q: float | Tensor = 0.0):
        predict = task.equation.predict
        assert predict is not None
        a, b = predict.linear(t, p, q)
        a, b = torch.broadcast_to(a, t.shape), torch.broadcast_to(b, t.shape)
        scale = predict.input_scale(t)
        self.ratio: list[float] = (a / b).tolist()
        self.weight: list[float] = b.tolist()
        self.scales = None if scale is None else torch.broadcast_to(scale, t.shape).tolist()
        self.rows = network_rows(predict, t, task.x)
        self.call = predict.caller(task.x)


class DriftCalls:
    """The same for a generic drift: F = drift(t_i, x)."""

    def __init__(self, equation: Equation, t: Tensor, device: torch.device):
        self.ratio = [0.0] * t.numel()
        self.weight = [1.0] * t.numel()
        self.rows, self.scales = as_time(t, device).unbind(), None
        self.call = lambda x, t: equation.drift(t, x)


def network_rows(predict: Prediction, t: Tensor, x: Tensor) -> list[Tensor]:
    """For every time of t (n,) what the network is given, (batch,): made once, without a copy a sample."""
    own = predict.network_time(as_time(t, x.device))
    if own.shape != t.shape:  # a hook that is not elementwise in t
        return [predict.network_time(as_time(s, x.device).expand(x.shape[0])) for s in t]
    if own.is_floating_point() and type(predict).call is Prediction.call:  # else the time is the process's: no rounding
        own = own.to(predict.time_dtype(x))
    return list(own[:, None].expand(-1, x.shape[0]).unbind())


class Normals:
    """Standard normals z_0, z_1, … of one solve, made a few steps at a time: z_k of a sample depends on its seed and k."""

    def __init__(self, task: Task, draws: int):
        self._seeds = task.seeds if task.seeds is not None else task.path.seeds
        self._prepare(task, draws)

    def _prepare(self, task: Task, draws: int) -> None:
        self._x, self._draws = task.x, draws
        self._ahead = 2 * max(1, min(draws, CHUNK_ELEMENTS // task.x.numel()) // 2)
        self._held: dict[int, Sequence[Tensor]] = {}

    def __call__(self, k: int) -> Tensor:
        """z_k, shape and dtype of the state."""
        block, place = divmod(k, self._ahead)
        if block not in self._held:
            if len(self._held) > 1:  # two are kept, for steps that look back at the draw before theirs
                self._held.pop(min(self._held))
            first = block * self._ahead
            self._held[block] = self._make(first, min(self._ahead, self._draws - first))
        return self._held[block][place]

    def _make(self, first: int, n: int) -> Sequence[Tensor]:
        x, seeds = self._x, self._seeds
        index = torch.arange(first, first + n, dtype=torch.int64, device=seeds.device).repeat_interleave(x.shape[0])
        z = standard_normal(
            seeds.repeat(n), x.shape[1:], index=index, stream=STEP_STREAM, dtype=x.dtype, device=x.device
        )
        return z.reshape(n, *x.shape).unbind()


class PathNormals(Normals):
    """z_k = (M(τ_{k+1}) − M(τ_k))/√|τ_{k+1} − τ_k|: the normals of a Brownian path M on a clock τ.

    Solvers with one seed and one clock then see one path, however they step.

    Args:
        areas: two normals an interval, z_2k as above and z_{2k+1} = √12 H_k/√|τ_{k+1} − τ_k| of its space-time Lévy area.
    """

    def __init__(self, task: Task, tau: Tensor, areas: bool = False):
        self._tau, self._areas = tau, areas
        self._path = task.path
        if task.path is None:
            assert task.seeds is not None
            self._path = BrownianPath(
                task.seeds, task.x.shape[1:], torch.promote_types(task.x.dtype, torch.float32), task.x.device
            )
        self._unit = tau.diff().abs().rsqrt().tolist()
        self._prepare(task, (tau.numel() - 1) * (1 + areas))

    def _make(self, first: int, n: int) -> Sequence[Tensor]:
        if self._areas:
            first, n = first // 2, n // 2
        W, H = self._path.increments(self._tau[first : first + n + 1])
        dtype, made = self._x.dtype, []
        for w, area, unit in zip(W, H, self._unit[first:], strict=False):
            made.append((w * unit).to(dtype))
            if self._areas:
                made.append((area * (unit * math.sqrt(12.0))).to(dtype))
        return made


Folded = tuple["int | None", float, Sequence[tuple[int, float]], float, int, bool, Sequence[tuple[float, int]]]
"""A stage whose (evaluation, W) are (place in memory counted from the newest, W·b)."""


class Plan:
    """A compiled solve.

    Args:
        calls: the network calls.
        steps: the stages of every step.
        normals: z_k, None when nothing is drawn.
    """

    def __init__(
        self,
        calls: Evaluations | DriftCalls,
        steps: Sequence[Sequence[Stage]],
        normals: Callable[[int], Tensor] | None = None,
    ):
        self.calls, self.normals, self.ratio = calls, normals, calls.ratio
        self.anchor: Tensor | None = None
        self.steps, longest = self._fold(steps)
        self.memory: deque[Tensor] = deque(maxlen=longest)

    @classmethod
    def one_step(
        cls,
        calls: Evaluations | DriftCalls,
        A: np.ndarray,
        W: np.ndarray,
        noise: np.ndarray | None,
        normals: Normals | None,
    ) -> Plan:
        """x ← A_n x + W_n F_n + noise_n z_n: the folding of all steps at once."""
        plan = cls(calls, (), normals)
        b = W * calls.weight
        scale, plan.ratio = (A + b * calls.ratio).tolist(), [0.0] * len(A)
        s = [0.0] * len(A) if noise is None else noise.tolist()
        plan.steps = [
            [(n, a, ((-1, w),), z, n, True, ())] for n, (a, w, z) in enumerate(zip(scale, b.tolist(), s, strict=True))
        ]
        return plan

    @property
    def loudness(self) -> float:
        """Largest Σ|W_j| / |ΣW_j| of a stage: how much louder than F itself errors of F come out."""
        loudest = 1.0
        for _, _, terms, *_ in (stage for stages in self.steps for stage in stages):
            if len(terms) > 1:
                loudest = max(loudest, sum(abs(w) for _, w in terms) / max(abs(sum(w for _, w in terms)), 1e-300))
        return loudest

    def _fold(self, steps: Sequence[Sequence[Stage]]) -> tuple[list[list[Folded]], int]:
        # an F used once, at once and beside its own x, as in every one-step method, gives its share of x to the scale
        weight, ratio, newest, longest = self.calls.weight, self.ratio, -1, 1
        folded: list[list[Folded]] = []
        uses = [0] * len(weight)
        for stages in steps:
            for stage in stages:
                for i, _ in stage.terms:
                    uses[i] += 1
        for stages in steps:
            done: list[Folded] = []
            for at, scale, terms, noise, draw, anchor, look in stages:
                if at is not None:
                    newest = at
                places = []
                for i, w in terms:
                    if w != 0.0:
                        places.append((i - newest - 1, w * weight[i]))
                        longest = max(longest, newest + 1 - i)
                if at is not None and anchor and not look and uses[at] == 1 and places and places[0][0] == -1:
                    scale += places[0][1] * ratio[at]
                    ratio[at] = 0.0
                done.append((at, scale, places, noise, draw, anchor, look))
            folded.append(done)
        return folded, longest


class LinearMethod(FixedStep):
    """A method compiled to a `Plan`."""

    @abstractmethod
    def plan(self, task: Task, times: Tensor) -> Plan:
        """Compile the solve over the nodes `times` (float64, CPU)."""

    def init(self, task: Task, times: Tensor) -> Plan:
        plan = self.plan(task, times)
        if plan.loudness > LOUD:
            warnings.warn(
                f"{self.facts.name} weighs earlier outputs of the network against each other {plan.loudness:.0e} times as much as they count, "
                "because nodes or output times lie very close together: expect large errors. Take them further apart, or a one-step "
                "method such as sf.EDMHeun or sf.RungeKutta",
                stacklevel=4,
            )
        return plan

    def total(self, state: Plan, times: Tensor) -> int:
        return len(state.steps)

    def step(self, task: Task, state: Plan, n: int, x: Tensor) -> tuple[Tensor, Plan]:
        memory, calls, ratios = state.memory, state.calls, state.ratio
        for at, scale, terms, noise, draw, anchor, look in state.steps[n]:
            if anchor:
                state.anchor = x
            for c, k in look:
                x = x.add(state.normals(k), alpha=c)  # type: ignore[misc]
            if at is not None:
                output = calls.call(x if calls.scales is None else x * calls.scales[at], calls.rows[at])
                ratio = ratios[at]
                if ratio:
                    output = torch.add(output, x, alpha=ratio)
                elif memory.maxlen != 1:  # a network may write its next output where it wrote this one
                    output = output.clone()
                memory.append(output)
            x = state.anchor * scale  # type: ignore[operator]  # the first stage of a solve sets the anchor
            for place, weight in terms:
                x.add_(memory[place], alpha=weight)
            if noise:
                x.add_(state.normals(draw), alpha=noise)  # type: ignore[misc]
        return x, state
