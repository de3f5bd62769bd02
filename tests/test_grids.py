"""Grids: exact ends, the stated spacing, all processes, and clear refusals."""

import math

import pytest
import torch

import sdeflow as sf

PROCESSES = [
    sf.VP(),
    sf.CosineVP(),
    sf.SubVP(),
    sf.VE(),
    sf.EDM(),
    sf.DiscreteVP.scaled_linear(),
    sf.RectifiedFlow(t_max=0.999),
]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_spacing_is_uniform_in_the_stated_variable(process):
    start, stop = process.t_max, process.t_min
    variable = {
        sf.UniformTime(): lambda t: t,
        sf.UniformLogSNR(): process.half_log_snr,
        sf.Karras(): lambda t: process.rho(t) ** (1 / 7),
        sf.Quadratic(): lambda t: t.sqrt(),
        sf.InChart(sf.Trigonometric(c=0.7)): lambda t: torch.atan(process.rho(t) / 0.7),
    }
    for grid, v in variable.items():
        times = grid.times(process, start, stop, 17)
        assert times.shape == (18,) and times[0] == start and times[-1] == stop and (times.diff() < 0).all()
        gaps = v(times).diff()
        assert torch.allclose(gaps, gaps.mean().expand(17), rtol=1e-7), grid
        back = grid.times(process, stop, start, 17)
        assert torch.allclose(back.flip(0), times, rtol=1e-9)


def test_alpha_zero_start():
    process = sf.RectifiedFlow()
    for grid in (sf.InChart(sf.StraightLine()), sf.UniformLogSNR(), sf.UniformTime(), sf.InChart(sf.Trigonometric())):
        times = grid.times(process, 1.0, 1e-3, 10)
        assert times[0] == 1.0 and times.isfinite().all()
    for grid in (sf.Karras(), sf.InChart(sf.LogSNR())):
        with pytest.raises(sf.InvalidInput, match="α = 0"):
            grid.times(process, 1.0, 1e-3, 10)


def test_karras_formula():
    times = sf.Karras().times(sf.EDM(), 80.0, 0.002, 17)
    i = torch.arange(18, dtype=torch.float64) / 17
    expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(times, expected, rtol=1e-12)


def test_own_nodes():
    grid = sf.Nodes([1.0, 0.4, 0.1])
    assert grid.steps == 2 and grid.times(None, 1.0, 0.1, 2).tolist() == [1.0, 0.4, 0.1]
    with pytest.raises(sf.InvalidInput, match="start=1"):
        grid.times(None, 0.9, 0.1, 2)
    for bad in ([1.0], [1.0, 0.5, 0.7], [1.0, math.nan, 0.1], [1.0, 1.0, 0.5]):
        with pytest.raises(sf.InvalidInput, match="strictly"):
            sf.Nodes(bad)


@pytest.mark.parametrize("steps", [0, -3, 2.0, True])
def test_steps_are_positive_integers(steps):
    with pytest.raises(sf.InvalidInput, match="steps"):
        sf.UniformTime().times(None, 1.0, 0.0, steps)


def test_process_grids_need_a_process():
    with pytest.raises(sf.InvalidInput, match="UniformTime"):
        sf.Karras().times(None, 1.0, 0.1, 4)


def test_multiscale_has_the_density_of_its_formula_and_reaches_both_ends():
    low, high = 0.05, 2.0
    grid, process = sf.Multiscale(low, high), sf.RectifiedFlow()
    times = grid.times(process, 1.0, 0.0, 4000)
    rho = process.rho(times)
    assert rho[0] == float("inf") and rho[-1] == 0.0
    lam = process.half_log_snr(times)[1:-1]
    got = lam.diff().reciprocal()
    middle = (-0.5 * (lam[1:] + lam[:-1])).exp()
    density = (1 + (low / middle) ** 2) ** -0.5 + (1 + (middle / high) ** 2) ** -0.5 - 1
    inside = (middle > 1e-2) & (middle < 10)
    torch.testing.assert_close(
        (got / density)[inside], (got / density)[inside].mean().expand(int(inside.sum())), rtol=1e-3, atol=0
    )


def test_multiscale_refuses_scales_out_of_order():
    with pytest.raises(sf.InvalidInput, match="low < high"):
        sf.Multiscale(2.0, 0.5)


def test_an_infinite_clock_names_the_end_and_what_is_zero_there():
    flow = sf.RectifiedFlow(t_min=0.0)
    with pytest.raises(sf.InvalidInput, match=r"start=1\.0, where α = 0"):
        sf.InChart(sf.LogSNR()).times(flow, 1.0, 0.1, 4)
    with pytest.raises(sf.InvalidInput, match=r"stop=0\.0, where σ = 0"):
        sf.InChart(sf.LogSNR()).times(flow, 0.9, 0.0, 4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 10, 50, 333, 999])
@pytest.mark.parametrize("stop", [0.0, -0.5])
def test_discrete_grids_have_as_many_steps_as_asked_from_their_own_start(spacing, steps, stop):
    grid = sf.Discrete(1000, spacing)
    nodes = grid.times(None, grid.start(steps, stop), stop, steps)
    assert len(nodes) == steps + 1 and torch.equal(nodes[:-1], nodes[:-1].round())
    if (spacing, stop) == ("leading", -0.5):  # the published ones, where none is lost at the end
        assert torch.equal(nodes[:-1].flip(0), torch.arange(steps, dtype=torch.float64) * (1000 // steps))


def test_a_discrete_grid_of_all_times_has_one_step_fewer():
    process = sf.DiscreteVP.linear()
    assert len(sf.Discrete(1000).times(process, 999.0, 0.0, 999)) == 1000
    with pytest.raises(sf.InvalidInput, match="at most 999 steps"):
        sf.Discrete(1000).times(process, 999.0, 0.0, 1000)
