"""Tables and figures, from records only: nothing is solved or measured here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdeflow.errors import InvalidInput, MissingDependency
from sdeflow.measure import Estimate, Record

EFFORT = ("steps", "grid", "dt", "rtol", "atol")
"""Settings that say how hard a solver works: a line of the figure joins runs that differ in these alone."""

EQUATIONS = {"ProbabilityFlowODE": "probability-flow ODE", "ReverseSDE": "reverse SDE", "ForwardSDE": "forward SDE"}
ERRORS = {
    "rmse": "end-point RMSE",
    "worst_sample": "worst sample",
    "sliced_wasserstein": "sliced Wasserstein-2",
    "energy_distance": "energy distance",
    "moments": "moment error",
}


@dataclass(frozen=True)
class Point:
    """One error of one record: a dot of a work-precision figure.

    Attributes:
        panel: the equation and the error, e.g. ("PF-ODE", "RMSE"): what shares axes.
        series: the method with all settings but those of the effort: what is joined by a line.
        family: what shares a colour.
        evaluations: mean network evaluations a sample.
        value, low, high: the error and its interval.
        floor: the error that cannot be told from none (Monte Carlo, or the reference's own), if known.
        resolved: whether the value stands clear of the floor.
    """

    panel: tuple[str, str]
    series: str
    family: str
    evaluations: float
    value: float
    low: float
    high: float
    floor: float | None
    resolved: bool


def points(records: Sequence[Record]) -> list[Point]:
    """The errors the records are judged by, as points to draw; records in which a sample failed are left out.

    A line needs a name: the solver's, and of its other settings those in which lines of one name differ.
    """
    kept = [r for r in records if r.complete]
    names = _series_names(kept)
    several = len({subject(r) for r in kept}) > 1
    return [
        Point(
            panel=(
                f"{subject(r)}: {equation_name(r)}" if several else equation_name(r),
                ERRORS.get(r.error.name, r.error.name),
            ),
            series=names[_series_key(r)],
            family=FAMILIES.get(str(r.solver["type"]), str(r.solver["type"])),
            evaluations=r.evaluations_mean,
            value=r.error.value,
            low=r.error.low,
            high=r.error.high,
            floor=r.error.floor,
            resolved=r.error.resolved,
        )
        for r in kept
    ]


def equation_name(record: Record) -> str:
    """The equation in words, with η where it is not implied."""
    kind = str(record.equation["type"])
    name = EQUATIONS.get(kind, kind)
    return f"{name}, η = {record.equation['eta']:g}" if kind == "ReverseSDE" else name


def solver_name(record: Record) -> str:
    """The method's name, after its library's where it is not our own."""
    library = {"TorchDiffEq": "torchdiffeq ", "TorchSDE": "torchsde "}.get(str(record.solver["type"]), "")
    return f"{library}{record.solver['name']}"


def subject(record: Record) -> str:
    """Problem and process: "digits, VP"."""
    return f"{record.problem['name']}, {record.process['type']}"


def _settings(record: Record) -> dict[str, Any]:
    solver = {k: v for k, v in record.solver.items() if k not in EFFORT}
    return solver | {"samples": record.samples, "seed": record.seed}


def _series_key(record: Record) -> str:
    return repr(sorted(_settings(record).items()))


def _series_names(records: Iterable[Record]) -> dict[str, str]:
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for r in records:
        by_name.setdefault(solver_name(r), {})[_series_key(r)] = _settings(r)
    names = {}
    for name, series in by_name.items():
        differ = [k for k in next(iter(series.values())) if len({repr(s.get(k)) for s in series.values()}) > 1]
        for key, settings in series.items():
            chart = _short(settings["chart"]) if "chart" in differ and settings["chart"] else ""
            said = ", ".join(
                f"{k} {_short(settings.get(k))}" for k in differ if k != "chart" and settings.get(k) is not None
            )
            names[key] = name + (f" in {chart}" if chart else "") + (f" ({said})" if said else "")
    return names


def _short(value: Any) -> str:
    """A setting in a legend: a chart by its name, numbers as they are."""
    if isinstance(value, dict):
        return str(value.get("type", value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- tables

COLUMNS = ("solver", "effort", "evaluations", "steps", "error", "95 % interval", "also", "seconds", "samples")


def rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The records as text, one row each, in the order of COLUMNS.

    evaluations: mean a sample (the most of any sample, where that differs). steps: accepted + rejected. error: "≤" marks a value that
    is not resolved: no larger than a perfect solver could show. samples: all, or those that succeeded and how the others ended.
    """
    names = _series_names(records)
    return [
        (
            names[_series_key(r)],
            effort(r),
            _count(r.evaluations_mean)
            + (f" ({r.evaluations_max})" if r.evaluations_max > r.evaluations_mean + 0.05 else ""),
            _count(r.accepted_mean) + (f" + {_count(r.rejected_mean)}" if r.rejected_mean else ""),
            _error(r.error),
            f"{r.error.low:.2g} … {r.error.high:.2g}" if math.isfinite(r.error.low) else "",
            ", ".join(f"{ERRORS.get(e.name, e.name)} {_error(e)}" for e in r.others),
            f"{r.wall_time:.2f}",
            _samples(r),
        )
        for r in records
    ]


def effort(record: Record) -> str:
    """How hard the solver worked: "20 steps" or "tolerance 0.001"."""
    s = record.solver
    if s.get("steps") is not None:
        return f"{s['steps']} steps"
    if s.get("dt") is not None:
        return f"dt {s['dt']:g}"
    if s.get("rtol") is not None:
        both = s["rtol"] == s.get("atol", s["rtol"])
        return f"tolerance {s['rtol']:g}" if both else f"rtol {s['rtol']:g}, atol {s['atol']:g}"
    return ""


def markdown(records: Sequence[Record]) -> str:
    """The records as Markdown tables, one for each equation and error."""
    blocks = []
    for title, group in grouped(records).items():
        head = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
        lines = [f"| {line} |" for line in [*head, *(" | ".join(row) for row in rows(group))]]
        blocks.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join(blocks) + "\n"


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records that belong in one table, by its title: problem, process, equation, error."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        what = ERRORS.get(r.error.name, r.error.name)
        title = f"{subject(r)}, {equation_name(r)}: {what}, {r.samples} samples"
        groups.setdefault(title, []).append(r)
    return groups


def _error(e: Estimate) -> str:
    if not math.isfinite(e.value):
        return "none"
    return f"{e.value:.2e}" if e.resolved else f"≤ {max(e.value, e.floor):.2e}"


def _count(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def _samples(r: Record) -> str:
    ended = ", ".join(f"{n} {name}" for name, n in sorted(r.status.items()) if name != "SUCCESS")
    return f"{r.status.get('SUCCESS', 0)}" + (f" ({ended})" if ended else "")


# --- figures

# Okabe and Ito's palette: told apart with every common colour vision.
PALETTE = ("#0072B2", "#D55E00", "#8C8C8C", "#E69F00", "#CC79A7", "#009E73", "#000000", "#56B4E9")
FAMILIES = {
    "TorchDiffEq": "torchdiffeq",
    "TorchSDE": "torchsde",
    "RungeKutta": "Runge–Kutta",
    "EulerMaruyama": "stochastic",
    "StochasticHeun": "stochastic",
    "Milstein": "stochastic",
    "DDPM": "ancestral",
    "EulerAncestral": "ancestral",
    "EDMHeun": "ancestral",
    "ERSDE": "ancestral",
    "Restart": "ancestral",
    "DDIM": "exponential",
    "DPMSolver": "exponential",
    "DPMSolverPP": "exponential",
    "UniPC": "exponential",
    "DEIS": "exponential",
    "SASolver": "exponential",
    "Adams": "Adams",
    "FixedAdams": "Adams",
    "StochasticAdams": "Adams",
    "Tsit5": "Runge–Kutta",
    "Dopri5": "Runge–Kutta",
}
"""What shares a colour; a class that is not here is a family of its own."""
ORDER = tuple(dict.fromkeys(FAMILIES.values()))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*")


def figure(points: Sequence[Point], path: str | Path, title: str = "") -> list[Path]:
    """Draw a work-precision figure: error against evaluations, both logarithmic, one panel an equation and error.

    Bars are the intervals of the records. Hollow points are unresolved: at or below the floor, which a dashed line marks.

    Args:
        points: what to draw; only finite, positive values can be.
        path: file name; .png and .pdf are both written beside each other whatever its suffix.
        title: a line above the panels.

    Returns:
        The files written.

    Raises:
        InvalidInput: no point can be drawn.
        MissingDependency: matplotlib is not installed.
    """
    drawn = [p for p in points if 0 < p.value < math.inf and 0 < p.evaluations < math.inf]
    if not drawn:
        raise InvalidInput("none of the records holds a positive, finite error; there is nothing to draw")
    plt = _pyplot()
    panels = list(dict.fromkeys(p.panel for p in drawn))
    colours = _colours(drawn)
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(
            1, len(panels), figsize=(4.3 * len(panels) + 0.2, 4.6), squeeze=False, layout="constrained"
        )
        for ax, panel in zip(axes[0], panels, strict=True):
            _panel(ax, panel, [p for p in drawn if p.panel == panel], colours)
        if title:
            fig.suptitle(title, fontsize=10)
        written = [Path(path).with_suffix(suffix) for suffix in (".png", ".pdf")]
        for file in written:
            file.parent.mkdir(parents=True, exist_ok=True)
            # no dates in the files: the same records give the same bytes
            fig.savefig(file, dpi=200, metadata={"Software": None} if file.suffix == ".png" else {"CreationDate": None})
        plt.close(fig)
    return written


_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}


def _panel(ax: Any, panel: tuple[str, str], points: list[Point], colours: dict[str, str]) -> None:
    equation, error = panel
    handles = []
    families: dict[str, int] = {}
    top = _top(points)
    for series in dict.fromkeys(p.series for p in points):
        line = sorted((p for p in points if p.series == series), key=lambda p: p.evaluations)
        n = families[line[0].family] = families.get(line[0].family, -1) + 1
        handles.append(_series(ax, series, line, colours[line[0].family], n, top))
    floor = max((p.floor for p in points if p.floor and math.isfinite(p.floor)), default=0.0)
    if floor > 0.3 * min(p.value for p in points):
        handles.append(ax.axhline(floor, ls=(0, (5, 3)), lw=0.9, color="#666666", label="floor", zorder=1))
    if not all(p.resolved for p in points):
        handles.append(
            ax.plot([], [], "o", mfc="white", mec="#666666", mew=1, ms=4.5, ls="", label="hollow: not resolved")[0]
        )
    if any(p.value > top for p in points):
        handles.append(ax.plot([], [], "^", color="#666666", ms=6, ls="", label="above the axis")[0])
    _axes(ax, points, top)
    ax.set(title=equation, xlabel="network evaluations a sample", ylabel=error)
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.48, -0.17), ncols=2, columnspacing=1.2)


