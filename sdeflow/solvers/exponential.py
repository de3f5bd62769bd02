"""The named exponential solvers: settings of one stepper (`exponential_steps`), formulae in `exponential_weights`.

All take the linear part of the equation exactly and replace D (or ε̂) by a polynomial; all want a diffusion equation.
Stochastic ones take η from the equation, so that with `ProbabilityFlowODE` they are the ODE methods of the same name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, InChart
from sdeflow.solvers.base import Facts, Task, chart_of, even_in_lambda
from sdeflow.solvers.exponential_steps import Scheme, Strengths, multistep_plan, points_of, singlestep_plan
from sdeflow.solvers.exponential_weights import Strength
from sdeflow.solvers.linear import LinearMethod, Plan


@dataclass(frozen=True, kw_only=True)
class DiffusionMethod(LinearMethod):
    """A fixed-grid method for diffusion equations.

    Args (all of them keywords of every method here):
        steps: number of steps (not of time points).
        grid: a rule for placing them, or the times themselves, start first.
        denoise: end with one step from `stop` to σ = 0, where x = D; it costs one evaluation and is counted. States at `save_at` are those before it.
    """

    denoise: bool = False

    def rule(self, task: Task) -> Grid:
        return InChart(chart_of(task, None))


@dataclass(frozen=True, kw_only=True)
class Multistep(DiffusionMethod):
    """One network call a step, polynomials through earlier calls.

    Args:
        own_start: make the first steps Runge–Kutta steps of the method's own order (order 3 costs one call more, order
            4 two, and so on); False starts with fewer nodes, as other libraries do, which costs no call and, beyond
            order 2, the order.
        lower_order_final: use fewer nodes in the last steps; steadier with very few steps on grids that end abruptly, but
            it costs the order.
    """

    own_start: bool = True
    lower_order_final: bool = False

    @abstractmethod
    def scheme(self, task: Task) -> Scheme:
        """The stepper's settings."""

    def plan(self, task: Task, times: Tensor) -> Plan:
        return multistep_plan(self.scheme(task), task, points_of(task, times, self.denoise))


def _order(name: str, order: int, highest: int) -> None:
    if isinstance(order, bool) or order not in range(1, highest + 1):
        raise InvalidInput(
            f"{name} has orders 1 to {highest}; got order={order!r}. Write {name}(order={highest}, steps=...)"
        )


