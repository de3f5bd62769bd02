"""torchdiffeq as a backend: exact maps, independent references, orders, counts, failures, gradients, bad input."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp

import sdeflow as sf
from sdeflow.solvers.torchdiffeq import METHODS

F64 = torch.float64
PROCESSES = {
    "vp": sf.VP(),
    "cosine": sf.CosineVP(),
    "subvp": sf.SubVP(),
    "ve": sf.VE(),
    "edm": sf.EDM(),
    "flow": sf.RectifiedFlow(),
}
GAUSSIAN = sf.problems.gaussian(mean=[0.3, -1.0], std=[0.35, 1.5])
ADAPTIVE = [name for name, m in METHODS.items() if m.adaptive]
FIXED = [name for name, m in METHODS.items() if not m.adaptive]


class Counted:
    """A network that keeps its own books: rows seen, batches seen."""

    def __init__(self, network):
        self.network, self.rows, self.calls = network, 0, 0

    def __call__(self, x, t):
        self.rows, self.calls = self.rows + x.shape[0], self.calls + 1
        return self.network(x, t)


def setting(method: str, steps: int = 12, tol: float = 1e-5, **more):
    if METHODS[method].adaptive:
        return sf.TorchDiffEq(method, rtol=tol, atol=tol, **more)
    return sf.TorchDiffEq(method, steps=steps, **more)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_closed_form_on_every_process(name):
    process = PROCESSES[name]
    x = process.prior((16, 2), dtype=F64)
    run = sf.solve(
        sf.ProbabilityFlowODE(GAUSSIAN.prediction(process)), sf.TorchDiffEq("dopri8", rtol=1e-12, atol=1e-12), x
    )
    torch.testing.assert_close(run.x, GAUSSIAN.flow(x, process, process.t_max, process.t_min), rtol=1e-9, atol=1e-9)


def dop853(problem, process, x):
    """scipy's DOP853 on the same field in the plain time of the process, one sample after the other."""
    predict = problem.prediction(process)

    def field(t, y):
        return predict.velocity(torch.from_numpy(y)[None], float(t))[0].numpy()

    span = (process.t_max, process.t_min)
    return torch.from_numpy(
        np.stack([solve_ivp(field, span, row.numpy(), "DOP853", rtol=1e-12, atol=1e-12).y[:, -1] for row in x])
    )


