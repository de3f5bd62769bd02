"""Problems against scikit-learn's own densities."""

import numpy as np
import pytest
import torch

import sdeflow as sf

pytest.importorskip("sklearn")


def test_digits_density_is_the_kernel_density_estimate():
    from sklearn.neighbors import KernelDensity

    problem = sf.problems.digits()
    x = torch.cat([problem.sample(32, dtype=torch.float64), sf.VP().prior((8, 64), dtype=torch.float64)])
    # one leaf for all points: with more, scikit-learn's bounds in 64-D stop it early however small the tolerances
    peer = KernelDensity(bandwidth=0.1, kernel="gaussian", rtol=0, atol=0, leaf_size=2000).fit(
        problem.mixture.means.numpy()
    )
    np.testing.assert_allclose(problem.log_prob(x), peer.score_samples(x.numpy()), rtol=1e-10, atol=1e-9)


def test_full_mixture_density_and_labels_are_the_gaussian_mixtures():
    from sklearn.mixture import GaussianMixture

    problem = sf.problems.mixture64()
    m = problem.mixture
    peer = GaussianMixture(m.components, covariance_type="full")
    assert m.axes is not None
    cov = m.axes @ torch.diag_embed(m.variances) @ m.axes.mT
    peer.weights_, peer.means_, peer.covariances_ = m.weights.numpy(), m.means.numpy(), cov.numpy()
    peer.precisions_cholesky_ = torch.linalg.cholesky(torch.linalg.inv(cov)).numpy()
    x = problem.sample(64, dtype=torch.float64)
    np.testing.assert_allclose(problem.log_prob(x), peer.score_samples(x.numpy()), rtol=1e-9, atol=1e-9)
