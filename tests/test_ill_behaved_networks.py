"""Networks and drifts that reuse their memory, write into their input or record no gradient; callers in inference mode."""

import math

import pytest
import torch

import sdeflow as sf

RING, VP = sf.problems.ring(), sf.VP()
START = VP.prior((4, 2), seed=0, dtype=torch.float64)


class OneBuffer:
    """Every value is written to where the last one was, as captured graphs do."""

    def __init__(self, function):
        self.function, self.buffer = function, torch.zeros(0)

    def __call__(self, *given, **named):
        value = self.function(*given, **named)
        if self.buffer.shape != value.shape:
            self.buffer = torch.empty_like(value)
        return self.buffer.copy_(value)


@pytest.mark.parametrize("kind", [sf.NoisePrediction, sf.DataPrediction])
@pytest.mark.parametrize(
    "solver",
    [
        sf.DPMSolverPP(order=3, steps=8),
        sf.UniPC(order=3, steps=8),
        sf.DEIS(steps=8),
        sf.EDMHeun(steps=8),
        sf.FixedAdams(steps=8),
        sf.Adams(rtol=1e-3, atol=1e-3),
        sf.Tsit5(rtol=1e-3, atol=1e-3),
    ],
    ids=lambda solver: solver.facts.name,
)
def test_a_network_may_return_the_same_memory_again(kind, solver):
    network = RING.network(VP, "noise" if kind is sf.NoisePrediction else "data")
    plain, buffered = (sf.ProbabilityFlowODE(kind(n, VP)) for n in (network, OneBuffer(network)))
    assert torch.equal(sf.solve(buffered, solver, START).x, sf.solve(plain, solver, START).x)


def test_guidance_by_a_network_that_returns_the_same_memory_again():
    network = RING.network(VP, "noise")

    def guided(network):
        yes, no = (sf.NoisePrediction(sf.Conditioned(network, label=k), VP) for k in (3, -1))
        return sf.ClassifierFree(yes, no, scale=3.0).noise(START, 0.4)

    assert torch.equal(guided(OneBuffer(network)), guided(network))


@pytest.mark.parametrize(
    "solver",
    [
        sf.RungeKutta("rk4", steps=8),
        sf.FixedAdams(steps=8),
        sf.Tsit5(),
        sf.Dopri5(),
        sf.Adams(),
        sf.TorchDiffEq("dopri5"),
    ],
    ids=lambda solver: solver.facts.name,
)
def test_a_drift_may_return_the_same_memory_again(solver):
    def drift(t, x):
        return x.flip(1) - torch.cos(t) * x

    plain, buffered = (
        sf.solve(sf.Equation(f), solver, START, start=0.0, stop=1.0).x for f in (drift, OneBuffer(drift))
    )
    assert torch.equal(plain, buffered)


@pytest.mark.parametrize("solver", [sf.DDIM(steps=4), sf.UniPC(steps=4), sf.Adams(), sf.TorchDiffEq("dopri5")])
def test_a_network_that_writes_into_its_input_is_refused(solver):
    x = START.clone()
    with pytest.raises(sf.InvalidInput, match=r"changed its input x in place.*x\.clone\(\)"):
        sf.solve(sf.ProbabilityFlowODE(sf.NoisePrediction(lambda x, t: x.mul_(0.5), VP)), solver, x)


def test_writing_into_the_time_is_refused():
    def network(x, t):
        t *= 999
        return x * t[:, None].cos()

    with pytest.raises(sf.InvalidInput, match="changed its input t in place"):
        sf.NoisePrediction(network, VP).data(START[:1], 0.5)
    with pytest.raises(sf.InvalidInput, match="changed its input in place"):
        sf.Equation(lambda t, x: t.mul_(2.0) * x).drift(torch.tensor(0.5, dtype=torch.float64), START)


def test_a_drift_that_writes_into_the_state_is_refused():
    with pytest.raises(sf.InvalidInput, match="changed its input in place"):
        sf.solve(sf.Equation(lambda t, x: x.neg_()), sf.RungeKutta("rk4", steps=4), START.clone(), start=0.0, stop=1.0)


