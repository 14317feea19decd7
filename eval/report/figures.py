"""Figures of the report: inline SVG whose colours are CSS variables, so that one serves light, dark and print."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dmd2.experiment.metrics import SETTLED
from dmd2.publish.table_text import Row, Table, label

LOG_RANGE = 10.0  # a curve spanning more than this factor is drawn on a log axis
MAX_POINTS = 600  # of a line, about two per pixel

# Colours in light and dark, told apart with any colour vision (after Okabe and Ito) and at least 3:1 on the page; line
# style and marker say the same in grey. Lists of coprime length, so that more rows than colours still differ.
ARMS = [("#0072b2", "#56b4e9"), ("#d55e00", "#ff8f52"), ("#00805e", "#35cf9f"), ("#a3357a", "#ef90c8"),
        ("#946500", "#f0c541"), ("#4b4bb8", "#a9a6ff"), ("#7a4a1e", "#d9a679")]  # fmt: skip
DASHES: list[Any] = ["-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "p"]
TEACHER_DASHES: list[Any] = [(0, (1, 2)), (0, (8, 3)), (0, (4, 2, 1, 2))]
ROLES = {"#101010": "--ink", "#606060": "--muted", "#b0b0b0": "--rule", "#f0f0f0": "--shade"}
INK, MUTED, RULE, SHADE = ROLES
VARIABLES = ROLES | {light: f"--arm-{i}" for i, (light, _) in enumerate(ARMS)}

Point = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """How one row is drawn everywhere on the page."""

    colour: str
    dash: Any
    marker: str | None
    width: float = 1.4


def styles(bundle: Table) -> dict[str, Style]:
    """Style of every row: students by colour, dash and marker, the reference row thicker, teachers grey and bare."""
    found: dict[str, Style] = {}
    for i, row in enumerate(students(bundle)):
        width = 2.2 if row["run"] == bundle["reference_row"] else 1.4
        found[row["run"]] = Style(ARMS[i % len(ARMS)][0], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)], width)
    for i, row in enumerate(teachers(bundle)):
        found[row["run"]] = Style(MUTED, TEACHER_DASHES[i % len(TEACHER_DASHES)], None)
    return found


def students(bundle: Table) -> list[Row]:
    """Rows that were trained."""
    return [row for row in bundle["rows"] if row["kind"] == "student"]


def teachers(bundle: Table) -> list[Row]:
    """Rows that are samplers of the teacher."""
    return [row for row in bundle["rows"] if row["kind"] == "teacher"]


def key(name: str, style: Style) -> Markup:
    """A short piece of a row's line as an SVG symbol called `name`, to stand as legend beside the row's name."""
    with _drawing(name):
        figure = Figure(figsize=(0.46, 0.17))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(-1, 1))
        axes.set_axis_off()
        axes.plot([0.03, 0.5, 0.97], [0, 0, 0], markevery=[1], markersize=5, clip_on=False, **_line(style))
        body, view = _drawn(figure)
        return Markup(f'<symbol id="{escape(name)}" viewBox="{view}">{body}</symbol>')


def curve(row: Row, axis: str, metric: str) -> dict[float, list[float]]:
    """Finite values of a metric over seeds at every snapshot; `axis` is "step" or "student_updates"."""
    points: dict[float, list[float]] = {}
    for snapshots in row["curves"].values():
        for snapshot in snapshots:
            if metric in snapshot and isfinite(snapshot[metric]):
                points.setdefault(snapshot[axis], []).append(snapshot[metric])
    return dict(sorted(points.items()))


def training_curves(bundle: Table) -> list[Markup]:
    """The table's first metric over critic updates and over student updates."""
    return [_curves(bundle, "step", "critic updates"), _curves(bundle, "student_updates", "student updates")]


def _curves(bundle: Table, axis: str, x_label: str) -> Markup:
    metric, drawn = bundle["metrics"][0], styles(bundle)
    curves = {row["run"]: curve(row, axis, metric) for row in students(bundle)}
    means = {run: [sum(v) / len(v) for v in points.values()] for run, points in curves.items()}
    levels = {row["run"]: next(iter(row["values"][metric].values())) for row in teachers(bundle)}
    with _drawing(f"{bundle['name']}-{axis}"):
        figure, axes = _panel(4.5, 3.1)
        for run, points in curves.items():
            mean, spread = means[run], [(min(v), max(v)) for v in points.values()]
            axes.plot(list(points), mean, markersize=3.6, markevery=max(1, len(mean) // 12), **_line(drawn[run]))
            if any(low < high for low, high in spread):
                low, high = zip(*spread, strict=True)
                axes.fill_between(list(points), low, high, color=drawn[run].colour, alpha=0.14, linewidth=0)
        for run, level in levels.items():
            axes.axhline(level, zorder=1, **_line(drawn[run]))
        x_scale = _x_scale(axes, [max(points) for points in curves.values() if points])
        y_scale = _y_scale(axes, [*levels.values(), *(value for mean in means.values() for value in mean)])
        title = label(metric) + y_scale
        axes.set_title(title, loc="left")
        axes.set_xlabel(x_label + x_scale)
        last = ", ".join(f"{run} {mean[-1]:.3g}" for run, mean in means.items() if mean)
        alt = f"Line chart of {title}, over {x_label}{x_scale}, one line per run. Last values: {last}."
        return _svg(figure, alt)


def _x_scale(axes: Axes, ends: list[float]) -> str:
    """Logarithmic when runs end so far apart that the shorter ones would be squeezed."""
    if not ends or max(ends) <= 3 * min(ends):
        axes.set_xlim(left=0)
        return ""
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, max(ends) / min(ends))
    return ", log scale"


def _y_scale(axes: Axes, values: list[float]) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low <= 0 or high <= LOG_RANGE * low:
        return ""
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis, high / low)
    return ", log scale"


