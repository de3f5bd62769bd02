"""Guidance against the exact guided fields of a class-conditional mixture."""

import pytest
import torch
import torch.utils.checkpoint

import sdeflow as sf
from sdeflow.counting import Counter, counting

RING = sf.problems.ring()
VP = sf.VP()
LABELS = torch.tensor([0, 3, 3, 7, 5])
T = 0.4
KINDS = {
    "noise": sf.NoisePrediction,
    "data": sf.DataPrediction,
    "score": sf.ScorePrediction,
    "v": sf.VPrediction,
    "flow": sf.FlowPrediction,
    "edm": sf.EDMPrediction,
}


def state(batch=5, seed=0):
    return VP.prior((batch, 2), seed=seed, dtype=torch.float64)


def pair(kind="noise", process=VP, labels=LABELS):
    network = RING.network(process, kind)
    make = KINDS[kind]
    given = make(sf.Conditioned(network, label=labels), process)
    return given, make(sf.Conditioned(network, label=-1), process)


def exact_scores(x, t=T, process=VP, labels=LABELS):
    given = torch.cat([RING.conditional(int(k)).score(x[i : i + 1], process, t) for i, k in enumerate(labels)])
    return given, RING.score(x, process, t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(), sf.RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_classifier_free_is_the_exact_guided_score(kind, batched, process):
    x = state()
    given, null = exact_scores(x, process=process)
    guided = sf.ClassifierFree(*pair(kind, process), scale=3.0, batched=batched)
    expected = null + 3.0 * (given - null)
    torch.testing.assert_close(guided.score(x, T), expected, rtol=1e-9, atol=1e-9)
    alpha, sigma = process.alpha(T), process.sigma(T)
    torch.testing.assert_close(guided.data(x, T), (x + sigma**2 * expected) / alpha, rtol=1e-9, atol=1e-9)


def test_w_is_scale_minus_one_and_scale_one_costs_one_evaluation():
    x = state()
    torch.testing.assert_close(
        sf.ClassifierFree(*pair(), w=2.0).noise(x, T), sf.ClassifierFree(*pair(), scale=3.0).noise(x, T)
    )
    counter = Counter(5)
    with counting(counter):
        plain = sf.ClassifierFree(*pair(), w=0.0).noise(x, T)
    torch.testing.assert_close(plain, pair()[0].noise(x, T), rtol=0, atol=0)
    assert counter.evaluations.tolist() == [1] * 5


def test_targets_may_differ():
    x = state()
    mixed = sf.ClassifierFree(pair("v")[0], pair("data")[1], scale=2.5)
    torch.testing.assert_close(mixed.data(x, T), sf.ClassifierFree(*pair(), scale=2.5).data(x, T), rtol=1e-9, atol=1e-9)


def test_a_scale_a_sample_and_times_of_their_own():
    x, scale = state(), torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    t = torch.tensor([0.1, 0.2, 0.4, 0.8, 0.9], dtype=torch.float64)
    guided = sf.ClassifierFree(*pair(), scale=scale).score(x, t)
    for i in range(5):
        given, null = exact_scores(x[i : i + 1], t=t[i], labels=LABELS[i : i + 1])
        torch.testing.assert_close(guided[i : i + 1], null + scale[i] * (given - null), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("batched", "calls"), [(False, 2), (True, 1)])
def test_guidance_counts_two_evaluations(batched, calls):
    counter = Counter(5)
    with counting(counter):
        sf.ClassifierFree(*pair(), scale=3.0, batched=batched).velocity(state(), T)
    assert counter.calls == calls
    assert counter.evaluations.tolist() == [2] * 5


@pytest.mark.parametrize("batched", [False, True])
def test_labels_follow_their_samples_when_others_leave(batched):
    guided, x = sf.ClassifierFree(*pair(), scale=torch.arange(1.0, 6.0), batched=batched), state()
    full, rows, counter = guided.data(x, T), torch.tensor([1, 4]), Counter(5)
    counter.restrict(rows)
    with counting(counter):
        part = guided.data(x[rows], T)
    torch.testing.assert_close(part, full[rows], rtol=1e-12, atol=1e-12)
    assert counter.evaluations.tolist() == [0, 2, 0, 0, 2]


def test_rescale_brings_the_spread_back_to_the_conditional_one():
    labels = torch.tensor([3, 1])
    digits = sf.problems.digits()
    x = VP.prior((2, 1, 8, 8), dtype=torch.float64)
    network = digits.network(VP, "v")
    given = sf.VPrediction(sf.Conditioned(network, label=labels), VP)
    null = sf.VPrediction(sf.Conditioned(network, label=-1), VP)
    plain, out_c = sf.ClassifierFree(given, null, scale=6.0).v(x, 0.3), given.v(x, 0.3)
    full = sf.ClassifierFree(given, null, scale=6.0, rescale=1.0).v(x, 0.3)
    torch.testing.assert_close(full.std((1, 2, 3)), out_c.std((1, 2, 3)))
    assert not torch.allclose(plain.std((1, 2, 3)), out_c.std((1, 2, 3)), rtol=1e-3)
    part = sf.ClassifierFree(given, null, scale=6.0, rescale=0.7).v(x, 0.3)
    torch.testing.assert_close(part, 0.7 * full + 0.3 * plain)


def test_interval_guides_inside_and_saves_evaluations_outside():
    x, given = state(), pair()[0]
    guided = sf.ClassifierFree(*pair(), scale=3.0, interval=(0.3, 0.6))
    everywhere = sf.ClassifierFree(*pair(), scale=3.0)
    for t, alike, cost in ((0.4, everywhere, 2), (0.2, given, 1), (0.7, given, 1)):
        counter = Counter(5)
        with counting(counter):
            value = guided.data(x, t)
        torch.testing.assert_close(value, alike.data(x, t), rtol=1e-12, atol=1e-12)
        assert counter.evaluations.tolist() == [cost] * 5
    t = torch.tensor([0.2, 0.4, 0.5, 0.7, 0.3], dtype=torch.float64)
    inside = torch.tensor([False, True, True, False, True])[:, None]
    expected = torch.where(inside, everywhere.data(x, t), given.data(x, t))
    torch.testing.assert_close(guided.data(x, t), expected, rtol=1e-12, atol=1e-12)


def log_posterior(label):
    """log p(y | x_t) of the ring, exactly."""
    part = RING.conditional(label)
    return lambda x, t: part.log_prob(x, VP, t) - RING.log_prob(x, VP, t)


@pytest.mark.parametrize("kind", KINDS)
def test_classifier_guidance_of_strength_one_is_the_conditional_score(kind):
    x = state()
    free = RING.prediction(VP, kind)
    guided = sf.ClassifierGuidance(free, log_posterior(3))
    torch.testing.assert_close(guided.score(x, T), RING.conditional(3).score(x, VP, T), rtol=1e-7, atol=1e-7)
    strong = sf.ClassifierGuidance(free, log_posterior(3), scale=4.0).score(x, T)
    null = RING.score(x, VP, T)
    torch.testing.assert_close(strong, null + 4.0 * (RING.conditional(3).score(x, VP, T) - null), rtol=1e-7, atol=1e-7)


def test_classifiers_may_hold_checkpoints():
    log_prob, x = log_posterior(3), state()

    def checkpointed(x, t):
        return torch.utils.checkpoint.checkpoint(log_prob, x, t, use_reentrant=False)

    plain, other = (sf.ClassifierGuidance(RING.prediction(VP), p) for p in (log_prob, checkpointed))
    torch.testing.assert_close(other.score(x, T), plain.score(x, T))


def test_classifier_guidance_at_no_data_and_outside_its_interval_adds_nothing():
    flow = sf.RectifiedFlow()
    free, x = RING.prediction(flow, "flow"), state()
    guided = sf.ClassifierGuidance(free, lambda x, t: x.sum(1), interval=(0.2, 1.0))
    torch.testing.assert_close(guided.velocity(x, 1.0), free.velocity(x, 1.0))
    torch.testing.assert_close(guided.velocity(x, 0.1), free.velocity(x, 0.1))
    assert not torch.allclose(guided.velocity(x, 0.5), free.velocity(x, 0.5))


def test_inpainting_keeps_known_axes_and_leaves_independent_ones_alone():
    problem = sf.problems.gaussian(mean=[0.3, -0.7, 0.2], std=[0.5, 0.2, 1.1])
    free = problem.prediction(VP)
    known, mask = torch.tensor([0.9, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    guided, x = sf.Inpaint(free, known, mask), VP.prior((4, 3), seed=1, dtype=torch.float64)
    torch.testing.assert_close(guided.data(x, T)[:, 0], torch.full((4,), 0.9, dtype=torch.float64))
    torch.testing.assert_close(guided.data(x, T)[:, 1:], free.data(x, T)[:, 1:])
    alpha, sigma = VP.alpha(T), VP.sigma(T)
    noise = (x[:, 0] - alpha * 0.9) / sigma
    torch.testing.assert_close(guided.noise(x, T)[:, 0], noise)
    # the known axis then moves along α·known + σ·ε with that same ε
    ds, da = VP.sigma_dot(T), VP.alpha_dot(T)
    torch.testing.assert_close(guided.velocity(x, T)[:, 0], da * 0.9 + ds * noise)


def test_wrappers_nest():
    x, known, mask = state(), torch.tensor([[0.7, 0.0]]), torch.tensor([1.0, 0.0])
    nested = sf.Inpaint(sf.ClassifierGuidance(sf.ClassifierFree(*pair(), scale=2.0), log_posterior(3)), known, mask)
    given, null = exact_scores(x)
    score = null + 2.0 * (given - null) + exact_scores(x, labels=[3] * 5)[0] - null
    data = (x + VP.sigma(T) ** 2 * score) / VP.alpha(T)
    torch.testing.assert_close(nested.data(x, T)[:, 1], data[:, 1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(nested.data(x, T)[:, 0], torch.full((5,), 0.7, dtype=torch.float64))
    over = sf.ClassifierFree(sf.Inpaint(pair()[0], known, mask), sf.Inpaint(pair()[1], known, mask), scale=2.0)
    under = sf.Inpaint(sf.ClassifierFree(*pair(), scale=2.0), known, mask)
    torch.testing.assert_close(over.data(x, T), under.data(x, T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_calls_and_plain_ones_agree(kind):
    """Solvers may precompute `linear`, `input_scale` and `network_time` and use `call`."""
    guided, x = sf.ClassifierFree(*pair(kind), scale=2.0), state()
    t = torch.tensor(T, dtype=torch.float64)
    a, b = guided.linear(t, 1.0, 0.0)
    assert guided.input_scale(t) is None
    torch.testing.assert_close(a * x + b * guided.call(x, guided.network_time(t.expand(5))), guided.data(x, T))


def test_float32_keeps_its_dtype_and_accuracy():
    for make in (lambda p: p, lambda p: sf.Inpaint(p, torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0]))):
        guided = make(sf.ClassifierFree(*pair("v"), scale=2.0))
        fine = guided.data(state(), 0.01)
        coarse = guided.data(state().float(), 0.01)
        assert coarse.dtype == torch.float32
        torch.testing.assert_close(coarse.double(), fine, rtol=1e-4, atol=1e-4)


def test_what_cannot_work_is_refused():
    given, null = pair()
    with pytest.raises(sf.InvalidInput, match="without the condition"):
        sf.ClassifierFree(given, scale=3.0)
    with pytest.raises(sf.InvalidInput, match="either scale or w"):
        sf.ClassifierFree(given, null)
    with pytest.raises(sf.InvalidInput, match="either scale or w"):
        sf.ClassifierFree(given, null, scale=3.0, w=2.0)
    with pytest.raises(sf.InvalidInput, match="one process"):
        sf.ClassifierFree(given, pair(process=sf.EDM())[1], scale=3.0)
    with pytest.raises(sf.InvalidInput, match="Conditioned"):
        sf.ClassifierFree(given, RING.prediction(VP, "noise"), scale=3.0, batched=True)
    with pytest.raises(sf.InvalidInput, match="rescale"):
        sf.ClassifierFree(given, null, scale=3.0, rescale=1.5)
    with pytest.raises(sf.InvalidInput, match="finite number"):
        sf.ClassifierFree(given, null, scale=float("nan"))
    with pytest.raises(sf.InvalidInput, match="low, high"):
        sf.ClassifierFree(given, null, scale=3.0, interval=(0.6, 0.3))
    with pytest.raises(sf.InvalidInput, match="5 rows for a batch of 3"):
        given.data(state(3), T)
    with pytest.raises(sf.InvalidInput, match="one number"):
        sf.ClassifierGuidance(null, lambda x, t: x).data(state(), T)
    with pytest.raises(sf.InvalidInput, match="mask"):
        sf.Inpaint(given, torch.zeros(2), torch.full((2,), 2.0))
    with pytest.raises(sf.InvalidInput, match="wraps a prediction"):
        sf.Inpaint(lambda x, t: x, torch.zeros(2), torch.zeros(2))
