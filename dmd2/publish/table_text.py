"""The text of a table of results, made from its JSON, for its Markdown, the report and the model card.

Cells and numbers are made here; the sentences are in ``templates/sentences.j2``. Numbers are written by one rule: three
significant digits, all digits before the point, no exponent; a standard deviation and a margin have two. An interval
has the decimals of its difference, a gap to the paper those of the paper's number. JSON and CSV keep all digits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

import numpy as np

from dmd2.experiment.metrics import BETTER, FRECHET, LABELS, NUMBERS
from dmd2.experiment.table_config import MIN_SEEDS
from dmd2.publish.template import TEMPLATES, template

# The paper's metric that ours stands in for.
PAPER_NAME = {name: number.paper for name, number in NUMBERS.items() if number.paper}
NONE = "–"
MOST_DECIMALS = 9  # of a number without exponent
TOO_FEW = "; measured with {}, needs {} seeds"  # as rules of claims say it
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
        *_paper_column(table),
        *_gaps(table),
        *_beside_column(table),
        *(Column(label(name), name, [other(row, name) for row in rows]) for name in [*rest, "brightness_std"]),
        Column("student updates", "text", [updates(row) for row in rows]),
        *_passes_column(rows),
        Column("training time", "text", [training_time(row) for row in rows]),
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


def from_paper(table: TableRecord) -> bool:
    """Whether a table has numbers of a paper beside its own, of rows or of other methods."""
    beside = (value for row in table["rows"] for value in row["paper"].values())
    return bool(table.get("published")) or any(value is not None for value in beside)


def _paper_column(table: TableRecord) -> list[Column]:
    first = table["metrics"][0]
    papers = [paper_value(row, first) for row in table["rows"]]
    if all(paper is None for paper in papers):
        return []
    return [Column(f"paper's {label(PAPER_NAME.get(first, first))}", "paper", [*map(_as_printed, papers)])]


def _beside_column(table: TableRecord) -> list[Column]:
    """The first metric of the same rows in another table, where there is one."""
    found = [row.get("beside", {}) for row in table["rows"]]
    if not any(found):
        return []
    return [
        Column(f"{label(table['metrics'][0])} in `{table['beside']}`", "text", [mean_sd(v.values()) for v in found])
    ]


def _as_printed(paper: float | None) -> str:
    return NONE if paper is None else f"{paper:.{_decimals(paper)}f}"


def _decimals(paper: float) -> int:
    """Decimals of a number of the paper: FID has two, scores below one have three."""
    return 2 if abs(paper) >= 1 else 3


def _gaps(table: TableRecord) -> list[Column]:
    """Differences to the paper's numbers where the metric is the paper's own, else ratios to a reference above 0."""
    metric, rows, reference = table["metrics"][0], table["rows"], table["reference_row"]
    means = [float(np.mean([*row["values"][metric].values()])) for row in rows]
    own = [row["paper"].get(metric) for row in rows]
    if any(paper is not None for paper in own):
        gaps = [NONE if p is None else f"{mean - p:+.{_decimals(p)}f}" for mean, p in zip(means, own, strict=True)]
        return [Column("gap to the paper", "text", gaps)]
    runs = [row["run"] for row in rows]
    if reference not in runs or not means[runs.index(reference)]:
        return []
    at, papers = runs.index(reference), [paper_value(row, metric) for row in rows]
    base = papers[at]
    theirs = [f" (paper ×{number(p / base)})" if p is not None and base else "" for p in papers]
    texts = [f"×{number(mean / means[at])}{paper}" for mean, paper in zip(means, theirs, strict=True)]
    return [Column(f"gap to `{reference}`", "text", texts)]


def other(row: RowRecord, metric: str) -> str:
    """A further metric of a row, with the paper's number beside it where the paper has one."""
    if metric not in row["values"]:
        return NONE
    paper = paper_value(row, metric)
    return mean_sd(row["values"][metric].values()) + ("" if paper is None else f" (paper {_as_printed(paper)})")


def updates(row: RowRecord) -> str:
    """Student updates of a trained row, network calls of a sampler of the teacher."""
    return str(row["student_updates"]) if row["kind"] == "student" else f"{row['network_calls']} calls"


def _passes_column(rows: list[RowRecord]) -> list[Column]:
    """Forward passes of its network that an update of the student costs, where a row has been counted."""
    found = [row.get("passes") for row in rows]
    return [Column("passes per update", "text", [*map(number, found)])] if any(found) else []


