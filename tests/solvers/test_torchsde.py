"""torchsde as a backend: exact laws, strong orders on one path, counts, failures, noise, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torchsde

import sdeflow as sf
from sdeflow.solvers.torchsde import METHODS

F64 = torch.float64
GAUSSIAN = sf.problems.gaussian(mean=[0.8, -0.5, 0.0], std=[0.25, 0.6, 1.5])
PROCESSES = {"vp": sf.VP(), "edm": sf.EDM(), "flow": sf.RectifiedFlow()}


class Unit:
    """Noise that makes the solver's linear map visible: step n's W is √h in row 2n, its H √(h/12) in row 2n + 1."""

    seeds = None

    def __init__(self, rows: int, d: int):
        self.rows, self.d, self.number = rows, d, {}

    def increment(self, s, t):
        n, h = self.number.setdefault((s, t), len(self.number)), abs(t - s)
        W, H = torch.zeros(2, self.rows, self.d, dtype=F64)
        W[2 * n], H[2 * n + 1] = math.sqrt(h), math.sqrt(h / 12)
        return W, H


def law(solver, process, eta, steps, mean, cov):
    """Exact mean and per-axis variances of what the solver draws, on Gaussian data with independent axes."""
    draws = 2 * steps
    x = mean.expand(draws + 2, -1).clone()
    x[-1] += cov.diag().sqrt()
    y = sf.solve(sf.ReverseSDE(GAUSSIAN.prediction(process), eta=eta), solver, x, path=Unit(draws + 2, 3)).x
    return y[-2], (y - y[-2]).square().sum(0)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", PROCESSES)
def test_mean_and_covariance_within_their_interval(name, eta):
    """4096 samples; every mean within 4.5 and every covariance within 5 of its standard errors: a false alarm in 10⁴ runs."""
    process, n = PROCESSES[name], 4096
    x = process.prior((n, 3), seed=11, dtype=F64)
    y = sf.solve(sf.ReverseSDE(GAUSSIAN.prediction(process), eta=eta), sf.TorchSDE("srk", steps=200), x, seed=4).x
    if name == "flow":  # begun where the prior is the marginal
        mean, cov = GAUSSIAN.moments(process, process.t_min)
    else:
        mean, cov = GAUSSIAN.reverse_moments(process, eta)
    assert bool(((y.mean(0) - mean).abs() < 4.5 * (cov.diag() / n).sqrt()).all())
    spread = ((cov.diag()[:, None] * cov.diag() + cov**2) / n).sqrt()
    assert bool(((y.T.cov() - cov).abs() < 5.0 * spread).all())


@pytest.mark.parametrize("method", METHODS)
def test_weak_order_by_exact_propagation(method):
    if METHODS[method].levy == "foster":
        pytest.skip("takes no path; with additive noise it is midpoint, see below")
    process, eta = sf.VP(t_min=0.05), 1.0
    mean, cov = GAUSSIAN.moments(process, 1.0)
    mean, cov = mean + 0.3, 1.4 * cov
    true_mean, true_cov = GAUSSIAN.reverse_moments(process, eta, mean=mean, cov=cov)
    errors = []
    for steps in (80, 160):
        m, v = law(sf.TorchSDE(method, steps=steps), process, eta, steps, mean, cov)
        errors.append(torch.cat([m - true_mean, v - true_cov.diag()]).norm().item())
    # midpoint's first order shows where the drift is curved: on linear equations it is of second order
    claim = 2.0 if method == "midpoint" else METHODS[method].weak
    assert abs(math.log2(errors[0] / errors[1]) - claim) < 0.2, errors


CURVED = sf.Equation(lambda t, x: -x - x.sin(), lambda t, x: 0.5 + 0.4 * t, noise="additive")


def on_the_path(name: str, steps: int) -> torch.Tensor:
    """64 paths on [0, 1]; the nodes of every grid are nodes of the finer ones, so all solves see the same W and H."""
    path = sf.BrownianPath(sf.sample_seeds(5, 64), (1,), F64, depth=12)
    x = torch.ones(64, 1, dtype=F64)
    return sf.solve(CURVED, sf.TorchSDE(name, steps=steps), x, start=0.0, stop=1.0, path=path).x


@pytest.fixture(scope="module")
def truth():
    return on_the_path("srk", 256)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].levy != "foster"])
def test_strong_order_on_one_path(method, truth):
    coarse, fine = ((on_the_path(method, n) - truth).square().mean().sqrt().item() for n in (8, 32))
    order = 0.5 * math.log2(coarse / fine)
    assert order > 1.4 if method == "srk" else abs(order - METHODS[method].strong) < 0.2, (order, coarse, fine)


def test_strong_order_on_the_reverse_sde():
    process = sf.VP(t_min=0.05)
    x = process.prior((64, 3), dtype=F64)
    path = sf.BrownianPath(sf.sample_seeds(5, 64), (3,), F64, depth=12)
    equation, chart = sf.ReverseSDE(GAUSSIAN.prediction(process)), sf.Trigonometric()

    def end(method, steps):
        solver = sf.TorchSDE(method, steps=steps, chart=chart, grid=sf.UniformLogSNR())
        return sf.solve(equation, solver, x, path=path).x

    truth = end("srk", 256)
    for method, low, high in (("srk", 1.4, 2.2), ("euler", 0.8, 1.2)):
        coarse, fine = ((end(method, n) - truth).square().mean().sqrt().item() for n in (16, 64))
        assert low < 0.5 * math.log2(coarse / fine) < high, (method, coarse, fine)


def test_log_ode_is_midpoint_where_noise_does_not_depend_on_the_state():
    x = torch.ones(4, 2, dtype=F64)
    sde = sf.as_torchsde(CURVED, sde_type="stratonovich")
    bm = torchsde.BrownianInterval(
        0.0, 1.0, size=(4, 2), dtype=F64, entropy=3, dt=0.1, levy_area_approximation="foster"
    )
    a, b = (torchsde.sdeint(sde, x, [0.0, 1.0], bm=bm, dt=0.1, method=m)[-1] for m in ("log_ode", "midpoint"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_counts_are_those_of_the_network(method, adaptive):
    problem, process, seen = sf.problems.ring(), sf.VP(), []
    exact = problem.network(process)

    def network(x, t):
        seen.append(x.shape[0])
        return exact(x, t)

    x = process.prior((6, 2), dtype=F64)
    solver = (
        sf.TorchSDE(method, adaptive=True, rtol=0.05, atol=0.05, steps=4) if adaptive else sf.TorchSDE(method, steps=9)
    )
    run = sf.solve(sf.ReverseSDE(sf.DataPrediction(network, process)), solver, x, seed=1)
    assert run.calls == len(seen) and run.evaluations.tolist() == [sum(seen) // 6] * 6
    if adaptive:
        assert int(run.rejected[0]) > 0 and run.rejected.unique().numel() == 1
    else:
        assert run.calls == 9 * solver.facts.evaluations and run.accepted.tolist() == [9] * 6


def test_adaptive_steps_follow_the_tolerance():
    x, equation = sf.VP(t_min=0.05).prior((16, 3), dtype=F64), sf.ReverseSDE(GAUSSIAN.prediction(sf.VP(t_min=0.05)))
    path = sf.BrownianPath(sf.sample_seeds(2, 16), (3,), F64, depth=12)
    truth = sf.solve(equation, sf.TorchSDE("srk", steps=300), x, path=path).x
    errors = []
    for tol in (3e-2, 3e-3):
        run = sf.solve(equation, sf.TorchSDE("srk", adaptive=True, rtol=tol, atol=tol), x, path=path)
        errors.append((run.x - truth).square().mean().sqrt().item())
    assert errors[1] < 0.4 * errors[0] and errors[1] < 3e-2


def test_the_steps_are_the_library_s():
    """On an even grid with one bm, our loop and sdeint give the same numbers."""
    x, path = torch.ones(8, 3, dtype=F64), sf.BrownianPath(sf.sample_seeds(1, 8), (3,), F64)
    growth = sf.Equation(lambda t, y: 0.1 * y - y.sin(), lambda t, y: 0.5 * y + t)
    for method in ("euler", "milstein", "srk"):
        ours = sf.solve(growth, sf.TorchSDE(method, steps=16), x, start=0.0, stop=1.0, path=path).x
        theirs = torchsde.sdeint(
            sf.as_torchsde(growth), x, [0.0, 1.0], bm=path.as_torchsde(), dt=1 / 16, method=method
        )[-1]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_one_liners_hand_equations_to_the_library():
    process = sf.VP(t_min=0.05)
    x = process.prior((2048, 3), dtype=F64)
    sde = sf.as_torchsde(sf.ReverseSDE(GAUSSIAN.prediction(process)))
    y = torchsde.sdeint(sde, x, torch.tensor([-1.0, -0.05], dtype=F64), dt=0.95 / 200, method="srk")[-1]
    mean, cov = GAUSSIAN.reverse_moments(process)
    assert bool(((y.mean(0) - mean).abs() < 5 * (cov.diag() / 2048).sqrt() + 0.02).all())
    assert bool(((y.var(0) / cov.diag()).log().abs() < 0.25).all())
    forward = sf.as_torchsde(sf.ForwardSDE(process))
    z = torchsde.sdeint(forward, torch.zeros(2048, 1, dtype=F64), [0.05, 1.0], dt=0.01, method="euler")[-1]
    assert abs(z.var().item() - 1.0) < 0.2
    pictures = sf.as_torchsde(sf.Equation(lambda t, y: -y, lambda t, y: 1.0, noise="additive"), event=(1, 2, 2))
    assert (
        pictures.f(torch.tensor(0.0), torch.ones(3, 4)).shape
        == (3, 4)
        == pictures.g(torch.tensor(0.0), torch.ones(3, 4)).shape
    )
    with pytest.raises(sf.InvalidInput, match="needs an equation with noise"):
        sf.as_torchsde(sf.Equation(lambda t, y: -y))
    with pytest.raises(sf.InvalidInput, match="another equation"):
        sf.as_torchsde(sf.Equation(lambda t, y: -y, lambda t, y: y), sde_type="stratonovich")


def test_noise_is_each_sample_s_own():
    process = sf.VP()
    x, equation = process.prior((5, 3), dtype=F64), sf.ReverseSDE(GAUSSIAN.prediction(process))
    for solver in (sf.TorchSDE("srk", steps=6), sf.TorchSDE("euler", steps=6), sf.TorchSDE("heun", dt=0.1)):
        together = sf.solve(equation, solver, x, seed=[5, 6, 7, 8, 9]).x
        torch.testing.assert_close(together[2:3], sf.solve(equation, solver, x[2:3], seed=[7]).x, rtol=0, atol=1e-12)
        other = sf.solve(equation, solver, x, seed=[5, 6, 17, 8, 9]).x
        assert not torch.equal(other[2], together[2]) and torch.equal(other[:2], together[:2])


def test_exact_solutions_of_generic_equations():
    n = 2000
    path = sf.BrownianPath(sf.sample_seeds(3, n), (1,), F64)
    W = path.increment(0.0, 1.0)[0]
    x = torch.ones(n, 1, dtype=F64)
    growth = sf.Equation(lambda t, y: 0.1 * y, lambda t, y: 0.5 * y)
    exact = (0.1 - 0.125 + 0.5 * W).exp()
    for method, bound in (("euler", 0.05), ("milstein", 5e-3), ("srk", 5e-4)):
        y = sf.solve(growth, sf.TorchSDE(method, steps=100), x, start=0.0, stop=1.0, path=path).x
        assert (y - exact).square().mean().sqrt().item() < bound
    strat = sf.Equation(lambda t, y: 0.1 * y, lambda t, y: 0.5 * y, calculus="stratonovich")
    y = sf.solve(strat, sf.TorchSDE("heun", steps=100), x, start=0.0, stop=1.0, path=path).x
    assert (y - (0.1 + 0.5 * W).exp()).square().mean().sqrt().item() < 5e-3
    scalar = sf.Equation(lambda t, y: 0.1 * y, lambda t, y: 0.5 * y, noise="scalar")
    y = sf.solve(scalar, sf.TorchSDE("milstein", steps=100), x.expand(n, 2), start=0.0, stop=1.0, path=path).x
    assert (y - exact).square().mean().sqrt().item() < 5e-3
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.3, 2.0]], dtype=F64)
    general = sf.Equation(lambda t, y: -y, lambda t, y: mix.expand(y.shape[0], 2, 3), noise="general")
    y = sf.solve(general, sf.TorchSDE("euler", steps=50), torch.zeros(n, 2, dtype=F64), start=0.0, stop=1.0, seed=1).x
    cov = mix @ mix.T * (1 - math.exp(-2)) / 2
    spread = ((cov.diag()[:, None] * cov.diag() + cov**2) / n).sqrt()
    assert bool(((y.T.cov() - cov).abs() < 5 * spread + 0.02 * cov.diag().max()).all())
    stratonovich = sf.Equation(
        lambda t, y: -y, lambda t, y: mix.expand(y.shape[0], 2, 3), "general", calculus="stratonovich"
    )
    y = sf.solve(
        stratonovich, sf.TorchSDE("log_ode", steps=20), torch.zeros(n, 2, dtype=F64), start=0.0, stop=1.0, seed=1
    ).x
    spread = ((cov.diag()[:, None] * cov.diag() + cov**2) / n).sqrt()
    assert bool(((y.T.cov() - cov).abs() < 5 * spread + 0.02 * cov.diag().max()).all())
    ou = sf.Equation(lambda t, y: -y, lambda t, y: math.sqrt(2.0), noise="additive")
    y = sf.solve(ou, sf.TorchSDE("srk", steps=40), 3 * x, start=0.0, stop=1.0, seed=1).x
    assert abs(y.mean().item() - 3 / math.e) < 0.1 and abs(y.var().item() / (1 - math.exp(-2)) - 1) < 0.15


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_nan_in_one_sample_leaves_the_others(adaptive):
    process = sf.VP()
    exact = GAUSSIAN.network(process)
    x = process.prior((4, 3), dtype=F64)
    x[1] = 90.0

    def network(y, t):
        return torch.where(((y[:, 0].abs() > 20) & (t < 0.95))[:, None], math.nan, exact(y, t))

    equation = sf.ReverseSDE(sf.DataPrediction(network, process), eta=0.5)
    solver = sf.TorchSDE("srk", adaptive=True, rtol=0.1, atol=0.1) if adaptive else sf.TorchSDE("srk", steps=60)
    run = sf.solve(equation, solver, x, seed=[1, 2, 3, 4], save_at=[0.9999, 1e-3], on_failure="return")
    assert run.status.tolist() == [0, sf.Status.NON_FINITE, 0, 0]
    assert bool(run.x.isfinite().all()) and bool(run.states[1, 1].isnan().all())
    assert bool(run.states[:, [0, 2, 3]].isfinite().all()) and torch.equal(run.states[1, 0], run.x[0])
    assert int(run.accepted[1]) < int(run.accepted[0]) and 20 < run.x[1, 0] < 120
    if not adaptive:
        alone = sf.solve(equation, solver, x[[0, 2, 3]], seed=[1, 3, 4], save_at=[0.9999, 1e-3]).x
        torch.testing.assert_close(run.x[[0, 2, 3]], alone, rtol=0, atol=1e-12)


def test_budgets_and_underflow_become_statuses():
    x = torch.ones(2, 1, dtype=F64)
    equation = sf.Equation(lambda t, y: -y, lambda t, y: 1.0, noise="additive", start=0.0, stop=1.0)
    run = sf.solve(equation, sf.TorchSDE(adaptive=True, rtol=1e-6, atol=1e-6, max_steps=7), x, on_failure="return")
    assert run.status.tolist() == [sf.Status.MAX_STEPS] * 2 and int((run.accepted + run.rejected)[0]) == 7
    run = sf.solve(equation, sf.TorchSDE("euler", steps=50, max_evaluations=10), x, on_failure="return")
    assert run.calls == 10 and run.status.tolist() == [sf.Status.MAX_STEPS] * 2 and run.accepted.tolist() == [10, 10]
    nothing = sf.solve(
        sf.Equation(lambda t, y: y * math.nan, lambda t, y: 1.0, start=0.0, stop=1.0),
        sf.TorchSDE("euler", steps=5),
        x,
        on_failure="return",
    )
    assert nothing.status.tolist() == [sf.Status.NON_FINITE] * 2 and nothing.calls == 1 and torch.equal(nothing.x, x)


def test_rectified_flow_leaves_alpha_zero():
    process = sf.RectifiedFlow()
    x = process.prior((3, 3), dtype=F64)
    run = sf.solve(
        sf.ReverseSDE(GAUSSIAN.prediction(process)), sf.TorchSDE("srk", steps=30), x, save_at=[1.0, 0.999, 0.5, 1e-3]
    )
    assert torch.equal(run.states[0], x) and torch.equal(run.states[-1], run.x) and bool(run.states.isfinite().all())
    plain = sf.solve(sf.ReverseSDE(GAUSSIAN.prediction(process)), sf.TorchSDE("srk", steps=30), x)
    assert plain.accepted.tolist() == [30] * 3 and plain.calls == 1 + 2 * 29


def test_dtypes_shapes_and_gradients():
    process = sf.VP()
    predict = sf.DataPrediction(lambda x, t: 0.5 * x.tanh(), process)
    x = process.prior((3, 1, 2, 2), dtype=F64).requires_grad_()
    equation, solver = sf.ReverseSDE(predict), sf.TorchSDE("srk", steps=8)
    y = sf.solve(equation, solver, x, seed=1, gradients=True).x
    (slope,) = torch.autograd.grad(y.sum(), x)
    up, down = (sf.solve(equation, solver, x.detach() + e, seed=1).x.sum() for e in (1e-5, -1e-5))
    torch.testing.assert_close(slope.sum(), (up - down) / 2e-5, rtol=1e-5, atol=1e-8)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        narrow = sf.solve(equation, solver, x.detach().to(dtype), seed=1).x
        assert narrow.dtype == dtype and (narrow.double() - y).abs().max() < tolerance * y.abs().max()


BAD = {
    "unknown": (lambda: sf.TorchSDE("sri", steps=4), "must be one of srk"),
    "no steps": (lambda: sf.TorchSDE("srk"), "needs steps"),
    "steps": (lambda: sf.TorchSDE("srk", steps=0), "positive integer"),
    "dt": (lambda: sf.TorchSDE("srk", dt=-0.1), "dt must be positive"),
    "both": (lambda: sf.TorchSDE("srk", dt=0.1, steps=3), "leave one of them out"),
    "grid": (lambda: sf.TorchSDE("srk", adaptive=True, grid=sf.UniformTime()), "leave grid out"),
    "rtol": (lambda: sf.TorchSDE("srk", adaptive=True, rtol=-1.0), "rtol must be"),
    "limit": (lambda: sf.TorchSDE("srk", steps=3, max_steps=0), "max_steps must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_say_what_to_write(name):
    make, text = BAD[name]
    with pytest.raises(sf.InvalidInput, match=text):
        make()


def test_bad_tasks_say_what_to_write():
    x, predict = sf.VP().prior((2, 3)), GAUSSIAN.prediction(sf.VP())
    moving = sf.Equation(lambda t, y: -y, lambda t, y: y, start=0.0, stop=1.0)
    cases = [
        (sf.ProbabilityFlowODE(predict), sf.TorchSDE("srk", steps=4), x, "an ODE"),
        (moving, sf.TorchSDE("heun", steps=4), x, "take one of srk, euler, milstein"),
        (moving, sf.TorchSDE("srk", steps=4, chart=sf.LogSNR()), x, "chart needs"),
        (moving, sf.TorchSDE("euler", adaptive=True), x, "need additive noise"),
        (sf.ReverseSDE(predict), sf.TorchSDE("srk", adaptive=True), x.half(), "cannot resolve"),
    ]
    for equation, solver, state, text in cases:
        with pytest.raises(sf.InvalidInput, match=text):
            sf.solve(equation, solver, state)


@pytest.mark.parametrize("method", METHODS)
def test_facts(method):
    facts = sf.TorchSDE(method, steps=3).facts
    assert facts.order is None and facts.face == "drift" and facts.reference.startswith("torchsde")
    assert (facts.strong, facts.weak) == (METHODS[method].strong, METHODS[method].weak)


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.1])
@pytest.mark.parametrize(
    "process",
    [sf.RectifiedFlow(), sf.CosineVP(t_max=1.0), sf.DiscreteVP(torch.linspace(0.999, 0.0, 50))],
    ids=lambda p: type(p).__name__,
)
def test_a_start_without_signal_or_with_1e_16_of_it(process, eta):
    """Mean and variance of 4000 samples within 5 standard errors of the exact ones."""
    problem = sf.problems.gaussian(mean=[0.5, -1.0], std=[0.3, 1.2])
    equation = sf.ReverseSDE(problem.prediction(process), eta=eta)
    x = process.prior((4000, 2), dtype=torch.float64)
    run = sf.solve(equation, sf.TorchSDE("srk", steps=120), x, seed=1)
    assert run.calls == 1 + 2 * 119  # the first step, to α > 0, is one evaluation
    mean, cov = problem.moments(process, process.t_min)
    v = cov.diagonal()
    assert bool(((run.x.mean(0) - mean).abs() < 5.0 * (v / 4000).sqrt()).all())
    assert bool(((run.x.var(0) - v).abs() < 5.0 * v * (2.0 / 4000) ** 0.5).all())
