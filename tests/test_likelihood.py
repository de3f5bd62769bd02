"""Likelihoods against exact densities, latents against the exact flow, gradients against differences."""

from dataclasses import dataclass

import pytest
import torch

import sdeflow as sf
from sdeflow.likelihood import student_quantile, value_and_divergence
from sdeflow.solvers.base import Facts, FixedStep

VP, EDM = sf.VP(), sf.EDM()
RING, GAUSSIAN = sf.problems.ring(), sf.problems.gaussian(dim=6)


@dataclass(frozen=True, kw_only=True)
class RK4(FixedStep):
    """Classical Runge–Kutta, here so that these tests depend on no solver of the package."""

    facts = Facts("rk4", 4, None, None, 4, False, ("none",), "drift", "Kutta 1901")

    def init(self, task, times):
        return times

    def step(self, task, state, n, x):
        f, t, h = task.equation.drift, state[n], (state[n + 1] - state[n]).item()
        k1 = f(t, x)
        k2 = f(t + h / 2, x + h / 2 * k1)
        k3 = f(t + h / 2, x + h / 2 * k2)
        k4 = f(t + h, x + h * k3)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), state


def exact_prior(problem, process):
    return lambda z: problem.log_prob(z, process, process.t_max)


@pytest.mark.parametrize("problem", [RING, GAUSSIAN], ids=lambda p: p.name)
@pytest.mark.parametrize("process", [VP, EDM], ids=lambda p: type(p).__name__)
def test_exact_divergence_gives_the_exact_density(problem, process):
    x = problem.sample(8, seed=1, dtype=torch.float64)
    found = sf.log_likelihood(
        problem.prediction(process, "noise"),
        x,
        RK4(steps=240),
        chart=sf.StraightLine(problem.data_scale),
        prior=exact_prior(problem, process),
    )
    exact = problem.log_prob(x, process, process.t_min)
    torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=1e-5)
    assert found.standard_error.tolist() == [0.0] * 8
    assert found.solution.evaluations.tolist() == [960] * 8


@pytest.mark.parametrize("chart", [sf.Trigonometric(0.7), sf.LogSNR(), sf.PlainTime()], ids=lambda c: type(c).__name__)
def test_every_chart_gives_the_same_density(chart):
    x = RING.sample(4, seed=2, dtype=torch.float64)
    found = sf.log_likelihood(
        RING.prediction(VP), x, RK4(steps=120), chart=chart, start=0.2, prior=exact_prior(RING, VP)
    )
    torch.testing.assert_close(found.log_prob, RING.log_prob(x, VP, 0.2), rtol=0, atol=1e-5)


def test_the_default_prior_is_the_process_gaussian():
    x = RING.sample(4, seed=2, dtype=torch.float64)
    found = sf.log_likelihood(RING.prediction(VP), x, RK4(steps=100))
    own = sf.log_likelihood(RING.prediction(VP), x, RK4(steps=100), prior=VP.prior_log_prob)
    assert torch.equal(found.log_prob, own.log_prob)
    torch.testing.assert_close(found.log_prob, RING.log_prob(x, VP, VP.t_min), rtol=0, atol=2e-3)


def test_images_keep_their_shape():
    digits = sf.problems.digits()
    x = digits.sample(2, seed=1, dtype=torch.float64).reshape(2, 1, 8, 8)
    options = {"start": 0.1, "chart": sf.StraightLine(digits.data_scale), "prior": exact_prior(digits, VP)}
    found = sf.log_likelihood(digits.prediction(VP, "noise"), x, RK4(steps=40), **options)
    assert found.latent.shape == x.shape
    torch.testing.assert_close(found.log_prob, digits.log_prob(x, VP, 0.1), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        found.bits_per_dim(0.125), -(found.log_prob / 64 / torch.tensor(2.0).log() + torch.tensor(0.125).log2()),
        check_dtype=False,
    )  # fmt: skip


