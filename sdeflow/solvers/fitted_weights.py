"""Extrapolations of an exponential multistep method fitted to the law: exact variances for Gaussian data of every scale.

Along the reverse SDE of η = 1 D is a martingale: the best guess of the next D is the last one, and what extrapolation adds to it is not knowledge but
a stand-in for the change to come, of the same law. How much of it belongs there is a question of the variance at the end. On data
N(0, s²) the method is linear,

    D_n = c_n x̃_n,   c = α s²/(α²s² + σ²),   x_{n+1} = A_n x_n + Σ_j w_{nj} D_{n−j} + δ_n S_n (D_n − D_{n−1}) + noise,

with S_n the weight of the slope through the last two D, so the variance at the end V(s; δ) is a sum of squares of responses, exact and cheap, and

    ∂V/∂δ_n = 2 S_n G_n Σ_k R_k (D_n − D_{n−1})_k

with R_k the responses at the end to the start and to every normal, and G_n that to an impulse in the predicted x_{n+1}. The δ_n minimise
Σ_s (V(s; δ)/V(s) − 1)² + μ² Σ_n (δ_n − δ̄)² over scales s even in ln s, by Gauss–Newton. Between the scales an axis of scale s is the same
function of λ + ln s, so one δ̄, a function of the step alone, is right for all of them; the others take care of the ends.
On the flow V is the square of what the start is multiplied by, and the same fit makes that right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Array = np.ndarray
Looks = tuple[tuple[tuple[float, int], ...], ...]
Rows = tuple[tuple[float, ...], ...]

STIFF = 0.03
"""μ: what a δ_n of its own has to gain."""
FINE = 3.0
"""Scales from this many times `low`: closer to it steps are too long for any δ, and asking for it there would cost the others."""
DENSITY = 4.0
"""Scales per unit of ln s."""
ROUNDS = 12
"""Gauss–Newton steps at most; three to six are what it takes."""


@dataclass(frozen=True)
class Linearised:
    """A multistep plan as scalars, hashable.

    Attributes:
        alpha, sigma: at the nodes, (steps + 1).
        A, noise: x ← A x + … + noise z.
        predict, correct: weights of the last D, newest first; `correct[n]` of the step n − 1 → n, empty for none.
        slope: S_n, 0 where a step is not to be touched.
        looks: (c, draw) pairs of every call.
        draws: normals a step, 0 on the flow.
    """

    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    A: tuple[float, ...]
    noise: tuple[float, ...]
    predict: Rows
    correct: Rows
    slope: tuple[float, ...]
    looks: Looks
    draws: int

    def variance(self, scales: Array, delta: Array) -> tuple[Array, Array]:
        """V/V_exact − 1 at the end, (scales,), and its derivatives by δ, (scales, steps)."""
        N, s2 = len(self.A), scales**2
        alpha, sigma = np.array(self.alpha)[:, None], np.array(self.sigma)[:, None]
        total = alpha**2 * s2 + sigma**2
        c = alpha * s2 / np.where(total > 0.0, total, 1.0)
        first = 1 + self.draws * N  # rows: the start, the normals, an impulse in every predicted state
        x = np.zeros((first + N, len(scales)))
        x[0] = np.sqrt(total[0])
        F: list[Array] = []
        changes, anchor = np.zeros((N, first, len(scales))), x
        for n in range(N):
            asked = x
            if self.looks[n]:
                asked = x.copy()
                for v, k in self.looks[n]:
                    asked[1 + k] += v
            F.append(c[n] * asked)
            if self.correct[n]:
                x = anchor * self.A[n - 1]
                for j, w in enumerate(self.correct[n]):
                    x += w * F[n - j]
                if self.draws:
                    x[1 + self.draws * (n - 1)] += self.noise[n - 1]
            anchor = x
            x = x * self.A[n]
            for j, w in enumerate(self.predict[n]):
                x += w * F[n - j]
            if self.slope[n]:
                change = self.slope[n] * (F[n] - F[n - 1])
                x += delta[n] * change
                changes[n] = change[:first]
            if self.draws:
                x[1 + self.draws * n] += self.noise[n]
            x[first + n] += 1.0
        # the last step to the clean data is D itself, whose variance is what the exact law leaves of s²
        exact = total[-1] if self.sigma[-1] > 0.0 else c[-2] ** 2 * total[-2]
        R, G = x[:first], x[first:]
        J = 2.0 * G * np.einsum("kj,nkj->nj", R, changes) / exact
        return (R**2).sum(0) / exact - 1.0, J.T

    def fitted(self, low: float, high: float) -> Array:
        """The δ for data of scales between `low` and `high`, (steps,)."""
        return np.array(_fitted(self, low, high))


def _even(first: float, last: float) -> Array:
    return np.linspace(first, last, max(2, math.ceil(DENSITY * (last - first))))


@lru_cache(maxsize=64)
def _fitted(method: Linearised, low: float, high: float) -> tuple[float, ...]:
    scales = np.exp(_even(math.log(min(FINE * low, 0.5 * high)), math.log(high)))
    free = np.flatnonzero(method.slope)
    delta = np.zeros(len(method.A))
    if not len(free):
        return tuple(delta)
    spread = STIFF * (np.eye(len(free)) - 1.0 / len(free))

    def measured(delta: Array) -> tuple[Array, Array, float]:
        error, J = method.variance(scales, delta)
        residual = np.append(error, spread @ delta[free])
        return residual, np.concatenate([J[:, free], spread]), float(residual @ residual)

    residual, J, size = measured(delta)
    for _ in range(ROUNDS):
        step, gained = np.linalg.lstsq(J, -residual, rcond=1e-10)[0], False
        for _ in range(8):  # V is of higher degree in δ: too long a step is halved
            trial = delta.copy()
            trial[free] += step
            found = measured(trial)
            if found[2] < size:
                gained = found[2] < (1.0 - 1e-4) * size
                delta, (residual, J, size) = trial, found
                break
            step = 0.5 * step
        if not gained:
            break
    return tuple(delta.tolist())
