"""Explicit Runge–Kutta methods as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """Butcher data: k_i = f(t + c_i h, x + h Σ_{j<i} a_ij k_j), x⁺ = x + h Σ b_i k_i.

    Attributes:
        name: the method's usual name.
        order: its order.
        a: strictly lower triangle, row i holding the i entries a_i0 … a_i,i−1; row 0 is empty.
        b: weights.
        reference: source.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    reference: str

    @property
    def c(self) -> tuple[float, ...]:
        """Nodes, the row sums of a."""
        return tuple(sum(row) for row in self.a)

    @property
    def stages(self) -> int:
        """Evaluations a step."""
        return len(self.b)


EULER = Tableau("Euler", 1, ((),), (1.0,), "Euler 1768")
MIDPOINT = Tableau("midpoint", 2, ((), (1 / 2,)), (0.0, 1.0), "Runge 1895")
HEUN = Tableau("Heun", 2, ((), (1.0,)), (1 / 2, 1 / 2), "Heun 1900")
KUTTA3 = Tableau("Kutta 3", 3, ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), "Kutta 1901")
RK4 = Tableau("RK4", 4, ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), "Kutta 1901")
DOPRI5 = Tableau(
    "Dopri5",
    5,
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    "Dormand & Prince 1980",
)
TSIT5 = Tableau(
    "Tsit5",
    5,
    (
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    ),
    (
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
    ),
    "Tsitouras 2011",
)
TABLEAUX = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun": HEUN,
    "kutta3": KUTTA3,
    "rk4": RK4,
    "dopri5": DOPRI5,
    "tsit5": TSIT5,
}
