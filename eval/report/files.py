"""Files beside the page of a table: its LaTeX, and figures for print as SVG and PDF."""

from math import ceil
from pathlib import Path

from matplotlib.figure import Figure

from dmd2.core.files import write_text
from dmd2.experiment.metrics import BETTER
from dmd2.publish.table_text import Column, TableRecord, columns
from dmd2.publish.template import template
from eval.report import training_log
from eval.report.figures import axes_of, best_runs, draw_curves, drawing, styles

TEMPLATE = Path(__file__).with_name("templates") / "table.tex.j2"
SPECIAL = str.maketrans({
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$",
    "✓": r"\checkmark", "–": "--", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
})  # fmt: skip
ARROWS = {"lower": " ↓", "higher": " ↑"}


def latex(table: TableRecord) -> str:
    """The table for LaTeX with the packages booktabs and amssymb."""
    shown = columns(table)
    texts = [[_cell(table, column, i) for column in shown] for i in range(len(table["rows"]))]
    first_teacher = next((i for i, row in enumerate(table["rows"]) if row["kind"] == "teacher"), 0)
    return template(TEMPLATE, tex=_escaped).render(
        table=table,
        heads=[_escaped(column.head + ARROWS.get(BETTER.get(column.kind, ""), "")) for column in shown],
        alignment="".join({"run": "l", "tick": "c"}.get(column.kind, "r") for column in shown),
        groups=[texts[:first_teacher], texts[first_teacher:]] if first_teacher else [texts],
    )


def _cell(table: TableRecord, column: Column, i: int) -> str:
    text = _escaped(column.texts[i])
    is_best = column.kind in BETTER and table["rows"][i]["run"] in best_runs(table, column.kind)
    return rf"\textbf{{{text}}}" if is_best else text


def _escaped(text: str) -> str:
    """Text for LaTeX; `...` is set as code."""
    parts = text.translate(SPECIAL).split("`")
    return "".join(rf"\texttt{{{part}}}" if i % 2 else part for i, part in enumerate(parts))


def save(table: TableRecord, folder: Path) -> None:
    """Write ``NAME.tex``, and the curves and the training as ``NAME.{curves,training}.{svg,pdf}``."""
    start = folder / table["name"]
    write_text(start.with_name(f"{start.name}.tex"), latex(table))
    for what, figure_of in {"curves": _curves, "training": _training}.items():
        with drawing(f"{table['name']}-{what}"):
            figure = figure_of(table)
            lines = [figure.axes[0].plot([], [], label=run, **style)[0] for run, style in styles(table).items()]
            figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
            for suffix, dated in (("svg", "Date"), ("pdf", "CreationDate")):
                figure.savefig(start.with_name(f"{start.name}.{what}.{suffix}"), metadata={dated: None})
                figure.set_layout_engine("none")  # it stays as it is


def _curves(table: TableRecord) -> Figure:
    shown = axes_of(table)
    figure = Figure(figsize=(4.5 * len(shown), 3.6), layout="constrained")
    for axes, (axis, x_label) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        draw_curves(axes, table, axis, x_label)
    return figure


def _training(table: TableRecord) -> Figure:
    """A panel for each quantity; an empty one if no training has a log."""
    names = training_log.shown(table)
    lines = ceil(max(1, len(names)) / 3)
    figure = Figure(figsize=(9, 2.1 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, 3, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        training_log.draw(axes, table, name)
    for axes in [*panels][len(names) :]:
        axes.set_axis_off()
    return figure
