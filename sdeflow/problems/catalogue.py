"""The ready-made problems and the way to make one's own."""

from __future__ import annotations

import math

import numpy as np
import torch

from sdeflow.errors import InvalidInput, MissingDependency
from sdeflow.problems.gaussian import GaussianProblem
from sdeflow.problems.mixture import Array, Mixture
from sdeflow.problems.problem import Problem


def gaussian(
    mean: Array | float | None = None,
    std: Array | float | None = None,
    cov: Array | None = None,
    dim: int | None = None,
) -> GaussianProblem:
    """N(m, C), with closed forms for its flow and its moments.

    By default 16-D and anisotropic: standard deviations from 0.05 to 2 in geometric progression and means from −1 to 1, so that fast and
    slow directions meet in one problem as they do in data.

    Args:
        mean: a number or (d,).
        std: a number or (d,); not together with cov.
        cov: (d, d), symmetric and positive definite.
        dim: d, where no array says it.
    """
    if std is not None and cov is not None:
        raise InvalidInput("give std or cov, not both")
    given = {"mean": mean, "std": std, "cov": cov}
    arrays = {k: torch.as_tensor(v, dtype=torch.float64).detach().cpu() for k, v in given.items() if v is not None}
    sizes = {a.shape[0] for a in arrays.values() if a.ndim} | ({int(dim)} if dim is not None else set())
    if len(sizes) > 1 or any(n < 1 for n in sizes):
        raise InvalidInput(f"mean, std, cov and dim must agree on one dimension ≥ 1; got {sorted(sizes)}")
    d = sizes.pop() if sizes else 16
    m = arrays.get(
        "mean", torch.linspace(-1.0, 1.0, d, dtype=torch.float64) if d > 1 else torch.zeros(1, dtype=torch.float64)
    )
    if m.ndim > 1:
        raise InvalidInput(f"mean must be a number or ({d},); got shape {tuple(m.shape)}")
    means = m.expand(d).reshape(1, d)
    if "cov" in arrays:
        return GaussianProblem("gaussian", Mixture.of(means, cov=arrays["cov"]))
    s = arrays.get("std", torch.logspace(math.log10(0.05), math.log10(2.0), d, dtype=torch.float64))
    if s.ndim > 1:
        raise InvalidInput(f"std must be a number or ({d},); got shape {tuple(s.shape)}")
    return GaussianProblem("gaussian", Mixture.of(means, std=s.expand(d).reshape(1, d)))


def ring(modes: int = 8, radius: float = 1.0, std: float = 0.05) -> Problem:
    """Equal Gaussians on a circle in the plane; the label is the mode, counted anticlockwise from (radius, 0)."""
    if modes < 1 or not radius >= 0:
        raise InvalidInput(f"ring needs modes ≥ 1 and radius ≥ 0; got modes={modes}, radius={radius}")
    angle = 2.0 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    return Problem(
        "ring", Mixture.of(radius * torch.stack([angle.cos(), angle.sin()], 1), std=std), torch.arange(modes)
    )


def mixture64(seed: int = 0, components: int = 16, dim: int = 64) -> Problem:
    """A mixture with full covariances of its own for every component; the label is the component.

    Means are standard normal; every covariance has a random rotation and standard deviations log-uniform in [0.05, 1]; weights are
    uniform in [½, 3⁄2], normalised. Drawn with numpy's PCG64 from `seed`.
    """
    draw = np.random.default_rng(seed)
    means = draw.standard_normal((components, dim))
    std = np.exp(draw.uniform(math.log(0.05), 0.0, (components, dim)))
    axes, _ = np.linalg.qr(draw.standard_normal((components, dim, dim)))
    cov = np.einsum("kde,ke,kfe->kdf", axes, std**2, axes)
    weights = draw.uniform(0.5, 1.5, components)
    name = (
        "mixture64"
        if (seed, components, dim) == (0, 16, 64)
        else f"mixture64(seed={seed}, components={components}, dim={dim})"
    )
    return Problem(
        name,
        Mixture.of(torch.from_numpy(means), cov=torch.from_numpy(0.5 * (cov + cov.swapaxes(1, 2))), weights=weights),
        torch.arange(components),
    )


def digits(std: float = 0.1) -> Problem:
    """Real data: scikit-learn's 1797 handwritten digits, 8×8 pixels scaled from [0, 16] to [−1, 1], each widened by N(0, std² I).

    The exact denoiser is a softmax over the data set; the label is the digit. Events are (64,); reshape to (8, 8) to look at them.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("the digits problem needs scikit-learn; write: pip install scikit-learn") from error
    pixels, label = load_digits(return_X_y=True)
    points = torch.from_numpy(pixels / 8.0 - 1.0)
    return from_points(points, std, labels=label, name="digits" if std == 0.1 else f"digits(std={std:g})")


def from_points(points: Array, std: Array | float = 0.1, labels: Array | None = None, name: str = "points") -> Problem:
    """A data set of one's own as a problem: the mixture of its points, each widened by N(0, std² I).

    Args:
        points: (n, d) or (n, *event), flattened here.
        std: a number, or (n,) one for each point.
        labels: (n,) integers ≥ 0, the classes.

    Example:
        >>> problem = sf.problems.from_points(points, std=0.1)
    """
    means = torch.as_tensor(points, dtype=torch.float64)
    if means.ndim < 2 or not means.shape[0]:
        raise InvalidInput(
            f"points must be an (n, d) array with n ≥ 1; got shape {tuple(means.shape)}. For points on a line write points[:, None]"
        )
    classes = None if labels is None else torch.as_tensor(labels)
    return Problem(name, Mixture.of(means.flatten(1), std=std), classes)