@pytest.mark.parametrize(("problem", "samples"), [("ring", 6), ("digits", 2)])
def test_an_independent_dop853_agrees(problem, samples):
    known, process = getattr(sf.problems, problem)(), PROCESSES["vp"]
    x = process.prior((samples, *known.event_shape), dtype=F64)
    flat = sf.solve(
        sf.ProbabilityFlowODE(known.prediction(process)), sf.TorchDiffEq("dopri8", rtol=1e-11, atol=1e-11), x
    )
    torch.testing.assert_close(flat.x, dop853(known, process, x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", FIXED)
def test_observed_orders(method):
    steps = {1: (320, 640), 2: (160, 320), 3: (80, 160), 4: (80, 160)}[METHODS[method].order]
    steps = (160, 320) if method == "explicit_adams" else steps
    equation = sf.Equation(lambda t, x: torch.stack([x[:, 1], (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0] + t.cos()], 1))
    x = torch.tensor([[1.0, 0.5], [-0.3, 1.2]], dtype=F64)

    def end(solver):
        return sf.solve(equation, solver, x, start=0.0, stop=3.0).x

    truth = end(sf.TorchDiffEq("dopri8", rtol=1e-13, atol=1e-13))
    settings = {"rtol": 1e-12, "atol": 1e-12} if method == "implicit_adams" else {}
    coarse, fine = ((end(sf.TorchDiffEq(method, steps=n, **settings)) - truth).norm().item() for n in steps)
    assert fine > 1e-12, "too fine to see an order"
    assert abs(math.log2(coarse / fine) - METHODS[method].order) < 0.2, (coarse, fine)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_error_follows_the_tolerance(method):
    x = PROCESSES["vp"].prior((32, 2), dtype=F64)
    equation, truth = sf.ProbabilityFlowODE(GAUSSIAN.prediction(sf.VP())), GAUSSIAN.flow(x, sf.VP(), 1.0, 1e-3)
    for tol in (1e-3, 1e-5):
        error = (sf.solve(equation, setting(method, tol=tol), x).x - truth).square().mean(1).sqrt().max().item()
        assert 1e-6 * tol < error < 30 * tol


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_network(method):
    problem, process = sf.problems.ring(), sf.VP()
    network = Counted(problem.network(process))
    x = process.prior((8, 2), dtype=F64)
    run = sf.solve(sf.ProbabilityFlowODE(sf.DataPrediction(network, process)), setting(method, tol=1e-6), x)
    assert run.calls == network.calls
    assert run.evaluations.tolist() == [network.calls] * 8 and network.rows == 8 * network.calls
    known = METHODS[method]
    if known.adaptive:
        tries = run.accepted + run.rejected
        assert (tries * known.calls + 2).tolist() == run.evaluations.tolist()
        assert int(run.rejected[0]) > 0, "the case must contain a rejection"
    else:
        assert run.accepted.tolist() == [12] * 8 and run.rejected.tolist() == [0] * 8
        if method in ("euler", "midpoint", "heun2", "heun3", "rk4"):
            assert run.calls == 12 * known.calls


def test_a_given_first_step_saves_the_probe():
    x, equation = sf.VP().prior((4, 2)), sf.ProbabilityFlowODE(GAUSSIAN.prediction(sf.VP()))
    run = sf.solve(equation, sf.TorchDiffEq("dopri5", first_step=0.1), x)
    assert run.calls == 1 + 6 * int(run.accepted[0] + run.rejected[0])


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "euler", "rk4", "implicit_adams"])
def test_a_nan_in_one_sample_leaves_the_others(method):
    process = sf.VP()
    exact = GAUSSIAN.network(process)
    x = process.prior((5, 2), dtype=F64)
    x[2, 0] = 40.0  # the only one that meets the bad region

    def network(y, t):
        bad = (y[:, 0].abs() > 30.0) & (t < 0.5)
        return torch.where(bad[:, None], math.nan, exact(y, t))

    equation = sf.ProbabilityFlowODE(sf.DataPrediction(network, process))
    run = sf.solve(equation, setting(method, steps=20), x, on_failure="return")
    good = [0, 1, 3, 4]
    assert run.status.tolist() == [0, 0, sf.Status.NON_FINITE, 0, 0]
    alone = sf.solve(equation, setting(method, steps=20), x[good])
    torch.testing.assert_close(run.x[good], alone.x, rtol=0, atol=1e-3)
    assert bool(run.x.isfinite().all()), "a failed sample keeps its last state"
    assert 0 < int(run.accepted[2]) < int(run.accepted[0])
    assert run.calls < 40 * alone.calls
    with pytest.raises(sf.SolveFailed, match="NON_FINITE") as failure:
        sf.solve(equation, setting(method, steps=20), x)
    assert failure.value.solution.success.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_nan_everywhere_ends_at_once(method):
    equation = sf.ProbabilityFlowODE(sf.DataPrediction(lambda x, t: x * math.nan, sf.VP()))
    run = sf.solve(equation, setting(method), sf.VP().prior((3, 2)), on_failure="return")
    assert run.status.tolist() == [sf.Status.NON_FINITE] * 3 and run.calls < 10
    start = sf.VP().prior((3, 2))
    torch.testing.assert_close(run.x, start)


def test_a_nan_start_is_that_samples_own():
    x = sf.VP().prior((3, 2), dtype=F64)
    x[1, 1] = math.nan
    run = sf.solve(sf.ProbabilityFlowODE(GAUSSIAN.prediction(sf.VP())), sf.TorchDiffEq(), x, on_failure="return")
    assert run.status.tolist() == [0, sf.Status.NON_FINITE, 0]
    assert bool(run.x[[0, 2]].isfinite().all())


