"""Tables and figures say what the records say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sdeflow import report
from sdeflow.errors import InvalidInput


def test_lines_join_runs_that_differ_in_effort_alone(make_record):
    drawn = report.points([make_record(steps=n) for n in (5, 10)])
    assert {p.series for p in drawn} == {"rk4"}
    assert [p.evaluations for p in drawn] == [20.0, 40.0]


def test_settings_that_tell_two_lines_apart_are_named(make_record):
    charts = [{"chart": {"type": t}} for t in ("PlainTime", "StraightLine")]
    drawn = report.points([make_record(steps=n, solver=c) for c in charts for n in (5, 10)])
    assert [p.series for p in drawn] == ["rk4 in PlainTime"] * 2 + ["rk4 in StraightLine"] * 2


def test_a_setting_with_a_number_is_named_with_it(make_record):
    series = {p.series for p in report.points([make_record(solver={"c": c}) for c in (0.5, 1.0)])}
    assert series == {"rk4 (c 0.5)", "rk4 (c 1)"}


def test_the_libraries_are_named(make_record):
    kinds = ("TorchDiffEq", "TorchSDE", "RungeKutta")
    assert [p.series for p in report.points([make_record(solver={"type": t}) for t in kinds])] == [
        "torchdiffeq rk4",
        "torchsde rk4",
        "rk4",
    ]


def test_panels_are_equation_and_error(make_record):
    ode, sde = make_record(), make_record(equation="ReverseSDE", error="sliced_wasserstein")
    assert [p.panel for p in report.points([ode, sde])] == [
        ("probability-flow ODE", "end-point RMSE"),
        ("reverse SDE, η = 1", "sliced Wasserstein-2"),
    ]


def test_several_problems_do_not_share_a_panel(make_record):
    panels = [p.panel[0] for p in report.points([make_record(), make_record(problem={"name": "ring"})])]
    assert panels == ["digits, VP: probability-flow ODE", "ring, VP: probability-flow ODE"]


def test_a_record_with_failed_samples_is_in_the_table_and_not_in_the_figure(make_record):
    failed = make_record(status={"SUCCESS": 6, "NON_FINITE": 2})
    assert report.points([failed]) == []
    assert report.rows([failed])[0][-1] == "6 (2 NON_FINITE)"


def test_rows_say_cost_and_error(make_record):
    r = make_record(evaluations_mean=40.5, evaluations_max=60, rejected_mean=2.0)
    row = dict(zip(report.COLUMNS, report.rows([r])[0], strict=True))
    assert row["evaluations"] == "40.5 (60)"
    assert row["steps"] == "10 + 2"
    assert row["error"] == "1.00e-02"
    assert row["95 % interval"] == "0.009 … 0.011"
    assert row["effort"] == "10 steps"


def test_an_unresolved_error_is_a_bound(make_record):
    row = report.rows([make_record(value=0.04, floor=0.05)])[0]
    assert row[report.COLUMNS.index("error")] == "≤ 5.00e-02"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": None, "rtol": 1e-3, "atol": 1e-3}, "tolerance 0.001"),
        ({"steps": None, "rtol": 1e-3, "atol": 1e-6}, "rtol 0.001, atol 1e-06"),
        ({"steps": None, "dt": 0.1}, "dt 0.1"),
        ({"steps": 7}, "7 steps"),
    ],
)
def test_effort_in_words(make_record, settings, said):
    assert report.effort(make_record(solver=settings)) == said


def test_markdown_has_a_table_for_each_equation(make_record):
    text = report.markdown([make_record(), make_record(equation="ReverseSDE", error="sliced_wasserstein")])
    assert text.count("| --- |") == 2 or text.count("--- | ---") >= 2
    assert "## digits, VP, probability-flow ODE: end-point RMSE, 8 samples" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(report.COLUMNS) + 1}


def drawing(monkeypatch: pytest.MonkeyPatch, points, path: Path):
    """The matplotlib figure that `report.figure` drew."""
    plt = report._pyplot()
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    files = report.figure(points, path)
    return kept[0], files


def test_the_figure_shows_every_point_hollow_if_unresolved(make_record, tmp_path: Path, monkeypatch):
    records = [make_record(steps=n, value=v, floor=0.05) for n, v in ((5, 0.4), (10, 0.1), (20, 0.04))]
    fig, files = drawing(monkeypatch, report.points(records), tmp_path / "figure.png")
    assert [f.suffix for f in files] == [".png", ".pdf"] and all(f.stat().st_size > 5000 for f in files)
    (ax,) = fig.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    dots = [line for line in ax.lines if len(line.get_xdata()) == 1 and line.get_marker() == "o"]
    shown = {(d.get_xdata()[0], d.get_ydata()[0]): d.get_markerfacecolor() for d in dots}
    assert set(shown) == {(20.0, 0.4), (40.0, 0.1), (80.0, 0.04)}
    assert [shown[x, y] == "white" for x, y in sorted(shown)] == [False, False, True]
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["rk4", "floor", "hollow: not resolved"]


def test_bars_are_the_intervals(make_record, tmp_path: Path, monkeypatch):
    fig, _ = drawing(monkeypatch, report.points([make_record(value=0.1)]), tmp_path / "figure.png")
    (bars,) = fig.axes[0].containers
    _, _, (segments,) = bars.lines
    (segment,) = segments.get_segments()
    assert segment[:, 1] == pytest.approx([0.09, 0.11])


def test_a_diverged_point_does_not_flatten_the_others(make_record, tmp_path: Path, monkeypatch):
    records = [make_record(steps=n, value=v) for n, v in ((5, 3e4), (10, 0.2), (20, 0.1))]
    fig, _ = drawing(monkeypatch, report.points(records), tmp_path / "figure.png")
    (ax,) = fig.axes
    assert ax.get_ylim()[1] == pytest.approx(2.0)  # ten times the median
    above = [line for line in ax.lines if line.get_marker() == "^" and len(line.get_xdata()) == 1]
    assert [(a.get_xdata()[0], a.get_ydata()[0]) for a in above] == [(20.0, ax.get_ylim()[1])]
    assert "above the axis" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_the_legend_lies_outside_the_data(make_record, tmp_path: Path, monkeypatch):
    records = [make_record(name=f"method {k}", steps=n) for k in range(10) for n in (5, 10)]
    fig, _ = drawing(monkeypatch, report.points(records), tmp_path / "figure.png")
    fig.canvas.draw()
    (ax,) = fig.axes
    legend, label = ax.get_legend().get_window_extent(), ax.xaxis.label.get_window_extent()
    assert legend.y1 <= label.y0
    assert legend.x0 >= 0 and legend.x1 <= fig.bbox.x1


def test_families_keep_their_colour_from_figure_to_figure(make_record):
    one = report._colours(report.points([make_record(solver={"type": "TorchSDE"})]))
    two = report._colours(report.points([make_record(), make_record(solver={"type": "TorchSDE"})]))
    assert one["torchsde"] == two["torchsde"]
    assert len(set(report.PALETTE[: len(report.ORDER)])) == len(report.ORDER)


def test_the_same_records_give_the_same_bytes(make_record, tmp_path: Path):
    first, second = (report.figure(report.points([make_record()]), tmp_path / name) for name in ("a.png", "b.png"))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_nothing_to_draw_is_said(make_record, tmp_path: Path):
    with pytest.raises(InvalidInput, match="nothing to draw"):
        report.figure(report.points([make_record(value=math.nan)]), tmp_path / "figure.png")


def test_pictures_of_points_and_of_images(tmp_path: Path):
    import numpy as np

    draw = np.random.default_rng(0)
    for name, shape in (("points", (30, 2)), ("images", (5, 64)), ("square", (5, 1, 8, 8))):
        path = report.picture(draw.uniform(-1, 1, shape), tmp_path / f"{name}.png")
        assert path.stat().st_size > 1000
    with pytest.raises(InvalidInput, match="square number"):
        report.picture(draw.uniform(-1, 1, (5, 3)), tmp_path / "none.png")


def test_pixels_land_where_they_belong(tmp_path: Path):
    """One white pixel at row 0, column 7 of a black image is white at the top right of the picture."""
    import matplotlib.image as mpimg
    import numpy as np

    image = -np.ones((1, 8, 8))
    image[0, 0, 7] = 1.0
    picture = mpimg.imread(report.picture(image, tmp_path / "one.png"))[..., 0]
    inside = np.argwhere(picture < 0.5)
    (top, left), (bottom, right) = inside.min(0), inside.max(0)
    height, width = bottom - top, right - left
    assert picture[top + height // 16, left + 15 * width // 16] > 0.9
    assert picture[top + height // 16, left + width // 16] < 0.1
