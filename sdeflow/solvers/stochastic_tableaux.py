"""Coefficients of one-step methods for additive noise, dz = f(u, z) du + g(u) dw.

With h = Δu, W the increment and H the space-time Lévy area of w over the step,

    z_i = z + h Σ_j a_ij f_j + Σ_k g(u + d_k h)(p_ik W + q_ik H),   f_i = f(u + c_i h, z_i),
    z⁺  = z + h Σ_i α_i f_i  + Σ_k g(u + d_k h)(v_k W + w_k H).

Rößler's I₍₁,₀₎/h is W/2 + H, so his B, β¹, β² give p = B/2, q = B, v = β¹ + β²/2, w = β².
"""

from __future__ import annotations

from dataclasses import dataclass

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