def test_underflow_and_budgets_become_statuses_with_the_partial_state():
    equation = sf.Equation(lambda t, x: x.square())  # leaves to infinity at t = 1
    x = torch.ones(2, 1, dtype=F64)
    run = sf.solve(equation, sf.TorchDiffEq("dopri5"), x, start=0.0, stop=2.0, on_failure="return")
    assert set(run.status.tolist()) <= {int(sf.Status.STEP_UNDERFLOW), int(sf.Status.NON_FINITE)} and run.x.min() > 1e4
    saved = [0.5, 2.0]
    run = sf.solve(
        equation, sf.TorchDiffEq("dopri5", max_steps=8), x, start=0.0, stop=2.0, save_at=saved, on_failure="return"
    )
    assert run.status.tolist() == [sf.Status.MAX_STEPS] * 2
    assert int((run.accepted + run.rejected)[0]) == 8
    torch.testing.assert_close(run.states[0], 2 * x, rtol=1e-4, atol=0)
    assert bool(run.states[1].isnan().all()) and bool(run.x.isfinite().all())
    run = sf.solve(equation, sf.TorchDiffEq(max_evaluations=15), x, start=0.0, stop=2.0, on_failure="return")
    assert run.calls == 15 and run.status.tolist() == [sf.Status.MAX_STEPS] * 2


def test_a_trial_step_out_of_the_domain_is_only_rejected():
    equation = sf.Equation(lambda t, x: -10.0 * x.sqrt())  # √ of a negative state in a bold first step
    run = sf.solve(
        equation, sf.TorchDiffEq("dopri5", first_step=0.9), torch.ones(1, 1, dtype=F64), start=0.0, stop=0.15
    )
    torch.testing.assert_close(run.x, torch.full((1, 1), 0.0625, dtype=F64), rtol=1e-4, atol=0)


def test_outputs_and_gradients():
    process, x = sf.VP(), sf.VP().prior((3, 2), dtype=F64)
    equation = sf.ProbabilityFlowODE(GAUSSIAN.prediction(process))
    times = [1.0, 0.6, 0.2, 1e-3]
    for method in METHODS:
        if "adams" in method:
            continue
        run = sf.solve(equation, setting(method, steps=200, tol=1e-7), x, save_at=times)
        for t, state in zip(times, run.states, strict=True):
            torch.testing.assert_close(state, GAUSSIAN.flow(x, process, 1.0, t), rtol=0, atol=2e-2)
        assert torch.equal(run.states[0], x) and torch.equal(run.states[-1], run.x)
    leaf = x.clone().requires_grad_()
    for solver in (sf.TorchDiffEq(rtol=1e-8, atol=1e-8), sf.TorchDiffEq(rtol=1e-8, atol=1e-8, adjoint=True)):
        y = sf.solve(equation, solver, leaf, gradients=True).x
        (slope,) = torch.autograd.grad(y.sum(), leaf)
        v0, v1 = (
            process.alpha(t) ** 2 * torch.tensor([0.35, 1.5], dtype=F64) ** 2 + process.sigma(t) ** 2
            for t in (1.0, 1e-3)
        )
        torch.testing.assert_close(slope, (v1 / v0).sqrt().expand(3, 2), rtol=1e-5, atol=1e-7)


