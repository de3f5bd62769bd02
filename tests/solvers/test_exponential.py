"""The exponential family: its identities, its edges and its weights."""

from __future__ import annotations

import math

import pytest
import torch

import sdeflow as sf

GRID = sf.UniformLogSNR()
VP = sf.VP(t_min=1e-2)
RING = sf.problems.ring(std=0.3)


def end(solver, kind="data", process=VP, equation=None, dtype=torch.float64, seed=None, problem=RING):
    predict = problem.prediction(process, kind)
    x = process.prior((16, problem.dim), dtype=dtype)
    return sf.solve(equation(predict) if equation else sf.ProbabilityFlowODE(predict), solver, x, seed=seed).x


def reverse(eta):
    return lambda predict: sf.ReverseSDE(predict, eta=eta)


def test_the_first_orders_are_all_ddim():
    ddim = end(sf.DDIM(steps=12, grid=GRID))
    for same in (
        sf.DPMSolverPP(order=1, steps=12, grid=GRID),
        sf.UniPC(order=1, steps=12, grid=GRID, corrector=False),
        sf.DEIS(order=1, steps=12, grid=GRID),
        sf.DPMSolver(order=1, steps=12, grid=GRID),
        sf.SASolver(predictor=1, corrector=0, steps=12, grid=GRID),
    ):
        torch.testing.assert_close(end(same), ddim, rtol=0, atol=1e-13)


def test_sa_solver_without_noise_is_the_multistep_ode_solver():
    assert torch.equal(
        end(sf.SASolver(predictor=3, corrector=0, steps=12, grid=GRID)),
        end(sf.DPMSolverPP(order=3, steps=12, grid=GRID, exact=True)),
    )
    exact = end(sf.SASolver(predictor=2, corrector=0, steps=12, grid=GRID))
    assert torch.equal(exact, end(sf.DPMSolverPP(order=2, steps=12, grid=GRID, exact=True)))


def test_sde_methods_on_the_flow_are_the_ode_methods():
    for order in (1, 2, 3):
        a, b = (end(sf.DPMSolverPP(order=order, steps=9, grid=GRID, sde=sde)) for sde in (True, False))
        # the SDE solver starts with fewer nodes only where there is noise
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["data", "noise", "score", "v", "flow", "edm"])
def test_every_kind_of_network_gives_the_same_trajectory(kind):
    given = {"steps": 10, "grid": sf.InChart()}  # the default grid depends on the kind
    for solver in (sf.DPMSolverPP(order=2, **given), sf.DEIS(order=3, **given), sf.UniPC(order=3, **given)):
        torch.testing.assert_close(end(solver, kind), end(solver, "data"), rtol=0, atol=1e-10)


def test_order_two_is_written_as_the_paper_has_it():
    times = GRID.times(VP, VP.t_max, VP.t_min, 6)
    predict = RING.prediction(VP)
    x = VP.prior((4, 2), dtype=torch.float64)
    got = sf.solve(sf.ProbabilityFlowODE(predict), sf.DPMSolverPP(order=2, grid=times), x).x
    older = h0 = None
    for s, t in zip(times[:-1], times[1:], strict=True):
        D, h = RING.denoise(x, VP, s), VP.half_log_snr(t) - VP.half_log_snr(s)
        mean = D if older is None else D + (D - older) / (2.0 * h0 / h)
        x = VP.sigma(t) / VP.sigma(s) * x - VP.alpha(t) * torch.expm1(-h) * mean
        older, h0 = D, h
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)


