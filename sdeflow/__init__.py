"""Solve and measure the differential equations of diffusion models.

process → prediction → equation → solver → solution; see docs/index.md.
"""

from sdeflow import diffusers, problems
from sdeflow.brownian import BrownianPath
from sdeflow.charts import BentLine, LogSNR, PlainTime, SNRTime, StraightLine, Trigonometric, chart_for
from sdeflow.equations import Equation, ForwardSDE, ProbabilityFlowODE, ReverseSDE
from sdeflow.errors import InvalidInput, MissingDependency, SdeflowError, SolveFailed
from sdeflow.grids import Discrete, InChart, Karras, Multiscale, Nodes, Power, Quadratic, UniformLogSNR, UniformTime
from sdeflow.guidance import ClassifierFree, ClassifierGuidance, Inpaint
from sdeflow.likelihood import Likelihood, bits_per_dim, decode, encode, log_likelihood
from sdeflow.networks import Checkpointed, Conditioned
from sdeflow.predictions import (
    DataPrediction,
    EDMPrediction,
    FlowPrediction,
    NoisePrediction,
    Prediction,
    ScorePrediction,
    VPrediction,
)
from sdeflow.processes import EDM, VE, VP, CosineVP, DiscreteVP, Process, RectifiedFlow, SubVP
from sdeflow.random import sample_seeds
from sdeflow.scale import data_scale
from sdeflow.solution import Solution, Status
from sdeflow.solve import solve
from sdeflow.solvers.adams import Adams
from sdeflow.solvers.adaptive_rk import Dopri5, Tsit5
from sdeflow.solvers.ancestral import DDPM, ERSDE, EDMHeun, Restart
from sdeflow.solvers.exponential import DDIM, DEIS, DPMSolver, DPMSolverPP, EulerAncestral, SASolver, UniPC
from sdeflow.solvers.fixed_adams import FixedAdams
from sdeflow.solvers.gotta_go_fast import GottaGoFast
from sdeflow.solvers.runge_kutta import RungeKutta
from sdeflow.solvers.stochastic import (
    SEA,
    SOSRA,
    SRA1,
    SRA2,
    SRA3,
    EulerMaruyama,
    ExponentialShARK,
    Milstein,
    ShARK,
    StochasticHeun,
)
from sdeflow.solvers.stochastic_adams import StochasticAdams
from sdeflow.solvers.torchdiffeq import TorchDiffEq
from sdeflow.solvers.torchsde import TorchSDE
from sdeflow.solvers.torchsde_equation import as_torchsde
from sdeflow.tune import tune

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "EDM",
    "ERSDE",
    "SEA",
    "SOSRA",
    "SRA1",
    "SRA2",
    "SRA3",
    "VE",
    "VP",
    "Adams",
    "BentLine",
    "BrownianPath",
    "Checkpointed",
    "ClassifierFree",
    "ClassifierGuidance",
    "Conditioned",
    "CosineVP",
    "DPMSolver",
    "DPMSolverPP",
    "DataPrediction",
    "Discrete",
    "DiscreteVP",
    "Dopri5",
    "EDMHeun",
    "EDMPrediction",
    "Equation",
    "EulerAncestral",
    "EulerMaruyama",
    "ExponentialShARK",
    "FixedAdams",
    "FlowPrediction",
    "ForwardSDE",
    "GottaGoFast",
    "InChart",
    "Inpaint",
    "InvalidInput",
    "Karras",
    "Likelihood",
    "LogSNR",
    "Milstein",
    "MissingDependency",
    "Multiscale",
    "Nodes",
    "NoisePrediction",
    "PlainTime",
    "Power",
    "Prediction",
    "ProbabilityFlowODE",
    "Process",
    "Quadratic",
    "RectifiedFlow",
    "Restart",
    "ReverseSDE",
    "RungeKutta",
    "SASolver",
    "SNRTime",
    "ScorePrediction",
    "SdeflowError",
    "ShARK",
    "Solution",
    "SolveFailed",
    "Status",
    "StochasticAdams",
    "StochasticHeun",
    "StraightLine",
    "SubVP",
    "TorchDiffEq",
    "TorchSDE",
    "Trigonometric",
    "Tsit5",
    "UniPC",
    "UniformLogSNR",
    "UniformTime",
    "VPrediction",
    "as_torchsde",
    "bits_per_dim",
    "chart_for",
    "data_scale",
    "decode",
    "diffusers",
    "encode",
    "log_likelihood",
    "problems",
    "sample_seeds",
    "solve",
    "tune",
]