def training_time(row: RowRecord) -> str:
    """Mean seconds of a training over seeds, if they are known."""
    seconds = [value for value in row["seconds"].values() if value is not None and row["kind"] == "student"]
    return f"{number(fmean(seconds))} s" if seconds else NONE


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
        lines.append([f"`{row['run']}`", *map(number, numbers), *difference])
    return heads + ([f"minus `{base}`, paired, 95 %"] if base else []), lines


def published(table: TableRecord) -> str:
    """Numbers of other methods, best of the first metric first, or of the paper's metric that it stands in for.

    Empty if there are none.
    """
    first, *rest = table["metrics"]
    others, where = table.get("published", {}), ""
    if not any(first in numbers for numbers in others.values()):
        first, where = PAPER_NAME.get(first, first), " on their own data"
    known = [(numbers, name) for name, numbers in others.items() if first in numbers]
    if not known:
        return ""
    known.sort(key=lambda pair: (pair[0][first], pair[1]), reverse=BETTER.get(first) == "higher")
    metrics = [first, *(metric for metric in rest if any(metric in numbers for numbers, _ in known))]
    values = [" / ".join(_as_printed(numbers.get(m)) for m in metrics) for numbers, _ in known]
    methods = ", ".join(f"{name} {text}" for (_, name), text in zip(known, values, strict=True))
    return f"Published {' / '.join(map(label, metrics))} of other methods{where}: {methods}."


def stand_in(table: TableRecord) -> str:
    """The sentence about a metric that only stands in for the paper's; empty if there is none."""
    if not any(metric in PAPER_NAME for metric in table["metrics"]):
        return ""
    return str(SENTENCES.stand_in(from_paper(table)))


def too_few_seeds(table: TableRecord) -> str:
    """The one sentence on all claims of a table that has too few seeds for any verdict; else empty."""
    claims, seeds = table["claims"], len(table["seeds"])
    if not claims or seeds >= MIN_SEEDS or any(claim["verdict"] != "undecided" for claim in claims):
        return ""
    return str(SENTENCES.too_few_seeds(seeds, MIN_SEEDS))


def evidence(table: TableRecord, claim: Mapping[str, str]) -> str:
    """What was measured of a claim; what `too_few_seeds` says is not said again."""
    if not too_few_seeds(table):
        return claim["evidence"]
    return claim["evidence"].replace(TOO_FEW.format(len(table["seeds"]), MIN_SEEDS), "").replace("undecided: ", "")


def markdown(table: TableRecord) -> str:
    """The page of a table with its protocol, claims and warnings."""
    text = template(TEMPLATES / "table.md.j2").render(
        table=table,
        cells=cells(table),
        certainty=certainty(table),
        published=published(table),
        stand_in=stand_in(table),
        too_few_seeds=too_few_seeds(table),
        evidence=evidence,
    )
    return text.rstrip("\n") + "\n"


def mean_sd(values: Iterable[float]) -> str:
    """``mean ± SD`` of a value per seed, or the one value."""
    known = np.array([*values])
    if len(known) < 2:
        return number(float(known[0])) if len(known) else NONE
    return f"{number(float(known.mean()))} ± {number(float(known.std(ddof=1)), 2)}"


def mean(values: Iterable[float]) -> str:
    """Mean over seeds."""
    return number(fmean(values))


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A number, if there is one, with so many significant digits and without exponent, if it is not far below one.

    Args:
        value: any.
        digits: how many.
        sign: ``+`` to write that of positive numbers, too.
    """
    if value is None:
        return NONE
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2]))
    return f"{value:{sign}.{decimals}f}" if decimals < MOST_DECIMALS else f"{value:{sign}.{digits - 1}e}"


def difference_text(found: Mapping[str, Any] | None) -> str:
    """``+1.2 [-0.3, +2.7]``; bold where the interval excludes 0."""
    if found is None or not isfinite(found["value"]):
        return NONE
    decimals = max(0, 2 - int(np.floor(np.log10(max(abs(found["value"]), found["high"] - found["low"], 1e-9)))))
    value, low, high = (f"{found[key]:+.{decimals}f}" for key in ("value", "low", "high"))
    return f"**{value} [{low}, {high}]**" if found["low"] > 0 or found["high"] < 0 else f"{value} [{low}, {high}]"
