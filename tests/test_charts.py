"""Charts: z = A x_0 + S ε, the same flow as in plain t, regular ends, and the reverse SDE's noise."""

import math

import pytest
import torch

import sdeflow as sf

PROCESSES = [sf.VP(), sf.CosineVP(), sf.SubVP(), sf.VE(), sf.EDM(), sf.RectifiedFlow(), sf.DiscreteVP.scaled_linear()]
CHARTS = [
    sf.StraightLine(), sf.StraightLine(c=1.3), sf.BentLine(), sf.BentLine(c=1.3, bend=0.3, delta=0.05), sf.Trigonometric(), sf.LogSNR(),
    sf.SNRTime(), sf.PlainTime(),
]  # fmt: skip

KINDS = ("data", "noise", "score", "v", "flow", "edm")


def inside(process, n=50):
    return torch.linspace(process.t_min, process.t_max, n + 2, dtype=torch.float64)[1:-1]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("chart", CHARTS, ids=repr)
def test_coordinates(process, chart):
    bound, t = chart.bind(process), inside(process)
    u = bound.u(t)
    A, S, dA, dS = bound.coefficients(u)
    assert torch.allclose(A, bound.m(t) * process.alpha(t), rtol=1e-10)
    assert torch.allclose(S, bound.m(t) * process.sigma(t), rtol=1e-10)
    assert torch.allclose(bound.t(u), t, rtol=1e-9)
    h = 1e-6 * u.abs()
    up, down = bound.coefficients(u + h), bound.coefficients(u - h)
    if not isinstance(chart, sf.PlainTime):
        assert torch.allclose((up[0] - down[0]) / (2 * h), dA, rtol=1e-6, atol=1e-8)
        assert torch.allclose((up[1] - down[1]) / (2 * h), dS, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("chart", CHARTS, ids=repr)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_drift_and_noise_are_the_transformed_equation(process, chart, eta):
    # z = m x, so dz/du = (ṁ x + m·drift)/u̇ and the noise is m g_η/√|u̇|
    predict = sf.DataPrediction(lambda x, t: torch.tanh(x) * t[:, None].cos(), process)
    bound, t = chart.bind(process), inside(process, 16)
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sde = sf.ReverseSDE(predict, eta=eta)
    leaf = t.clone().requires_grad_(True)
    A, S, dA, dS = bound.coefficients(bound.u(t))
    alpha, sigma, da, ds = process.coefficients(t)
    # u̇ from S/A = ρ: (S/A)′ u̇ = ρ̇, without differentiating the chart's own code
    du = ((ds * alpha - sigma * da) / alpha**2) / ((dS * A - S * dA) / A**2)
    dm = (dA * du - bound.m(t) * da) / alpha if not isinstance(chart, sf.PlainTime) else torch.zeros_like(t)
    expected = (dm[:, None] * x + bound.m(t)[:, None] * sde.drift(t, x)) / du[:, None]
    got = bound.drift(predict, bound.u(t), bound.to_chart(t, x), eta)
    assert ((got - expected).abs() <= 1e-7 * expected.abs().amax(1, keepdim=True).clamp_min(1.0)).all()
    noise = bound.m(t) * eta * process.g(t) / du.abs().sqrt()
    assert torch.allclose(bound.diffusion(bound.u(t), eta), noise, rtol=1e-7)
    assert leaf.grad is None


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_straight_line_is_z_minus_d_over_u(process):
    predict = sf.DataPrediction(lambda x, t: torch.tanh(x), process)
    bound, t = sf.StraightLine(c=0.8).bind(process), inside(process, 16)
    u, x = bound.u(t), torch.randn(16, 3, dtype=torch.float64)
    z = bound.to_chart(t, x)
    expected = (z - predict.data(x, t)) / u[:, None]
    assert torch.allclose(bound.drift(predict, u, z), expected, rtol=1e-8, atol=1e-8)


def test_snr_time_has_unit_noise_and_data_drift():
    process = sf.VP()
    bound, t = sf.SNRTime().bind(process), inside(process, 16)
    predict = sf.DataPrediction(lambda x, t: torch.tanh(x), process)
    x = torch.randn(16, 3, dtype=torch.float64)
    u = bound.u(t)
    assert torch.allclose(bound.diffusion(u, 1.0), torch.ones_like(u))
    assert torch.allclose(bound.drift(predict, u, bound.to_chart(t, x), 1.0), predict.data(x, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("chart", [sf.StraightLine(), sf.BentLine(), sf.Trigonometric()], ids=repr)
def test_alpha_zero_is_regular(chart):
    process = sf.RectifiedFlow()
    bound = chart.bind(process)
    x = process.prior((4, 2), dtype=torch.float64)
    z = bound.to_chart(1.0, x)
    assert torch.allclose(bound.from_chart(1.0, z), x) and z.isfinite().all()
    assert bound.t(bound.u(1.0)) == pytest.approx(1.0, abs=1e-15)
    predict = sf.FlowPrediction(lambda x, t: x - 0.3, process)
    assert bound.drift(predict, bound.u(1.0), z).isfinite().all()


def test_bad_scale_is_refused():
    for c in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(sf.InvalidInput, match="data scale"):
            sf.StraightLine(c=c)


def test_bad_bends_are_refused():
    for given in ({"bend": 0.0}, {"bend": math.inf}, {"delta": -0.1}, {"delta": "a"}):
        with pytest.raises(sf.InvalidInput, match=rf"positive and finite {next(iter(given))}.*BentLine\(c=0\.5\)"):
            sf.BentLine(**given)


def test_bent_line_is_lambda_near_noise_and_the_straight_line_near_data():
    process = sf.VP()
    bent, line = sf.BentLine(bend=0.05, delta=1e-6).bind(process), sf.StraightLine().bind(process)
    for rho, pace in ((140.0, 0.05), (70.0, 0.05), (1.0, None), (0.1, None)):
        lam = torch.tensor([-0.01, 0.01], dtype=torch.float64) - math.log(rho)
        t = process.time(lam)
        moved = bent.u(t).diff()
        expected = line.u(t).diff() if pace is None else pace * -lam.diff()
        assert moved.item() == pytest.approx(expected.item(), rel=0.1 if pace else 1e-2)


def test_the_chart_bends_for_networks_that_cancel_noise():
    problem, vp = sf.problems.ring(), sf.VP()
    bent = {kind: type(sf.chart_for(problem.prediction(vp, kind=kind))) is sf.BentLine for kind in KINDS}
    assert bent == {"data": False, "noise": True, "score": True, "v": False, "flow": False, "edm": False}
    noise = problem.prediction(vp, kind="noise")
    assert sf.chart_for(noise, c=2.0) == sf.BentLine(c=2.0)
    # from here σ/α is 2: D = (x − σε̂)/α is no worse than ε̂
    assert sf.chart_for(noise, start=vp.time(torch.tensor(-math.log(2.0))).item()) == sf.StraightLine()
    guided = sf.ClassifierFree(noise, noise, scale=2.0)
    assert sf.chart_for(guided) == sf.BentLine()
    ode, x = sf.ProbabilityFlowODE(noise), vp.prior((8, 2), seed=1, dtype=torch.float64)
    for solver in (sf.FixedAdams, sf.Adams, sf.TorchDiffEq, sf.RungeKutta, sf.Tsit5):
        given = {"steps": 8} if solver in (sf.FixedAdams, sf.RungeKutta) else {}
        named = ("rk4",) if solver is sf.RungeKutta else ("dopri5",) if solver is sf.TorchDiffEq else ()
        default, asked, line = (
            sf.solve(ode, solver(*named, **given, chart=chart), x).x
            for chart in (None, sf.BentLine(), sf.StraightLine())
        )
        assert torch.equal(default, asked) and not torch.equal(default, line)
