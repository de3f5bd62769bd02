"""Problems: samples, labels, conditionals and exact networks of every kind."""

import math
import sys

import pytest
import torch
from scipy import stats

import sdeflow as sf
from sdeflow.counting import Counter, counting
from sdeflow.problems import Problem

F64 = torch.float64
PROCESSES = [sf.VP(), sf.CosineVP(), sf.SubVP(), sf.VE(), sf.EDM(), sf.RectifiedFlow(), sf.DiscreteVP.scaled_linear()]
KINDS = ["data", "noise", "score", "v", "flow", "edm"]


@pytest.fixture(scope="module")
def digits() -> Problem:
    return sf.problems.digits()


def points() -> Problem:
    g = torch.Generator().manual_seed(0)
    return sf.problems.from_points(torch.randn(9, 3, generator=g), std=0.2, labels=[0, 0, 0, 1, 1, 2, 2, 2, 2])


def all_problems() -> list[Problem]:
    return [sf.problems.gaussian(), sf.problems.ring(), sf.problems.mixture64(), points()]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("problem", all_problems(), ids=lambda p: p.name)
def test_every_kind_of_network_says_the_same(problem, process):
    for fraction in (0.0, 0.3, 1.0):
        t = process.t_min + fraction * (process.t_max - process.t_min)
        x = process.perturb(problem.sample(16, dtype=F64), t, problem.sample(16, seed=1, dtype=F64))
        sigma = process.sigma(t).item()
        score, data = problem.score(x, process, t), problem.denoise(x, process, t)
        for kind in KINDS:
            predict = problem.prediction(process, kind)
            if process.alpha(t) == 0 and kind in ("noise", "score"):
                # such a network says nothing of the data here; what it does say is exact
                factor = 1.0 if kind == "score" else -1.0 / sigma
                torch.testing.assert_close(factor * predict.evaluate(x, t), score, rtol=1e-12, atol=1e-12)
                continue
            scale = 1.0 if process.alpha(t) == 0 else max(1.0, sigma / process.alpha(t).item())
            torch.testing.assert_close(predict.data(x, t), data, rtol=1e-10, atol=1e-11 * scale)
            torch.testing.assert_close(
                sigma * predict.score(x, t), sigma * score, rtol=1e-10, atol=1e-11 / min(1.0, sigma)
            )


def test_rectified_flow_begins_at_alpha_zero():
    process, problem = sf.RectifiedFlow(), sf.problems.ring()
    x = process.prior((8, 2), dtype=F64)
    for kind in ("data", "v", "flow", "edm"):
        predict = problem.prediction(process, kind)
        assert bool(predict.velocity(x, 1.0).isfinite().all())
        torch.testing.assert_close(
            predict.data(x, 1.0), torch.zeros_like(x), rtol=0, atol=1e-12
        )  # the mean of the ring
        torch.testing.assert_close(predict.velocity(x, 1.0), x, rtol=0, atol=1e-12)


def test_digits_denoiser_equals_the_softmax_over_the_data_set(digits):
    process = sf.VP()
    m, s2 = digits.mixture.means, 0.01
    predict = digits.prediction(process)
    for t in (1e-3, 0.05, 0.2, 0.5, 1.0):
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = process.perturb(digits.sample(12, dtype=F64), t, process.prior((12, 64), seed=3, dtype=F64))
        V = alpha**2 * s2 + sigma**2
        r = x[:, None, :] - alpha * m
        gamma = torch.softmax(-0.5 * r.square().sum(2) / V, 1)
        brute = (gamma[:, :, None] * (m + alpha * s2 / V * r)).sum(1)
        assert (predict.data(x, t) - brute).abs().max().item() < 1e-12


