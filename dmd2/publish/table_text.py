"""The text of a table of results, made from its JSON, for its Markdown, the report and the model card.

Cells and numbers are made here; the sentences are in ``templates/sentences.j2``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dmd2.experiment.metrics import BETTER, FRECHET, LABELS, NUMBERS
from dmd2.publish.template import TEMPLATES, template

# The paper's metric that ours stands in for.
PAPER_NAME = {name: number.paper for name, number in NUMBERS.items() if number.paper}
NONE = "–"
SENTENCES: Any = template(TEMPLATES / "sentences.j2").module

TableRecord = dict[str, Any]  # a table of results, as in results/tables/NAME.json
RowRecord = dict[str, Any]  # one of its rows
Cells = tuple[list[str], list[list[str]]]  # heads, and the texts of every row


@dataclass(frozen=True)
class Column:
    """A column: its head, what it shows ("run", "tick", "paper", "text" or a metric's name), and a text per row."""

    head: str
    kind: str
    texts: list[str]


def columns(table: TableRecord) -> list[Column]:
    """The columns of a table, in order."""
    first, *rest = table["metrics"]
    rows: list[RowRecord] = table["rows"]
    gpu = any(cost["gpu_hours"] for row in rows for cost in row["cost"].values())
    hours = "gpu_hours" if gpu else "cpu_hours"
    return [
        Column("run", "run", [f"`{row['run']}`" for row in rows]),
        *(Column(name, "tick", ["✓" * row["ticks"].get(name, False) for row in rows]) for name in table["columns"]),
        Column(label(first), first, [mean_sd(row["values"][first].values()) for row in rows]),
        Column(f"paper's {label(PAPER_NAME.get(first, first))}", "paper", [_paper(row, first) for row in rows]),
        _gaps(table),
        *(Column(label(name), name, [other(row, name) for row in rows]) for name in [*rest, "brightness_std"]),
        Column("student updates", "text", [_updates(row) for row in rows]),
        Column("training time", "text", [_training_time(row) for row in rows]),
        Column(
            "GPU-hours" if gpu else "CPU-hours",
            "text",
            [mean(cost[hours] for cost in row["cost"].values()) if row["cost"] else NONE for row in rows],
        ),
    ]


def cells(table: TableRecord) -> Cells:
    """Heads and texts of the columns."""
    found = columns(table)
    return [column.head for column in found], [list(texts) for texts in zip(*(c.texts for c in found), strict=True)]


def label(metric: str) -> str:
    """A metric as tables call it."""
    return LABELS.get(metric, metric)


def paper_value(row: RowRecord, metric: str) -> float | None:
    """The paper's number for a metric, or for the one ours stands in for."""
    return row["paper"].get(metric, row["paper"].get(PAPER_NAME.get(metric, metric)))


def _paper(row: RowRecord, metric: str) -> str:
    value = paper_value(row, metric)
    return NONE if value is None else f"{value:.{_decimals(value)}f}"


def _decimals(paper: float) -> int:
    """Decimals of a number of the paper: FID has two, scores below one have three."""
    return 2 if abs(paper) >= 1 else 3


def _gaps(table: TableRecord) -> Column:
    """Differences to the paper's numbers where the metric is the paper's own, else both ratios to the reference row."""
    metric, rows, reference = table["metrics"][0], table["rows"], table["reference_row"]
    means = [float(np.mean([*row["values"][metric].values()])) for row in rows]
    own = [row["paper"].get(metric) for row in rows]
    if any(paper is not None for paper in own):
        gaps = [NONE if p is None else f"{mean - p:+.{_decimals(p)}f}" for mean, p in zip(means, own, strict=True)]
        return Column("gap to the paper", "text", gaps)
    runs, texts = [row["run"] for row in rows], [NONE for _ in rows]
    if reference in runs:
        at, papers = runs.index(reference), [paper_value(row, metric) for row in rows]
        base = papers[at]
        theirs = [f" (paper ×{p / base:.2f})" if p is not None and base else "" for p in papers]
        texts = [f"×{mean / means[at]:.2f}{paper}" for mean, paper in zip(means, theirs, strict=True)]
    return Column(f"gap to `{reference or 'none'}`", "text", texts)


def other(row: RowRecord, metric: str) -> str:
    """A further metric of a row, with the paper's number beside it where the paper has one."""
    if metric not in row["values"]:
        return NONE
    paper = paper_value(row, metric)
    return mean_sd(row["values"][metric].values()) + ("" if paper is None else f" (paper {paper:g})")


def _updates(row: RowRecord) -> str:
    return str(row["student_updates"]) if row["kind"] == "student" else f"{row['network_calls']} calls"


def _training_time(row: RowRecord) -> str:
    seconds = [value for value in row["seconds"].values() if value is not None and row["kind"] == "student"]
    return f"{fmean(seconds):.0f} s" if seconds else NONE


def certainty(table: TableRecord) -> Cells | None:
    """The second table: how sure the first metric is, and the paired differences; of a Frechet distance only."""
    metric, base = table["metrics"][0], table["reference_row"]
    if metric not in FRECHET:
        return None
    heads = ["run", label(metric), "SE of the images", "bias at this n", f"{label(metric)} without bias"]
    lines = []
    for row in table["rows"]:
        found = [estimates[metric] for estimates in row["estimates"].values()]
        value, errors, biases = ([e[key] for e in found] for key in ("value", "se", "bias"))
        centre = float(np.mean(value))
        error = None if None in errors else float(np.sqrt(np.mean(np.square(errors))))
        bias = None if None in biases else float(np.mean(biases))
        numbers = [centre, error, bias, None if bias is None else centre - bias]
        difference = [difference_text(row["difference"])] if base else []
        lines.append([f"`{row['run']}`", *(digits(x, 3) for x in numbers), *difference])
    return heads + ([f"minus `{base}`, paired, 95 %"] if base else []), lines


def published(table: TableRecord) -> str:
    """Numbers of other methods on the same data, best of the first metric first; empty if there are none."""
    first, *rest = table["metrics"]
    known = [(numbers, name) for name, numbers in table.get("published", {}).items() if first in numbers]
    if not known:
        return ""
    known.sort(key=lambda pair: (pair[0][first], pair[1]), reverse=BETTER.get(first) == "higher")
    metrics = [first, *(metric for metric in rest if any(metric in numbers for numbers, _ in known))]
    values = [" / ".join(f"{numbers[m]:g}" if m in numbers else NONE for m in metrics) for numbers, _ in known]
    methods = ", ".join(f"{name} {text}" for (_, name), text in zip(known, values, strict=True))
    return f"Published {' / '.join(map(label, metrics))} of other methods: {methods}."


def stand_in(table: TableRecord) -> bool:
    """Whether a metric of the table only stands in for the paper's."""
    return any(metric in PAPER_NAME for metric in table["metrics"])


def markdown(table: TableRecord) -> str:
    """The page of a table with its protocol, claims and warnings."""
    text = template(TEMPLATES / "table.md.j2").render(
        table=table,
        cells=cells(table),
        certainty=certainty(table),
        published=published(table),
        stand_in=stand_in(table),
    )
    return text.rstrip("\n") + "\n"


def mean_sd(values: Iterable[float]) -> str:
    """``mean ± SD`` of a value per seed, or the one value; large numbers without exponent."""
    known = np.array([*values])
    if len(known) < 2:
        return _number(float(known[0]), 3) if len(known) else NONE
    return f"{_number(known.mean(), 3)} ± {_number(known.std(ddof=1), 2)}"


def mean(values: Iterable[float]) -> str:
    """Mean over seeds, with three digits."""
    return _number(fmean(values), 3)


def _number(value: float, digits: int) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def digits(value: float | None, count: int) -> str:
    """A number, if there is one, with so many significant digits."""
    return NONE if value is None else f"{value:.{count}g}"


def difference_text(found: Mapping[str, Any] | None) -> str:
    """``+1.2 [-0.3, +2.7]``; bold where the interval excludes 0."""
    if found is None:
        return NONE
    decimals = max(0, 2 - int(np.floor(np.log10(max(abs(found["value"]), found["high"] - found["low"], 1e-9)))))
    value, low, high = (f"{found[key]:+.{decimals}f}" for key in ("value", "low", "high"))
    return f"**{value} [{low}, {high}]**" if found["low"] > 0 or found["high"] < 0 else f"{value} [{low}, {high}]"
