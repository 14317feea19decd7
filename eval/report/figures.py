"""Figures of the report: inline SVG whose colours are CSS variables, so that one serves light, dark and print."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.style
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dmd2.experiment.metrics import UNSETTLED, best_first
from dmd2.publish.table_text import RowRecord, TableRecord, label, number

STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"
LOG_RANGE = 10.0  # a curve spanning more than this factor is drawn on a log axis

# Colours in light and dark, told apart with any colour vision (after Okabe and Ito) and at least 3:1 on the page; line
# style and marker say the same in grey. Lists of coprime length, so that more rows than colours still differ.
ARMS = [("#0072b2", "#56b4e9"), ("#d55e00", "#ff8f52"), ("#00805e", "#35cf9f"), ("#a3357a", "#ef90c8"),
        ("#946500", "#f0c541"), ("#4b4bb8", "#a9a6ff"), ("#7a4a1e", "#d9a679")]  # fmt: skip
DASHES: list[Any] = ["-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "p"]
TEACHER_DASHES: list[Any] = [(0, (1, 2)), (0, (8, 3)), (0, (4, 2, 1, 2))]
ROLES = {"#101010": "--ink", "#606060": "--muted", "#b0b0b0": "--rule", "#f0f0f0": "--shade"}  # greys of STYLE
MUTED, SHADE = "#606060", "#f0f0f0"
VARIABLES = ROLES | {light: f"--arm-{i}" for i, (light, _) in enumerate(ARMS)}

Kind = Literal["student", "teacher"]
LineStyle = dict[str, Any]  # keyword arguments of matplotlib's plot


def rows_of(table: TableRecord, kind: Kind) -> list[RowRecord]:
    """Rows that were trained, or those that are samplers of the teacher."""
    return [row for row in table["rows"] if row["kind"] == kind]


def best_runs(table: TableRecord, metric: str) -> list[str]:
    """The student rows with the best mean; none where there is nothing to compare."""
    students = [row for row in rows_of(table, "student") if metric in row["values"]]
    means = {row["run"]: fmean(row["values"][metric].values()) for row in students}
    finite = {run: mean for run, mean in means.items() if isfinite(mean)}
    if len(set(finite.values())) < 2:
        return []
    best = min(finite.values(), key=lambda mean: best_first(metric, mean))
    return [run for run, mean in finite.items() if mean == best]


def styles(table: TableRecord) -> dict[str, LineStyle]:
    """Line of every row: students by colour, dash and marker, the reference row thicker, teachers grey and bare."""
    found: dict[str, LineStyle] = {}
    for i, row in enumerate(rows_of(table, "student")):
        found[row["run"]] = {
            "color": ARMS[i % len(ARMS)][0],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 2.2 if row["run"] == table["reference_row"] else 1.4,
        }
    for i, row in enumerate(rows_of(table, "teacher")):
        dash = TEACHER_DASHES[i % len(TEACHER_DASHES)]
        found[row["run"]] = {"color": MUTED, "linestyle": dash, "linewidth": 1.4}
    return found


def key(name: str, style: LineStyle) -> Markup:
    """A short piece of a row's line as an SVG symbol called `name`, to stand as legend beside the row's name."""
    with drawing(name):
        figure = Figure(figsize=(0.46, 0.17))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(-1, 1))
        axes.set_axis_off()
        axes.plot([0.03, 0.5, 0.97], [0, 0, 0], markevery=[1], markersize=5, clip_on=False, **style)
        body, view = _drawn(figure)
        return Markup(f'<symbol id="{escape(name)}" viewBox="{view}">{body}</symbol>')


def curve(row: RowRecord, axis: str, metric: str) -> dict[float, list[float]]:
    """Finite values of a metric over seeds at every snapshot for which `axis`, one of `AXES`, is known."""
    points: dict[float, list[float]] = {}
    for snapshots in row["curves"].values():
        for snapshot in snapshots:
            if metric in snapshot and snapshot.get(axis) is not None and isfinite(snapshot[metric]):
                points.setdefault(snapshot[axis], []).append(snapshot[metric])
    return dict(sorted(points.items()))


AXES = {"step": "critic updates", "student_updates": "student updates", "passes": "network passes"}


def axes_of(table: TableRecord) -> dict[str, str]:
    """What curves of a table are drawn over, with names: over network passes if those of a row are known."""
    counted = any(row.get("passes") for row in rows_of(table, "student"))
    return {axis: name for axis, name in AXES.items() if axis != "passes" or counted}


def training_curves(table: TableRecord) -> list[Markup]:
    """The table's first metric over critic updates, student updates and network passes."""
    return [_curves(table, axis, x_label) for axis, x_label in axes_of(table).items()]


def _curves(table: TableRecord, axis: str, x_label: str) -> Markup:
    with drawing(f"{table['name']}-{axis}"):
        figure, axes = panel(4.5, 3.1)
        return svg(figure, draw_curves(axes, table, axis, x_label))


