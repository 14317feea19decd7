"""The text of a table, made from its JSON: cells and sentences, for its Markdown, the report and the model card."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dmd2.experiment.metrics import BETTER, FRECHET, LABELS, NUMBERS

# The paper's metric that ours stands in for.
PAPER_NAME = {name: number.paper for name, number in NUMBERS.items() if number.paper}
NONE = "–"

Table = dict[str, Any]  # as in results/tables/NAME.json
Row = dict[str, Any]  # one of its rows
Cells = tuple[list[str], list[list[str]]]  # heads, and the texts of every row


@dataclass(frozen=True)
class Column:
    """A column: its head, what it shows ("run", "tick", "paper", "text" or a metric's name), and its text for a row."""

    head: str
    kind: str
    text: Callable[[Row], str]


def columns(table: Table) -> list[Column]:
    """The columns of a table, in order."""
    first, *rest = table["metrics"]
    gpu = any(cost["gpu_hours"] for row in table["rows"] for cost in row["cost"].values())
    hours = "gpu_hours" if gpu else "cpu_hours"
    gap_to = "the paper" if to_paper(table) else f"`{table['reference_row'] or 'none'}`"
    return [
        Column("run", "run", lambda row: f"`{row['run']}`"),
        *map(_tick_column, table["columns"]),
        Column(label(first), first, lambda row: mean_sd(row["values"][first].values())),
        Column(f"paper's {label(PAPER_NAME.get(first, first))}", "paper", lambda row: _paper(paper_value(row, first))),
        Column(f"gap to {gap_to}", "text", lambda row: gap(table, row)),
        *map(_metric_column, [*rest, "brightness_std"]),
        Column("student updates", "text", _updates),
        Column("training time", "text", _training_time),
        Column("GPU-hours" if gpu else "CPU-hours", "text",
               lambda row: mean(cost[hours] for cost in row["cost"].values()) if row["cost"] else NONE),
    ]  # fmt: skip


def _tick_column(name: str) -> Column:
    return Column(name, "tick", lambda row: "✓" if row["ticks"].get(name) else "")


def _metric_column(metric: str) -> Column:
    return Column(label(metric), metric, lambda row: other(row, metric))


def cells(table: Table) -> Cells:
    """Heads and texts of the columns."""
    found = columns(table)
    return [column.head for column in found], [[column.text(row) for column in found] for row in table["rows"]]


def label(metric: str) -> str:
    """A metric as tables call it."""
    return LABELS.get(metric, metric)


def paper_value(row: Row, metric: str) -> float | None:
    """The paper's number for a metric, or for the one ours stands in for."""
    return row["paper"].get(metric, row["paper"].get(PAPER_NAME.get(metric, metric)))


def _paper(value: float | None) -> str:
    return NONE if value is None else f"{value:.{_decimals(value)}f}"


def _decimals(paper: float) -> int:
    """Of a number of the paper: FID has two, scores below one have three."""
    return 2 if abs(paper) >= 1 else 3


def to_paper(table: Table) -> bool:
    """Whether the column of gaps is to the paper, which has numbers of the first metric itself."""
    return any(row["paper"].get(table["metrics"][0]) is not None for row in table["rows"])


def gap(table: Table, row: Row) -> str:
    """Difference to the paper's number where the metric is the paper's own, else both ratios to the reference row."""
    metric = table["metrics"][0]
    value = _mean(row, metric)
    if to_paper(table):
        own = row["paper"].get(metric)
        return NONE if own is None else f"{value - own:+.{_decimals(own)}f}"
    reference = next((r for r in table["rows"] if r["run"] == table["reference_row"]), None)
    if reference is None:
        return NONE
    paper, base = paper_value(row, metric), paper_value(reference, metric)
    ratio = f" (paper ×{paper / base:.2f})" if paper is not None and base else ""
    return f"×{value / _mean(reference, metric):.2f}{ratio}"


def other(row: Row, metric: str) -> str:
    """A further metric of a row, with the paper's number beside it where the paper has one."""
    if metric not in row["values"]:
        return NONE
    paper = paper_value(row, metric)
    return mean_sd(row["values"][metric].values()) + ("" if paper is None else f" (paper {paper:g})")


def _mean(row: Row, metric: str) -> float:
    return float(np.mean([*row["values"][metric].values()]))


def _updates(row: Row) -> str:
    return str(row["student_updates"]) if row["kind"] == "student" else f"{row['network_calls']} calls"


def _training_time(row: Row) -> str:
    seconds = [value for value in row["seconds"].values() if value is not None and row["kind"] == "student"]
    return f"{fmean(seconds):.0f} s" if seconds else NONE


def certainty(table: Table) -> Cells:
    """The second table: how sure the first metric is, and the paired differences."""
    metric, base = table["metrics"][0], table["reference_row"]
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
        lines.append([f"`{row['run']}`", *(NONE if x is None else f"{x:.3g}" for x in numbers), *difference])
    return heads + ([f"minus `{base}`, paired, 95 %"] if base else []), lines


def explained(table: Table) -> str:
    """What the intervals of the second table cover."""
    seeds = len(table["seeds"])
    noise = (f"a t-interval over {seeds} training seeds, so it covers the noise of training, and that of sampling but "
             "for what the same sample seeds do to every training alike"
             if seeds > 1 else "of one run: it covers the finite sample of images, not another training")  # fmt: skip
    return ("SE and bias are those of the finite number of images at one training seed (root mean square over "
            "seeds). Differences are taken at equal training seeds, sample seeds and labels; the interval is "
            f"{noise}.")  # fmt: skip


def published(table: Table) -> str:
    """Numbers of other methods on the same data, best of the first metric first; empty if there are none."""
    first, *rest = table["metrics"]
    known = [(numbers, name) for name, numbers in table.get("published", {}).items() if first in numbers]
    if not known:
        return ""
    known.sort(key=lambda pair: (pair[0][first], pair[1]), reverse=BETTER.get(first) == "higher")
    metrics = [first, *(metric for metric in rest if any(metric in numbers for numbers, _ in known))]
    methods = [f"{name} " + " / ".join(f"{numbers[m]:g}" if m in numbers else NONE for m in metrics)
               for numbers, name in known]  # fmt: skip
    return f"Published {' / '.join(map(label, metrics))} of other methods: {', '.join(methods)}."


def stand_in(table: Table) -> bool:
    """Whether a metric of the table only stands in for the paper's."""
    return any(metric in PAPER_NAME for metric in table["metrics"])


def measured_how(table: Table) -> list[str]:
    """Paragraphs below the table: its seeds and protocol, and what FD is not."""
    protocol, seeds = table["rows"][0]["protocol"], table["seeds"]
    spread = "One seed" if len(seeds) == 1 else f"Mean ± SD over seeds {', '.join(map(str, seeds))}"
    chosen = "the last snapshot" if table["select"] == "last" else "the best snapshot by the reported metric itself"
    draws = f", mean of {protocol['draws']} draws" if protocol.get("draws", 1) > 1 else ""
    text = [
        f"{spread}; {chosen}; {protocol['images']} images per number{draws}, labels {protocol['labels']}, rounding "
        f"{protocol['rounding']}, sampled in {protocol.get('precision', 'fp32')}; detector {protocol['detector']}; "
        f"reference {protocol['reference']}. Brightness SD: fixed noise, over training without its first 20 %."
    ]
    if stand_in(table):
        text.append("FD is the Fréchet distance in this detector's features: it is not FID, and the paper's numbers "
                    "are FID on its own dataset, in its column and in parentheses, so only ratios and orders can be "
                    "compared.")  # fmt: skip
    return text


def markdown(table: Table) -> str:
    """The page of a table with its protocol, claims and warnings."""
    sure = [grid(*certainty(table)), explained(table)] if table["metrics"][0] in FRECHET else []
    warnings = "\n".join(f"**Warning:** {warning}." for warning in table["warnings"])
    claims = [[f"{c['id']}: {c['claim']}", c["paper"], f"**{c['verdict']}**", c["evidence"]] for c in table["claims"]]
    verdicts = grid(["claim", "paper", "verdict", "evidence"], claims) if claims else ""
    parts = [f"# {table['title']}", grid(*cells(table)), *measured_how(table), *sure, published(table), table["notes"]]
    return "\n\n".join(part for part in (*parts, warnings, verdicts) if part) + "\n"


def excerpt(table: Table, run: str) -> str:
    """One row of the table as Markdown, with what is said of all rows."""
    heads, lines = cells(table)
    return "\n\n".join([grid(heads, [line for line in lines if line[0] == f"`{run}`"]), *measured_how(table)])


def grid(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(x)} |" for x in lines)])


def mean_sd(values: Iterable[float]) -> str:
    """``mean ± SD`` of a value per seed, or the one value; large numbers without exponent."""
    known = np.array([*values])
    if len(known) < 2:
        return _number(float(known[0]), 3)
    return f"{_number(known.mean(), 3)} ± {_number(known.std(ddof=1), 2)}"


def mean(values: Iterable[float]) -> str:
    """Mean over seeds, with three digits."""
    return _number(fmean(values), 3)


def _number(value: float, digits: int) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def difference_text(found: Mapping[str, Any] | None) -> str:
    """``+1.2 [-0.3, +2.7]``; bold where the interval excludes 0."""
    if found is None:
        return NONE
    digits = max(0, 2 - int(np.floor(np.log10(max(abs(found["value"]), found["high"] - found["low"], 1e-9)))))
    value, low, high = (f"{found[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"**{value} [{low}, {high}]**" if found["low"] > 0 or found["high"] < 0 else f"{value} [{low}, {high}]"
