"""Every native fixed-grid solver with the settings the contract tests run it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import sdeflow as sf
from sdeflow.solvers.base import Facts, Solver

GRID = sf.UniformLogSNR()


@dataclass(frozen=True)
class Case:
    """One solver with its settings.

    Attributes:
        make: steps to solver, on `grid`.
        eta: the η of the equation weak orders are measured on; None for the flow alone.
        own_noise: whether the solver sets its noise itself, so that only the marginals can be compared.
        steps: the doubling steps at which orders are read off, the last two deciding.
        surplus: how much more than its claim the observed order may be, on these problems.
    """

    make: Callable[..., Solver]
    eta: float | None = None
    own_noise: bool = False
    steps: tuple[int, ...] = (80, 160, 320)
    surplus: float = 0.2
    grid: Any = field(default=GRID)

    def __call__(self, steps: int, **settings: Any) -> Solver:
        return self.make(steps=steps, **({"grid": self.grid} | settings))

    @property
    def facts(self) -> Facts:
        return self(8).facts


CHART = sf.Trigonometric(c=0.8)
EVEN = sf.InChart(CHART)


def rk(method: str, steps: tuple[int, ...], grid: sf.InChart | sf.UniformLogSNR = EVEN) -> Case:
    return Case(lambda **k: sf.RungeKutta(method, chart=CHART, **k), steps=steps, grid=grid)


def adams(order: int, corrector: int) -> Case:
    return Case(lambda **k: sf.FixedAdams(order=order, corrector=corrector, chart=CHART, **k), surplus=0.5, grid=EVEN)


CASES: dict[str, Case] = {
    "ddim": Case(sf.DDIM),
    "ddim-half": Case(lambda **k: sf.DDIM(eta=0.5, **k), eta=0.5),
    "ddim-full": Case(lambda **k: sf.DDIM(eta=1.0, **k), eta=1.0),
    "euler-ancestral": Case(sf.EulerAncestral, eta=1.0),
    "dpmpp-1m": Case(lambda **k: sf.DPMSolverPP(order=1, **k)),
    "dpmpp-2m": Case(lambda **k: sf.DPMSolverPP(order=2, **k)),
    "dpmpp-2m-exact": Case(lambda **k: sf.DPMSolverPP(order=2, exact=True, **k)),
    "dpmpp-3m": Case(lambda **k: sf.DPMSolverPP(order=3, **k), steps=(320, 640, 1280)),
    "dpmpp-2s": Case(lambda **k: sf.DPMSolverPP(order=2, multistep=False, **k)),
    "dpmpp-3s": Case(lambda **k: sf.DPMSolverPP(order=3, multistep=False, **k)),
    "sde-dpmpp-1": Case(lambda **k: sf.DPMSolverPP(order=1, sde=True, **k), eta=1.0),
    "sde-dpmpp-2": Case(lambda **k: sf.DPMSolverPP(order=2, sde=True, **k), eta=1.0),
    "sde-dpmpp-3": Case(lambda **k: sf.DPMSolverPP(order=3, sde=True, **k), eta=1.0, steps=(320, 640, 1280)),
    "dpm-1": Case(lambda **k: sf.DPMSolver(order=1, **k)),
    "dpm-2": Case(lambda **k: sf.DPMSolver(order=2, **k)),
    "dpm-3": Case(lambda **k: sf.DPMSolver(order=3, **k)),
    "deis-t2": Case(lambda **k: sf.DEIS(order=2, **k)),
    "deis-t3": Case(lambda **k: sf.DEIS(order=3, **k)),
    "deis-rho3": Case(lambda **k: sf.DEIS(order=3, variable="rho", **k)),
    "deis-lambda4": Case(lambda **k: sf.DEIS(order=4, variable="lambda", **k)),
    "sa-p3c0": Case(lambda **k: sf.SASolver(predictor=3, corrector=0, **k), eta=0.7, steps=(320, 640, 1280)),
    "sa-p2c2": Case(lambda **k: sf.SASolver(predictor=2, corrector=2, **k), eta=1.3, surplus=0.5),
    "sa-p3c3": Case(sf.SASolver, eta=1.0),
    "sa-varying": Case(lambda **k: sf.SASolver(eta=lambda lam: 1.0 + 0.5 * np.tanh(lam), **k), eta=1.0, own_noise=True),
    # looking ahead it is of order 3 and more on linear equations, which test_stochastic_adams.py sees to
    "stochastic-adams": Case(sf.StochasticAdams, eta=1.0, steps=(320, 640, 1280), surplus=3.0),
    "stochastic-adams-at": Case(lambda **k: sf.StochasticAdams(look_ahead=False, **k), eta=0.7, steps=(320, 640, 1280)),
    "stochastic-adams-p4c4": Case(lambda **k: sf.StochasticAdams(predictor=4, corrector=4, **k), eta=0.5, surplus=3.0),
    "ddpm-small": Case(sf.DDPM, eta=1.0),
    "ddpm-large": Case(lambda **k: sf.DDPM(variance="large", **k), eta=1.0),
    "fixed-adams-2": Case(lambda **k: sf.FixedAdams(order=2, **k), surplus=0.3),
    "fixed-adams-3": Case(lambda **k: sf.FixedAdams(order=3, **k), steps=(160, 320, 640), surplus=0.3),
    "fixed-adams-2-3": Case(lambda **k: sf.FixedAdams(order=2, corrector=3, **k), steps=(160, 320, 640), surplus=0.3),
    "fixed-adams-bare": Case(lambda **k: sf.FixedAdams(order=2, corrector=0, **k), surplus=0.3),
    "ersde-1": Case(lambda **k: sf.ERSDE(order=1, **k), eta=1.0, own_noise=True),
    "ersde-2": Case(lambda **k: sf.ERSDE(order=2, **k), eta=1.0, own_noise=True),
    "ersde-3": Case(lambda **k: sf.ERSDE(order=3, **k), eta=1.0, own_noise=True, surplus=2.0),
    "ersde-3-sde": Case(lambda **k: sf.ERSDE(order=3, phi=lambda rho: rho**2, **k), eta=1.0),
    "edm-heun": Case(sf.EDMHeun),
    "edm-churn": Case(lambda **k: sf.EDMHeun(churn=8.0, **k), eta=1.0, own_noise=True),
    "restart": Case(
        lambda steps, **k: sf.Restart(steps=steps, loops=((0.3, 1.0, 2, max(1, steps // 4)),), **k),
        eta=1.0,
        own_noise=True,
    ),
    "euler": rk("euler", (80, 160, 320)),
    "midpoint": rk("midpoint", (80, 160, 320)),
    "heun": rk("heun", (80, 160, 320)),
    "kutta3": rk("kutta3", (80, 160, 320)),
    "rk4": rk("rk4", (40, 80, 160)),
    "dopri5": rk("dopri5", (40, 80, 160), GRID),
    "tsit5": rk("tsit5", (40, 80, 160), GRID),
    "adams-2": adams(2, 0),
    "adams-3": adams(3, 3),
} | {
    f"uni{'pc' if corrector else 'p'}-{order}-{variant}-{predict}": Case(
        lambda order=order, variant=variant, predict=predict, corrector=corrector, **k: sf.UniPC(
            order=order, variant=variant, predict=predict, corrector=corrector, **k
        ),
        steps=(320, 640, 1280) if order == 3 and not corrector else (160, 320, 640),
        surplus=0.8 if order == 3 and not corrector else 0.2,
    )
    for order, variant, predict, corrector in [
        (1, "bh1", "data", True),
        (1, "bh2", "noise", True),
        (2, "bh1", "data", True),
        (2, "bh2", "data", True),
        (2, "bh1", "noise", True),
        (3, "bh2", "data", True),
        (3, "bh2", "noise", True),
        (4, "bh2", "data", True),
        (4, "bh2", "noise", True),
        (2, "bh2", "data", False),
        (3, "bh1", "noise", False),
        (4, "bh2", "data", False),
    ]
}
FLOW = {name: case for name, case in CASES.items() if "none" in case.facts.noise}
NOISY = {name: case for name, case in CASES.items() if "additive" in case.facts.noise}
