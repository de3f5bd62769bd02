"""Runs that differ in anything but their solver's name have keys, and truths, of their own."""

from __future__ import annotations

import pytest
import torch

import sdeflow as sf
from sdeflow import measure as me
from sdeflow.solvers.base import Solver

PROCESS, RING = sf.VP(), sf.problems.ring()
NETWORK = RING.network(PROCESS, "noise")
GIVEN, FOUR, NULL = (sf.NoisePrediction(sf.Conditioned(NETWORK, label=k), PROCESS) for k in (3, 4, -1))


def bent(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return NETWORK(x, t)


def scaled(factor: float) -> sf.Prediction:
    return sf.NoisePrediction(lambda x, t: factor * NETWORK(x, t), PROCESS)


def inpainted(known: float) -> sf.Prediction:
    return sf.Inpaint(NULL, torch.full((2,), known), torch.tensor([1.0, 0.0]))


def guided(scale: float) -> sf.Prediction:
    return sf.ClassifierFree(GIVEN, NULL, scale=scale)


def hooked(slope: float) -> sf.Prediction:
    return sf.NoisePrediction(bent, PROCESS, time=lambda t: slope * t)


def test_the_key_knows_guidance_conditions_hooks_and_functions():
    def key(predict: sf.Prediction, solver: Solver | None = None) -> str:
        equation = sf.ReverseSDE(predict)
        return me.run_key(
            RING, equation, solver or sf.DDIM(steps=4), 8, 0, 1.0, 0.1, "prior", torch.float64, torch.device("cpu")
        )

    make = [
        lambda: key(guided(1.0)),
        lambda: key(guided(3.0)),
        lambda: key(sf.ClassifierFree(FOUR, NULL, scale=3.0)),
        lambda: key(sf.ClassifierFree(GIVEN, NULL, scale=3.0, interval=(0.1, 0.5))),
        lambda: key(inpainted(0.0)),
        lambda: key(inpainted(1.0)),
        lambda: key(scaled(1.0)),
        lambda: key(scaled(2.0)),
        lambda: key(hooked(1.0)),
        lambda: key(hooked(0.9)),
        lambda: key(sf.NoisePrediction(bent, PROCESS, dtype=torch.float32)),
        lambda: key(scaled(1.0), sf.ERSDE(steps=4, phi=lambda rho: rho**2)),
        lambda: key(scaled(1.0), sf.ERSDE(steps=4, phi=lambda rho: rho**3)),
    ]
    keys = [m() for m in make]
    assert len(set(keys)) == len(keys) and keys == [m() for m in make]


@pytest.mark.parametrize("make", [guided, hooked, scaled])
def test_two_predictions_of_one_network_are_judged_by_truths_of_their_own(make):
    """Their flows differ by 1e-2 and more; a truth kept from the other would be that far off."""
    for setting in (1.0, 0.9):
        equation = sf.ProbabilityFlowODE(make(setting))
        record = me.measure(RING, PROCESS, equation, sf.Tsit5(rtol=1e-7, atol=1e-7), samples=4)
        assert record.error.value < 1e-5


def test_a_function_that_names_itself_and_others_has_a_key():
    def again(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        table = {"again": again, "bent": bent}
        return table["bent"](x, t)

    first, second = (me.describe(sf.NoisePrediction(again, PROCESS)) for _ in range(2))
    assert first == second != me.describe(sf.NoisePrediction(bent, PROCESS))