def test_bits_per_dim_of_a_uniform_density_is_the_number_of_bits():
    """256 equally likely levels on [−1, 1] hold 8 bits."""
    density = torch.full((3,), 5 * torch.tensor(0.5).log().item(), dtype=torch.float64)
    torch.testing.assert_close(sf.bits_per_dim(density, 5), torch.full((3,), 8.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_stated_standard_error_covers_the_truth(kind):
    """1000 repeats of one sample, each with probes of its own: 95 % intervals cover in 95 ± 3 % (sampling sd 0.7 %)."""
    problem = sf.problems.mixture64(dim=8, components=4)
    x = problem.sample(1, seed=3, dtype=torch.float64)
    options = {"start": 0.2, "chart": sf.StraightLine(problem.data_scale)}
    exact = sf.log_likelihood(problem.prediction(VP), x, RK4(steps=12), **options).log_prob
    found = sf.log_likelihood(
        problem.prediction(VP), x.expand(1000, -1), RK4(steps=12), divergence=kind, probes=12, seed=5, **options
    )
    low, high = found.interval(0.95)
    covered = ((low <= exact) & (exact <= high)).double().mean().item()
    assert found.standard_error.min() > 0
    assert 0.92 <= covered <= 0.98
    spread = found.log_prob.std() / found.standard_error.square().mean().sqrt()
    assert 0.93 <= spread <= 1.07  # relative sd of a standard deviation from 1000 draws is 2.2 %


def test_probes_belong_to_their_sample():
    x = RING.sample(6, seed=3, dtype=torch.float64)
    options = {"divergence": "gaussian", "probes": 3, "start": 0.1}
    seeds = sf.sample_seeds(7, 6)
    whole = sf.log_likelihood(RING.prediction(VP), x, RK4(steps=8), seed=seeds, **options)
    part = sf.log_likelihood(RING.prediction(VP), x[[4, 1]], RK4(steps=8), seed=seeds[[4, 1]], **options)
    torch.testing.assert_close(part.log_prob, whole.log_prob[[4, 1]])
    one = sf.log_likelihood(RING.prediction(VP), x, RK4(steps=8), divergence="gaussian", start=0.1)
    assert one.standard_error.isnan().all()


def test_divergence_against_the_full_jacobian():
    def function(z):
        return torch.sin(z) * z.roll(1, 1) + z.square().sum(1, keepdim=True)

    z = torch.randn(5, 4, dtype=torch.float64)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda r: function(r[None])[0], row) for row in z])
    value, trace = value_and_divergence(function, z)
    torch.testing.assert_close(value, function(z))
    torch.testing.assert_close(trace[:, 0], jacobian.diagonal(dim1=1, dim2=2).sum(1))
    v = torch.randn(5, 3, 4, dtype=torch.float64)
    _, terms = value_and_divergence(function, z, v)
    torch.testing.assert_close(terms, torch.einsum("bki,bij,bkj->bk", v, jacobian, v))


def test_student_quantiles():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 7, 40):
        for p in (0.75, 0.975, 0.995):
            assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-4)


def test_likelihood_is_differentiable():
    def total(x):
        return sf.log_likelihood(
            GAUSSIAN.prediction(VP), x, RK4(steps=6), start=0.2, stop=0.6, gradients=True
        ).log_prob  # fmt: skip

    x = GAUSSIAN.sample(2, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(total, (x,), atol=1e-5)


def test_encode_then_decode_returns_the_data():
    x, predict = RING.sample(6, seed=1, dtype=torch.float64), RING.prediction(VP)
    latent = sf.encode(predict, x, RK4(steps=300, grid=sf.InChart()))
    back = sf.decode(predict, latent.x, RK4(steps=300, grid=sf.InChart()))
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-6)
    assert (latent.x - x).abs().max() > 0.1


def test_encode_is_the_exact_flow_of_a_gaussian():
    problem = sf.problems.gaussian(mean=[0.4, -1.0], std=[0.3, 1.2])
    x = problem.sample(5, dtype=torch.float64)
    mean, std = torch.tensor([0.4, -1.0], dtype=torch.float64), torch.tensor([0.3, 1.2], dtype=torch.float64)

    def law(t):
        alpha, sigma = VP.alpha(t), VP.sigma(t)
        return alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()

    (m0, s0), (m1, s1) = law(VP.t_min), law(VP.t_max)
    found = sf.encode(problem.prediction(VP), x, RK4(steps=300, grid=sf.InChart())).x
    torch.testing.assert_close(found, m1 + s1 / s0 * (x - m0), rtol=0, atol=1e-6)


