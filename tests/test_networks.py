"""A trained network through everything: loading, guidance, likelihood, transforms, compilation, half precision."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import sdeflow as sf

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "tests" / "data" / "digits"
pytest.importorskip("diffusers")
sklearn_svm = pytest.importorskip("sklearn.svm")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def training():
    """The training script as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import train_digits
    finally:
        sys.path.pop(0)
    return train_digits


@pytest.fixture(scope="module")
def networks():
    def load(target, **options):
        return sf.diffusers.from_pretrained(str(DIGITS / target), null_label=10, **options)

    return load


def test_weights_and_data_are_those_of_the_record(training):
    record = json.loads((DIGITS / "training.json").read_text())
    images, labels, *_ = training.split()
    assert training.data_hash(images, labels) == record["data_sha256"]
    for target, part in record["targets"].items():
        weights = DIGITS / target / "unet" / "diffusion_pytorch_model.safetensors"
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == part["sha256"]
    assert sum(p.stat().st_size for p in DIGITS.rglob("*") if p.is_file()) < 2e6


@pytest.mark.parametrize(
    "make",
    [
        lambda tol: sf.ShARK(rtol=tol, atol=tol, chart=sf.Trigonometric()),
        lambda tol: sf.ExponentialShARK(rtol=tol, atol=tol),
        lambda tol: sf.Adams(rtol=tol, atol=tol),
    ],
    ids=["ShARK", "ExponentialShARK", "Adams"],
)
def test_adaptive_sdes_do_not_leave_the_data_at_loose_tolerances(networks, make):
    """Near pure noise this network's D is off by several times the data's scale; no error made there may be left to be forgotten."""
    loaded = networks("noise", class_labels=torch.arange(20) % 10)
    x = loaded.prediction.process.prior((20, 1, 8, 8), seed=1)
    with torch.no_grad():
        solution = sf.solve(sf.ReverseSDE(loaded.prediction), make(0.1), x, seed=2)
    assert solution.x.abs().max() < 2.5  # pixels lie in [−1, 1]
    assert solution.evaluations.double().mean() < 100


@pytest.mark.parametrize("target", ["noise", "v"])
def test_samples_are_the_digits_that_were_asked_for(training, networks, target):
    """A classifier of 99 % on held-out digits reads guided samples as asked; chance is 10 %."""
    images, classes, held_out, labels = training.split()
    classifier = sklearn_svm.SVC().fit(images.flatten(1), classes)
    assert classifier.score(held_out.flatten(1), labels) > 0.97
    asked = torch.arange(40) % 10
    loaded = networks(target, class_labels=asked, guidance_scale=2.0)
    assert type(loaded.prediction.like).__name__ == {"noise": "NoisePrediction", "v": "VPrediction"}[target]
    with torch.no_grad():
        found = sf.solve(sf.ProbabilityFlowODE(loaded.prediction), sf.UniPC(order=2, steps=12), loaded.noise(40))
    assert (found.evaluations == 2 * found.calls).all()  # both halves in one call
    assert (classifier.predict(found.x.flatten(1)) == asked.numpy()).mean() >= 0.85


def test_guidance_without_a_null_condition_is_refused():
    with pytest.raises(sf.InvalidInput, match="null_label="):
        sf.diffusers.from_pretrained(str(DIGITS / "noise"), class_labels=3, guidance_scale=2.0)
    with pytest.raises(sf.InvalidInput, match="class_labels=3"):
        sf.diffusers.from_pretrained(str(DIGITS / "noise"))


def test_hutchinson_agrees_with_the_exact_divergence_of_the_network(networks):
    predict = networks("v", class_labels=torch.tensor([3, 5]), load={"torch_dtype": torch.float64}).prediction
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    options = {"start": 300.0, "stop": 700.0}
    solver = sf.RungeKutta("heun", steps=2)
    exact = sf.log_likelihood(predict, x, solver, **options)
    found = sf.log_likelihood(predict, x, solver, divergence="rademacher", probes=24, **options)
    assert (found.standard_error > 0).all()
    assert ((found.log_prob - exact.log_prob).abs() < 5 * found.standard_error).all()  # both rows: 1e-6 false alarms


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2)).double()


def test_torch_func_passes_through_a_prediction():
    net, process = small(), sf.VP()
    predict = sf.VPrediction(lambda x, t: net(torch.cat([x, t[:, None]], 1)), process)
    x, v = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    value, slope = torch.func.jvp(lambda x: predict.score(x, 0.4), (x,), (v,))
    torch.testing.assert_close(value, predict.score(x, 0.4))
    h = 1e-6
    difference = (predict.score(x + h * v, 0.4) - predict.score(x - h * v, 0.4)) / (2 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
    rows = torch.vmap(lambda x: predict.data(x[None], 0.4)[0])(x)
    torch.testing.assert_close(rows, predict.data(x, 0.4))
    times = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    mapped = torch.vmap(lambda t: predict.data(x, t))(times)
    torch.testing.assert_close(mapped, torch.stack([predict.data(x, t) for t in times]))
    ends = torch.func.jacrev(lambda x: predict.velocity(x[None], 0.4)[0])(x[0])
    torch.testing.assert_close(
        ends, torch.autograd.functional.jacobian(lambda x: predict.velocity(x[None], 0.4)[0], x[0])
    )


def test_compiled_networks_give_the_same_samples():
    net, process = small().float(), sf.VP()

    def network(x, t):
        return net(torch.cat([x, t[:, None]], 1))

    x = process.prior((6, 2), seed=1)
    plain = sf.solve(sf.ProbabilityFlowODE(sf.VPrediction(network, process)), sf.DDIM(steps=5), x)
    compiled = torch.compile(network, backend="aot_eager")
    found = sf.solve(sf.ProbabilityFlowODE(sf.VPrediction(compiled, process)), sf.DDIM(steps=5), x)
    torch.testing.assert_close(found.x, plain.x)
    assert found.calls == plain.calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_under_a_float32_state(dtype):
    process, x = sf.VP(), sf.VP().prior((6, 2), seed=1)

    class Network(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.seen = net, set()

        def forward(self, x, t):
            self.seen.add((x.dtype, t.dtype))
            return self.net(torch.cat([x, t[:, None].to(x.dtype)], 1))

    ends = []
    for kind in (torch.float32, dtype):
        network = Network(small().to(kind))
        found = sf.solve(sf.ProbabilityFlowODE(sf.VPrediction(network, process)), sf.DDIM(steps=5), x)
        assert found.x.dtype == torch.float32
        assert network.seen == {(kind, torch.float32)}
        ends.append(found.x)
    assert 0 < (ends[0] - ends[1]).abs().max() < 0.05


def test_conditions_follow_rows_and_are_checked():
    labels, seen = torch.arange(4), []

    def network(x, t, label, info, flag):
        seen.append((label, info, flag))
        return x

    bound = sf.Conditioned(network, label=labels, info={"size": torch.ones(1, 2)}, flag=True)
    bound(torch.zeros(4, 3), torch.zeros(4))
    label, info, flag = seen[0]
    assert label.tolist() == [0, 1, 2, 3]
    assert info["size"].shape == (4, 2)
    assert flag is True
    with pytest.raises(sf.InvalidInput, match="label holds 4 rows for a batch of 3"):
        bound(torch.zeros(3, 3), torch.zeros(3))
    with pytest.raises(sf.InvalidInput, match="callable"):
        sf.Conditioned(3)
    with pytest.raises(sf.InvalidInput, match="callable"):
        sf.Checkpointed(None)
