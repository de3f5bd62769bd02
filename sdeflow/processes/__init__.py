"""Gaussian diffusion processes x_t = α(t) x_0 + σ(t) ε."""

from sdeflow.processes.base import PRIOR_STREAM, Process, Time, as_time, expand
from sdeflow.processes.discrete import DiscreteVP
from sdeflow.processes.named import EDM, VE, VP, CosineVP, RectifiedFlow, SubVP

__all__ = [
    "EDM",
    "PRIOR_STREAM",
    "VE",
    "VP",
    "CosineVP",
    "DiscreteVP",
    "Process",
    "RectifiedFlow",
    "SubVP",
    "Time",
    "as_time",
    "expand",
]