def _series(ax: Any, name: str, line: list[Point], family_colour: str, n: int, top: float) -> Any:
    colour, marker = _shade(family_colour, n), MARKERS[n % len(MARKERS)]
    x, y = [p.evaluations for p in line], [p.value for p in line]
    bars = [[max(p.value - p.low, 0.0) for p in line], [max(p.high - p.value, 0.0) for p in line]]
    ax.errorbar(x, y, yerr=bars, fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.5, capthick=0.8, zorder=2)
    style = "-" if n % 2 == 0 else (0, (3, 1.2))
    ax.plot(x, y, ls=style, lw=1.1, color=colour, zorder=3)
    for p in line:
        face = colour if p.resolved else "white"
        ax.plot(p.evaluations, p.value, marker, mfc=face, mec=colour, mew=1.0, ms=4.5, zorder=4)
        if p.value > top:
            ax.plot(p.evaluations, top, "^", color=colour, ms=6, zorder=5, clip_on=False)
    return ax.plot([], [], marker, ls=style, lw=1.1, ms=4.5, color=colour, label=name)[0]


def _top(points: list[Point]) -> float:
    """Upper end of the error axis: ten times the worst line's median, or the largest error if that is less.

    A solve that diverged by many orders would leave no room for the others; it is shown as lying above the axis.
    """
    lines: dict[str, list[float]] = {}
    for p in points:
        lines.setdefault(p.series, []).append(p.value)
    usual = 10.0 * max(statistics.median(values) for values in lines.values())
    largest = max(p.value for p in points)
    if largest > usual:
        return usual
    return 1.7 * max([largest, *(p.high for p in points if math.isfinite(p.high))])


