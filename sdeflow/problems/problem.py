"""Problems with a known truth: a Gaussian mixture with a name, labels, samples and exact networks of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.predictions import (
    DataPrediction,
    EDMPrediction,
    FlowPrediction,
    NoisePrediction,
    Prediction,
    ScorePrediction,
    VPrediction,
)
from sdeflow.problems.mixture import Mixture
from sdeflow.processes import Process, Time, as_time, expand
from sdeflow.random import sample_seeds, standard_normal, uniform

COMPONENT_STREAM, DATA_STREAM = 101, 102
"""Random streams of `Problem.sample`, apart from those of priors and solves, so that one seed never reuses a number."""

KINDS = ("data", "noise", "score", "v", "flow", "edm")
"""What an exact network can return."""

Seed = int | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """Data whose density p(x_0) = Σ_k w_k N(m_k, C_k) is known, so that score, D and density are exact at every t.

    Build one with `gaussian`, `ring`, `mixture64`, `digits` or `from_points`.

    Attributes:
        name: used in tables and records.
        mixture: the components.
        component_labels: the class of each component, int64 (K,), None where there are no classes.
    """

    name: str
    mixture: Mixture
    component_labels: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        labels = self.component_labels
        if labels is None:
            return
        labels = torch.as_tensor(labels).detach().cpu()
        if labels.shape != (self.mixture.components,) or labels.is_floating_point() or bool((labels < 0).any()):
            raise InvalidInput(
                f"labels must be {self.mixture.components} integers ≥ 0, one for each point; got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        object.__setattr__(self, "component_labels", labels.to(torch.int64))

    def __repr__(self) -> str:
        classes = "" if self.component_labels is None else f", classes={len(self.classes)}"
        return f"{type(self).__name__}({self.name!r}, dim={self.dim}, components={self.mixture.components}{classes})"

    @property
    def dim(self) -> int:
        """d, the number of elements of one sample."""
        return self.mixture.dim

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (d,); every method also takes events of another shape with d elements, such as (1, 8, 8)."""
        return (self.dim,)

    @property
    def data_scale(self) -> float:
        """Root-mean-square standard deviation √(tr Cov(x_0)/d): the c of the charts."""
        return (self.mixture.moments()[1].trace() / self.dim).sqrt().item()

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels that occur, sorted."""
        return tuple(self._labels_or_raise().unique().tolist())

    # --- the exact truths

    def log_prob(self, x: Tensor, process: Process | None = None, t: Time | None = None) -> Tensor:
        """log p_t(x) in nats, (batch,), float64: the density of the data, or of x_t when a process and t are given."""
        return self.mixture.posterior(*self._at(x, process, t)).log_prob

    def score(self, x: Tensor, process: Process, t: Time) -> Tensor:
        """∇ log p_t(x), shape and dtype of x; uncounted (see `prediction` for the counted network)."""
        _, score = self.mixture.fields(*self._at(x, process, t))
        return score.reshape(x.shape).to(x.dtype)

    def denoise(self, x: Tensor, process: Process, t: Time) -> Tensor:
        """D(x, t) = E[x_0 | x_t = x], shape and dtype of x; uncounted."""
        data, _ = self.mixture.fields(*self._at(x, process, t))
        return data.reshape(x.shape).to(x.dtype)

    def moments(self, process: Process | None = None, t: Time | None = None) -> tuple[Tensor, Tensor]:
        """Exact mean (d,) and covariance (d, d) of the data, or of x_t: α m and α² C + σ² I; float64."""
        mean, cov = self.mixture.moments()
        if process is None or t is None:
            return mean, cov
        alpha, sigma = process.alpha(t).cpu(), process.sigma(t).cpu()
        return alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(self.dim, dtype=cov.dtype)

    def sample(
        self, n: int, seed: Seed = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n exact samples of the data, (n, d). Row i depends on the seed and i alone (a list of seeds: one for each row)."""
        seeds = sample_seeds(seed, _whole(n), "cpu")
        noise = standard_normal(seeds, (self.dim,), stream=DATA_STREAM, dtype=torch.float64, device="cpu")
        return self.mixture.scale(noise, self._draw(seeds)).to(device, dtype)

    def labels(self, n: int, seed: Seed = 0, device: torch.device | str = "cpu") -> Tensor:
        """The classes of `sample(n, seed)`, int64 (n,)."""
        labels = self._labels_or_raise()
        return labels[self._draw(sample_seeds(seed, _whole(n), "cpu"))].to(device)

    # --- networks

    def prediction(
        self,
        process: Process,
        kind: str = "data",
        label: int | None = None,
        dtype: torch.dtype | None = torch.float64,
        sigma_data: float = 0.5,
    ) -> Prediction:
        """The exact network of one kind as a `Prediction`, evaluated and counted like any other network.

        Args:
            process: any process.
            kind: "data", "noise", "score", "v", "flow" (also called "velocity") or "edm".
            label: the class to condition on; None for the whole mixture. For class-by-row networks see `network`.
            dtype: the network's dtype. float64 keeps the truth exact whatever the state's dtype; None computes at the state's
                (for devices without float64).
            sigma_data: σ_d of "edm".

        Raises:
            InvalidInput: an unknown kind or label.
        """
        network = (self if label is None else self.conditional(label)).network(process, kind, sigma_data)
        kind = network.kind
        if kind == "edm":
            return EDMPrediction(network, process, sigma_data=sigma_data, dtype=dtype)
        return _PREDICTIONS[kind](network, process, dtype=dtype)

    def network(self, process: Process, kind: str = "data", sigma_data: float = 0.5) -> ExactNetwork:
        """The bare `network(x, t, label=None)` of `prediction`, for guidance: label is a number or (batch,) int64, −1 for no class."""
        return ExactNetwork(self, process, kind, sigma_data)

    def conditional(self, label: int) -> Problem:
        """p(x_0 | class): the mixture of the components with this label.

        Raises:
            InvalidInput: the problem has no labels, or none of that number.
        """
        labels = self._labels_or_raise()
        keep = labels == int(label)
        if not bool(keep.any()):
            raise InvalidInput(f"{self.name} has no class {label}; its classes are {list(self.classes)}")
        return Problem(f"{self.name}[{int(label)}]", self.mixture.restricted(keep), labels[keep])

    def allowed(self, label: int | Tensor, batch: int, device: torch.device) -> Tensor:
        """Components each row may come from, bool (batch, K): those of its label, all for label −1."""
        own = self._labels_or_raise().to(device)
        rows = torch.as_tensor(label, device=device)
        if rows.ndim > 1 or rows.is_floating_point() or (rows.ndim == 1 and rows.shape[0] != batch):
            raise InvalidInput(
                f"label must be a number or ({batch},) integers, one for each row of x; got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        mask = (rows.reshape(-1, 1) == own) | (rows.reshape(-1, 1) == -1)
        if not bool(mask.any(1).all()):
            raise InvalidInput(
                f"{self.name} has classes {list(self.classes)} (and −1 for none); got {rows.unique().tolist()}"
            )
        return mask.expand(batch, -1)

    def _labels_or_raise(self) -> Tensor:
        if self.component_labels is None:
            raise InvalidInput(
                f"{self.name} has no labels; write sf.problems.from_points(points, std=0.1, labels=labels)"
            )
        return self.component_labels

    def _draw(self, seeds: Tensor) -> Tensor:
        u = uniform(seeds, (), stream=COMPONENT_STREAM, dtype=torch.float64, device="cpu")
        return torch.searchsorted(self.mixture.weights.cumsum(0), u, right=True).clamp_max(self.mixture.components - 1)

    def _at(self, x: Tensor, process: Process | None, t: Time | None) -> tuple[Tensor, Tensor, Tensor]:
        flat = flatten(x, self.dim, self.name)
        if (process is None) != (t is None):
            raise InvalidInput(
                "give both process and t, as in problem.log_prob(x, process, t), or neither for the density of the data"
            )
        if process is None or t is None:
            return flat, as_time(1.0, x.device), as_time(0.0, x.device)
        t = as_time(t, x.device)
        return flat, process.alpha(t), process.sigma(t)


class ExactNetwork:
    """`network(x, t, label=None)` returning exactly what a perfectly trained network of one kind would.

    x is (batch, *event), t a float, a 0-d or a (batch,) tensor; for kind "edm" they are c_in x and c_noise = ln(ρ)/4, as `EDMPrediction`
    hands them over. Computed in float64 and returned in x's dtype, differentiable in both.
    """

    def __init__(self, problem: Problem, process: Process, kind: str = "data", sigma_data: float = 0.5):
        kind = {"velocity": "flow"}.get(kind, kind)
        if kind not in KINDS:
            raise InvalidInput(
                f"kind must be one of {', '.join(KINDS)}; got {kind!r}. Write problem.prediction(process, kind='data')"
            )
        self.problem, self.process, self.kind, self.sigma_data = problem, process, kind, sigma_data
        self.__name__ = f"{problem.name}:{kind}"

    def __call__(self, x: Tensor, t: Time, label: int | Tensor | None = None) -> Tensor:
        t = as_time(t, x.device)
        if t.ndim == 1 and t.shape[0] and t.stride(0) == 0:
            t = t[0]  # one time for all rows: coefficients are then computed once
        if self.kind == "edm":
            return self._edm(x, t, label).reshape(x.shape).to(x.dtype)
        flat = flatten(x, self.problem.dim, self.problem.name)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        D, s = self.problem.mixture.fields(flat, alpha, sigma, self._allowed(label, x))
        alpha, sigma = expand(alpha, D), expand(sigma, D)
        if self.kind == "data":
            output = D
        elif self.kind == "score":
            output = s
        elif self.kind == "noise":
            output = -sigma * s
        elif self.kind == "v":
            output = -sigma * (alpha * s + D)
        else:
            output = expand(self.process.alpha_dot(t), D) * D - expand(self.process.sigma_dot(t), D) * sigma * s
        return output.reshape(x.shape).to(x.dtype)

    def _allowed(self, label: int | Tensor | None, x: Tensor) -> Tensor | None:
        return None if label is None else self.problem.allowed(label, x.shape[0], x.device)

    def _edm(self, x: Tensor, t: Tensor, label: int | Tensor | None) -> Tensor:
        # F knows ρ alone: take α = cos θ, σ = sin θ with tan θ = ρ, finite even where α = 0. From D = skip·x + out·F and
        # x = αD + σε: F = (σD − σ_d²αε)/(σ_d √(σ²+σ_d²α²)), free of differences of large numbers
        theta = torch.atan((4.0 * t).exp())
        alpha, sigma = theta.cos(), theta.sin()
        norm = (sigma**2 + (self.sigma_data * alpha) ** 2).sqrt()
        flat = flatten(x, self.problem.dim, self.problem.name)
        flat = flat.to(norm.dtype) * norm.reshape(-1, 1)
        D, s = self.problem.mixture.fields(flat, alpha, sigma, self._allowed(label, x))
        alpha, sigma, norm = (c.reshape(-1, 1) for c in (alpha, sigma, norm))
        return sigma * (D + self.sigma_data**2 * alpha * s) / (self.sigma_data * norm)


_PREDICTIONS = {
    "data": DataPrediction,
    "noise": NoisePrediction,
    "score": ScorePrediction,
    "v": VPrediction,
    "flow": FlowPrediction,
}


def flatten(x: Tensor, dim: int, name: str) -> Tensor:
    """x (batch, *event) as (batch, d), checked."""
    if x.ndim < 2 or not x.is_floating_point() or x.shape[1:].numel() != dim:
        raise InvalidInput(
            f"{name} takes a floating x of shape (batch, {dim}); got {x.dtype} of shape {tuple(x.shape)}. "
            f"Write problem.sample(n) or process.prior((n, {dim}))"
        )
    return x.reshape(x.shape[0], dim)


def _whole(n: int) -> int:
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise InvalidInput(f"the number of samples must be a positive integer; got {n!r}")
    return int(n)