def test_order_three_has_the_two_that_is_usually_missing():
    lam = torch.tensor([-2.0, -1.5, -0.7, 0.4], dtype=torch.float64)
    times = VP.time(lam)

    # D = λ²/2 along the path is integrated exactly by a quadratic, and by nothing that halves the second difference
    class Quadratic:
        def __call__(self, x, t):
            return (0.5 * VP.half_log_snr(t) ** 2)[:, None].expand_as(x)

    predict = sf.DataPrediction(Quadratic(), VP, dtype=torch.float64)
    x = torch.zeros(1, 1, dtype=torch.float64)
    states = sf.solve(
        sf.ProbabilityFlowODE(predict), sf.DPMSolverPP(order=3, grid=times), x, start=times[0].item(), stop=times[-1].item(),
        save_at=times[2:],
    ).states  # fmt: skip
    grid = torch.linspace(lam[2].item(), lam[3].item(), 20001, dtype=torch.float64)
    integral = torch.trapezoid(grid.exp() * 0.5 * grid**2, grid)
    sigma = VP.sigma(times)
    exact = sigma[3] / sigma[2] * states[0] + sigma[3] * integral
    torch.testing.assert_close(states[1], exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("process", [sf.RectifiedFlow(), sf.CosineVP(t_max=1.0)], ids=["flow", "cosine"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: sf.DDIM(**k),
        lambda **k: sf.DPMSolverPP(order=3, **k),
        lambda **k: sf.DPMSolverPP(order=3, multistep=False, **k),
        lambda **k: sf.UniPC(order=2, **k),
        lambda **k: sf.UniPC(order=3, predict="noise", **k),
        lambda **k: sf.DEIS(order=2, **k),
        lambda **k: sf.DPMSolver(order=2, **k),
        lambda **k: sf.SASolver(**k),
    ],
)
def test_alpha_zero_is_an_ordinary_place_to_start(process, make):
    problem = sf.problems.gaussian(mean=[0.3, -1.0], std=[0.5, 1.5])
    x = process.prior((8, 2), dtype=torch.float64)
    truth = problem.flow(x, process, process.t_max, process.t_min)
    errors = [
        (sf.solve(sf.ProbabilityFlowODE(problem.prediction(process, "flow")), make(steps=n), x).x - truth).abs().max()
        for n in (20, 80)
    ]
    assert errors[1] < 0.1 and errors[1] < 0.35 * errors[0]


def test_data_form_keeps_its_order_from_alpha_zero():
    process, problem = sf.RectifiedFlow(), sf.problems.gaussian(mean=[0.3], std=[1.5])
    x = process.prior((4, 1), dtype=torch.float64)
    truth = problem.flow(x, process, 1.0, process.t_min)
    grid = sf.InChart(sf.StraightLine(1.0))
    for solver, order in ((sf.DPMSolverPP, 3), (sf.UniPC, 3)):
        e = [
            (
                sf.solve(
                    sf.ProbabilityFlowODE(problem.prediction(process)), solver(order=order, steps=n, grid=grid), x
                ).x
                - truth
            )
            .abs()
            .max()
            for n in (40, 80)
        ]
        assert math.log2(e[0] / e[1]) > 2.8


def test_denoise_is_one_more_counted_step_that_returns_d():
    predict = RING.prediction(VP)
    x = VP.prior((3, 2), dtype=torch.float64)
    for make in (sf.DDIM, lambda **k: sf.DPMSolverPP(order=2, **k), lambda **k: sf.RungeKutta("heun", **k)):
        plain = sf.solve(sf.ProbabilityFlowODE(predict), make(steps=5), x)
        clean = sf.solve(sf.ProbabilityFlowODE(predict), make(steps=5, denoise=True), x)
        torch.testing.assert_close(clean.x, RING.denoise(plain.x, VP, VP.t_min), rtol=0, atol=1e-13)
        assert clean.calls == plain.calls + 1


def test_start_at_sigma_zero_is_refused():
    process = sf.EDM(t_min=0.0)
    equation = sf.ProbabilityFlowODE(RING.prediction(process))
    with pytest.raises(sf.InvalidInput, match="σ = 0"):
        sf.solve(equation, sf.DDIM(steps=3, grid=sf.UniformTime()), torch.zeros(1, 2), start=0.0, stop=1.0)


def test_other_settings_are_refused_with_the_line_to_write():
    for wrong, line in (
        (lambda: sf.DPMSolverPP(order=4, steps=3), "order=3"),
        (lambda: sf.UniPC(order=2, steps=3, variant="bh3"), "bh1, bh2"),
        (lambda: sf.DDIM(steps=3, eta=2.0), "eta=1.0"),
        (lambda: sf.SASolver(steps=3, eta=0.5), "ReverseSDE"),
    ):
        with pytest.raises(sf.InvalidInput, match=line):
            wrong()
    with pytest.raises(sf.InvalidInput, match="eta=0.5"):
        end(sf.DDIM(steps=3, eta=0.5), equation=reverse(1.0))


@pytest.mark.parametrize("grid", [sf.UniformLogSNR(), sf.UniformTime()], ids=repr)
def test_ddim_at_eta_one_is_ddpm_with_the_posterior_variance(grid):
    process = sf.DiscreteVP.linear()
    equation = sf.ReverseSDE(sf.problems.ring().prediction(process))
    x = process.prior((16, 2), dtype=torch.float64)
    ddim = sf.solve(equation, sf.DDIM(steps=25, eta=1.0, grid=grid), x, seed=3).x
    ddpm = sf.solve(equation, sf.DDPM(steps=25, variance="small", grid=grid), x, seed=3).x
    assert (ddim - ddpm).abs().max() < 1e-6


@pytest.mark.parametrize(
    "make", [lambda **k: sf.DDIM(eta=1.0, **k), sf.DDPM, lambda **k: sf.DDPM(variance="large", **k)]
)
def test_one_ancestral_step_is_the_textbook_s(make):
    # a = ᾱ_t/ᾱ_p, β = 1 − a: mean √ᾱ_p β/(1−ᾱ_t) x̂_0 + √a (1−ᾱ_p)/(1−ᾱ_t) x_t, variance β̃ = (1−ᾱ_p)/(1−ᾱ_t) β or β
    process, t, p = sf.DiscreteVP.linear(), 600.0, 450.0
    problem = sf.problems.ring()
    equation = sf.ReverseSDE(problem.prediction(process))
    x = process.prior((4000, 2), dtype=torch.float64)
    bar_t, bar_p = (process.alpha(s).item() ** 2 for s in (t, p))
    a, beta = bar_t / bar_p, 1.0 - bar_t / bar_p
    data = problem.denoise(x, process, t)
    mean = bar_p**0.5 * beta / (1.0 - bar_t) * data + a**0.5 * (1.0 - bar_p) / (1.0 - bar_t) * x
    solver = make(grid=[t, p])
    noise = sf.solve(equation, solver, x, start=t, stop=p, seed=7).x - mean
    variance = beta if getattr(solver, "variance", "small") == "large" else (1.0 - bar_p) / (1.0 - bar_t) * beta
    # 8000 squared normals: six standard errors, a false alarm in 5e8
    assert abs(noise.square().mean().item() / variance - 1.0) < 6.0 * math.sqrt(2.0 / noise.numel())
    # the same path moves every state by the same amount, so the mean is met to rounding
    again = sf.solve(equation, solver, x.flip(0), start=t, stop=p, seed=7).x - mean.flip(0)
    assert (again - noise).abs().max() < 1e-10


def test_dpm_solver_does_not_leave_pure_noise_in_one_long_step_by_itself():
    """A network that predicts noise to 2 % says nothing of the data where α ≈ 0: in one long step of λ that is amplified."""
    process = sf.DiscreteVP.linear()
    exact = RING.prediction(process, "noise")
    predict = sf.NoisePrediction(lambda x, t: exact.noise(x, t) + 0.02 * torch.cos(3.0 * x), process)
    equation, x = sf.ProbabilityFlowODE(predict), process.prior((64, 2), dtype=torch.float64)
    truth = sf.solve(equation, sf.Adams(rtol=1e-5, atol=1e-5), x).x

    def error(**settings):
        return (sf.solve(equation, sf.DPMSolver(order=2, steps=8, **settings), x).x - truth).square().mean().sqrt()

    assert error() < 0.5
    assert error(grid=sf.InChart()) > 5 * error()
    flow = sf.RectifiedFlow(t_min=0.0)  # α = 0 at one end, σ = 0 at the other: no even steps in λ
    ends = sf.ProbabilityFlowODE(RING.prediction(flow, "flow"))
    assert bool(sf.solve(ends, sf.DPMSolver(order=2, steps=8), x).x.isfinite().all())


@pytest.mark.parametrize(
    "phi", [lambda rho: rho**0.5, lambda rho: 1.0 / rho, lambda rho: rho * (2.0 + torch.sin(3.0 * rho))]
)
def test_a_phi_whose_noise_would_be_negative_is_refused(phi):
    """Its variance used to be cut to 0, and the state came out with a hundred times the spread of the data."""
    process, problem = sf.VP(), sf.problems.ring()
    with pytest.raises(sf.InvalidInput, match="φ/ρ must grow"):
        sf.solve(sf.ReverseSDE(problem.prediction(process)), sf.ERSDE(steps=50, phi=phi), process.prior((2, 2)), seed=0)


def test_an_eta_of_lambda_that_is_not_finite_is_named():
    process, problem = sf.VP(), sf.problems.ring()
    with pytest.raises(sf.InvalidInput, match=r"eta\(λ\) must be finite"):
        sf.solve(
            sf.ReverseSDE(problem.prediction(process)),
            sf.SASolver(steps=5, eta=lambda lam: lam * float("nan")),
            process.prior((2, 2)),
        )