def _axes(ax: Any, points: list[Point], top: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set(xscale="log", yscale="log")
    values, lows = [p.value for p in points], [p.low for p in points if p.low > 0]
    # an interval that reaches down to nothing would leave the points no room
    bottom = max(min([*values, *lows]), 0.2 * min(values))
    ax.set_ylim(0.6 * bottom, top)
    counts = [p.evaluations for p in points]
    ax.set_xlim(0.85 * min(counts), 1.18 * max(counts))
    wide = max(counts) > 200 * min(counts)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(which="major", lw=0.4, color="#DDDDDD")
    ax.set_axisbelow(True)


def _colours(points: Iterable[Point]) -> dict[str, str]:
    """One colour a family, the same in every figure."""
    families = dict.fromkeys([*ORDER, *(p.family for p in points)])
    return {family: PALETTE[n % len(PALETTE)] for n, family in enumerate(families)}


def _shade(colour: str, n: int) -> str:
    """The family's colour, lighter for its later members; markers and dashes tell them apart as well."""
    share = (0.0, 0.32, 0.52)[n % 3]
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * share):02X}" for c in channels)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingDependency("figures need matplotlib; write: pip install 'sdeflow[cli]'") from error
    mpl.use("Agg")  # files only: never a window
    return plt


def picture(x: Any, path: str | Path, truth: Any = None, title: str = "") -> Path:
    """Show states: a grid of square grey images, or a scatter of points in the plane.

    Args:
        x: (n, d) or (n, *event) array or tensor, d a square number (images of values in [−1, 1]) or 2.
        path: file name, .png.
        truth: (m, 2) exact samples drawn behind a scatter.
        title: a line above.

    Raises:
        InvalidInput: d is neither 2 nor a square.
        MissingDependency: matplotlib is not installed.
    """
    import numpy as np

    flat = np.asarray(x, dtype=float).reshape(len(x), -1)
    side = math.isqrt(flat.shape[1])
    if flat.shape[1] != 2 and side**2 != flat.shape[1]:
        raise InvalidInput(
            f"a picture needs samples of 2 elements (points) or of a square number of them (images); got {flat.shape[1]}. "
            "The states are saved all the same"
        )
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        fig = _scatter(plt, flat, truth) if flat.shape[1] == 2 else _images(plt, flat.reshape(-1, side, side))
        if title:
            fig.suptitle(title, fontsize=9)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=200, metadata={"Software": None})
        plt.close(fig)
    return path


def _images(plt: Any, images: Any) -> Any:
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(0.5 * columns, 0.5 * rows + 0.3), squeeze=False, layout="constrained"
    )
    fig.get_layout_engine().set(w_pad=0.01, h_pad=0.01, hspace=0.0, wspace=0.0)
    for n, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if n < len(images):
            ax.imshow(images[n], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    return fig


def _scatter(plt: Any, points: Any, truth: Any) -> Any:
    fig, ax = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    if truth is not None:
        ax.plot(truth[:, 0], truth[:, 1], ".", ms=3, mew=0, color="#BBBBBB", label="data")
    ax.plot(points[:, 0], points[:, 1], ".", ms=3, mew=0, color=PALETTE[0], label="solved")
    ax.set(aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    if truth is not None:
        fig.legend(loc="outside lower center", ncols=2, markerscale=3)
    return fig
