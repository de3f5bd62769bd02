"""Coefficients of one-step methods for additive noise, dz = f(u, z) du + g(u) dw.

With h = Δu, W the increment and H the space-time Lévy area of w over the step,

    z_i = z + h Σ_j a_ij f_j + Σ_k g(u + d_k h)(p_ik W + q_ik H),   f_i = f(u + c_i h, z_i),
    z⁺  = z + h Σ_i α_i f_i  + Σ_k g(u + d_k h)(v_k W + w_k H).

Rößler's I₍₁,₀₎/h is W/2 + H, so his B, β¹, β² give p = B/2, q = B, v = β¹ + β²/2, w = β².
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

Row = tuple[float, ...]


@dataclass(frozen=True)
class AdditiveTableau:
    """A method; rows of `a`, `p`, `q` are stages, columns of `p`, `q` and entries of `v`, `w` the places `d` of g."""

    name: str
    strong: float
    weak: float
    c: Row
    a: tuple[Row, ...]
    alpha: Row
    d: Row
    p: tuple[Row, ...]
    q: tuple[Row, ...]
    v: Row
    w: Row
    reference: str

    @property
    def stages(self) -> int:
        """Number of drift evaluations."""
        return len(self.c)

    @cached_property
    def _kernels(self) -> tuple[tuple[float, float], ...]:
        """(p_i, q_i) of the noise g(p_i W + q_i H) at the stages, g constant."""
        return tuple((sum(p), sum(q)) for p, q in zip(self.p, self.q, strict=True))

    @cached_property
    def reach(self) -> float:
        """Standard deviation of the noise between the first and the last stage, in units of g√h."""
        (p, q), (p_s, q_s) = self._kernels[0], self._kernels[-1]
        return math.sqrt((p_s - p) ** 2 + (q_s - q) ** 2 / 12.0)

    @cached_property
    def linear_error(self) -> float:
        """e of the RMS local error e·κ²g h^{5/2} on dz = κz du + g dw.

        The solution has κ²g∫∫w = κ²g∫½(h − s)²dw, of variance h⁵/20 and covariances h³/6 with W, h³/24 with H; the method
        Σα_i a_ij (p_j W + q_j H) h² instead.
        """
        P, Q = (
            sum(
                b * a * k[of]
                for b, row in zip(self.alpha, self.a, strict=True)
                for a, k in zip(row, self._kernels[: len(row)], strict=True)
            )
            for of in (0, 1)
        )
        return math.sqrt(1 / 20 - P / 3 - Q / 12 + P**2 + Q**2 / 12)

    @cached_property
    def noise_error(self) -> float:
        """e of the RMS local error e·g″h^{5/2} of ∫g dw.

        The kernel s²/2 less the method's Σ½d_k²(v_k + w_k(½ − s)) = V + Y(½ − s).
        """
        V = 0.5 * sum(d * d * v for d, v in zip(self.d, self.v, strict=True))
        Y = 0.5 * sum(d * d * w for d, w in zip(self.d, self.w, strict=True))
        return math.sqrt(1 / 20 - V / 3 + Y / 12 + V**2 + Y**2 / 12)

    @cached_property
    def bent_error(self) -> float:
        """e of the RMS local error e·f″g²h² on a drift that bends.

        It is ½f″g² times the standard deviation of ∫w²du − hΣα_i(p_i W + q_i H)², a quadratic form of dw: √2 times the norm of
        its kernel h − max(s, t) − hΣα_i k_i(s)k_i(t), k_i(s) = p_i + q_i(½ − s/h).
        """
        cross = sum(
            b * (p * p / 3 + p * q / 12 + q * q / 120) for b, (p, q) in zip(self.alpha, self._kernels, strict=True)
        )
        own = sum(
            b * b2 * (p * p2 + q * q2 / 12) ** 2
            for b, (p, q) in zip(self.alpha, self._kernels, strict=True)
            for b2, (p2, q2) in zip(self.alpha, self._kernels, strict=True)
        )
        return 0.5 * math.sqrt(2.0 * (1 / 6 - 2.0 * cross + own))


def _roessler(
    name: str,
    c: Row,
    a: tuple[Row, ...],
    alpha: Row,
    d: Row,
    B: tuple[Row, ...],
    beta1: Row,
    beta2: Row,
    reference: str = "Rößler 2010",
    weak: float = 2.0,
) -> AdditiveTableau:
    s = len(c)
    full = tuple((*row, *(0.0,) * (s - len(row))) for row in B)
    half = tuple(tuple(x / 2 for x in row) for row in full)
    v = tuple(x + y / 2 for x, y in zip(beta1, beta2, strict=True))
    return AdditiveTableau(name, 1.5, weak, c, a, alpha, d, half, full, v, beta2, reference)


EULER = AdditiveTableau(
    "Euler–Maruyama", 1.0, 1.0, (0.0,), ((),), (1.0,), (0.0,), ((0.0,),), ((0.0,),), (1.0,), (0.0,), "Maruyama 1955"
)
SEA = AdditiveTableau(
    "SEA", 1.0, 1.0, (0.0,), ((),), (1.0,), (0.0,), ((0.5,),), ((1.0,),), (1.0,), (0.0,),
    "Foster, dos Reis & Strange 2024, shifted Euler",
)  # fmt: skip
SRA1 = _roessler(
    "SRA1", (0.0, 3 / 4), ((), (3 / 4,)), (1 / 3, 2 / 3), (1.0, 0.0), ((), (3 / 2,)), (1.0, 0.0), (-1.0, 1.0)
)
SRA2 = _roessler(
    "SRA2", (0.0, 3 / 4), ((), (3 / 4,)), (1 / 3, 2 / 3), (1 / 3, 1.0), ((), (3 / 2,)), (0.0, 1.0), (1.5, -1.5)
)
SRA3 = _roessler(
    "SRA3",
    (0.0, 1.0, 1 / 2),
    ((), (1.0,), (1 / 4, 1 / 4)),
    (1 / 6, 1 / 6, 2 / 3),
    (1.0, 0.0, 0.0),
    ((), (0.0,), (1.0, 1 / 2)),
    (1.0, 0.0, 0.0),
    (-1.0, 1.0, 0.0),
)
SOSRA = _roessler(
    "SOSRA",
    (0.0, 0.6923962376159507, 1.0),
    ((), (0.6923962376159507,), (-3.1609142252828395, 4.1609142252828395)),
    (0.2889874966892885, 0.6859880440839937, 0.025024459226717772),
    (0.0, 0.041248171110700504, 1.0),
    ((), (1.3371632704399763,), (1.442371048468624, 1.8632741501139225)),
    (-16.792534242221663, 17.514995785380226, 0.27753845684143835),
    (0.4237535769074274, 0.6010381474428539, -1.0247917243497813),
    "Rackauckas & Nie 2020",
)
SHARK = AdditiveTableau(
    "ShARK",
    1.5,
    2.0,
    (0.0, 5 / 6),
    ((), (5 / 6,)),
    (0.4, 0.6),
    (0.0, 1.0),
    ((0.0, 0.0), (5 / 6, 0.0)),
    ((1.0, 0.0), (1.0, 0.0)),
    # ∫g dw = g₀W + (g₁ − g₀)(W/2 − H) for g linear in u
    (0.5, 0.5),
    (1.0, -1.0),
    "Foster, dos Reis & Strange 2024",
)
