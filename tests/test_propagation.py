"""Exact moments: against closed forms and Monte Carlo, for every kind of solver, and refusals."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.measure import exact_moments

F64 = torch.float64
VP = sf.VP(t_min=1e-2)
PLANE = sf.problems.gaussian(mean=[0.8, -0.5], cov=torch.tensor([[0.3, 0.2], [0.2, 0.9]], dtype=F64))


def test_euler_maruyama_on_ornstein_uhlenbeck_is_its_recursion():
    # x ← (1 − ah)x + s√h z: variance r²P + s²h each step
    a, s, n, P = 1.3, 0.7, 10, 2.0
    equation = sf.Equation(lambda t, x: -a * (x - 1.0), lambda t, x: s, noise="additive", start=0.0, stop=1.0)
    law = exact_moments(equation, sf.EulerMaruyama(steps=n), torch.tensor([3.0]), torch.tensor([[P]]))
    mean, var = 3.0, P
    for _ in range(n):
        mean, var = mean - a / n * (mean - 1.0), (1 - a / n) ** 2 * var + s**2 / n
    assert law.mean.item() == pytest.approx(mean, rel=1e-12) and law.cov.item() == pytest.approx(var, rel=1e-12)
    assert law.evaluations == n


@pytest.mark.parametrize(
    "solver",
    [
        sf.DPMSolverPP(order=2, sde=True, steps=6),
        sf.SASolver(steps=6),
        sf.EDMHeun(steps=5, churn=3.0),
        sf.Restart(steps=6, loops=((0.3, 1.0, 1, 2),)),
        sf.ExponentialShARK(steps=4),
        sf.SRA3(steps=8, chart=sf.LogSNR()),
        sf.TorchSDE("srk", steps=8, chart=sf.LogSNR()),
        sf.TorchSDE("euler", steps=8, chart=sf.LogSNR()),
    ],
    ids=lambda s: s.facts.name,
)
def test_monte_carlo_agrees(solver):
    equation = sf.ReverseSDE(PLANE.prediction(VP))
    mean, cov = PLANE.moments(VP, VP.t_max)
    law = exact_moments(equation, solver, mean, cov)
    n = 20_000
    z = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    run = sf.solve(equation, solver, mean + z @ torch.linalg.cholesky(cov).T, seed=5)
    from sdeflow.measure import moment_deviation

    z_max, comparisons = moment_deviation(run.x, law.mean, law.cov)
    assert comparisons == 5 and z_max < 4.2  # false alarm 1.3e-4 for five normal deviates
    assert law.evaluations == run.evaluations[0]


def test_a_flow_has_no_noise_and_its_moments_are_the_closed_forms_at_fine_steps():
    equation = sf.ProbabilityFlowODE(PLANE.prediction(VP))
    mean, cov = PLANE.moments(VP, VP.t_max)
    law = exact_moments(equation, sf.UniPC(steps=400), mean, cov)
    right_mean, right = PLANE.moments(VP, VP.t_min)
    torch.testing.assert_close(law.mean, right_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(law.cov, right, rtol=0, atol=1e-6)


def test_errors_along_the_axes_are_those_of_the_axes():
    equation = sf.ReverseSDE(PLANE.prediction(VP))
    law = exact_moments(equation, sf.DDPM(steps=10), *PLANE.moments(VP, VP.t_max))
    _, right = PLANE.moments(VP, VP.t_min)
    v, axes = torch.linalg.eigh(right)
    wanted = [(axes[:, i] @ law.cov @ axes[:, i] / v[i] - 1).item() for i in range(2)]
    assert law.variance_errors(right).tolist() == pytest.approx(wanted, rel=1e-12)
    assert law.variance_error(right) == pytest.approx(math.hypot(*wanted) / math.sqrt(2), rel=1e-12)


def test_what_is_not_affine_is_refused():
    mean, cov = PLANE.moments(VP, VP.t_max)
    ring = sf.ReverseSDE(sf.problems.ring().prediction(VP))
    with pytest.raises(sf.InvalidInput, match="not an affine map"):
        exact_moments(ring, sf.DDPM(steps=10), mean, cov)
    with pytest.raises(sf.InvalidInput, match="chooses its steps"):
        exact_moments(sf.ReverseSDE(PLANE.prediction(VP)), sf.ShARK(rtol=1e-2, atol=1e-2), mean, cov)


def test_overlapping_intervals_are_refused():
    class Twice(sf.EulerMaruyama):
        def take(self, clock, u, h, z, W, H):
            self.seen.increment(0.1, 0.3)
            return super().take(clock, u, h, z, W, H)

        def integrate(self, task):
            object.__setattr__(self, "seen", task.path)
            return super().integrate(task)

    equation = sf.Equation(lambda t, x: -x, lambda t, x: 1.0, noise="additive", start=0.0, stop=1.0)
    with pytest.raises(sf.InvalidInput, match="overlap"):
        exact_moments(equation, Twice(steps=4), torch.zeros(1), torch.eye(1))
