"""Gaussian diffusion processes: x_t = α(t) x_0 + σ(t) ε, data at the small end of t, noise at the large end.

Any differentiable pair gives the forward SDE dx = f x dt + g dw with f = α̇/α and g² = (σ²)˙ − 2 f σ² = −2 σ² λ̇,
λ = log(α/σ) the half log-SNR. Coefficients are float64 whatever the state is (float32 on devices without float64).

Sources: Song et al. 2021 (VP, sub-VP, VE), Nichol & Dhariwal 2021 (cosine), Karras et al. 2022 (EDM),
Liu et al. 2023 and Lipman et al. 2023 (rectified flow), Ho et al. 2020 (discrete tables).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput
from sdeflow.random import sample_seeds, standard_normal

Time = float | Tensor
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
PRIOR_STREAM = 1
"""Random stream of `Process.prior`, so that a solve with the same seed sees other numbers."""


def as_time(t: Time, device: torch.device | None = None) -> Tensor:
    """t as a floating tensor: float64, or float32 on devices that have no float64; integers are converted."""
    if isinstance(t, Tensor):
        if t.dtype is torch.float64 and (device is None or t.device == device):
            return t
        device = device or t.device
    device = torch.device(device or "cpu")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.as_tensor(t, dtype=dtype, device=device)


class Process:
    """A process of the user's own: x_t = α(t) x_0 + σ(t) ε, derivatives by autograd, inverse by safeguarded Newton.

    Args:
        alpha: α(t), a function of a float64 tensor, differentiable by autograd, positive below t_max.
        sigma: σ(t), likewise; σ/α must grow with t.
        t_min: the data end of the interval on which a network was trained or the score exists.
        t_max: the noise end.

    Every coefficient method takes a float or a tensor of any shape and returns a float64 tensor of that shape on its
    device.

    Raises:
        InvalidInput: the interval is empty or σ/α does not grow with t.

    Example:
        >>> Process(alpha=lambda t: 1.0, sigma=lambda t: t.sqrt(), t_min=1e-4, t_max=4.0)   # dx = dw
    """

    t_min: float
    t_max: float

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor | float],
        sigma: Callable[[Tensor], Tensor | float],
        t_min: float,
        t_max: float,
    ):
        check_interval(t_min, t_max)
        self.t_min, self.t_max = float(t_min), float(t_max)
        self._alpha, self._sigma = alpha, sigma
        times = torch.linspace(self.t_min, self.t_max, 257, dtype=torch.float64)
        for name, function in (("alpha", alpha), ("sigma", sigma)):
            _check_differentiable(name, function, times)
        for name, value in (("alpha", self.alpha(times)), ("sigma", self.sigma(times))):
            _check_range(name, value, times)
        share = self._noise_share(times)
        if not bool((share.diff() > 0).all()):
            raise InvalidInput(
                f"{self!r}: σ/α must grow with t on [t_min, t_max] (data at t_min, noise at t_max), but it does not. "
                "If your time runs the "
                "other way, write Process(alpha=lambda t: a(1 - t), sigma=lambda t: s(1 - t), ...)"
            )

    def __repr__(self) -> str:
        return f"Process(t_min={self.t_min}, t_max={self.t_max})"

    # --- the two functions everything else follows from

    def alpha(self, t: Time) -> Tensor:
        """α(t), the scale of the data."""
        t = as_time(t)
        return torch.as_tensor(self._alpha(t), dtype=t.dtype, device=t.device).expand(t.shape)

    def sigma(self, t: Time) -> Tensor:
        """σ(t), the standard deviation of the noise."""
        t = as_time(t)
        return torch.as_tensor(self._sigma(t), dtype=t.dtype, device=t.device).expand(t.shape)

    def alpha_dot(self, t: Time) -> Tensor:
        """dα/dt."""
        return _derivative(self.alpha, as_time(t))

    def sigma_dot(self, t: Time) -> Tensor:
        """dσ/dt."""
        return _derivative(self.sigma, as_time(t))

    def time(self, half_log_snr: Time) -> Tensor:
        """t with λ(t) = half_log_snr, inside [t_min, t_max]; λ = −∞ is reached where α is 0.

        Bracketed Newton on w = σ/(α+σ), which is finite at both ends, to the last bits of float64.
        """
        lam = as_time(half_log_snr)
        w = torch.sigmoid(-lam)
        low, high = torch.full_like(w, self.t_min), torch.full_like(w, self.t_max)
        t = 0.5 * (low + high)
        for _ in range(80):
            gap = self._noise_share(t) - w
            low, high = torch.where(gap <= 0, t, low), torch.where(gap >= 0, t, high)
            alpha, sigma, da, ds = self.coefficients(t)
            newton = t - gap * (alpha + sigma) ** 2 / (ds * alpha - sigma * da)
            inside = (newton > low) & (newton < high)
            previous, t = t, torch.where(inside, newton, 0.5 * (low + high))
            if bool(((t - previous).abs() <= 4e-16 * t.abs()).all()):
                break
        return t

    # --- what follows

    def coefficients(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(α, σ, α̇, σ̇) at t."""
        return self.alpha(t), self.sigma(t), self.alpha_dot(t), self.sigma_dot(t)

    def half_log_snr(self, t: Time) -> Tensor:
        """λ(t) = log(α/σ); −∞ where α = 0."""
        return self.alpha(t).log() - self.sigma(t).log()

    def rho(self, t: Time) -> Tensor:
        """ρ(t) = σ/α = e^{−λ}; ∞ where α = 0."""
        return self.sigma(t) / self.alpha(t)

    def time_of_rho(self, rho: Time) -> Tensor:
        """t with σ/α = rho; the inverse of `rho`."""
        return self.time(-as_time(rho).log())

    def f(self, t: Time) -> Tensor:
        """f(t) = α̇/α, the linear drift of the forward SDE."""
        return self.alpha_dot(t) / self.alpha(t)

    def g2(self, t: Time) -> Tensor:
        """g(t)² = 2σ(σ̇ − fσ), the squared noise amplitude of the forward SDE."""
        alpha, sigma, da, ds = self.coefficients(t)
        return 2.0 * sigma * (ds - sigma * da / alpha)

    def g(self, t: Time) -> Tensor:
        """g(t), the noise amplitude of the forward SDE."""
        return self.g2(t).sqrt()

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean α x_0, shaped as x0, and standard deviation σ, broadcastable to it, of x_t given x_0 (batch, *event)."""
        t = as_time(t, x0.device)
        return expand(self.alpha(t), x0) * x0, expand(self.sigma(t), x0)

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """x_t = α x_0 + σ·noise, shaped as x0."""
        mean, std = self.marginal(x0, t)
        return mean + std * noise

    def prior(
        self,
        shape: Sequence[int],
        seed: int | Sequence[int] | Tensor = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A sample of N(0, σ(t_max)²) of the given shape (batch, *event); row i depends on the seed and i alone."""
        if not isinstance(shape, Sequence) or len(shape) < 2:
            raise InvalidInput(f"shape must be (batch, *event); got {shape!r}. Write prior((16, 3, 64, 64))")
        if not dtype.is_floating_point:
            raise InvalidInput(f"dtype must be a floating dtype; got {dtype}. Write dtype=torch.float32")
        batch, *event = (int(n) for n in shape)
        if min(batch, *event) < 0:
            raise InvalidInput(f"shape must be (batch, *event), none negative; got {shape!r}")
        seeds = sample_seeds(seed, batch, device)
        noise = standard_normal(seeds, tuple(event), stream=PRIOR_STREAM, dtype=dtype, device=device)
        return noise * self.sigma(self.t_max).item()

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of `prior` in nats at x (batch, *event): (batch,)."""
        std, n = self.sigma(self.t_max).item(), x[0].numel()
        return -0.5 * (x / std).square().flatten(1).sum(1) - n * (math.log(std) + 0.5 * math.log(2.0 * math.pi))

    def _noise_share(self, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha(t), self.sigma(t)
        return sigma / (alpha + sigma)


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A 0-d or (batch,) coefficient in x's dtype, shaped to broadcast against x (batch, *event)."""
    coefficient = coefficient.to(x.dtype)
    return coefficient if coefficient.ndim == 0 else coefficient.reshape(-1, *(1,) * (x.ndim - 1))