def small_network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x, t):
            self.calls += 1
            return self.net(torch.cat([x, t[:, None]], 1))

    return Network()


@pytest.mark.parametrize("wrap", [lambda n: n, sf.Checkpointed], ids=["plain", "checkpointed"])
def test_gradients_through_a_solve(wrap):
    network = small_network()
    predict = sf.VPrediction(wrap(network), VP)

    def end(x):
        return sf.decode(predict, x, RK4(steps=5), start=0.1, stop=0.9, gradients=True).x

    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (x,))


def test_checkpointing_recomputes_and_gives_the_same_gradients():
    grads, calls = [], []
    for wrap in (lambda n: n, sf.Checkpointed):
        network = small_network()
        found = sf.decode(
            sf.VPrediction(wrap(network), VP), torch.ones(3, 2, dtype=torch.float64), RK4(steps=5), gradients=True
        )
        found.x.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        calls.append((network.calls, found.calls))
    torch.testing.assert_close(*grads)
    assert calls == [(20, 20), (40, 20)]


def test_what_cannot_work_is_refused():
    x, predict = RING.sample(2), RING.prediction(VP)
    with pytest.raises(sf.InvalidInput, match="exact divergence takes no probes"):
        sf.log_likelihood(predict, x, RK4(steps=2), probes=4)
    with pytest.raises(sf.InvalidInput, match='"rademacher"'):
        sf.log_likelihood(predict, x, RK4(steps=2), divergence="hutchinson")
    with pytest.raises(sf.InvalidInput, match="positive integer"):
        sf.log_likelihood(predict, x, RK4(steps=2), divergence="gaussian", probes=0)
    with pytest.raises(sf.InvalidInput, match="needs a prediction"):
        sf.log_likelihood(lambda x, t: x, x, RK4(steps=2))
    with pytest.raises(sf.InvalidInput, match="floating"):
        sf.log_likelihood(predict, x.long(), RK4(steps=2))
    with pytest.raises(sf.InvalidInput, match="start < stop"):
        sf.log_likelihood(predict, x, RK4(steps=2), start=VP.t_max, stop=VP.t_min)
    for prior in (lambda z: z[:, :1], lambda z: z.sum(), lambda z: 0.0):
        with pytest.raises(sf.InvalidInput, match="one number a sample"):
            sf.log_likelihood(predict, x, RK4(steps=2), prior=prior)
    with pytest.raises(sf.InvalidInput, match="width"):
        sf.bits_per_dim(x[:, 0], 2, width=0.0)
    with pytest.raises(sf.InvalidInput, match="level"):
        sf.log_likelihood(predict, x, RK4(steps=2)).interval(1.0)


def test_adaptive_solves_reach_the_exact_density_with_labels_and_probes_kept_in_line():
    """Samples leave an adaptive solve one by one: conditions, probes and counts must follow their samples."""
    labels = torch.tensor([0, 3, 3, 7, 5])
    x = torch.cat([RING.conditional(int(k)).sample(1, seed=int(k), dtype=torch.float64) for k in labels])
    network = RING.network(VP, "noise")
    predict = sf.NoisePrediction(sf.Conditioned(network, label=labels), VP)
    solver = sf.Adams(rtol=1e-9, atol=1e-9)
    ends = {int(k): RING.conditional(int(k)) for k in labels}

    def prior(z):
        return torch.cat([ends[int(k)].log_prob(z[n : n + 1], VP, VP.t_max) for n, k in enumerate(labels)])

    found = sf.log_likelihood(predict, x, solver, prior=prior)
    exact = torch.cat([ends[int(k)].log_prob(x[n : n + 1], VP, VP.t_min) for n, k in enumerate(labels)])
    torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=1e-5)
    options = {"divergence": "rademacher", "probes": 3}
    whole = sf.log_likelihood(predict, x, solver, seed=sf.sample_seeds(1, 5), prior=prior, **options)
    for n in range(5):
        one = sf.NoisePrediction(sf.Conditioned(network, label=labels[n : n + 1]), VP)
        alone = sf.log_likelihood(
            one, x[n : n + 1], solver, seed=sf.sample_seeds(1, 5)[n : n + 1],
            prior=lambda z, k=int(labels[n]): ends[k].log_prob(z, VP, VP.t_max), **options,
        )  # fmt: skip
        torch.testing.assert_close(alone.log_prob, whole.log_prob[n : n + 1], rtol=0, atol=1e-7)
        # rounding differs with the batch's size, and may move a step
        assert abs(alone.solution.evaluations[0] - whole.solution.evaluations[n]) <= 3


