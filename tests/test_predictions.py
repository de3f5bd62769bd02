"""Predictions: every target of one exact field gives the same drift; casts, hooks, counts and errors."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.counting import Counter, counting

PROCESSES = [
    sf.VP(),
    sf.CosineVP(),
    sf.SubVP(),
    sf.VE(),
    sf.EDM(),
    sf.RectifiedFlow(),
    sf.DiscreteVP.scaled_linear(),
    sf.Process(alpha=lambda t: 1 - 0.5 * t, sigma=lambda t: t**2, t_min=0.05, t_max=1.5),
]
MEAN, STD = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64), torch.tensor([0.5, 0.2, 1.1], dtype=torch.float64)


def fields(process, x, t):
    """D and ε̂ of Gaussian data, by Tweedie, with t a (batch,) tensor."""
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    score = -(x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    return (x + sigma**2 * score) / alpha, -sigma * score, score


def networks(process):
    """The same field said in every way, each by its own definition."""

    def coefficients(t):
        return [c[:, None] for c in process.coefficients(t)]

    def v(x, t):
        data, noise, _ = fields(process, x, t)
        alpha, sigma, *_ = coefficients(t)
        return alpha * noise - sigma * data

    def flow(x, t):
        data, noise, _ = fields(process, x, t)
        _, _, da, ds = coefficients(t)
        return da * data + ds * noise

    def edm(x_in, c_noise):
        rho = (4 * c_noise).exp()[:, None]
        t = process.time(-4 * c_noise)
        y = x_in * (rho**2 + 0.25).sqrt()
        data, *_ = fields(process, y * process.alpha(t)[:, None], t)
        return (data - 0.25 / (rho**2 + 0.25) * y) * (rho**2 + 0.25).sqrt() / (0.5 * rho)

    return {
        sf.DataPrediction: lambda x, t: fields(process, x, t)[0],
        sf.NoisePrediction: lambda x, t: fields(process, x, t)[1],
        sf.ScorePrediction: lambda x, t: fields(process, x, t)[2],
        sf.VPrediction: v,
        sf.FlowPrediction: flow,
        sf.EDMPrediction: edm,
    }


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_kind_gives_the_same_drift(process):
    t = torch.linspace(process.t_min, process.t_max, 9, dtype=torch.float64)[:-1]
    x = process.perturb(
        torch.randn(8, 3, dtype=torch.float64),
        t,
        torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double(),
    )
    data, noise, score = fields(process, x, t)
    f, g2, alpha_dot, sigma_dot = (c[:, None] for c in (process.f(t), process.g2(t), *process.coefficients(t)[2:]))
    for kind, network in networks(process).items():
        predict = kind(network, process)

        def close(a, b, condition=0.0):
            return ((a - b).abs() <= 1e-10 * b.abs().max().clamp_min(1.0) + 1e-15 * condition).all()

        assert close(predict.data(x, t), data), kind
        assert close(predict.noise(x, t), noise), kind
        # (αD − x)/σ² of a rounded D is off by up to 1e-16/σ², whoever computes it
        assert close(predict.score(x, t), score, (x.abs().amax(1) / process.sigma(t) ** 2)[:, None]), kind
        assert close(predict.velocity(x, t), alpha_dot * data + sigma_dot * noise), kind
        assert close(predict.pair(x, t)[0], data) and close(predict.pair(x, t)[1], noise)
        assert close(sf.ProbabilityFlowODE(predict).drift(t, x), f * x - 0.5 * g2 * score), kind
        for eta in (0.5, 1.0, 2.0):
            sde = sf.ReverseSDE(predict, eta=eta)
            assert close(sde.drift(t, x), f * x - (1 + eta**2) / 2 * g2 * score), (kind, eta)
            assert torch.allclose(sde.diffusion(t, x) ** 2, eta**2 * g2)


def test_rectified_flow_at_alpha_zero():
    process = sf.RectifiedFlow()
    x = process.prior((4, 3), dtype=torch.float64)
    for kind in (sf.DataPrediction, sf.VPrediction, sf.FlowPrediction):
        predict = kind(
            {
                sf.DataPrediction: lambda x, t: MEAN.expand_as(x),
                sf.VPrediction: lambda x, t: -MEAN.expand_as(x),  # αε − σD at α = 0
                sf.FlowPrediction: lambda x, t: x - MEAN,
            }[kind],
            process,
        )
        assert torch.allclose(predict.data(x, 1.0), MEAN.expand_as(x))
        assert torch.allclose(predict.velocity(x, 1.0), x - MEAN)


def test_time_is_a_float_a_scalar_or_one_a_sample():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    predict = sf.DataPrediction(network, sf.VP())
    x = torch.randn(4, 2)
    results = [predict.data(x, t) for t in (0.3, torch.tensor(0.3), torch.full((4,), 0.3))]
    assert all(t.shape == (4,) for t in seen)
    assert torch.equal(results[0], results[1]) and torch.allclose(results[0], results[2])


@pytest.mark.parametrize(
    ("dtype", "time_dtype"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_casts(dtype, time_dtype):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x, t):
            assert x.dtype == dtype and t.dtype == time_dtype
            return x * self.weight

    x = torch.randn(4, 2)
    assert sf.DataPrediction(Network(), sf.VP()).data(x, 0.5).dtype == torch.float32
    assert sf.DataPrediction(lambda x, t: x, sf.VP(), dtype=dtype).evaluate(x, 0.5).dtype == torch.float32


def test_time_hook_and_edm_noise_level():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    x = torch.randn(3, 2)
    sf.NoisePrediction(network, sf.VP(), time=lambda t: (999 * t).round().long()).noise(x, 0.5)
    assert seen[-1].dtype == torch.int64 and (seen[-1] == 500).all()
    sf.EDMPrediction(network, sf.EDM()).data(x, 2.0)
    assert torch.allclose(seen[-1], torch.full((3,), math.log(2.0) / 4))


def test_counts_what_the_network_sees():
    counter = Counter(4)
    predict = sf.NoisePrediction(lambda x, t: x, sf.VP())
    with counting(counter):
        predict.score(torch.randn(4, 2), 0.5)
        predict.pair(torch.randn(8, 2), 0.5)  # a doubled batch: two evaluations a sample
        counter.restrict(torch.tensor([1, 3]))
        predict.data(torch.randn(2, 2), 0.5)
        with pytest.raises(sf.InvalidInput, match="batch of 3"):
            predict.data(torch.randn(3, 2), 0.5)
    predict.data(torch.randn(4, 2), 0.5)  # outside: not counted
    assert counter.calls == 3 and counter.evaluations.tolist() == [3, 4, 3, 4]


def test_a_network_made_of_predictions_is_counted_where_they_call_theirs():
    process = sf.VP()
    inner = sf.NoisePrediction(lambda x, t: x, process)
    once = sf.DataPrediction(lambda x, t: inner.data(x, t), process)
    twice = sf.ScorePrediction(lambda x, t: 3.0 * once.score(x, t) - 2.0 * inner.score(x, t), process)
    for predict, calls in ((once, 1), (twice, 2)):
        for solver in (sf.DDIM(steps=7), sf.TorchDiffEq("rk4", steps=2), sf.EDMHeun(steps=3)):
            plain = sf.solve(sf.ProbabilityFlowODE(inner), solver, torch.ones(3, 2))
            s = sf.solve(sf.ProbabilityFlowODE(predict), solver, torch.ones(3, 2))
            assert s.calls == calls * plain.calls
            assert torch.equal(s.evaluations, calls * plain.evaluations)


@pytest.mark.parametrize(
    ("network", "word"),
    [
        (lambda x, t: (x,), r"\[0\]"),
        (lambda x, t: x[:, :1], "shape"),
        (lambda x, t: x.sum(), "shape"),
        (lambda x, t: None, "NoneType"),
        (lambda x, t: {"sample": x}, r"\['sample'\]"),
        (lambda x, t: x.numpy(), "from_numpy"),
        (lambda x, t: x.long(), "torch.int64"),
    ],
)
def test_bad_networks_are_named(network, word):
    with pytest.raises(sf.InvalidInput, match=word):
        sf.DataPrediction(network, sf.VP()).data(torch.randn(4, 2), 0.5)


def test_bad_arguments_are_named():
    with pytest.raises(sf.InvalidInput, match="callable"):
        sf.DataPrediction(3, sf.VP())  # type: ignore[arg-type]
    with pytest.raises(sf.InvalidInput, match=r"sf\.VP\(\)"):
        sf.DataPrediction(lambda x, t: x, "vp")  # type: ignore[arg-type]
    with pytest.raises(sf.InvalidInput, match="floating"):
        sf.DataPrediction(lambda x, t: x, sf.VP(), dtype=torch.int64)


def test_noise_and_score_at_alpha_zero():
    process, x = sf.RectifiedFlow(), torch.randn(3, 2, dtype=torch.float64)
    for predict in (
        sf.NoisePrediction(lambda x, t: x, process),
        sf.ScorePrediction(lambda x, t: -x, process),
    ):
        assert torch.equal(predict.noise(x, 1.0), x) and torch.equal(predict.score(x, 1.0), -x)


def test_times_stand_beside_samples_or_are_refused():
    predict = sf.NoisePrediction(lambda x, t: torch.tanh(x) * t[:, None].cos(), sf.VP())
    x, t = torch.randn(4, 2), torch.linspace(0.1, 0.9, 4)
    assert torch.equal(predict.velocity(x, t[:, None]), predict.velocity(x, t))
    with pytest.raises(sf.InvalidInput, match=r"one value a sample, \(4,\); got shape \(3,\)"):
        predict.data(x, t[:3])


@pytest.mark.parametrize("kind", ["noise", "score"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("process", [sf.CosineVP(t_max=1.0), sf.DiscreteVP(torch.linspace(0.999, 0.0, 50))])
def test_noise_without_signal_but_for_rounding_says_so(process, dtype, kind):
    """α = 6e-17 is no signal: a D of 1e9 would go through a solve and come out as a state of 1e6."""
    predict = sf.problems.gaussian(dim=2).prediction(process, kind)
    x = process.prior((3, 2), dtype=dtype)
    assert not bool(predict.data(x, process.t_max).isfinite().any())
    assert bool(predict.noise(x, process.t_max).isfinite().all())
    run = sf.solve(sf.ProbabilityFlowODE(predict), sf.DDIM(steps=20), x, on_failure="return")
    assert run.status.tolist() == [sf.Status.NON_FINITE] * 3
    run = sf.solve(sf.ProbabilityFlowODE(predict), sf.DDIM(steps=20), x, start=0.99 * process.t_max)
    assert float(run.x.abs().max()) < 30.0