def test_in_inference_mode_a_network_gets_a_copy_to_write_into():
    network = RING.network(VP, "noise")

    def writing(x, t):
        output = network(x, t)
        x.zero_()
        return output

    with torch.inference_mode():
        x = START.clone()
        found = sf.solve(sf.ProbabilityFlowODE(sf.NoisePrediction(writing, VP)), sf.UniPC(steps=6), x).x
        assert torch.equal(x, START)
    wanted = sf.solve(sf.ProbabilityFlowODE(sf.NoisePrediction(network, VP)), sf.UniPC(steps=6), START).x
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        (sf.ProbabilityFlowODE, sf.Adams(dense=True)),
        (sf.ReverseSDE, sf.Adams(rtol=0.1, atol=0.1)),
        (sf.ReverseSDE, sf.ShARK(steps=4)),
        (sf.ProbabilityFlowODE, sf.UniPC(steps=4)),
    ],
)
def test_autocast_is_for_the_network_alone(kind, solver, gradients):
    """A network that multiplies no matrices computes the same in it, and so must the solver."""
    predict, x = sf.NoisePrediction(lambda x, t: torch.sin(3 * x) + x, VP), VP.prior((4, 6), seed=0)

    def solved():
        found = sf.solve(kind(predict), solver, x, gradients=gradients)
        return found.x, found.at(0.4) if found.dense else found.x

    wanted = solved()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solved()
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_general_noise_under_autocast():
    equation = sf.Equation(lambda t, x: -x, lambda t, x: x[..., None] * torch.ones(6, 3), noise="general")
    x = VP.prior((4, 6), seed=0)
    wanted = sf.solve(equation, sf.EulerMaruyama(steps=8), x, start=0.0, stop=1.0).x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sf.solve(equation, sf.EulerMaruyama(steps=8), x, start=0.0, stop=1.0).x, wanted)


def cosine():
    return sf.Process(
        alpha=lambda t: torch.cos(0.5 * math.pi * t),
        sigma=lambda t: torch.sin(0.5 * math.pi * t),
        t_min=1e-3,
        t_max=0.999,
    )


def test_derivatives_of_own_processes_in_inference_mode():
    process = cosine()
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    wanted = process.coefficients(t)
    with torch.inference_mode():
        inside, made = process.coefficients(t * 1.0), cosine().coefficients(t)
        later = t * 1.0
    outside = process.coefficients(later)
    for found in (inside, made, outside):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with torch.inference_mode():
        constant = sf.Process(alpha=lambda t: 1.0, sigma=lambda t: t.sqrt(), t_min=1e-4, t_max=4.0)
        assert torch.equal(constant.alpha_dot(t), torch.zeros_like(t))


@pytest.mark.parametrize(
    "solver", [sf.TorchDiffEq("dopri5", chart=sf.PlainTime()), sf.Adams(), sf.RungeKutta("rk4", steps=20)]
)
def test_solves_of_own_processes_in_inference_mode(solver):
    process = cosine()
    equation = sf.ProbabilityFlowODE(RING.prediction(process))
    wanted = sf.solve(equation, solver, START).x
    with torch.inference_mode():
        assert torch.equal(sf.solve(equation, solver, START.clone()).x, wanted)


def test_strengths_of_ones_own_in_inference_mode():
    equation, solver = (
        sf.ReverseSDE(RING.prediction(VP)),
        sf.ERSDE(steps=4, phi=lambda rho: rho * (rho.pow(0.3).exp() + 1)),
    )
    wanted = sf.solve(equation, solver, START, seed=0).x
    with torch.inference_mode():
        assert torch.equal(sf.solve(equation, solver, START.clone(), seed=0).x, wanted)


def test_likelihood_under_a_process_of_ones_own():
    process, x = cosine(), RING.sample(3, seed=1, dtype=torch.float64)
    solver = sf.Adams(rtol=1e-7, atol=1e-7)
    found = sf.log_likelihood(
        RING.prediction(process), x, solver, prior=lambda z: RING.log_prob(z, process, process.t_max)
    )
    assert (found.log_prob - RING.log_prob(x, process, process.t_min)).abs().max() < 1e-5


def test_a_network_without_gradient_is_warned_of():
    network = RING.network(VP, "noise")

    @torch.no_grad()
    def frozen(x, t):
        return network(x, t)

    predict, x = sf.NoisePrediction(frozen, VP), RING.sample(2, seed=1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="carries no gradient"):
        sf.log_likelihood(predict, x, sf.Adams())
    leaf = START.clone().requires_grad_(True)
    with pytest.warns(UserWarning, match="carries no gradient"):
        sf.solve(sf.ProbabilityFlowODE(predict), sf.DDIM(steps=2), leaf, gradients=True)
    # without gradients nothing is said
    sf.solve(sf.ProbabilityFlowODE(predict), sf.DDIM(steps=2), leaf)