@pytest.mark.parametrize("problem", [RING, sf.problems.gaussian()], ids=lambda p: p.name)
@pytest.mark.parametrize("process", [VP, EDM], ids=lambda p: type(p).__name__)
def test_adams_to_a_tight_tolerance_gives_the_exact_density(problem, process):
    x = problem.sample(8, seed=4, dtype=torch.float64)
    found = sf.log_likelihood(
        problem.prediction(process), x, sf.Adams(rtol=1e-8, atol=1e-8), prior=exact_prior(problem, process)
    )
    exact = problem.log_prob(x, process, process.t_min)
    torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=1e-5)
    assert found.solution.evaluations.double().mean() < 250


def test_encode_then_decode_to_ten_times_the_tolerance():
    x, predict, solver = RING.sample(32, seed=1, dtype=torch.float64), RING.prediction(VP), sf.Adams(1e-7, 1e-7)
    back = sf.decode(predict, sf.encode(predict, x, solver).x, solver).x
    assert (back - x).square().mean(1).sqrt().max() < 1e-6


def test_fields_whose_backward_cannot_be_mapped_are_worked_off_one_by_one():
    """Convolution and group norm together: their backward passes have no batching rule."""
    layers = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 1, 3, padding=1)
    net, z = torch.nn.Sequential(*layers).double(), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda r: net(r[None])[0], row) for row in z])
    _, trace = value_and_divergence(net, z)
    torch.testing.assert_close(trace[:, 0], jacobian.reshape(3, 9, 9).diagonal(dim1=1, dim2=2).sum(1))


def test_samples_that_stop_on_the_way_have_no_density():
    def network(x, t):
        return torch.where(x[:, :1] > 0.0, torch.nan, x)

    x = torch.tensor([[0.5, 0.5], [-0.5, 0.5]], dtype=torch.float64)
    found = sf.log_likelihood(sf.DataPrediction(network, VP), x, RK4(steps=4), on_failure="return")
    assert found.solution.success.tolist() == [False, True]
    assert found.log_prob.isfinite().tolist() == [False, True]


class Tanh(torch.autograd.Function):
    """As many networks have them: without `setup_context`, which torch.func needs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, v):
        (x,) = ctx.saved_tensors
        return v * (1.0 - x.tanh() ** 2)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", ["exact", "rademacher"])
@pytest.mark.parametrize("part", ["checkpoint", "function"])
def test_likelihood_of_networks_that_torch_func_refuses(part, kind, gradients):
    network, settings = small_network(), {"divergence": kind, "gradients": gradients, "seed": 3}
    x, solver = RING.sample(3, dtype=torch.float64), RK4(steps=5)
    plain = sf.log_likelihood(sf.VPrediction(network, VP), x, solver, **settings)
    if part == "checkpoint":
        other = sf.log_likelihood(sf.VPrediction(sf.Checkpointed(network), VP), x, solver, **settings)
    else:
        layers = network.net

        def odd(x, t):
            return layers[2](Tanh.apply(layers[0](torch.cat([x, t[:, None]], 1))))

        other = sf.log_likelihood(sf.VPrediction(odd, VP), x, solver, **settings)
    torch.testing.assert_close(other.log_prob, plain.log_prob)
    assert other.solution.evaluations.tolist() == plain.solution.evaluations.tolist() == [20] * 3
    assert other.log_prob.requires_grad == gradients
    if gradients:
        weights = [p for p in network.parameters() if p.ndim == 2]
        for a, b in zip(*(torch.autograd.grad(f.log_prob.sum(), weights) for f in (other, plain)), strict=True):
            torch.testing.assert_close(a, b)
