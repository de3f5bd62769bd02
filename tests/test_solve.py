"""solve: defaults, outputs, counting, seeds, failures and the errors of bad input, with a solver small enough to read."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers.base import Facts, FixedStep


@dataclass(frozen=True, kw_only=True)
class Euler(FixedStep):
    """x ← x + h·drift: the ten-line solver of the docs."""

    @property
    def facts(self):
        return Facts("Euler", 1, None, None, 1, False, ("none",), "drift", "Euler 1768")

    def init(self, task, times):
        return times.tolist()

    def step(self, task, state, n, x):
        return x + (state[n + 1] - state[n]) * task.equation.drift(state[n], x), state


BANK = sf.Equation(lambda t, x: 0.04 * x, start=0.0, stop=1.0)
X = torch.ones(3, 2, dtype=torch.float64)


def test_euler_on_the_interest_rate():
    solution = sf.solve(BANK, Euler(steps=10), X)
    assert torch.allclose(solution.x, X * 1.004**10)
    assert solution.calls == 10 and solution.evaluations.tolist() == [10, 10, 10]
    assert solution.accepted.tolist() == [10, 10, 10] and solution.rejected.tolist() == [0, 0, 0]
    assert solution.success.all() and solution.t.tolist() == [1.0] and solution.states.shape == (1, 3, 2)
    assert torch.equal(solution.states[-1], solution.x)


def test_either_direction_and_outputs_on_nodes():
    back = sf.solve(BANK, Euler(steps=100), X, start=1.0, stop=0.0, save_at=[1.0, 0.5, 0.333, 0.0])
    assert back.states.shape == (4, 3, 2) and torch.equal(back.states[0], X)
    assert torch.allclose(back.states[1], X * (1 - 0.0004) ** 50)
    # 0.333 is no node: it becomes one, so it is Euler's value there, not an interpolation
    assert back.calls == 101
    assert torch.allclose(back.states[2], X * (1 - 0.0004) ** 66 * (1 - 0.04 * 0.007), rtol=1e-12)


def test_own_grid():
    solution = sf.solve(BANK, Euler(grid=[0.0, 0.5, 1.0]), X)
    assert torch.allclose(solution.x, X * 1.02**2) and solution.calls == 2


def test_a_sample_that_fails_leaves_the_others():
    sick = sf.Equation(lambda t, x: torch.where(x > 5, math.nan, 0.04 * x), start=0.0, stop=1.0)
    x = torch.tensor([[1.0], [9.0], [2.0]], dtype=torch.float64)
    with pytest.raises(sf.SolveFailed, match="1 of 3 samples.*NON_FINITE.*first failed row 1") as caught:
        sf.solve(sick, Euler(steps=10), x)
    partial = caught.value.solution
    assert partial.status.tolist() == [sf.Status.SUCCESS, sf.Status.NON_FINITE, sf.Status.SUCCESS]
    assert torch.allclose(partial.x[[0, 2]], x[[0, 2]] * 1.004**10)
    returned = sf.solve(sick, Euler(steps=10), x, on_failure="return")
    assert returned.success.tolist() == [True, False, True]


def test_gradients_only_when_asked():
    x = X.clone().requires_grad_(True)
    assert not sf.solve(BANK, Euler(steps=10), x).x.requires_grad
    (slope,) = torch.autograd.grad(sf.solve(BANK, Euler(steps=10), x, gradients=True).x.sum(), x)
    assert torch.allclose(slope, torch.full_like(x, 1.004**10))


def test_progress_is_a_function_of_the_fraction():
    seen: list[float] = []
    sf.solve(BANK, Euler(steps=4), X, progress=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_seeds_are_one_a_sample():
    seeds = sf.sample_seeds(7, 5)
    assert seeds.unique().numel() == 5
    assert torch.equal(sf.sample_seeds(7, 9)[:5], seeds)
    assert torch.equal(sf.sample_seeds(seeds, 5), seeds) and sf.sample_seeds([4, 2], 2).tolist() == [4, 2]


VP_ODE = sf.ProbabilityFlowODE(sf.NoisePrediction(lambda x, t: x, sf.VP()))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: sf.solve(BANK, Euler(steps=3), torch.ones(3, 2, dtype=torch.int64)), "int64"),
        (lambda: sf.solve(BANK, Euler(steps=3), [[1.0]]), "list"),
        (lambda: sf.solve(BANK, Euler(steps=3), torch.ones(3)), r"x\[None\]"),
        (lambda: sf.solve(BANK, Euler(steps=3), torch.ones(0, 2)), "at least one sample"),
        (lambda: sf.solve(BANK, Euler(steps=3), X, start=0.5, stop=0.5), "different"),
        (lambda: sf.solve(BANK, Euler(steps=3), X, stop=math.inf), "finite"),
        (lambda: sf.solve(VP_ODE, Euler(steps=3), X, start=1.5), "outside"),
        (lambda: sf.solve(sf.Equation(lambda t, x: x), Euler(steps=3), X), "no interval"),
        (lambda: sf.solve(BANK, "dopri5", X), "solver object"),
        (lambda: sf.solve(lambda t, x: x, Euler(steps=3), X), r"sf\.Equation\(drift\)"),
        (lambda: sf.solve(BANK, Euler(steps=3), X, save_at=[0.5, 0.2]), "order of travel"),
        (lambda: sf.solve(BANK, Euler(steps=3), X, save_at=[2.0]), "between start"),
        (lambda: sf.solve(BANK, Euler(steps=3), X, on_failure="ignore"), "on_failure"),
        (lambda: sf.solve(sf.ReverseSDE(VP_ODE.predict), Euler(steps=3), X), "additive noise"),
        (lambda: sf.solve(sf.Equation(lambda t, x: x[:1], start=0, stop=1), Euler(steps=3), X), "state's shape"),
        (lambda: sf.solve(sf.ReverseSDE(VP_ODE.predict), Euler(steps=3), X, seed=[1, 2]), "3 integers"),
        (lambda: Euler(), "steps"),
        (lambda: Euler(steps=2.5), "steps"),
        (lambda: sf.solve(BANK, Euler(steps=3), X).at(0.5), "save_at"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(sf.InvalidInput, match=word):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the mix of devices is the point")
def test_device_mix_is_named():
    network = torch.nn.Linear(2, 2).cuda()
    predict = sf.NoisePrediction(lambda x, t: network(x), sf.VP())
    predict.network = network
    with pytest.raises(sf.InvalidInput, match="write solve"):
        sf.solve(sf.ProbabilityFlowODE(predict), Euler(steps=3), X)


def test_device_mix_is_named_on_meta():
    # the meta device stands in for a GPU: the check reads devices and computes nothing
    class Network(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    predict = sf.NoisePrediction(Network(2, 2, device="meta"), sf.VP())
    with pytest.raises(sf.InvalidInput, match="network is on meta, the state on cpu"):
        sf.solve(sf.ProbabilityFlowODE(predict), Euler(steps=3), X.float())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sf.DDIM(steps=5, grid="karras"), r"got 'karras'.*grid=sf\.Karras\(\)"),
        (lambda: sf.DDIM(steps=5, grid=sf.Karras), r"the class Karras.*grid=sf\.Karras\(\)"),
        (lambda: sf.Adams(rtol="1e-3"), r"rtol='1e-3'.*Adams\(rtol=1e-4"),
        (lambda: sf.Adams(chart=sf.StraightLine), r"the class StraightLine.*chart=sf\.StraightLine\(c="),
        (lambda: sf.TorchDiffEq("rk4", steps=4, chart="line"), r"got 'line'.*chart=sf\.StraightLine\(c="),
        (lambda: sf.StraightLine(c="a"), r"got 'a'.*StraightLine\(c=0\.5\)"),
        (lambda: sf.ReverseSDE(sf.NoisePrediction(abs, sf.VP()), eta="a"), "eta must be .* got 'a'"),
        (lambda: sf.NoisePrediction(torch.nn.Linear, sf.VP()), "the class Linear"),
        (lambda: sf.VP().prior(4), r"got 4.*prior\(\("),
        (lambda: sf.VP().prior((4, 2), dtype=torch.int64), "floating dtype; got torch.int64"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(make, words):
    process = sf.VP()
    ode = sf.ProbabilityFlowODE(sf.NoisePrediction(lambda x, t: x, process))
    with pytest.raises(sf.InvalidInput, match=words):
        sf.solve(ode, make(), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"save_at": "abc"}, r"got 'abc'.*save_at=\[0\.5, 0\.1\]"),
        ({"save_at": 0.5}, r"Write save_at=\[0\.5\]"),
        ({"start": "a"}, "start must be a finite number; got 'a'"),
        ({"stop": float("nan")}, "stop must be a finite number; got nan"),
    ],
)
def test_times_of_the_wrong_kind_are_named(given, words):
    ode = sf.ProbabilityFlowODE(sf.NoisePrediction(lambda x, t: x, sf.VP()))
    with pytest.raises(sf.InvalidInput, match=words):
        sf.solve(ode, sf.DDIM(steps=3), torch.ones(2, 3), **given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", [sf.Adams(), sf.Tsit5(), sf.SRA1(rtol=1e-2, atol=1e-2), sf.GottaGoFast()], ids=str)
def test_adaptive_steps_in_half_precision_are_refused(solver, dtype):
    process = sf.VP()
    equation = sf.ReverseSDE(
        sf.NoisePrediction(lambda x, t: x, process), eta=1.0 if "none" not in solver.facts.noise else 0.0
    )
    with pytest.raises(sf.InvalidInput, match=r"cannot resolve.*x\.float\(\)"):
        sf.solve(equation, solver, torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize(
    "solver",
    [
        sf.SASolver(steps=3),
        sf.StochasticAdams(steps=3),
        sf.EDMHeun(steps=3, churn=3.0),
        sf.ShARK(steps=3),
        sf.TorchSDE("srk", steps=3),
        sf.Adams(),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("path", [sf.BrownianPath([1, 2], (1,)), sf.BrownianPath([1, 2, 3], (2,)), "w"], ids=str)
def test_a_path_that_is_not_the_samples_own_is_refused(solver, path):
    """A path of one element would otherwise drive all elements of a sample with the same noise."""
    process, problem = sf.VP(), sf.problems.ring()
    equation = sf.ReverseSDE(problem.prediction(process))
    with pytest.raises(sf.InvalidInput, match=r"BrownianPath for 2 samples of shape \(2,\)"):
        sf.solve(equation, solver, process.prior((2, 2)), path=path)


@pytest.mark.parametrize(
    "solver",
    [sf.FixedAdams(steps=5, chart=sf.LogSNR()), sf.RungeKutta(steps=5, chart=sf.LogSNR()), sf.Tsit5(chart=sf.LogSNR())],
)
def test_a_chart_is_refused_on_an_equation_without_a_process(solver):
    with pytest.raises(sf.InvalidInput, match="chart.*diffusion equation"):
        sf.solve(sf.Equation(lambda t, x: -x), solver, torch.ones(2, 2), start=0.0, stop=1.0)


@pytest.mark.parametrize(
    "solver",
    [
        sf.Adams(),
        sf.Adams(coupled=True),
        sf.Adams(global_error=True),
        sf.Tsit5(),
        sf.TorchDiffEq("dopri5", rtol=1e-4, atol=1e-4),
        sf.UniPC(steps=5),
        sf.SRA1(rtol=0.1, atol=0.1),
        sf.ExponentialShARK(rtol=0.1, atol=0.1),
        sf.StochasticAdams(steps=5),
        sf.TorchSDE("srk", steps=5),
    ],
    ids=repr,
)
def test_states_at_the_ends_of_the_interval(solver):
    process = sf.VP()
    predict = sf.problems.ring().prediction(process)
    equation = sf.ProbabilityFlowODE(predict) if "none" in solver.facts.noise else sf.ReverseSDE(predict)
    x = process.prior((3, 2), seed=0, dtype=torch.float64)
    for save_at in ([process.t_min], [process.t_max], [process.t_max, process.t_min]):
        found = sf.solve(equation, solver, x, save_at=save_at)
        assert found.t.tolist() == save_at
        wanted = torch.stack([x if t == process.t_max else found.x for t in save_at])
        torch.testing.assert_close(found.states, wanted, rtol=0.0, atol=1e-15)


def test_an_ode_leaves_seed_and_path_unused():
    wanted = sf.solve(BANK, Euler(steps=3), X).x
    assert torch.equal(sf.solve(BANK, Euler(steps=3), X, seed=5).x, wanted)
    path = sf.BrownianPath(sf.sample_seeds(0, 3), (2,))
    assert torch.equal(sf.solve(BANK, Euler(steps=3), X, path=path).x, wanted)


def test_states_are_those_before_a_last_step_to_clean_data():
    process = sf.VP(t_min=0.1)
    equation = sf.ProbabilityFlowODE(sf.problems.ring().prediction(process))
    x = process.prior((3, 2), seed=0)
    for make in (sf.UniPC, sf.RungeKutta):
        plain = sf.solve(equation, make(steps=4), x, save_at=[0.5, 0.1]).x
        found = sf.solve(equation, make(steps=4, denoise=True), x, save_at=[0.5, 0.1])
        torch.testing.assert_close(found.states[-1], plain)
        assert (found.x - plain).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("kind", "said"), [("noise", r"α is 0 at start=1, .*start=0\.999"), ("data", r"σ is 0 at stop=0, .*stop=0\.001")]
)
def test_failures_at_pure_noise_or_clean_data_say_what_to_write(kind, said):
    ends = {"noise": sf.RectifiedFlow(), "data": sf.VP(t_min=0.0)}
    process, ring = ends[kind], sf.problems.ring()
    predict = (sf.NoisePrediction if kind == "noise" else sf.DataPrediction)(ring.network(process, kind), process)
    x = process.prior((3, 2), seed=0)
    with pytest.raises(sf.SolveFailed, match=said):
        sf.solve(sf.ProbabilityFlowODE(predict), sf.Tsit5(), x)
    # a failure elsewhere is not put down to the end
    with pytest.raises(sf.SolveFailed) as failed:
        sf.solve(sf.Equation(lambda t, x: x / 0.0 * 0.0), sf.Tsit5(), x, start=0.0, stop=1.0)
    assert "is 0 at" not in str(failed.value)


FIXED = [sf.UniPC, sf.FixedAdams, sf.DPMSolverPP, sf.DEIS, sf.StochasticAdams, sf.SASolver, sf.DDIM]


@pytest.mark.parametrize("make", FIXED)
def test_output_times_in_float32_are_the_nodes_they_were(make):
    """Multistep methods divide by the distance of nodes: one beside another made errors of 1e30, without a sign."""
    process = sf.RectifiedFlow()
    predict = sf.problems.ring().prediction(process)
    nodes = [1.0, *(1.0 - 0.1 * n for n in range(1, 10)), process.t_min]
    solver, x = make(grid=nodes), process.prior((6, 2), seed=0, dtype=torch.float64)
    equation = sf.ProbabilityFlowODE(predict) if "none" in solver.facts.noise else sf.ReverseSDE(predict)
    plain = sf.solve(equation, solver, x, seed=1)
    found = sf.solve(equation, solver, x, seed=1, save_at=torch.tensor(nodes))
    assert found.accepted.tolist() == plain.accepted.tolist()
    torch.testing.assert_close(found.x, plain.x, rtol=0.0, atol=1e-5)
    assert found.t[0] == 1.0 and found.t[-1] == process.t_min
    assert torch.equal(found.states[0], x) and torch.equal(found.states[-1], found.x)
    # and a time a thousandth of a step from a node takes its place
    beside = sf.solve(equation, solver, x, seed=1, save_at=[0.4999])
    assert beside.t.tolist() == [0.4999] and beside.accepted.tolist() == plain.accepted.tolist()
    # further off it is a node of its own
    apart = sf.solve(equation, solver, x, seed=1, save_at=[0.49])
    assert (apart.accepted == plain.accepted + 1).all()


@pytest.mark.parametrize(
    "solver",
    [
        sf.TorchDiffEq("rk4", steps=5),
        sf.TorchDiffEq("dopri5"),
        sf.TorchSDE("srk", steps=5),
        sf.Adams(),
        sf.SRA1(steps=5),
    ],
    ids=lambda solver: solver.facts.name,
)
def test_ends_of_the_interval_in_float32(solver):
    process = sf.VP(t_max=0.999)
    predict = sf.problems.ring().prediction(process)
    equation = sf.ProbabilityFlowODE(predict) if "none" in solver.facts.noise else sf.ReverseSDE(predict)
    x = process.prior((3, 2), seed=0, dtype=torch.float64)
    times = torch.tensor([0.999, 0.3, 0.001])  # 0.999 is above, 0.001 inside the interval
    found = sf.solve(equation, solver, x, save_at=times)
    assert found.t[0] == process.t_max and found.t[-1] == process.t_min
    torch.testing.assert_close(found.states[[0, -1]], torch.stack([x, found.x]), rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("make", [sf.UniPC, sf.FixedAdams, sf.DEIS, sf.StochasticAdams])
def test_output_times_too_close_for_a_multistep_method_are_warned_of(make):
    process = sf.RectifiedFlow()
    predict = sf.problems.ring().prediction(process)
    solver, x = make(steps=10), process.prior((2, 2), seed=0, dtype=torch.float64)
    equation = sf.ProbabilityFlowODE(predict) if "none" in solver.facts.noise else sf.ReverseSDE(predict)
    with pytest.warns(UserWarning, match="very close together.*one-step"):
        sf.solve(equation, solver, x, save_at=[0.5, 0.4999999], on_failure="return")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.solve(equation, solver, x, save_at=[0.5, 0.48])
        sf.solve(equation, sf.EDMHeun(steps=10), x, save_at=[0.5, 0.4999999])