def remembering(process: Process) -> Process:
    """The same process, which keeps α, σ and log α at the tensor it was asked for last.

    A step asks for them several times at one t. For use inside one solve: tensors must not be changed in place.
    """
    found = copy.copy(process)
    for name in ("log_alpha", "alpha", "sigma"):
        method = getattr(found, name, None)
        if method is not None:
            object.__setattr__(found, name, last_answer(method))
    return found


def last_answer(method: Callable[[Asked], Answer]) -> Callable[[Asked], Answer]:
    """The same function, which keeps its answer to what it was asked last; a tensor is known by itself, not by its values."""
    last: tuple[Asked, Answer] | None = None

    def remembered(t: Asked) -> Answer:
        nonlocal last
        if last is None or t is not last[0]:
            last = t, method(t)
        return last[1]

    return remembered


def check_interval(t_min: float, t_max: float) -> None:
    if not (math.isfinite(t_min) and math.isfinite(t_max) and t_min < t_max):
        raise InvalidInput(f"a process needs finite times with t_min < t_max; got t_min={t_min}, t_max={t_max}")


def _check_differentiable(name: str, function: Callable[[Tensor], Tensor | float], times: Tensor) -> None:
    """Refuse a function that autograd cannot follow (numpy's, math's): its derivative would silently be 0."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = times.clone().requires_grad_(True)
        try:
            value = function(leaf)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"{name} must be a function of a float64 tensor of times, written with torch's functions; it raised "
                f"{type(error).__name__}: {error}. Write e.g. {name}=lambda t: torch.cos(t)"
            ) from error
    if isinstance(value, Tensor) and value.shape not in ((), times.shape):
        raise InvalidInput(
            f"{name} must return a number or one value for each time; for times of shape {tuple(times.shape)} it returned shape "
            f"{tuple(value.shape)}"
        )
    if isinstance(value, Tensor) and value.requires_grad:
        _check_slope(name, function, times)
        return
    if bool((torch.as_tensor(value, dtype=times.dtype).expand(times.shape).diff() != 0).any()):
        raise InvalidInput(
            f"{name}(t) changes with t but autograd cannot follow it, so that its derivative would be 0; write it with "
            f"torch's functions of t, e.g. {name}=lambda t: torch.cos(t)"
        )


def _check_range(name: str, value: Tensor, times: Tensor) -> None:
    good = value.isfinite() & (value >= 0.0)
    if bool(good.all()):
        return
    bad = (~good).nonzero()[0, 0]
    hint = "there is no such time here"
    if bool(good.any()):
        first = int(good.nonzero()[0, 0])
        after = (~good[first:]).nonzero()
        last = first + int(after[0, 0]) - 1 if after.numel() else len(times) - 1
        hint = f"write t_min={times[first].item():.4g}, t_max={times[last].item():.4g}"
    raise InvalidInput(
        f"α and σ must be finite and not negative on [t_min, t_max], but {name}({times[bad].item():.4g}) = {value[bad].item():.4g}; {hint}"
    )


def _check_slope(name: str, function: Callable[[Tensor], Tensor | float], times: Tensor) -> None:
    """Refuse a function of which autograd follows a part only: compared with differences at most times, kinks aside."""
    h = 1e-3 * (times[-1] - times[0])
    inner = times[2:-2:4] + 0.37 * h
    low, high, middle = (torch.as_tensor(function(t)).double().expand(t.shape) for t in (inner - h, inner + h, inner))
    seen, told = (high - low) / (2.0 * h), _derivative(lambda t: torch.as_tensor(function(t)), inner).double()
    off = (seen - told).abs() > 0.02 * (seen.abs() + told.abs()) + 1e-3 * middle.abs().max() / (times[-1] - times[0])
    if bool(off.double().mean() > 0.5):
        t, a, b = (v[off][0].item() for v in (inner, seen, told))
        raise InvalidInput(
            f"autograd's derivative of {name} is {b:g} at t={t:g}, where {name} changes at the rate {a:g}: it cannot follow all of it. "
            f"Write {name} with torch's functions of t throughout, without detach, rounding or numpy"
        )


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    try:
        leaf = None if torch.is_inference_mode_enabled() else t.detach().requires_grad_(True)
    except RuntimeError:  # t is of inference mode, or a transform of torch.func is under way
        leaf = None
    if leaf is None:  # where autograd cannot record torch.func still can, at four times the price
        return torch.func.grad(lambda t: function(t).sum())(t.detach())
    with torch.enable_grad():
        value = function(leaf)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    return torch.zeros_like(t) if slope is None else slope.detach()
