"""Counter-based random numbers keyed by one seed a sample (interim: SplitMix64; replaced by a published "
"counter-based generator)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput


def _i64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _i64(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _i64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _i64(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def sample_seeds(seed: int | Sequence[int] | Tensor, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """One int64 seed a sample: derived from an integer and the row, or the given ones."""
    if isinstance(seed, int):
        rows = torch.arange(batch, dtype=torch.int64, device=device)
        return _mix(_mix(torch.full_like(rows, _i64(seed))) + rows)
    seeds = torch.as_tensor(seed, device=device)
    if seeds.shape != (batch,) or seeds.is_floating_point():
        raise InvalidInput(
            f"seed must be an integer or {batch} integers, one a sample; got shape {tuple(seeds.shape)} of "
            f"{seeds.dtype}"
        )
    return seeds.long()


def uniform(
    seeds: Tensor,
    shape: Sequence[int],
    index: int | Tensor = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float64,
    device=None,
) -> Tensor:
    """Uniforms in (0, 1), (batch, *shape)."""
    n = math.prod(shape)
    index = torch.as_tensor(index, dtype=torch.int64, device=seeds.device)
    key = _mix(_mix(seeds + _i64(0xD1B54A32D192ED03 * (stream + 1))) + index)
    bits = _mix(key[:, None] + torch.arange(n, dtype=torch.int64, device=seeds.device) * _i64(0xA24BAED4963EE407))
    return ((_shift(bits, 11).double() + 0.5) * 2.0**-53).to(dtype).reshape(-1, *shape)


def standard_normal(
    seeds: Tensor,
    shape: Sequence[int],
    index: int | Tensor = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float64,
    device=None,
) -> Tensor:
    """Standard normals, (batch, *shape)."""
    u = uniform(seeds, (2, *shape), index, stream)
    return ((-2.0 * u[:, 0].log()).sqrt() * (2.0 * math.pi * u[:, 1]).cos()).to(dtype)
