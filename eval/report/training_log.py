"""Losses and health of the trainings of a table: a panel for each quantity of `eval.report.logs`."""

from markupsafe import Markup
from matplotlib.axes import Axes

from dmd2.publish.table_text import RowRecord, TableRecord, number
from eval.report.figures import LOG_RANGE, drawing, panel, rows_of, scaled, styles, svg
from eval.report.logs import QUANTITIES


def shown(table: TableRecord) -> list[str]:
    """The quantities that a row of the table has; tables of earlier versions have none."""
    return [name for name in QUANTITIES if any(_curve(row, name) for row in rows_of(table, "student"))]


def _curve(row: RowRecord, name: str) -> list[list[float]]:
    found: list[list[float]] = row.get("log", {}).get(name, [])
    return found


def panels(table: TableRecord) -> list[Markup]:
    """A panel for each quantity, with a line for each row."""
    drawn = []
    for name in shown(table):
        with drawing(f"{table['name']}-{name}"):
            figure, axes = panel(3.5, 2.0)
            drawn.append(svg(figure, draw(axes, table, name)))
    return drawn


def draw(axes: Axes, table: TableRecord, name: str) -> str:
    """Draw a quantity over training; returns what the chart shows, for who does not see it."""
    curves = {row["run"]: _curve(row, name) for row in rows_of(table, "student")}
    curves = {run: points for run, points in curves.items() if points}
    for run, points in curves.items():
        style = {**styles(table)[run], "marker": "", "linewidth": 1.1}
        axes.plot(*zip(*points, strict=True), **style)
    scale = scaled(axes, "y", [value for points in curves.values() for _, value in points], LOG_RANGE)
    axes.set_xlim(left=0)
    axes.set(title=QUANTITIES[name] + scale, xlabel="critic updates")
    last = ", ".join(f"{run} {number(points[-1][1])}" for run, points in curves.items())
    return f"Line chart of the {QUANTITIES[name]}{scale} over critic updates, one line per run. Last values: {last}."