def _plain(value: float, _: Any) -> str:
    return f"{value / 1000:g}k" if value >= 10000 else f"{value:g}"


def _plain_ticks(axis: Axis, factor: float) -> None:
    """Ticks of a log axis as plain numbers, two or three to a decade."""
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if factor > 30 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(NullFormatter())


def brightness(bundle: Table) -> dict[str, Markup]:
    """One panel per run, on shared axes: brightness of the fixed-noise samples over training, one line per seed."""
    lines = {row["run"]: [_finite(points) for points in row["probe"].values()] for row in students(bundle)}
    values = [y for several in lines.values() for points in several for _, y in points]
    if not values:
        return {}
    middle, half = (min(values) + max(values)) / 2, max(0.05, 0.54 * (max(values) - min(values)))
    limits = (middle - half, middle + half)
    return {row["run"]: _brightness_panel(bundle, row, lines[row["run"]], limits) for row in students(bundle)}


def _brightness_panel(bundle: Table, row: Row, lines: list[list[Point]], limits: Point) -> Markup:
    steps, settled = row["config"]["train"]["steps"], SETTLED * row["config"]["train"]["steps"]
    with _drawing(f"{bundle['name']}-{row['run']}-brightness"):
        figure, axes = _panel(3.5, 1.75)
        axes.axvspan(0, settled, color=SHADE, linewidth=0, zorder=0)
        for points in lines:
            xs, ys = zip(*_thinned(points), strict=True) if points else ((), ())
            axes.plot(xs, ys, color=styles(bundle)[row["run"]].colour, linewidth=0.9, alpha=0.85)
        axes.set(xlim=(0, steps), ylim=limits, xlabel="critic updates")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        late = [y for points in lines for x, y in points if x >= settled]
        spread = f", between {min(late):.3f} and {max(late):.3f} after the shaded start" if late else ""
        return _svg(figure, f"Brightness of {row['run']} over critic updates{spread}.")


def _finite(points: list[list[float]]) -> list[Point]:
    return [(x, y) for x, y in points if y is not None and isfinite(y)]


def _thinned(points: list[Point]) -> list[Point]:
    """At most about `MAX_POINTS`, keeping the lowest and highest of each stretch so that no spike is lost."""
    size = -(-2 * len(points) // MAX_POINTS)
    if size < 3:
        return points
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [{min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])} for s in stretches]
    return [point for pair in ends for point in sorted(pair)]


@contextmanager
def _drawing(salt: str) -> Iterator[None]:
    """Matplotlib's own defaults, whatever the user's matplotlibrc says, and the same ids in every rendering."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
            "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "axes.spines.top": False, "axes.spines.right": False,
            "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
            "ytick.labelcolor": INK, "axes.labelcolor": INK, "text.color": INK, "axes.linewidth": 0.7,
            "grid.color": RULE, "grid.linewidth": 0.5, "axes.axisbelow": True, "lines.dash_capstyle": "butt",
        })  # fmt: skip
        yield


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", alpha=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(_plain)
    return figure, axes


def _line(style: Style) -> dict[str, Any]:
    line = {"color": style.colour, "linestyle": style.dash, "linewidth": style.width, "marker": style.marker}
    return line | {"markeredgewidth": 0}


def _drawn(figure: Figure) -> tuple[str, str]:
    """The drawing alone and its view box: no prolog, metadata, style sheet or unused id; colours as CSS variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    body = text[text.index('<g id="figure_1"') : text.rindex("</svg>")]
    body = re.sub(r' id="[\w.]+_\d+"', "", body)
    body = re.sub(r"(\d\.\d\d)\d+", r"\1", body)
    body = re.sub(r" font-family: [^;\"]+;?", "", body)
    body = re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", body)
    width, height = figure.get_size_inches() * 72
    return re.sub(r"\s*\n\s*", " ", body).strip(), f"0 0 {width:g} {height:g}"


def _svg(figure: Figure, alt: str) -> Markup:
    body, view = _drawn(figure)
    return Markup(f'<svg viewBox="{view}" role="img" aria-label="{escape(alt)}">{body}</svg>')