def test_digits_are_the_scikit_learn_data(digits):
    sklearn = pytest.importorskip("sklearn.datasets")
    pixels, label = sklearn.load_digits(return_X_y=True)
    assert digits.mixture.means.shape == (1797, 64)
    assert digits.mixture.means.min() == -1.0 and digits.mixture.means.max() == 1.0
    assert torch.equal((digits.mixture.means + 1.0) * 8.0, torch.from_numpy(pixels))
    assert digits.classes == tuple(range(10)) and digits.component_labels.tolist() == label.tolist()
    assert digits.event_shape == (64,) and 0.5 < digits.data_scale < 0.6


def test_digits_without_scikit_learn_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(sf.MissingDependency, match="pip install scikit-learn"):
        sf.problems.digits()


@pytest.mark.parametrize("problem", all_problems(), ids=lambda p: p.name)
def test_samples_have_the_exact_moments(problem):
    """Mean and covariance of 20000 samples; Bonferroni over all entries, false-alarm rate below 1e-6 a problem."""
    n = 20000
    x = problem.sample(n, seed=5, dtype=F64)
    mean, cov = problem.moments()
    d = problem.dim
    z = stats.norm.isf(0.5e-6 / (d + d * (d + 1) // 2))
    assert bool(((x.mean(0) - mean).abs() < z * (cov.diagonal() / n).sqrt()).all())
    r = x - mean
    products = r[:, :, None] * r[:, None, :] if d <= 16 else None
    spread = products.var(0) if products is not None else (r.square().T @ r.square()) / n - cov**2
    assert bool((((r.T @ r) / n - cov).abs() < z * (spread / n).sqrt() * 1.02).all())


def test_components_are_drawn_with_their_weights():
    """χ² test of the component counts, false-alarm rate 1e-6."""
    problem = sf.problems.mixture64()
    counts = problem.labels(20000, seed=1).bincount(minlength=16)
    assert stats.chisquare(counts.numpy(), 20000 * problem.mixture.weights.numpy()).pvalue > 1e-6


def test_samples_depend_on_seed_and_row_alone():
    for problem in all_problems():
        long = problem.sample(50, seed=3)
        assert long.dtype == torch.float32 and torch.equal(problem.sample(20, seed=3), long[:20])
        assert not torch.equal(problem.sample(50, seed=4), long)
        seeds = sf.sample_seeds(3, 50)
        assert torch.equal(problem.sample(50, seed=seeds), long)
        assert torch.equal(problem.sample(2, seed=seeds[[7, 3]]), long[[7, 3]])
        assert torch.equal(problem.sample(50, seed=3, dtype=F64).float(), long)


def test_samples_and_priors_of_one_seed_are_unrelated():
    """Correlation of 20000 pairs, false-alarm rate 1e-6."""
    problem = sf.problems.gaussian(mean=0.0, std=1.0, dim=1)
    x, z = problem.sample(20000, seed=0, dtype=F64), sf.VP().prior((20000, 1), seed=0, dtype=F64)
    assert abs((x * z).mean().item()) < stats.norm.isf(0.5e-6) / math.sqrt(20000)


def test_labels_belong_to_the_samples():
    problem = sf.problems.ring(std=0.01)
    x, label = problem.sample(200, seed=2, dtype=F64), problem.labels(200, seed=2)
    assert torch.equal(torch.cdist(x, problem.mixture.means).argmin(1), label)


@pytest.mark.parametrize("process", [sf.VP(), sf.RectifiedFlow()], ids=repr)
def test_conditional_is_the_mixture_restricted(process):
    problem = points()
    own = problem.component_labels == 2
    direct = sf.problems.from_points(problem.mixture.means[own], std=0.2)
    x = process.prior((7, 3), dtype=F64)
    for t in (process.t_min, 0.4, process.t_max):
        for conditional in (problem.prediction(process, label=2), problem.conditional(2).prediction(process)):
            torch.testing.assert_close(
                conditional.data(x, t), direct.prediction(process).data(x, t), rtol=1e-13, atol=1e-13
            )
    assert problem.conditional(2).name == "points[2]" and problem.conditional(2).classes == (2,)
    # p(x) = Σ_c p(c) p(x|c)
    total = torch.logsumexp(
        torch.stack(
            [
                math.log((problem.component_labels == c).sum().item() / 9) + problem.conditional(c).log_prob(x)
                for c in (0, 1, 2)
            ]
        ),
        0,
    )
    torch.testing.assert_close(total, problem.log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_class_by_row_network_equals_the_conditionals(kind):
    process, problem = sf.VP(), points()
    network = problem.network(process, kind)
    x, t = process.prior((4, 3), dtype=F64), torch.full((4,), 0.3, dtype=F64)
    mixed = network(x, t, label=torch.tensor([2, -1, 0, 1]))
    for i, label in enumerate([2, None, 0, 1]):
        one = (problem if label is None else problem.conditional(label)).network(process, kind)
        torch.testing.assert_close(mixed[i : i + 1], one(x[i : i + 1], t[:1]), rtol=1e-12, atol=1e-12)


def test_an_evaluation_is_counted_like_any_networks():
    process, problem = sf.VP(), sf.problems.ring()
    counter, x = Counter(5), process.prior((5, 2))
    with counting(counter):
        problem.prediction(process).data(x, 0.5)
        problem.prediction(process).pair(x, 0.5)
        problem.score(x, process, 0.5)  # the truth itself is free
    assert counter.calls == 2 and counter.evaluations.tolist() == [2] * 5


@pytest.mark.parametrize("problem", all_problems(), ids=lambda p: p.name)
def test_a_float32_state_gets_the_exact_value_rounded(problem):
    process = sf.VP()
    x = process.perturb(problem.sample(64), 0.2, process.prior((64, problem.dim)))
    predict = problem.prediction(process)
    assert predict.data(x, 0.2).dtype == torch.float32
    torch.testing.assert_close(predict.data(x, 0.2).double(), predict.data(x.double(), 0.2), rtol=1e-6, atol=1e-6)


def test_events_may_have_any_shape(digits):
    x = digits.sample(3)
    predict = digits.prediction(sf.VP())
    assert torch.equal(predict.data(x.reshape(3, 1, 8, 8), 0.5).reshape(3, 64), predict.data(x, 0.5))


def test_repr_names_the_problem(digits):
    assert repr(digits) == "Problem('digits', dim=64, components=1797, classes=10)"
    assert repr(sf.problems.gaussian()) == "GaussianProblem('gaussian', dim=16, components=1)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.prediction(sf.VP(), "x0"), "kind must be one of data"),
        (lambda p: p.prediction(sf.VP(), label=7), r"no class 7; its classes are \[0, 1, 2\]"),
        (lambda p: p.network(sf.VP())(torch.zeros(2, 3), 0.5, label=torch.tensor([0, 9])), "has classes"),
        (lambda p: p.network(sf.VP())(torch.zeros(2, 3), 0.5, label=torch.tensor([0, 1, 2])), "one for each row"),
        (lambda p: p.score(torch.zeros(2, 4), sf.VP(), 0.5), r"shape \(batch, 3\); got .*\(2, 4\)"),
        (lambda p: p.score(torch.zeros(2, 3, dtype=torch.int64), sf.VP(), 0.5), "floating"),
        (lambda p: p.log_prob(torch.zeros(2, 3), sf.VP()), "both process and t"),
        (lambda p: p.sample(0), "positive integer"),
        (lambda p: sf.problems.gaussian().labels(3), "no labels"),
        (lambda p: sf.problems.from_points(torch.zeros(4)), r"points\[:, None\]"),
        (lambda p: sf.problems.from_points(torch.zeros(4, 2), labels=[0, 1]), "labels must be 4 integers"),
        (lambda p: sf.problems.gaussian(mean=[0.0, 1.0], std=[1.0, 1.0, 1.0]), "agree on one dimension"),
        (lambda p: sf.problems.gaussian(std=1.0, cov=torch.eye(2)), "not both"),
        (lambda p: sf.problems.ring(modes=0), "modes ≥ 1"),
    ],
)
def test_bad_input_says_what_to_write(call, message):
    with pytest.raises(sf.InvalidInput, match=message):
        call(points())
