"""The exceptions sdeflow raises. Each also is the built-in exception a caller would expect."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdeflow.solution import Solution


class SdeflowError(Exception):
    """Base of every exception raised on purpose by sdeflow."""


class InvalidInput(SdeflowError, ValueError):
    """An argument cannot be used; the message says what was given, what was expected and what to write."""


class MissingDependency(SdeflowError, ImportError):
    """An optional package is not installed; the message holds the install command."""


class SolveFailed(SdeflowError, RuntimeError):
    """At least one sample did not reach the end of the interval.

    Attributes:
        solution: the partial `Solution`; finished samples in it are complete, `solution.status` tells them apart.
    """

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution


def finite(value: Any) -> bool:
    """Whether a setting is a finite real number: Python's, numpy's, or nothing else."""
    return isinstance(value, Real) and math.isfinite(value)
