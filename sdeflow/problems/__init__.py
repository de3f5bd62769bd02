"""Problems whose answer is known: Gaussian mixtures with exact score, density, samples and networks under every process."""

from sdeflow.problems.catalogue import digits, from_points, gaussian, mixture64, ring
from sdeflow.problems.gaussian import GaussianProblem
from sdeflow.problems.mixture import Mixture
from sdeflow.problems.problem import ExactNetwork, Problem

__all__ = [
    "ExactNetwork",
    "GaussianProblem",
    "Mixture",
    "Problem",
    "digits",
    "from_points",
    "gaussian",
    "mixture64",
    "ring",
]
