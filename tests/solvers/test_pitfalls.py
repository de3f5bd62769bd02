"""One test for every pitfall of docs/backends.md, by its number; where it is short, the library's own behaviour stands beside it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torchdiffeq
import torchsde

import sdeflow as sf
import sdeflow.solvers.torchsde as backend

F64 = torch.float64
VP = sf.VP()
GAUSSIAN = sf.problems.gaussian(mean=[0.3, -1.0], std=[0.35, 1.5])
FLOW, REVERSE = sf.ProbabilityFlowODE(GAUSSIAN.prediction(VP)), sf.ReverseSDE(GAUSSIAN.prediction(VP))
X = VP.prior((8, 2), dtype=F64)
DECAY = sf.Equation(lambda t, x: -x, lambda t, x: 1.0, noise="additive")


def times_seen(drift, seen):
    def watched(t, x):
        seen.append(float(t))
        return drift(t, x)

    return watched


def test_01_nothing_is_evaluated_past_the_end():
    seen, theirs = [], []
    sf.solve(sf.Equation(times_seen(FLOW.drift, seen)), sf.TorchDiffEq(rtol=1e-4, atol=1e-4), X, start=1.0, stop=1e-3)
    assert min(seen) >= 1e-3 and max(seen) <= 1.0
    torchdiffeq.odeint(times_seen(lambda t, x: -x, theirs), X, torch.tensor([1.0, 1e-3]), rtol=1e-4, atol=1e-4)
    assert min(theirs) < 1e-3, "the library has learnt to stop: the cure can go"


def test_02_the_first_probe_stays_inside():
    seen, theirs = [], []
    slow = lambda t, x: 1e-9 * x  # noqa: E731
    sf.solve(sf.Equation(times_seen(slow, seen)), sf.TorchDiffEq(), X, start=1.0, stop=0.0)
    assert min(seen) >= 0.0 and max(seen) <= 1.0
    torchdiffeq.odeint(times_seen(slow, theirs), X, torch.tensor([1.0, 0.0], dtype=F64))
    assert min(theirs) < -22.0


def test_03_the_end_is_no_interpolant():
    truth = GAUSSIAN.flow(X, VP, 1.0, 0.2)
    run = sf.solve(FLOW, sf.TorchDiffEq("dopri8", rtol=1e-10, atol=1e-10, chart=sf.PlainTime()), X, stop=0.2)
    theirs = torchdiffeq.odeint(
        FLOW.drift, X, torch.tensor([1.0, 0.2], dtype=F64), rtol=1e-10, atol=1e-10, method="dopri8"
    )[-1]
    assert (run.x - truth).abs().max() < 1e-9 < 0.1 * (theirs - truth).abs().max()


def test_04_outputs_are_exact_or_interpolated_as_asked():
    times, error, calls = torch.linspace(0.95, 0.05, 25, dtype=F64), {}, {}
    for exact in (True, False):
        solver = sf.TorchDiffEq("dopri8", rtol=1e-10, atol=1e-10, exact_outputs=exact)
        run = sf.solve(FLOW, solver, X, stop=0.05, save_at=times)
        error[exact] = max(
            (y - GAUSSIAN.flow(X, VP, 1.0, t.item())).abs().max().item() for t, y in zip(times, run.states, strict=True)
        )
        calls[exact] = run.calls
    assert error[True] < 1e-9 and error[False] > 30 * error[True] and calls[True] > calls[False]


def test_05_a_hard_sample_is_not_diluted_by_its_batch():
    def drift(t, x):
        return x[:, 1:2] * torch.stack([(20 * t).cos() * torch.ones(x.shape[0], dtype=F64), 0 * x[:, 0]], 1)

    x = torch.zeros(2048, 2, dtype=F64)
    x[0, 1], exact = 20.0, math.sin(20.0)
    error = {}
    for norm in ("sample", "batch"):
        run = sf.solve(
            sf.Equation(drift), sf.TorchDiffEq("bosh3", norm=norm, rtol=0.0, atol=1e-4), x, start=0.0, stop=1.0
        )
        error[norm] = abs(run.x[0, 0].item() - exact)
    assert error["sample"] < 3e-3 and error["batch"] > 10 * error["sample"]


def test_06_fixed_methods_need_steps():
    with pytest.raises(sf.InvalidInput, match="needs steps"):
        sf.TorchDiffEq("rk4")


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_07_adams_refuses_uneven_grids(method):
    with pytest.raises(sf.InvalidInput, match="unequal"):
        sf.solve(FLOW, sf.TorchDiffEq(method, steps=20, grid=sf.UniformLogSNR()), X)
    with pytest.raises(sf.InvalidInput, match="unequal"):
        sf.solve(FLOW, sf.TorchDiffEq(method, steps=20), X, save_at=[0.777, 1e-3])


@pytest.mark.parametrize("method", ["fehlberg2", "scipy_solver"])  # 8 and 9
def test_08_and_09_unsound_methods_are_refused_with_the_reason(method):
    with pytest.raises(sf.InvalidInput, match=f"does not offer {method}"):
        sf.TorchDiffEq(method)


SCRIPT = """
import math, torch, sdeflow as sf
ode, sde = sf.Equation(lambda t, x: x * math.nan), sf.Equation(lambda t, x: x * math.nan, lambda t, x: 1.0)
for equation, solver in ((ode, sf.TorchDiffEq()), (ode, sf.TorchDiffEq("rk4", steps=5)), (sde, sf.TorchSDE("srk", adaptive=True)),
                         (sf.Equation(lambda t, x: x * x), sf.TorchDiffEq())):
    run = sf.solve(equation, solver, torch.ones(2, 2), start=0.0, stop=2.0, on_failure="return")
    assert run.calls < 2000
    print(int(run.status[0]), end=" ")
