"""The generator against its published numbers, and its floats against their laws (false-alarm rate 1e-6 a test)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sdeflow.errors import InvalidInput
from sdeflow.random import Key, bridges, lattice_normals, sample_seeds, standard_normal, uniform

RATE = 1e-6


def unsigned(x: torch.Tensor) -> list[int]:
    return [int(v) & (2**64 - 1) for v in x.flatten().tolist()]


def test_sample_seeds_are_the_published_splitmix64_sequence():
    """Test vector of Vigna's splitmix64.c for the seed 1234567, and the first numbers for 0."""
    assert unsigned(sample_seeds(1234567, 5)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert unsigned(sample_seeds(0, 3)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def java_split(seed: int) -> tuple[int, int]:
    """SplittableRandom(seed).split() in Python's own integers, from the algorithm as published."""
    word, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix64(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    def mix_gamma(z):
        z = (z ^ (z >> 33)) * 0xFF51AFD7ED558CCD & word
        z = (z ^ (z >> 33)) * 0xC4CEB9FE1A85EC53 & word
        z = (z ^ (z >> 33)) | 1
        return z ^ 0xAAAAAAAAAAAAAAAA if (z ^ (z >> 1)).bit_count() < 24 else z

    return mix64((seed + golden) & word), mix_gamma((seed + 2 * golden) & word)


def test_keys_are_split_generators():
    seeds = sample_seeds(3, 4000)
    key = Key.of(seeds)
    expected = [java_split(s) for s in unsigned(seeds)]
    assert list(zip(unsigned(key.state), unsigned(key.gamma), strict=True)) == expected
    assert all((g ^ (g >> 1)).bit_count() >= 24 for _, g in expected)


def test_values_do_not_depend_on_the_batch_or_the_shape():
    seeds = sample_seeds(11, 37)
    for draw in (standard_normal, uniform):
        whole = draw(seeds, (3, 5), index=4, stream=2)
        rows = torch.tensor([30, 2, 17])
        assert torch.equal(draw(seeds[rows], (3, 5), index=4, stream=2), whole[rows])
        assert torch.equal(draw(seeds, (7,), index=4, stream=2), whole.flatten(1)[:, :7])
        per_sample = draw(seeds, (3, 5), index=torch.full((37,), 4), stream=2)
        assert torch.equal(per_sample, whole)
        assert not torch.equal(draw(seeds, (3, 5), index=5, stream=2), whole)
        assert not torch.equal(draw(seeds, (3, 5), index=4, stream=1), whole)
        assert torch.equal(draw(seeds, (3, 5), index=4, stream=2, dtype=torch.float32), whole.float())


@pytest.mark.parametrize("axis", ["seeds", "elements", "indices"])
def test_laws_and_independence_along_every_axis(axis: str):
    """KS against the exact law, moments and lag correlations, whichever of seed, element and index runs."""
    n = 200_000
    if axis == "seeds":
        seeds, shape, index = torch.arange(n), (2,), 0
    elif axis == "elements":
        seeds, shape, index = torch.tensor([5, 6]), (n // 2,), 0
    else:
        seeds, shape, index = torch.full((n,), 9), (2,), torch.arange(n)
    z = standard_normal(seeds, shape, index=index).numpy()
    u = uniform(seeds, shape, index=index).numpy()
    assert stats.kstest(z.flatten(), "norm").pvalue > RATE
    assert stats.kstest(u.flatten(), "uniform").pvalue > RATE
    counts = np.bincount((u.flatten() * 4096).astype(int), minlength=4096)
    assert stats.chisquare(counts).pvalue > RATE
    if z.shape[0] == 2:
        z = z.T
    bound = stats.norm.isf(RATE / 10) / math.sqrt(z.shape[0] - 8)
    for values in (z, z**2 - 1.0):
        standard = values / values.std(0)
        assert abs((standard[:, 0] * standard[:, 1]).mean()) < bound
        for lag in (1, 2, 8):
            assert (abs((standard[lag:] * standard[:-lag]).mean(0)) < bound).all()


def test_what_is_refused():
    with pytest.raises(InvalidInput, match="one a sample"):
        sample_seeds([1, 2], 3)
    with pytest.raises(InvalidInput, match="sample_seeds"):
        uniform(torch.tensor([1.0]), (2,))
    with pytest.raises(InvalidInput, match="index"):
        uniform(torch.tensor([1]), (2,), index=torch.tensor([1, 2]))


def test_lattice_normals_have_the_moments_of_two_independent_normals():
    Z, N = (v.double() for v in lattice_normals(torch.float32, torch.device("cpu")))
    for x in (Z, N):
        assert abs(x.mean()) < 1e-6 and abs(x.square().mean() - 1.0) < 1e-6 and abs((x**4).mean() - 3.0) < 1e-2
        assert (
            x.sort().values - torch.special.ndtri((torch.arange(len(x)).double() + 0.5) / len(x))
        ).abs().max() < 2e-2
    assert abs((Z * N).mean()) < 1e-7 and abs((Z**2 * N**2).mean() - 1.0) < 5e-3
    assert max(abs((Z**3 * N).mean()), abs((Z * N**3).mean()), abs((Z**2 * N).mean())) < 5e-3


@pytest.mark.parametrize("levels", [1, 4, 6])
def test_bridges_have_the_moments_of_brownian_motion_given_its_increment_and_area(levels: int):
    """Exactly: mean and covariance of the increments and areas between knots, by conditioning; values and integrals add up."""
    table = bridges(levels, torch.float64, torch.device("cpu")).numpy()
    K, entries = table.shape[:2]
    step, area, value, integral = np.moveaxis(table, 2, 0)
    found = np.concatenate([step, area])
    # ∫w = Σ (1/K)(w(start) + D/2 + H), the areas here being √12 H
    later = (K - 1 - np.arange(K)) / K
    given = np.stack([np.r_[np.ones(K), np.zeros(K)], np.r_[later + 0.5 / K, np.full(K, 12**-0.5 / K)]])
    free = np.eye(2 * K) / K
    exact = free - free @ given.T @ np.linalg.solve(given @ free @ given.T, given @ free)
    assert abs(found.mean(1)).max() < 1e-15
    assert abs(found @ found.T / entries - exact).max() < 1e-14
    assert abs(np.diff(value, axis=0) - step[:-1]).max() < 1e-14 and abs(value[-1] + step[-1]).max() < 1e-14
    assert abs(np.diff(integral, axis=0) - ((value + 0.5 * step + 12**-0.5 * area) / K)[:-1]).max() < 1e-14
    fourth = (found**4).mean(1) / (found**2).mean(1) ** 2
    assert abs(fourth - 3.0).max() < 6.0 * math.sqrt(24.0 / (entries / 2))


def test_deeper_bridges_refine_shallower_ones():
    coarse, fine = (bridges(levels, torch.float64, torch.device("cpu")) for levels in (4, 6))
    assert torch.equal(coarse[:, :, 2:], fine[::4, :, 2:])
    single = bridges(6, torch.float32, torch.device("cpu"))
    assert torch.equal(single, fine.float())


@pytest.mark.parametrize("seed", [1.5, "a", [1, 2, None], [0.5, 1.0, 2.0]])
def test_seeds_that_are_no_integers_are_refused(seed):
    with pytest.raises(InvalidInput, match="seed must be an integer or 3 integers"):
        sample_seeds(seed, 3)


def test_numpy_integers_are_seeds():
    assert torch.equal(sample_seeds(np.int64(7), 3), sample_seeds(7, 3))
    assert torch.equal(sample_seeds(np.arange(3), 3), sample_seeds([0, 1, 2], 3))
