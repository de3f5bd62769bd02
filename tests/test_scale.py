"""The scale of a network's data, from coarse solves of a pilot."""

import math

import pytest
import torch

import sdeflow as sf


@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(), sf.RectifiedFlow()], ids=["VP", "EDM", "RectifiedFlow"])
@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
def test_scale_of_a_gaussian(process, scale):
    problem = sf.problems.from_points(torch.zeros(1, 8), std=scale)
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    pilot = process.prior((64, 8), seed=3, dtype=torch.float64)
    # what the flow makes of these very samples: a factor, the same for all
    tight = sf.Adams(rtol=1e-8, atol=1e-8, chart=sf.StraightLine(c=scale))
    due = sf.solve(equation, tight, pilot).x.var(0).mean().sqrt().item()
    # between 0.35 s and 1.4 s the choice of c hardly matters
    assert 1 / 1.2 < sf.data_scale(equation, pilot) / due < 1.2
    assert sf.data_scale(equation, pilot, steps=80) == pytest.approx(due, rel=0.03)
    assert due == pytest.approx(scale, rel=0.15)


def test_it_costs_what_it_says_and_takes_a_reverse_sde():
    process = sf.VP()
    calls = []

    def network(x, t):
        calls.append(len(x))
        return x

    predict = sf.NoisePrediction(network, process)
    pilot = process.prior((4, 1, 2, 2), seed=0)
    sde = sf.data_scale(sf.ReverseSDE(predict, eta=1.0), pilot, steps=7)
    assert calls == [4] * 7 and sde == sf.data_scale(sf.ProbabilityFlowODE(predict), pilot, steps=7)


def test_bad_input_is_named():
    process = sf.VP()
    equation = sf.ProbabilityFlowODE(sf.DataPrediction(lambda x, t: x * math.nan, process))
    pilot = process.prior((4, 2), seed=0)
    for call, word in (
        (lambda: sf.data_scale(sf.Equation(lambda t, x: x), pilot), "ProbabilityFlowODE"),
        (lambda: sf.data_scale(equation, pilot[:1]), "at least 2"),
        (lambda: sf.data_scale(equation, pilot), "NaN"),
    ):
        with pytest.raises(sf.InvalidInput, match=word):
            call()
