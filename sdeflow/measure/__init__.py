"""Errors with intervals and floors, references that know their uncertainty, and one record for every run."""

from sdeflow.measure.errors import (
    energy_distance,
    energy_distance_estimate,
    moment_deviation,
    moment_error,
    moment_error_estimate,
    monte_carlo_floor,
    projections,
    rmse,
    sample_rmse,
    sliced_wasserstein,
    sliced_wasserstein_estimate,
)
from sdeflow.measure.propagation import Moments, exact_moments
from sdeflow.measure.record import Record, describe, run_key
from sdeflow.measure.reference import Reference, reference
from sdeflow.measure.run import Truth, compare, exact_samples, measure, prepare, strong_error
from sdeflow.measure.statistics import Estimate, bootstrap
from sdeflow.measure.weak import mean_element, mean_square, weak_errors

__all__ = [
    "Estimate",
    "Moments",
    "Record",
    "Reference",
    "Truth",
    "bootstrap",
    "compare",
    "describe",
    "energy_distance",
    "energy_distance_estimate",
    "exact_moments",
    "exact_samples",
    "mean_element",
    "mean_square",
    "measure",
    "moment_deviation",
    "moment_error",
    "moment_error_estimate",
    "monte_carlo_floor",
    "prepare",
    "projections",
    "reference",
    "rmse",
    "run_key",
    "sample_rmse",
    "sliced_wasserstein",
    "sliced_wasserstein_estimate",
    "strong_error",
    "weak_errors",
]
