"""Equations: plain drift/diffusion objects, checked once, counted once."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.counting import Counter, counting


def test_a_generic_drift_counts_one_evaluation():
    counter = Counter(3)
    bank = sf.Equation(lambda t, x: 0.04 * x)
    with counting(counter):
        assert torch.allclose(bank.drift(0.0, torch.ones(3, 1)), torch.full((3, 1), 0.04))
    assert counter.evaluations.tolist() == [1, 1, 1] and not bank.stochastic


def test_predictions_inside_a_drift_count_themselves():
    predict = sf.NoisePrediction(lambda x, t: x, sf.VP())
    twice = sf.Equation(lambda t, x: predict.score(x, t) + predict.velocity(x, t))
    counter = Counter(3)
    with counting(counter):
        twice.drift(0.5, torch.ones(3, 1))
    assert counter.evaluations.tolist() == [2, 2, 2]


def test_forward_sde_is_f_and_g():
    process = sf.SubVP()
    sde, t, x = sf.ForwardSDE(process), torch.tensor([0.2, 0.7]), torch.randn(2, 3, dtype=torch.float64)
    assert torch.allclose(sde.drift(t, x), process.f(t)[:, None] * x)
    assert torch.allclose(sde.diffusion(t, x), process.g(t)[:, None])
    assert (sde.start, sde.stop, sde.noise) == (process.t_min, process.t_max, "additive")


def test_reverse_equations_run_from_noise_to_data():
    predict = sf.NoisePrediction(lambda x, t: x, sf.EDM())
    ode, sde = sf.ProbabilityFlowODE(predict), sf.ReverseSDE(predict, eta=0.5)
    assert (ode.start, ode.stop, ode.noise, ode.eta) == (80.0, 0.002, "none", 0.0)
    assert (sde.start, sde.stop, sde.noise, sde.eta) == (80.0, 0.002, "additive", 0.5)
    assert ode.predict is predict and sde.process is predict.process


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: sf.Equation(3), "functions of"),
        (lambda: sf.Equation(lambda t, x: x, lambda t, x: x, noise="brown"), "noise must be"),
        (lambda: sf.Equation(lambda t, x: x, calculus="stieltjes"), "calculus"),
        (lambda: sf.ReverseSDE(sf.VP()), "needs a prediction"),
        (lambda: sf.ProbabilityFlowODE(None), "ProbabilityFlowODE needs"),
        (lambda: sf.ForwardSDE("vp"), r"sf\.VP\(\)"),
        (lambda: sf.ReverseSDE(sf.NoisePrediction(lambda x, t: x, sf.VP()), eta=-1.0), "eta"),
        (lambda: sf.ReverseSDE(sf.NoisePrediction(lambda x, t: x, sf.VP()), eta=math.nan), "eta"),
        (lambda: sf.Equation(lambda t, x: x[:, :1]).drift(0.0, torch.ones(2, 3)), "state of shape"),
    ],
)
def test_bad_equations_are_named(make, word):
    with pytest.raises(sf.InvalidInput, match=word):
        make()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("solver", [sf.Adams(rtol=1e-8, atol=1e-8), sf.Tsit5(rtol=1e-8, atol=1e-8)])
def test_a_drift_with_t_in_it_is_right_where_every_sample_has_its_own_time(batch, solver):
    """x' = cos(t) x with two elements: left as (batch,), t would meet the elements where batch = 2."""
    x = torch.randn(batch, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for drift in (lambda t, x: torch.cos(t) * x, lambda t, x: torch.cos(t if t.ndim == 0 else t[:, None]) * x):
        found = sf.solve(sf.Equation(drift), solver, x, start=0.0, stop=1.0).x
        assert torch.allclose(found, x * math.exp(math.sin(1.0)), rtol=1e-5)


def test_a_drift_of_another_dtype_keeps_the_states():
    drift = sf.Equation(lambda t, x: -x * torch.ones(2, dtype=torch.float64))
    found = sf.solve(drift, sf.Adams(rtol=1e-4, atol=1e-4), torch.ones(3, 2), start=0.0, stop=1.0).x
    assert found.dtype is torch.float32 and torch.allclose(found, torch.full((3, 2), math.exp(-1.0)), atol=1e-3)
    with pytest.raises(sf.InvalidInput, match=r"returned torch.int64.*to\(x.dtype\)"):
        sf.Equation(lambda t, x: x.long()).drift(0.0, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("value", "noise", "words"),
    [
        (torch.ones(3, 5), "diagonal", r"shape \(3, 5\).*broadcasts to \(4, 2\)"),
        (None, "diagonal", "NoneType"),
        (torch.ones(4, 2), "general", r"shape \(4, 2\).*\(batch, d, m\) = \(4, 2, m\)"),
    ],
)
def test_a_diffusion_that_does_not_fit_is_refused(value, noise, words):
    equation = sf.Equation(lambda t, x: -x, lambda t, x: value, noise=noise)
    with pytest.raises(sf.InvalidInput, match=words):
        sf.solve(equation, sf.EulerMaruyama(steps=2), torch.ones(4, 2), start=0.0, stop=1.0)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "solver",
    [
        sf.EulerMaruyama(steps=4),
        sf.Milstein(steps=4),
        sf.SRA1(steps=4),
        sf.SRA1(rtol=1e-2, atol=1e-2),
        sf.GottaGoFast(),
        sf.TorchSDE("srk", steps=4),
    ],
)
def test_one_amplitude_an_element_broadcasts_like_any_tensor(solver, batch):
    """Amplitudes (2,) belong to the elements, also where the batch has as many samples."""
    x, g = torch.zeros(batch, 2, dtype=torch.float64), torch.tensor([0.1, 1.0], dtype=torch.float64)
    equations = [
        sf.Equation(lambda t, x: -x, diffusion, noise="additive", start=0.0, stop=1.0)
        for diffusion in (lambda t, x: g, lambda t, x: g.expand_as(x))
    ]
    short, full = (sf.solve(e, solver, x, seed=0).x for e in equations)
    assert torch.equal(short, full)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_diffusion_with_t_in_it_is_right_where_every_sample_has_its_own_time(batch):
    x = torch.zeros(batch, 2, dtype=torch.float64)
    ends = [
        sf.solve(
            sf.Equation(lambda t, x: -x, diffusion, noise="additive", start=0.0, stop=1.0),
            sf.SRA1(rtol=1e-2, atol=1e-2),
            x,
            seed=0,
        ).x
        for diffusion in (
            lambda t, x: 1.0 + torch.cos(t),
            lambda t, x: 1.0 + torch.cos(t if t.ndim == 0 else t[:, None]),
            lambda t, x: (1.0 + torch.cos(t)) * torch.ones_like(x),
        )
    ]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_noise_that_is_said_to_be_additive_and_is_not_is_refused():
    x, drift = torch.ones(2, 2), lambda t, x: -x
    for diffusion in (lambda t, x: 0.3 * x, lambda t, x: x.square().sum(1, keepdim=True), lambda t, x: x.sqrt()):
        wrong = sf.Equation(drift, diffusion, noise="additive", start=0.0, stop=1.0)
        with pytest.raises(sf.InvalidInput, match='changes with x.*noise="diagonal"'):
            sf.solve(wrong, sf.SRA1(steps=4), x)
    for diffusion in (lambda t, x: 0.3, lambda t, x: torch.cos(t), lambda t, x: torch.full_like(x, 0.3)):
        sf.solve(sf.Equation(drift, diffusion, noise="additive", start=0.0, stop=1.0), sf.SRA1(steps=4), x)