"""


def test_10_failures_do_not_rest_on_assertions():
    """Under `python -O` the library loops for ever on both."""
    done = subprocess.run([sys.executable, "-O", "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    codes = [int(code) for code in done.stdout.split()]
    assert codes[:3] == [sf.Status.NON_FINITE] * 3 and codes[3] in (sf.Status.STEP_UNDERFLOW, sf.Status.NON_FINITE)


def test_11_a_hundred_steps_of_a_hundredth():
    run = sf.solve(DECAY, sf.TorchSDE("euler", dt=0.01), torch.ones(2, 2), start=0.0, stop=1.0)
    assert run.accepted.tolist() == [100, 100] and run.calls == 100
    calls = []
    sde = sf.as_torchsde(sf.Equation(times_seen(lambda t, x: -x, calls), lambda t, x: 1.0))
    torchsde.sdeint(sde, torch.ones(2, 2), torch.tensor([0.0, 1.0]), dt=0.01, method="euler")
    assert len(calls) > 100, "the library counts to a hundred in float32 now: the cure can go"


def test_12_the_interval_is_told_the_step(monkeypatch):
    told, make = {}, torchsde.BrownianInterval
    monkeypatch.setattr(torchsde, "BrownianInterval", lambda **k: told.update(k) or make(**k))
    sf.solve(DECAY, sf.TorchSDE("log_ode", steps=50), torch.ones(2, 2), start=0.0, stop=1.0)
    assert math.isclose(told["dt"], 0.02)


def test_13_the_flipped_clock_is_exact():
    seen = []
    equation = sf.Equation(times_seen(lambda t, x: -x, seen), lambda t, x: 1.0, noise="additive", start=1.0, stop=1e-5)
    sf.as_torchsde(equation).f(torch.tensor(-1e-5), torch.ones(2, 2))
    assert seen == [float(torch.tensor(1e-5))]
    sf.solve(equation, sf.TorchSDE("heun", steps=3), torch.ones(2, 2))
    assert seen[-1] == 1e-5, "not even float32's neighbour"


def test_14_seeds_are_ours_and_the_global_generators_are_left_alone():
    for solver in (
        sf.TorchSDE("srk", steps=5),
        sf.TorchSDE("srk", adaptive=True, rtol=0.5, atol=0.5),
        sf.TorchSDE("log_ode", steps=5),
    ):
        before, runs = torch.get_rng_state(), []
        for seed, noise in ((1, 5), (1, 6), (2, 5)):
            torch.manual_seed(noise)
            state = torch.get_rng_state()
            runs.append(sf.solve(REVERSE, solver, X, seed=seed).x)
            assert torch.equal(torch.get_rng_state(), state)
        torch.set_rng_state(before)
        assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


def test_15_a_path_is_the_same_for_other_steps_and_methods():
    path = sf.BrownianPath(sf.sample_seeds(3, 8), (2,), F64, depth=12)
    ends = [
        sf.solve(DECAY, sf.TorchSDE(m, steps=n), X, start=0.0, stop=1.0, path=path).x
        for m, n in (("srk", 32), ("srk", 64), ("heun", 128))
    ]
    assert (ends[0] - ends[1]).abs().max() < 1e-2 and (ends[1] - ends[2]).abs().max() < 2e-2


def test_16_outputs_off_the_grid_become_nodes():
    still = sf.Equation(lambda t, x: 0 * x, lambda t, x: 1.0, noise="additive")
    run = sf.solve(
        still, sf.TorchSDE("euler", steps=1), torch.zeros(4000, 1), start=0.0, stop=1.0, save_at=[0.0625, 1.0]
    )
    # the variance of w(1/16); interpolated it is 1/256. Standard error 2.2 %
    assert abs(run.states[0].var().item() / 0.0625 - 1.0) < 0.12


def test_17_repeated_drifts_are_remembered():
    additive = sf.solve(REVERSE, sf.TorchSDE("srk", steps=100), X)
    assert additive.calls == 200
    moving = sf.Equation(lambda t, x: -x, lambda t, x: 0.3 * x)
    assert sf.solve(moving, sf.TorchSDE("srk", steps=100), X, start=0.0, stop=1.0).calls == 400


def test_18_no_failed_step_is_accepted():
    """The library takes a step whose error is above the tolerance once its size is down at dt_min."""
    fast = sf.Equation(lambda t, x: -50.0 * (x - t.cos()), lambda t, x: 1e-3, noise="additive")
    coarse = sf.TorchSDE("euler", adaptive=True, steps=1, rtol=0.0, atol=1e-2)
    run = sf.solve(fast, coarse, torch.zeros(2, 1, dtype=F64), start=0.0, stop=1.0)
    assert int(run.rejected.min()) >= 3, "one step over the interval errs by thousands"
    assert (run.x - math.cos(1.0)).abs().max() < 0.05
    exact = sf.TorchSDE("euler", adaptive=True, rtol=0.0, atol=1e-8, max_steps=60)
    run = sf.solve(fast, exact, torch.zeros(2, 1, dtype=F64), start=0.0, stop=1.0, on_failure="return")
    assert run.status.tolist() == [sf.Status.MAX_STEPS] * 2
    assert (run.accepted + run.rejected).tolist() == [60, 60] and bool(run.x.isfinite().all())


@pytest.mark.parametrize("dt", [0.0, -0.1, math.nan])
def test_19_steps_of_no_length_and_half_precision_are_refused(dt):
    with pytest.raises(sf.InvalidInput, match="dt must be positive"):
        sf.TorchSDE("euler", dt=dt)
    with pytest.raises(sf.InvalidInput, match="cannot resolve"):
        sf.solve(DECAY, sf.TorchSDE("srk", adaptive=True), X.half(), start=0.0, stop=1.0)


def test_20_reversible_heun_is_refused_with_the_reason():
    with pytest.raises(sf.InvalidInput, match="unstable on reverse-time diffusion"):
        sf.TorchSDE("reversible_heun", steps=50)


@pytest.mark.parametrize("solver", [sf.TorchDiffEq(), sf.TorchDiffEq("rk4", steps=4), sf.TorchSDE("srk", steps=4)])
def test_21_no_graph_unless_asked(solver):
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    predict = sf.DataPrediction(lambda x, t: x * weight * 0.1, VP)
    equation = sf.ReverseSDE(predict) if isinstance(solver, sf.TorchSDE) else sf.ProbabilityFlowODE(predict)
    assert not sf.solve(equation, solver, X).x.requires_grad
    assert sf.solve(equation, solver, X, gradients=True).x.requires_grad


def test_22_shapes_are_checked_and_kept():
    wrong = sf.Equation(lambda t, x: x[:, :1], lambda t, x: 1.0, noise="additive")
    for solver in (sf.TorchSDE("euler", steps=2), sf.TorchSDE("srk", steps=2)):
        with pytest.raises(sf.InvalidInput, match="must return a tensor of the"):
            sf.solve(wrong, solver, X, start=0.0, stop=1.0)
    with pytest.raises(sf.InvalidInput, match="must return a tensor of the"):
        sf.solve(sf.Equation(lambda t, x: x[:, :1]), sf.TorchDiffEq(), X, start=0.0, stop=1.0)
    single = sf.solve(DECAY, sf.TorchSDE("srk", steps=2), torch.ones(1, 1), start=0.0, stop=1.0)
    assert single.x.shape == (1, 1) and single.x.dtype == torch.float32
    picture = sf.solve(DECAY, sf.TorchSDE("srk", steps=2), torch.ones(2, 3, 4, 4), start=0.0, stop=1.0)
    assert picture.x.shape == (2, 3, 4, 4)
    assert set(backend.REFUSED).isdisjoint(backend.METHODS)
