"""Adams on reverse SDEs: exact steps, unbiased in spite of rejections, tolerances kept, and refusals."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.brownian import BrownianPath
from sdeflow.solvers import stochastic_adams_stepper
from sdeflow.solvers.stochastic_adams_stepper import DataFlow, ExactStep, weights

F64 = torch.float64
VP = sf.VP()


def variance_deviation(dim, tolerance=1e-3, total=2000, seed=0):
    """(deviation of the pooled variance in standard errors, share of rejected tries)."""
    problem = sf.problems.gaussian(mean=0.0, std=0.5, dim=dim)
    start, stop = (problem.moments(VP, t)[1][0, 0].item() for t in (VP.t_max, VP.t_min))
    n = total // dim
    x = math.sqrt(start) * torch.randn(n, dim, dtype=F64, generator=torch.Generator().manual_seed(seed))
    run = sf.solve(sf.ReverseSDE(problem.prediction(VP)), sf.Adams(rtol=tolerance, atol=tolerance), x, seed=seed)
    share = run.rejected.sum() / (run.rejected.sum() + run.accepted.sum())
    # the mean is known to be 0, so n·dim terms and no estimate of it
    return (run.x.square().mean().item() / stop - 1.0) / math.sqrt(2.0 / (n * dim)), share.item()


@pytest.mark.parametrize("dim", [1, 2, 3, 64])
def test_the_variance_is_unbiased_though_steps_are_rejected(dim, monkeypatch):
    monkeypatch.setattr(stochastic_adams_stepper, "SAFETY", 0.9)  # steps so bold that many are refused
    deviation, rejected = variance_deviation(dim)
    assert rejected > 0.2
    assert abs(deviation) < 3.0


def test_fresh_noise_after_a_rejection_is_biased(monkeypatch):
    """The control of the test above: the same solver, drawing anew at every try."""
    generator = torch.Generator().manual_seed(1)

    def fresh(self, s, t):
        W = torch.randn(self.batch, *self.shape, dtype=F64, generator=generator) * (t - s).abs().sqrt()[:, None]
        return W, torch.zeros_like(W)

    monkeypatch.setattr(BrownianPath, "increment", fresh)
    monkeypatch.setattr(stochastic_adams_stepper, "SAFETY", 0.9)
    deviation, rejected = variance_deviation(1)
    assert rejected > 0.2
    assert abs(deviation) > 3.0, deviation


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_the_exact_step_is_the_solution_for_constant_data(eta):
    # D constant: x_t = a x_s + D ∫dω + noise; with D = 0 the variance of x is σ² throughout, and with σ = 0 x is αD
    predict = sf.problems.gaussian(mean=[0.7], std=[1e-6]).prediction(VP)
    x = torch.zeros(1, 1, dtype=F64)
    from sdeflow.counting import Counter
    from sdeflow.solvers.base import Task

    equation = sf.ReverseSDE(predict, eta=eta)
    task = Task(equation, x, 1.0, 1e-3, None, torch.zeros(1, dtype=torch.int64), None, False, Counter(1, x.device))
    flow = DataFlow.data(task, sf.Trigonometric(0.8), False)
    s, t = (flow.u(torch.tensor([v], dtype=F64)) for v in (0.6, 0.3))
    step = ExactStep.of(flow, s, t)
    (A_s, S_s), (A_t, S_t) = ((m * VP.alpha(v), m * VP.sigma(v)) for v in (0.6, 0.3) for m in [flow.chart.m(v)])
    assert flow.t(s).item() == pytest.approx(0.6, rel=1e-10)
    assert (step.a**2 * S_s**2 + step.noise**2).item() == pytest.approx(S_t.item() ** 2, rel=1e-12)
    assert (step.a * A_s + step.measure.sum(0)).item() == pytest.approx(A_t.item(), rel=1e-12)
    assert (step.b * (step.end - step.begin).sqrt()).item() == pytest.approx(step.noise.item(), rel=1e-10)
    # the rows integrate polynomials in the clock exactly
    nodes = torch.tensor([[0.0], [-0.7], [-1.9], [-2.5]], dtype=F64)
    got = weights(nodes, torch.tensor([3]), step)
    for power in range(3):
        assert (got.rows[0][:, 0] * nodes[:, 0] ** power).sum().item() == pytest.approx(
            (step.measure * step.nodes**power).sum().item(), rel=1e-10, abs=1e-12
        )
        if power < 2:
            assert (got.rows[1][:, 0] * nodes[:, 0] ** power).sum().item() == pytest.approx(1.0, rel=1e-10)


@pytest.mark.parametrize("control", ["weak", "strong"])
def test_smaller_tolerances_make_smaller_errors_on_the_path(control):
    problem = sf.problems.gaussian(mean=[0.0, 0.0], std=[0.4, 0.9])
    equation = sf.ReverseSDE(problem.prediction(VP))
    x = VP.prior((64, 2), dtype=F64)
    fine = sf.solve(equation, sf.SASolver(predictor=2, corrector=1, steps=1000), x, seed=1).x
    errors = []
    for tolerance in (1e-1, 1e-2):
        run = sf.solve(equation, sf.Adams(rtol=tolerance, atol=tolerance, control=control), x, seed=1)
        errors.append((run.x - fine).square().mean().sqrt().item())
    assert errors[1] < 0.4 * errors[0]
    if control == "strong":
        assert errors[1] < 0.1


@pytest.mark.parametrize("process", [sf.VP(t_min=1e-2), sf.EDM()], ids=["vp", "edm"])
def test_the_strong_error_is_within_a_factor_5_of_the_tolerance(process):
    equation = sf.ReverseSDE(sf.problems.gaussian(mean=[0.0, 0.0], std=[0.3, 1.2]).prediction(process))
    x = process.prior((48, 2), seed=3, dtype=F64)
    # SNRTime's clock is e^{2λ}, in which Adams has its path at η = 1
    fine = sf.solve(equation, sf.ShARK(steps=800, chart=sf.SNRTime(), grid=sf.Multiscale(0.01, 2.0)), x, seed=3).x
    for tolerance in (1e-1, 3e-2, 1e-2):
        solver = sf.Adams(rtol=0.0, atol=tolerance, control="strong", chart=sf.Trigonometric(0.6))
        error = (sf.solve(equation, solver, x, seed=3).x - fine).square().mean().sqrt().item()
        assert 0.2 < error / tolerance < 5.0, (tolerance, error)


@pytest.mark.parametrize("seed", [2, 4, 5, 9])
def test_every_sample_goes_its_own_way_and_a_bad_one_alone(seed):
    problem = sf.problems.ring()
    equation = sf.ReverseSDE(problem.prediction(VP))
    x = VP.prior((6, 2), seed=seed, dtype=F64)
    solver = sf.Adams(rtol=3e-2, atol=3e-2)
    seeds = sf.sample_seeds(seed, 6)
    all_of_them = sf.solve(equation, solver, x, seed=seeds)
    one = sf.solve(equation, solver, x[2:3], seed=seeds[2:3])
    torch.testing.assert_close(all_of_them.x[2:3], one.x, rtol=1e-9, atol=1e-9)
    bad = x.clone()
    bad[1] = math.nan
    run = sf.solve(equation, solver, bad, seed=seeds, on_failure="return")
    assert run.status.tolist() == [0, 1, 0, 0, 0, 0]
    torch.testing.assert_close(run.x[2:3], one.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "process", [sf.EDM(), sf.RectifiedFlow(), sf.RectifiedFlow(t_min=0.0), sf.CosineVP()], ids=repr
)
def test_it_runs_on_every_process_from_end_to_end(process):
    problem = sf.problems.gaussian(mean=[0.3], std=[0.5])
    mean, cov = problem.moments(process, process.t_max)
    x = mean + cov.sqrt() * torch.randn(400, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    run = sf.solve(
        sf.ReverseSDE(problem.prediction(process, "flow"), eta=0.7), sf.Adams(rtol=1e-2, atol=1e-2), x, seed=0
    )
    right = problem.moments(process, process.t_min)[1].item()
    assert abs(run.x.var().item() / right - 1.0) < 4 * math.sqrt(2.0 / 400) and bool(run.success.all())


def test_saved_states_and_one_step_for_all():
    problem = sf.problems.gaussian(mean=[0.3], std=[0.5])
    equation = sf.ReverseSDE(problem.prediction(VP))
    x = VP.prior((8, 1), dtype=F64)
    run = sf.solve(equation, sf.Adams(rtol=1e-1, atol=1e-1, coupled=True), x, save_at=[0.5, VP.t_min], seed=0)
    assert run.accepted.unique().numel() == 1 and run.states.shape == (2, 8, 1)
    torch.testing.assert_close(run.states[-1], run.x)


@pytest.mark.parametrize(
    ("solver", "equation", "message"),
    [
        (sf.Adams(dense=True), None, "save_at"),
        (sf.Adams(pece=True), None, "for ODEs"),
        (sf.Adams(error_estimate=True), None, "for ODEs"),
        (sf.Adams(global_error=True), None, r"for ODEs.*ExponentialShARK\(.*global_error=True"),
        (sf.Adams(chart=sf.LogSNR()), None, "trigonometric"),
        (sf.Adams(), sf.Equation(lambda t, x: -x, lambda t, x: 1.0, noise="additive", start=0.0, stop=1.0), "ShARK"),
    ],
)
def test_what_has_no_meaning_with_noise_is_refused(solver, equation, message):
    equation = equation or sf.ReverseSDE(sf.problems.gaussian(mean=[0.0], std=[1.0]).prediction(VP))
    with pytest.raises(sf.InvalidInput, match=message):
        sf.solve(equation, solver, torch.ones(2, 1, dtype=F64), seed=0)


def test_control_is_one_of_two():
    with pytest.raises(sf.InvalidInput, match="strong"):
        sf.Adams(control="medium")