def draw_curves(axes: Axes, table: TableRecord, axis: str, x_label: str) -> str:
    """Draw the table's first metric over `axis`; returns what the chart shows, for who does not see it."""
    metric, drawn = table["metrics"][0], styles(table)
    curves = {row["run"]: curve(row, axis, metric) for row in rows_of(table, "student")}
    means = {run: [sum(v) / len(v) for v in points.values()] for run, points in curves.items()}
    levels = {row["run"]: next(iter(row["values"][metric].values())) for row in rows_of(table, "teacher")}
    for run, points in curves.items():
        axes.plot([*points], means[run], markersize=3.6, markevery=max(1, len(points) // 12), **drawn[run])
        low, high = [min(v) for v in points.values()], [max(v) for v in points.values()]
        if low != high:
            axes.fill_between([*points], low, high, color=drawn[run]["color"], alpha=0.14, linewidth=0)
    for run, level in levels.items():
        axes.axhline(level, zorder=1, **drawn[run])
    ends = [max(points) for points in curves.values() if points]
    # Where runs end far apart, the shorter ones would be squeezed.
    x_scale = scaled(axes, "x", ends, 3)
    y_scale = scaled(axes, "y", [*levels.values(), *(v for mean in means.values() for v in mean)], LOG_RANGE)
    if not x_scale:
        axes.set_xlim(left=0)
    title = label(metric) + y_scale
    axes.set(title=title, xlabel=x_label + x_scale)
    last = ", ".join(f"{run} {number(mean[-1])}" for run, mean in means.items() if mean)
    return f"Line chart of {title}, over {x_label}{x_scale}, one line per run. Last values: {last}."


def scaled(axes: Axes, which: Literal["x", "y"], values: list[float], most: float) -> str:
    """Make an axis logarithmic if positive values span more than the factor `most`; how it is labelled then.

    Its ticks are plain numbers, two or three to a decade.
    """
    finite = [value for value in values if isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low <= 0 or high <= most * low:
        return ""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high > 30 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(NullFormatter())
    return ", log scale"


def _plain(value: float, _: Any) -> str:
    return f"{value / 1000:g}k" if value >= 10000 else f"{value:g}"


def brightness(table: TableRecord) -> dict[str, Markup]:
    """One panel per run, on shared axes: brightness of the fixed-noise samples over training, one line per seed."""
    students = rows_of(table, "student")
    lines = {row["run"]: [_finite(points) for points in row["probe"].values()] for row in students}
    values = [y for several in lines.values() for points in several for _, y in points]
    if not values:
        return {}
    middle, half = (min(values) + max(values)) / 2, max(0.05, 0.54 * (max(values) - min(values)))
    drawn, panels = styles(table), {}
    for row in students:
        run, steps = row["run"], row["config"]["train"]["steps"]
        with drawing(f"{table['name']}-{run}-brightness"):
            figure, axes = panel(3.5, 1.75)
            axes.axvspan(0, UNSETTLED * steps, color=SHADE, linewidth=0, zorder=0)
            for points in lines[run]:
                axes.plot(*zip(*points, strict=True), color=drawn[run]["color"], linewidth=0.9, alpha=0.85)
            axes.set(xlim=(0, steps), ylim=(middle - half, middle + half), xlabel="critic updates")
            axes.yaxis.set_major_locator(MaxNLocator(4))
            late = [y for points in lines[run] for x, y in points if x >= UNSETTLED * steps]
            spread = f", between {number(min(late))} and {number(max(late))} after the shaded start" if late else ""
            panels[run] = svg(figure, f"Brightness of {run} over critic updates{spread}.")
    return panels


def _finite(points: list[list[float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and isfinite(y)]


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Our style over matplotlib's own defaults, whatever a matplotlibrc says, and the same ids in every rendering."""
    with mpl.style.context(STYLE, after_reset=True):
        mpl.rcParams["svg.hashsalt"] = salt
        yield


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one chart over training."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(_plain)
    return figure, axes


def _drawn(figure: Figure) -> tuple[str, str]:
    """The drawing alone and its view box: no prolog, metadata, style sheet or unused id; colours as CSS variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    body = text[text.index('<g id="figure_1"') : text.rindex("</svg>")]
    body = re.sub(r' id="[\w.]+_\d+"', "", body)
    body = re.sub(r">[^<]*<|(\d\.\d\d)\d+", lambda found: found[1] or found[0], body)  # but not of texts
    body = re.sub(r" font-family: [^;\"]+;?", "", body)
    body = re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", body)
    width, height = figure.get_size_inches() * 72
    return re.sub(r"\s*\n\s*", " ", body).strip(), f"0 0 {width:g} {height:g}"


def svg(figure: Figure, alt: str) -> Markup:
    """The figure for a page; `alt` says what it shows."""
    body, view = _drawn(figure)
    return Markup(f'<svg viewBox="{view}" role="img" aria-label="{escape(alt)}">{body}</svg>')