def _choice(owner: str, field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidInput(f"{owner}: {field} must be one of {', '.join(choices)}; got {value!r}")


def _own_eta(task: Task) -> Strengths:
    law = Strength.constant(task.equation.eta)
    return lambda s, t: law


def same_eta(solver: str, eta: float, task: Task) -> None:
    """Refuse an equation whose η is not the solver's.

    Raises:
        InvalidInput: they differ.
    """
    if abs(task.equation.eta - eta) > 1e-12:
        raise InvalidInput(
            f"{solver} has η = {eta:g}, the equation {task.equation.eta:g}; write "
            + (f"sf.ReverseSDE(predict, eta={eta:g})" if eta else "sf.ProbabilityFlowODE(predict)")
            + f", or eta={task.equation.eta:g} in the solver"
        )


def noises(eta: float) -> tuple[str, ...]:
    """What a solver of strength η accepts."""
    return ("additive",) if eta else ("none",)


@dataclass(frozen=True, kw_only=True)
class DDIM(DiffusionMethod):
    """DDIM(η) of Song, Meng & Ermon 2021: x_t = α_t D + σ_t √(1−η²κ) ε̂ + η σ_t √κ z, κ = 1 − (α_s σ_t/(α_t σ_s))².

    η = 0 draws no noise and is DPM-Solver++ of order 1; η = 1 is DDPM with variance β̃. The equation must be
    `ReverseSDE(predict, eta)` of the same η, towards which it converges (weak order 1).
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.eta <= 1.0:
            raise InvalidInput(f"DDIM needs 0 ≤ eta ≤ 1; got {self.eta}. Write sf.DDIM(steps=50, eta=1.0)")

    @property
    def facts(self) -> Facts:
        weak = 1 if self.eta else None
        return Facts(
            f"DDIM(η={self.eta:g})" if self.eta else "DDIM",
            None if self.eta else 1, weak, weak, 1, False, noises(self.eta), "diffusion", "Song, Meng & Ermon 2021",
        )  # fmt: skip

    def check(self, task: Task) -> None:
        super().check(task)
        same_eta(self.facts.name, self.eta, task)

    def plan(self, task: Task, times: Tensor) -> Plan:
        def posterior(s: np.ndarray, t: np.ndarray) -> Strength:
            # √(1−η²κ) in place of e^{−η²h}
            def decay(a: np.ndarray, b: np.ndarray) -> np.ndarray:
                with np.errstate(divide="ignore"):
                    return -0.5 * np.log1p(self.eta**2 * np.expm1(-2.0 * (b - a)))

            return Strength(decay, lambda lam: np.ones_like(lam), True, Strength.constant(self.eta))

        strengths = posterior if self.eta else _own_eta(task)
        return multistep_plan(Scheme(strengths=strengths), task, points_of(task, times, self.denoise))


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(DDIM):
    """Euler-ancestral of k-diffusion: down to σ_down by Euler in y = x/α, then noise σ_up = η √(ρ_t²(ρ_s²−ρ_t²))/ρ_s.

    In y, ρ = σ/α this is DDIM(η) letter by letter: Euler from ρ_s to ρ_down is y ← D + (ρ_down/ρ_s)(y − D) and
    ρ_down² = ρ_t² − σ_up² = ρ_t²(1 − η²κ).
    """

    eta: float = 1.0

    @property
    def facts(self) -> Facts:
        return replace(super().facts, name="Euler ancestral", reference="Karras et al. 2022; k-diffusion")


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP(Multistep):
    """DPM-Solver++ and SDE-DPM-Solver++ of Lu et al. 2022: D as a polynomial of degree order − 1 in λ.

    Args:
        order: 1 (DDIM), 2 (2M; 2S) or 3 (3M; 3S).
        sde: for `ReverseSDE(predict, eta)`, any η: order 1 has weak order 1, the others 2.
        multistep: False for the singlestep methods 2S and 3S, `order` calls a step.
        exact: order 2 with the exact integral of the line instead of the paper's D₀ + (D₀ − D₁)/(2r).

    3M differs from the widespread form in D² = 2(a−b)/(r₀+r₁), without whose 2 it is of second order.
    """

    order: int = 2
    sde: bool = False
    multistep: bool = True
    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _order("DPMSolverPP", self.order, 3)
        if self.sde and not self.multistep:
            raise InvalidInput(
                f"the SDE methods are multistep; write sf.DPMSolverPP(order={self.order}, steps=..., sde=True)"
            )

    @property
    def facts(self) -> Facts:
        name = f"{'SDE-' * self.sde}DPM-Solver++{self.order}{'M' if self.multistep else 'S'}"
        strong, weak = (1, min(self.order, 2)) if self.sde else (None, None)
        accepts = ("none", "additive") if self.sde else ("none",)
        calls = 1 if self.multistep else self.order
        return Facts(name, self.order, strong, weak, calls, False, accepts, "diffusion", "Lu et al. 2022b")

    def scheme(self, task: Task) -> Scheme:
        simple = None if self.exact else "bh2"
        return Scheme("data", self.order, 0, "lambda", simple, _own_eta(task), self.own_start, self.lower_order_final)

    def plan(self, task: Task, times: Tensor) -> Plan:
        if self.multistep:
            return super().plan(task, times)
        return singlestep_plan("data", self.order, task, points_of(task, times, self.denoise))


@dataclass(frozen=True, kw_only=True)
class DPMSolver(DiffusionMethod):
    """DPM-Solver 1, 2, 3 of Lu et al. 2022: singlestep, ε̂ as a polynomial in λ, `order` calls a step.

    The default grid is the paper's, uniform in λ, unless an end has (almost) no signal or no noise. In this form an error δ of D at a
    step's stage comes out of the step as about e^{h/2} δ (order 2, h the step in λ), and a network that predicts ε̂ has δ = (σ/α)·error near
    pure noise: grids that leave it in one long step of λ blow the solve up. `DPMSolverPP` interpolates D and does not.
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _order("DPMSolver", self.order, 3)

    @property
    def facts(self) -> Facts:
        o = self.order
        return Facts(f"DPM-Solver-{o}", o, None, None, o, False, ("none",), "diffusion", "Lu et al. 2022a")

    def rule(self, task: Task) -> Grid:
        return even_in_lambda(task) or super().rule(task)

    def plan(self, task: Task, times: Tensor) -> Plan:
        return singlestep_plan("noise", self.order, task, points_of(task, times, self.denoise))


@dataclass(frozen=True, kw_only=True)
class UniPC(Multistep):
    """UniPC of Zhao et al. 2023: an order-p predictor, and a corrector that reuses the call made at the predicted point.

    Args:
        order: p = 1 … 4; with the corrector the order is p + 1, at one call a step.
        variant: "bh2" or "bh1", B = e^{−h} − 1 or −h: they differ only where two nodes are used.
        predict: "data" or "noise": what the polynomials interpolate.
        corrector: False for UniP alone, order p.
    """

    order: int = 3
    variant: Literal["bh1", "bh2"] = "bh2"
    predict: Literal["data", "noise"] = "data"
    corrector: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _order("UniPC", self.order, 4)
        _choice("UniPC", "variant", self.variant, ("bh1", "bh2"))
        _choice("UniPC", "predict", self.predict, ("data", "noise"))

    @property
    def facts(self) -> Facts:
        name = f"{'UniPC' if self.corrector else 'UniP'}-{self.order}"
        order = self.order + self.corrector
        return Facts(name, order, None, None, 1, False, ("none",), "diffusion", "Zhao et al. 2023")

    def scheme(self, task: Task) -> Scheme:
        corrector = self.order if self.corrector else 0
        return Scheme(
            self.predict, self.order, corrector, "lambda", self.variant,
            own_start=self.own_start, lower_order_final=self.lower_order_final,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DEIS(Multistep):
    """DEIS of Zhang & Chen 2023: ε̂ as a polynomial of degree order − 1, its integral over ρ exact.

    Args:
        order: nodes, 1 … 4.
        variable: "t" (tAB-DEIS), "rho" (ρAB-DEIS, the linear multistep method in ρ) or "lambda" (log ρ, diffusers').
    """

    order: int = 3
    variable: Literal["t", "rho", "lambda"] = "t"

    def __post_init__(self) -> None:
        super().__post_init__()
        _order("DEIS", self.order, 4)
        _choice("DEIS", "variable", self.variable, ("t", "rho", "lambda"))

    @property
    def facts(self) -> Facts:
        name = f"DEIS {'λ' if self.variable == 'lambda' else {'t': 't', 'rho': 'ρ'}[self.variable]}AB{self.order}"
        return Facts(name, self.order, None, None, 1, False, ("none",), "diffusion", "Zhang & Chen 2023")

    def scheme(self, task: Task) -> Scheme:
        return Scheme(
            "noise", self.order, 0, self.variable, own_start=self.own_start, lower_order_final=self.lower_order_final
        )


@dataclass(frozen=True, kw_only=True)
class SASolver(Multistep):
    """SA-Solver of Xue et al. 2023: predictor and corrector of any η, D as a polynomial in λ, integrals exact.

    Args:
        predictor: nodes of the predictor, 1 … 4.
        corrector: old nodes of the corrector, 0 … 4 (beside the new one, at no extra call); 0 for none.
        eta: None for the equation's own η; or a function η(λ) of a float64 array, taken at the middle of each step,
            whatever the equation's (every η keeps the marginals).

    On the flow it is UniPC with exact integrals. Noise caps the weak order at 2. The default grid is even in λ unless an end has (almost) no
    signal or no noise: the noise of uneven steps in the history is extrapolated more than it is corrected.
    """

    predictor: int = 3
    corrector: int = 3
    eta: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _order("SASolver", self.predictor, 4)
        if self.corrector not in range(5):
            raise InvalidInput(f"SASolver needs 0 ≤ corrector ≤ 4; got {self.corrector!r}")
        if self.eta is not None and not callable(self.eta):
            raise InvalidInput(
                f"SASolver takes a constant η from the equation; write sf.ReverseSDE(predict, eta={self.eta}), or "
                "eta=lambda lam: ... for one that varies"
            )

    def rule(self, task: Task) -> Grid:
        return even_in_lambda(task) or super().rule(task)

    @property
    def facts(self) -> Facts:
        order = min(self.predictor, self.corrector) + 1 if self.corrector else self.predictor
        name = f"SA-Solver P{self.predictor}C{self.corrector}"
        accepts = ("none", "additive") if self.eta is None else ("additive",)
        return Facts(
            name,
            order if self.eta is None else None,
            1,
            min(order, 2),
            1,
            False,
            accepts,
            "diffusion",
            "Xue et al. 2023",
        )

    def scheme(self, task: Task) -> Scheme:
        varying = self.eta

        def frozen(s: np.ndarray, t: np.ndarray) -> Strength:
            assert varying is not None
            middle = np.where(np.isfinite(s), 0.5 * (s + np.where(np.isfinite(t), t, s)), t)
            eta = np.broadcast_to(np.asarray(varying(middle), float), middle.shape)
            if not np.isfinite(eta).all():
                raise InvalidInput(
                    f"SASolver's eta(λ) must be finite at every λ; at λ = {middle[~np.isfinite(eta)][0]:.4g} it is not. Write e.g. "
                    "eta=lambda lam: np.where(lam > 0, 1.0, 0.0)"
                )
            return Strength.constant(eta)

        return Scheme(
            "data", self.predictor, self.corrector, "lambda", None, frozen if varying else _own_eta(task),
            self.own_start, self.lower_order_final,
        )  # fmt: skip