def test_the_adjoint_gives_the_parameters_their_gradients():
    process = sf.VP()
    torch.manual_seed(1)
    net = torch.nn.Linear(2, 2).double()

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x, t):
            return self.inner(x).tanh()

    x = process.prior((4, 2), dtype=F64)
    equation = sf.ProbabilityFlowODE(sf.DataPrediction(Network(), process))
    grads = []
    for adjoint in (False, True):
        solver = sf.TorchDiffEq(rtol=1e-8, atol=1e-8, adjoint=adjoint)
        loss = sf.solve(equation, solver, x, gradients=True).x.square().sum()
        grads.append(torch.autograd.grad(loss, net.weight)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    fixed = sf.solve(equation, sf.TorchDiffEq("rk4", steps=40, adjoint=True), x, gradients=True).x.square().sum()
    torch.testing.assert_close(torch.autograd.grad(fixed, net.weight)[0], grads[0], rtol=1e-2, atol=1e-3)


def test_generic_equations():
    money = sf.solve(
        sf.Equation(lambda t, x: 0.04 * x),
        sf.TorchDiffEq(rtol=1e-10, atol=1e-10),
        torch.full((2, 1), 1500.0, dtype=F64),
        start=0,
        stop=10,
    )
    torch.testing.assert_close(money.x, torch.full((2, 1), 1500.0 * math.exp(0.4), dtype=F64), rtol=1e-9, atol=0)
    lotka = sf.Equation(lambda t, x: torch.stack([x[:, 0] * (1.5 - x[:, 1]), x[:, 1] * (x[:, 0] - 3.0)], 1))
    run = sf.solve(
        lotka,
        sf.TorchDiffEq("dopri8", rtol=1e-11, atol=1e-11),
        torch.tensor([[10.0, 5.0]], dtype=F64),
        start=0.0,
        stop=5.0,
    )
    truth = solve_ivp(
        lambda t, y: [y[0] * (1.5 - y[1]), y[1] * (y[0] - 3.0)], (0, 5), [10.0, 5.0], "LSODA", rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(run.x[0], torch.from_numpy(truth.y[:, -1]), rtol=1e-7, atol=0)


def test_the_library_takes_our_drift_as_it_is():
    ode = sf.ProbabilityFlowODE(GAUSSIAN.prediction(sf.VP()))
    x = sf.VP().prior((4, 2), dtype=F64)
    ts = torch.tensor([1.0, 1e-3], dtype=F64)
    y = torchdiffeq.odeint(ode.drift, x, ts, rtol=1e-8, atol=1e-8, method="dopri5", options={"step_t": ts[-1:]})[-1]
    torch.testing.assert_close(y, GAUSSIAN.flow(x, sf.VP(), 1.0, 1e-3), rtol=0, atol=1e-6)


def test_event_shapes_dtypes_and_charts():
    digits = sf.problems.digits()
    predict = digits.prediction(sf.VP())
    x = sf.VP().prior((3, 64))
    run = sf.solve(sf.ProbabilityFlowODE(predict), sf.TorchDiffEq("rk4", steps=6), x)
    picture = sf.DataPrediction(lambda y, t: digits.network(sf.VP())(y.flatten(1), t).reshape(y.shape), sf.VP())
    folded = sf.solve(sf.ProbabilityFlowODE(picture), sf.TorchDiffEq("rk4", steps=6), x.reshape(3, 1, 8, 8))
    torch.testing.assert_close(folded.x.reshape(3, 64), run.x)
    wide = sf.solve(sf.ProbabilityFlowODE(predict), sf.TorchDiffEq("rk4", steps=6), x.double())
    torch.testing.assert_close(run.x.double(), wide.x, rtol=1e-3, atol=1e-3)
    half = sf.solve(sf.ProbabilityFlowODE(predict), sf.TorchDiffEq("rk4", steps=6), x.bfloat16())
    assert half.x.dtype == torch.bfloat16 and (half.x.double() - wide.x).abs().mean() < 0.05
    gaussian = sf.ProbabilityFlowODE(GAUSSIAN.prediction(sf.VP()))
    y = sf.VP().prior((4, 2), dtype=F64)
    truth, spent = GAUSSIAN.flow(y, sf.VP(), 1.0, 1e-3), {}
    for chart in (sf.StraightLine(), sf.Trigonometric(), sf.LogSNR(), sf.PlainTime()):
        got = sf.solve(gaussian, sf.TorchDiffEq("dopri5", rtol=1e-6, atol=1e-6, chart=chart), y)
        torch.testing.assert_close(got.x, truth, rtol=0, atol=1e-4)
        spent[type(chart).__name__] = got.calls
    assert spent["StraightLine"] < spent["PlainTime"]


BAD = {
    "unknown": (lambda: sf.TorchDiffEq("rk45"), "must be one of dopri5"),
    "negative": (lambda: sf.TorchDiffEq(rtol=-1e-3), "rtol must be a finite number"),
    "nan": (lambda: sf.TorchDiffEq(atol=math.nan), "atol must be a finite number"),
    "zero": (lambda: sf.TorchDiffEq(rtol=0.0, atol=0.0), "both 0"),
    "no steps": (lambda: sf.TorchDiffEq("rk4"), "needs steps"),
    "half a step": (lambda: sf.TorchDiffEq("rk4", steps=2.5), "positive integer"),
    "steps and tolerance": (lambda: sf.TorchDiffEq("dopri5", steps=10), "chooses its own steps"),
    "norm": (lambda: sf.TorchDiffEq(norm="max"), "norm must be"),
    "first": (lambda: sf.TorchDiffEq(first_step=0.0), "first_step must be positive"),
    "budget": (lambda: sf.TorchDiffEq(max_steps=0), "max_steps must be"),
    "adams order": (lambda: sf.TorchDiffEq("explicit_adams", steps=9, max_order=12), "max_order"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_say_what_to_write(name):
    make, text = BAD[name]
    with pytest.raises(sf.InvalidInput, match=text):
        make()


def test_bad_tasks_say_what_to_write():
    ode = sf.ProbabilityFlowODE(GAUSSIAN.prediction(sf.VP()))
    x = sf.VP().prior((2, 2))
    with pytest.raises(sf.InvalidInput, match="cannot resolve"):
        sf.solve(ode, sf.TorchDiffEq(), x.half())
    with pytest.raises(sf.InvalidInput, match="additive noise"):
        sf.solve(sf.ReverseSDE(GAUSSIAN.prediction(sf.VP())), sf.TorchDiffEq(), x)
    with pytest.raises(sf.InvalidInput, match="chart needs"):
        sf.solve(sf.Equation(lambda t, y: -y), sf.TorchDiffEq(chart=sf.LogSNR()), x, start=0.0, stop=1.0)
    flow = sf.ProbabilityFlowODE(GAUSSIAN.prediction(sf.RectifiedFlow()))
    with pytest.raises(sf.InvalidInput, match="does not reach"):
        sf.solve(flow, sf.TorchDiffEq(chart=sf.LogSNR()), x)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sf.TorchDiffEq().rtol = 1.0


@pytest.mark.parametrize("method", METHODS)
def test_facts(method):
    facts = setting(method).facts
    assert (facts.order, facts.adaptive, facts.noise, facts.face) == (
        METHODS[method].order,
        method in ADAPTIVE,
        ("none",),
        "drift",
    )
    assert facts.reference.startswith("torchdiffeq") and facts.strong is facts.weak is None


@pytest.mark.parametrize("wall", [0.5, 0.4321, 0.3])
@pytest.mark.parametrize(
    "solver",
    [*(sf.TorchDiffEq(m, rtol=1e-6, atol=1e-6) for m in ("dopri5", "bosh3", "dopri8")), sf.TorchSDE(adaptive=True)],
    ids=lambda s: s.facts.name,
)
def test_a_sample_that_ends_at_a_wall_does_not_stop_the_others(solver, wall):
    """Up to the wall every step that is short enough is finite, so that non-finite attempts never come in a long row."""
    problem, process = sf.problems.gaussian(mean=[0.0, 1.0], std=[0.5, 1.0]), sf.VP()
    inner = problem.network(process)

    def network(x, t):
        out = inner(x, t)
        return torch.where((x[:, :1] > 50.0) & (t[:, None] < wall), torch.nan, out)

    x = process.prior((4, 2), dtype=torch.float64)
    x[1, 0] = 1e4
    equation = (sf.ProbabilityFlowODE if "none" in solver.facts.noise else sf.ReverseSDE)(
        sf.DataPrediction(network, process)
    )
    run = sf.solve(equation, solver, x, on_failure="return")
    assert run.status.tolist() == [0, sf.Status.NON_FINITE, 0, 0]
    if "none" in solver.facts.noise:
        rest = torch.tensor([0, 2, 3])
        exact = problem.flow(x[rest], process, process.t_max, process.t_min)
        torch.testing.assert_close(run.x[rest], exact, rtol=1e-4, atol=1e-4)
