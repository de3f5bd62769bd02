"""Counter-based random numbers keyed by one seed a sample: SplitMix64 in torch's wrapping int64 arithmetic.

Word number c of the generator with state s and odd increment γ is mix64(s + (c + 1) γ), so any word is had at once. A (seed,
stream) pair has the generator that `SplittableRandom(seed + stream·S).split()` returns: its own s and its own γ. The integers
are the same on every device; the transform to floats comes after.

Sources: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (the generator, its γ, its tests:
DieHarder and TestU01's BigCrush, single and split); Box & Muller 1958.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
_STREAM = _signed(0xD1B54A32D192ED03)
_MIX = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_MURMUR = _signed(0xFF51AFD7ED558CCD), _signed(0xC4CEB9FE1A85EC53)


def _fold_(z: Tensor, n: int, scratch: Tensor) -> Tensor:
    """z ^= z >>> n, in place; torch's shift keeps the sign, so the mask takes it off."""
    torch.bitwise_right_shift(z, n, out=scratch)
    scratch.bitwise_and_((1 << (64 - n)) - 1)
    return z.bitwise_xor_(scratch)


def mix64_(z: Tensor) -> Tensor:
    """SplitMix64's output function, in place on int64 words of any shape (Stafford's variant 13)."""
    scratch = torch.empty_like(z)
    _fold_(z, 30, scratch).mul_(_MIX[0])
    _fold_(z, 27, scratch).mul_(_MIX[1])
    return _fold_(z, 31, scratch)


def _mix_gamma(z: Tensor) -> Tensor:
    """SplittableRandom's increment: odd, and with at least 24 changes from bit to bit."""
    z, scratch = z.clone(), torch.empty_like(z)
    _fold_(z, 33, scratch).mul_(_MURMUR[0])
    _fold_(z, 33, scratch).mul_(_MURMUR[1])
    _fold_(z, 33, scratch).bitwise_or_(1)
    changes = _fold_(z.clone(), 1, scratch)
    few = sum(((changes >> bit) & 1 for bit in range(64)), start=torch.zeros_like(z)) < 24
    return torch.where(few, z ^ _signed(0xAAAAAAAAAAAAAAAA), z)


class Key(NamedTuple):
    """One generator a sample: state s and odd increment γ, int64 (batch,)."""

    state: Tensor
    gamma: Tensor

    @classmethod
    def of(cls, seeds: Tensor, stream: int = 0) -> Key:
        """The generators of (seed, stream), seeds int64 (batch,)."""
        root = seeds + _signed(stream * _STREAM)
        return cls(mix64_(root + GOLDEN), _mix_gamma(root + _signed(2 * GOLDEN)))

    def words(self, counter: Tensor) -> Tensor:
        """Words number `counter`, int64 broadcastable against (batch, n): int64 (batch, n)."""
        return mix64_(self.state[:, None] + (counter + 1) * self.gamma[:, None])


def normal_pair_(words: Tensor, first: Tensor, second: Tensor) -> None:
    """Box–Muller: √(−2 ln u)·(cos 2πv, sin 2πv), from contiguous 64-bit words into two tensors of their shape.

    u is the high half, at (k + ½)/2³², v the low half. The logarithm is taken in float64 whatever the dtype of the results is,
    since ln u near u = 1 has no accuracy in float32.
    """
    wide = torch.float32 if words.device.type == "mps" else torch.float64
    halves = words.view(torch.int32).view(*words.shape, 2)
    # the signed half plus 2³¹ runs over 0 … 2³² − 1
    radius = halves[..., 1].to(wide).add_(2.0**31 + 0.5).mul_(2.0**-32).log_().mul_(-2.0).to(first.dtype).sqrt_()
    angle = halves[..., 0].to(first.dtype).add_(0.5).mul_(math.pi * 2.0**-31)
    torch.cos(angle, out=first).mul_(radius)
    torch.sin(angle, out=second).mul_(radius)


