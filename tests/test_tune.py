"""Fixed-grid Adams and the budget mode built on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.solvers.fixed_adams import FixedAdams, adams_weights, integrals
from sdeflow.tune import FIRST, REFINED, TIGHT, search

F64 = torch.float64


def test_weights_integrate_polynomials_exactly_on_any_grid():
    u = np.sort(np.random.default_rng(0).uniform(0.0, 1.0, 9))[::-1].copy()
    for ahead in (0, 1):
        for k in (1, 2, 3, 5):
            rows = integrals(u, k, ahead)
            nodes = u[: rows.shape[1]]
            for power in range(k):
                exact = (u[1:] ** (power + 1) - u[:-1] ** (power + 1)) / (power + 1)
                full = np.arange(len(rows)) + ahead + 1 >= max(k, power + 1)
                assert np.abs(rows @ nodes**power - exact)[full].max() < 1e-9


def test_classical_coefficients():
    even = np.arange(6.0)
    assert np.allclose(integrals(even, 3, 0)[4, 2:5], [5 / 12, -16 / 12, 23 / 12])
    assert np.allclose(integrals(even, 3, 1)[4, 3:6], [-1 / 12, 8 / 12, 5 / 12])


def test_weights_are_those_of_predict_evaluate_correct():
    # the loop written out, against the compiled weights, on x' = cos(3u)·x
    u = np.array([0.0, 0.1, 0.25, 0.3, 0.55, 0.7])
    predict, correct = integrals(u, 3, 0), integrals(u, 3, 1)
    z = p = 1.0
    slopes: list[float] = []
    for n in range(5):
        slopes.append(np.cos(3 * u[n]) * p)
        if n:
            z = z + correct[n - 1, : n + 1] @ slopes
        p = z + predict[n, : n + 1] @ slopes
    equation = sf.Equation(lambda t, x: torch.cos(3 * t) * x)
    x = torch.ones(1, 1, dtype=F64)
    got = sf.solve(equation, FixedAdams(order=3, grid=u.tolist()), x, start=0.0, stop=0.7)
    assert got.x.item() == pytest.approx(p, rel=1e-14) and got.calls == 5
    assert np.allclose(np.triu(adams_weights(u, 3, 3), 1), 0)


@pytest.fixture(scope="module")
def ring():
    process = sf.EDM()
    equation = sf.ProbabilityFlowODE(sf.problems.ring().prediction(process))
    tight = sf.Adams(rtol=1e-9, atol=1e-9)
    x = process.prior((128, 2), seed=1, dtype=F64)
    return process, equation, x, sf.solve(equation, tight, x).x


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


def test_tuned_beats_every_untuned_grid_on_other_samples(ring):
    process, equation, x, end = ring
    solver = sf.tune(equation, budget=15, pilot=process.prior((24, 2), seed=99, dtype=F64))
    solution = sf.solve(equation, solver, x)
    assert (solution.evaluations == 15).all()
    plain = [
        rms(sf.solve(equation, FixedAdams(order=k, steps=15, grid=grid), x).x, end)
        for k in (1, 2, 3, 4)
        for grid in (None, sf.UniformLogSNR(), sf.Karras())
    ]
    plain.append(rms(sf.solve(equation, sf.DPMSolverPP(order=2, steps=15, grid=sf.UniformLogSNR()), x).x, end))
    plain.append(rms(sf.solve(equation, sf.DPMSolverPP(order=2, steps=15, grid=sf.Karras()), x).x, end))
    assert rms(solution.x, end) < 0.35 * min(plain), plain


def test_cost_is_bounded_and_the_pilot_error_is_a_true_error(ring):
    process, equation, _, _ = ring
    seen = []

    class Counted(sf.DataPrediction):
        def call(self, x, network_time):
            seen.append(x.shape[0])
            return super().call(x, network_time)

    problem = sf.problems.ring()
    counted = sf.ProbabilityFlowODE(Counted(problem.network(process, "data"), process))
    pilot = process.prior((40, 2), seed=5, dtype=F64)
    fractions: list[float] = []
    tuning = search(counted, 8, pilot, progress=fractions.append)
    assert set(seen) == {32} and len(seen) == tuning.evaluations <= 100 * 8
    assert TIGHT + FIRST + REFINED <= 100 and len(tuning.candidates) == FIRST + REFINED
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    end = sf.solve(equation, sf.Adams(rtol=1e-9, atol=1e-9), pilot[:32]).x
    error = (sf.solve(equation, tuning.solver, pilot[:32]).x - end).square().mean(1).sqrt().mean().item()
    assert error == pytest.approx(tuning.pilot_error, rel=1e-3)


def test_alpha_zero_float32_images_and_files(tmp_path):
    process = sf.RectifiedFlow()
    problem = sf.problems.from_points(torch.tensor([[0.5, -0.5, 0.1, 0.2], [-0.4, 0.3, 0.0, 0.6]]), std=0.2)
    equation = sf.ProbabilityFlowODE(problem.prediction(process))
    solver = sf.tune(equation, 6, process.prior((8, 1, 2, 2), seed=3))
    x = process.prior((5, 1, 2, 2), seed=4)
    first = sf.solve(equation, solver, x).x
    solver.save(tmp_path / "solver.json")
    again = FixedAdams.load(tmp_path / "solver.json")
    assert again == solver or torch.equal(sf.solve(equation, again, x).x, first)
    assert first.dtype == torch.float32 and first.isfinite().all()
    (tmp_path / "other.json").write_text('{"solver": "Euler"}')
    with pytest.raises(sf.InvalidInput, match=r"other\.json"):
        FixedAdams.load(tmp_path / "other.json")
    with pytest.raises(sf.InvalidInput, match="can be saved"):
        FixedAdams(steps=3).save(tmp_path / "no.json")


def test_bad_input_is_named(ring):
    _, equation, x, _ = ring
    for call, word in (
        (lambda: sf.tune(sf.Equation(lambda t, x: x), 5, x), "ProbabilityFlowODE"),
        (lambda: sf.tune(sf.ReverseSDE(equation.predict), 5, x), "ProbabilityFlowODE"),
        (lambda: sf.tune(equation, 1, x), "budget"),
        (lambda: sf.tune(equation, 5, x[:1]), "pilot"),
        (lambda: sf.tune(equation, 5, 24), "pilot"),
        (lambda: FixedAdams(order=0, steps=3), "order"),
        (lambda: FixedAdams(corrector=1, steps=3), "corrector"),
    ):
        with pytest.raises(sf.InvalidInput, match=word):
            call()