LATTICE_BITS = 15
"""Bits of a word that choose one point of `lattice_normals`: a word chooses four."""
LATTICE_MULTIPLIER = 9957


@functools.cache
def lattice_normals(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """2¹⁵ equally likely pairs (Z, N) that stand for two standard normals, (2¹⁵,) each: four pairs a word, not one.

    A rank-1 lattice (k, ka mod 2¹⁵) through x = c₁m + c₃m³, m the inverse normal distribution of (k + ½)/2¹⁵, with c such that
    E x² = 1 and E x⁴ = 3 exactly; then the second less its share of the first, so that E ZN = 0. a has the smallest mixed
    moments among the multipliers with long shortest vectors; what remains is E Z²N² = 1.005. Each takes 2¹⁵ values within
    ±4.2. Rounded to float32, so that every dtype sees the same, on the CPU, so that every device does.
    """
    n = 1 << LATTICE_BITS
    k = torch.arange(n, dtype=torch.int64)
    m = torch.special.ndtri((k.double() + 0.5) / n)
    Z = 0.999844872 * m + 5.84791532e-05 * m**3
    Z = Z / Z.square().mean().sqrt()
    N = Z[(k * LATTICE_MULTIPLIER) % n]
    N = N - (N * Z).mean() * Z
    N = N / N.square().mean().sqrt()
    return Z.float().to(device, dtype), N.float().to(device, dtype)


BRIDGE_BITS = 14
"""Bits of a word that choose one of the `bridges`."""
BRIDGE_LEVELS = 6
"""Halvings a bridge is made of."""
BRIDGE_STREAM = 17


@functools.cache
def bridges(levels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """2¹⁴ equally likely Brownian bridges b on [0, 1], with ∫b = 0 too: (2^levels, 2¹⁴, 4), levels ≤ 6.

    Of the cell [θ, θ + 1/K], θ = j/K, K = 2^levels: b(θ + 1/K) − b(θ); √12 times the space-time Lévy area of b over it; b(θ);
    ∫₀^θ b. Between the knots b is the quadratic of these, so that deeper tables refine shallower ones.

    Normal numbers and their negatives, made uncorrelated: over the table first and second moments are exactly those of
    Brownian motion less its mean given (W, H) = 0, down to the knots. Fourth moments are a few per cent off, as 2¹³ draws are.
    Made on the CPU in float64, so that every device and dtype sees the same.
    """
    n, K = 1 << (BRIDGE_BITS - 1), 1 << BRIDGE_LEVELS
    normals = standard_normal(sample_seeds(0, n), (2 * K - 2,), stream=BRIDGE_STREAM)
    factor = torch.linalg.cholesky(normals.T @ normals / n)
    normals = torch.linalg.solve_triangular(factor, normals.T, upper=False)
    A = B = torch.zeros(1, n, dtype=torch.float64)
    for level in range(BRIDGE_LEVELS):
        # the halvings of `brownian_plan`, in standard normals
        Z, N = normals[(2 << level) - 2 : (4 << level) - 2].view(2, 1 << level, n)
        lean, bend = 0.375**0.5 * B + 0.125**0.5 * Z, 0.125**0.5 * B - 0.375**0.5 * Z
        A = torch.stack([0.5**0.5 * A + lean, 0.5**0.5 * A - lean], 1).flatten(0, 1)
        B = torch.stack([bend + 0.5**0.5 * N, bend - 0.5**0.5 * N], 1).flatten(0, 1)
    step, area = A * K**-0.5, B * (12.0 * K) ** -0.5
    start = torch.nn.functional.pad(step.cumsum(0), (0, 0, 1, 0))
    total = torch.nn.functional.pad(((start[:-1] + 0.5 * step + area) / K).cumsum(0), (0, 0, 1, 0))
    stride = 1 << (BRIDGE_LEVELS - levels)
    start, total, K = start[::stride], total[::stride], 1 << levels
    step = start.diff(dim=0)
    area = K * total.diff(dim=0) - start[:-1] - 0.5 * step
    table = torch.stack([step, 12.0**0.5 * area, start[:-1], total[:-1]], 2)
    return torch.cat([table, -table], 1).to(device, dtype)


def sample_seeds(seed: int | Sequence[int] | Tensor, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """One seed a sample, int64 (batch,).

    An integer gives the SplitMix64 sequence started from it, so row i depends on the integer and i alone; a sequence or
    integer tensor (batch,) gives itself.

    Raises:
        InvalidInput: the seeds are not `batch` integers.
    """
    if not isinstance(seed, Tensor):
        seed = _integers(seed, batch)
    if isinstance(seed, int):
        rows = torch.arange(1, batch + 1, dtype=torch.int64, device=device)
        return mix64_(rows * GOLDEN + _signed(seed))
    if not isinstance(seed, Tensor):
        seed = torch.tensor([_signed(s) for s in seed])
    if seed.shape != (batch,) or seed.is_floating_point():
        raise InvalidInput(
            f"seed must be an integer or {batch} integers, one a sample; got shape {tuple(seed.shape)} of {seed.dtype}"
        )
    return seed.to(device, torch.int64)


def _integers(seed: object, batch: int) -> int | list[int]:
    """Python integers from whatever counts as an integer (numpy's, too), or as a sequence of them."""
    try:
        return operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        return [operator.index(s) for s in seed]  # type: ignore[attr-defined]
    except TypeError:
        raise InvalidInput(
            f"seed must be an integer or {batch} integers, one a sample; got {seed!r}. Write seed=7"
        ) from None


def uniform(
    seeds: Tensor,
    shape: Sequence[int],
    index: int | Tensor = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms (k + ½)/2⁵³ in (0, 1), (batch, *shape), k the top 53 bits of word index·2³² + element.

    Args:
        seeds: int64 (batch,), one a sample (`sample_seeds`).
        shape: event shape.
        index: number of the draw, or one a sample (batch,).
        stream: keeps draws made for different ends apart.
        dtype, device: of the result; default device: that of the seeds. Computed in float64, then cast.
    """
    words = _words(seeds, math.prod(shape), index, stream, device)
    if words.device.type == "mps":
        value = ((words >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
    else:
        value = ((words >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
    return value.to(dtype).reshape(seeds.shape[0], *shape)


def standard_normal(
    seeds: Tensor,
    shape: Sequence[int],
    index: int | Tensor = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals, (batch, *shape): elements 2k and 2k + 1 are the Box–Muller pair of word index·2³² + k.

    A value depends on (seed, stream, index, element) alone. Arguments as for `uniform`.
    """
    n = math.prod(shape)
    words = _words(seeds, (n + 1) // 2, index, stream, device)
    wide = torch.float32 if words.device.type == "mps" else torch.float64
    first, second = (torch.empty(words.shape, dtype=wide, device=words.device) for _ in range(2))
    normal_pair_(words, first, second)
    return torch.stack([first, second], -1).flatten(1)[:, :n].to(dtype).reshape(seeds.shape[0], *shape)


def _words(seeds: Tensor, n: int, index: int | Tensor, stream: int, device: torch.device | str | None) -> Tensor:
    seeds = seeds.to(device or seeds.device)
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise InvalidInput(
            f"seeds must be int64 of shape (batch,); got {seeds.dtype} of {tuple(seeds.shape)}. Write "
            "sf.sample_seeds(seed, batch)"
        )
    draw = torch.as_tensor(index, dtype=torch.int64, device=seeds.device)
    if draw.ndim and draw.shape != seeds.shape:
        raise InvalidInput(f"index must be an integer or of shape {tuple(seeds.shape)}; got {tuple(draw.shape)}")
    elements = torch.arange(n, dtype=torch.int64, device=seeds.device)
    return Key.of(seeds, stream).words((draw << 32).reshape(-1, 1) + elements)
