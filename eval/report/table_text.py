"""The text of a table: cells for Markdown and the report, and the Markdown itself."""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

import numpy as np

from dmd2.experiment.metrics import BETTER, FRECHET
from eval.report.differences import shown
from eval.report.rules import show

PAPER_NAME = {"fd": "fid", "patch_fd": "patch_fid"}  # the paper's metric that ours stands in for
LABELS = {
    "fd": "FD", "fid": "FID", "patch_fd": "Patch FD", "patch_fid": "Patch FID", "clip_score": "CLIP",
    "accuracy": "Class accuracy", "brightness": "Brightness", "brightness_std": "Brightness SD",
    "saturation": "Saturation", "sharpness": "Sharpness", "kid": "KID", "precision": "Precision", "recall": "Recall",
    "density": "Density", "coverage": "Coverage", "is": "Inception score",
}  # fmt: skip

Row = dict[str, Any]


def paper_value(row: Row, metric: str) -> float | None:
    """The paper's number for a metric, or for the one ours stands in for."""
    return row["paper"].get(metric, row["paper"].get(PAPER_NAME.get(metric, metric)))


def summary(values: dict[Any, float]) -> str:
    """``mean ± SD`` over seeds, or the single value."""
    return show(np.array(list(values.values())))


def hours(values: Iterable[float]) -> str:
    """Mean of hours over seeds, with three digits."""
    return show(np.array([fmean(values)]))


def to_paper(bundle: dict[str, Any]) -> bool:
    """Whether the column of gaps is to the paper, which has numbers of the first metric itself."""
    return any(row["paper"].get(bundle["metrics"][0]) is not None for row in bundle["rows"])


def gap(bundle: dict[str, Any], row: Row) -> str:
    """Difference to the paper's number where the metric is the paper's own, else both ratios to the reference row."""
    metric = bundle["metrics"][0]
    value, paper = float(np.mean(list(row["values"][metric].values()))), paper_value(row, metric)
    if to_paper(bundle):
        own = row["paper"].get(metric)
        return "–" if own is None else f"{value - own:+.{_decimals(own)}f}"
    reference = next((r for r in bundle["rows"] if r["run"] == bundle["reference_row"]), None)
    if reference is None:
        return "–"
    ours = value / float(np.mean(list(reference["values"][metric].values())))
    base = paper_value(reference, metric)
    return f"×{ours:.2f}" + (f" (paper ×{paper / base:.2f})" if paper is not None and base else "")


def _decimals(paper: float) -> int:
    """Of a number of the paper: FID has two, scores below one have three."""
    return 2 if abs(paper) >= 1 else 3


def cells(bundle: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and text cells of the table, for Markdown and for the report."""
    first = bundle["metrics"][0]
    gap_name = "gap to the paper" if to_paper(bundle) else f"gap to `{bundle['reference_row'] or 'none'}`"
    paper_label = LABELS.get(PAPER_NAME.get(first, first), first)
    header = ["run", *bundle["columns"], LABELS.get(first, first), f"paper's {paper_label}"]
    rest = [m for m in [*bundle["metrics"][1:], "brightness_std"]]
    header += [gap_name, *(LABELS.get(m, m) for m in rest), "student updates", "training time"]
    gpu = any(cost["gpu_hours"] for row in bundle["rows"] for cost in row["cost"].values())
    header.append("GPU-hours" if gpu else "CPU-hours")
    lines = []
    for row in bundle["rows"]:
        paper = paper_value(row, first)
        ticks = ["✓" if row["ticks"].get(c) else "" for c in bundle["columns"]]
        others = [other(row, metric) for metric in rest]
        seconds = [value for value in row["seconds"].values() if value is not None and row["kind"] == "student"]
        updates = str(row["student_updates"]) if row["kind"] == "student" else f"{row['network_calls']} calls"
        papers = "–" if paper is None else f"{paper:.{_decimals(paper)}f}"
        spent = [cost["gpu_hours" if gpu else "cpu_hours"] for cost in row["cost"].values()]
        lines.append([f"`{row['run']}`", *ticks, summary(row["values"][first]), papers, gap(bundle, row), *others,
                      updates, f"{fmean(seconds):.0f} s" if seconds else "–",
                      hours(spent) if spent else "–"])  # fmt: skip
    return header, lines


def other(row: Row, metric: str) -> str:
    """A further metric of a row, with the paper's number beside it where the paper has one."""
    if metric not in row["values"]:
        return "–"
    paper = paper_value(row, metric)
    return summary(row["values"][metric]) + ("" if paper is None else f" (paper {paper:g})")


def certainty(bundle: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the second table: how sure the first metric is, and the paired differences."""
    metric, base = bundle["metrics"][0], bundle["reference_row"]
    label = LABELS.get(metric, metric)
    header = ["run", label, "SE of the images", "bias at this n", f"{label} without bias"]
    header += [f"minus `{base}`, paired, 95 %"] if base else []
    lines = []
    for row in bundle["rows"]:
        found = [estimates[metric] for estimates in row["estimates"].values()]
        value = float(np.mean([e["value"] for e in found]))
        error = _root_mean_square([e["se"] for e in found])
        bias = None if any(e["bias"] is None for e in found) else float(np.mean([e["bias"] for e in found]))
        numbers = [value, error, bias, None if bias is None else value - bias]
        lines.append([f"`{row['run']}`", *("–" if x is None else f"{x:.3g}" for x in numbers),
                      *([shown(row["difference"])] if base else [])])  # fmt: skip
    return header, lines


def _root_mean_square(errors: list[float | None]) -> float | None:
    known = [e for e in errors if e is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if len(known) == len(errors) else None


def explained(bundle: dict[str, Any]) -> str:
    """What the intervals of the second table cover."""
    seeds = len(bundle["seeds"])
    noise = (f"a t-interval over {seeds} training seeds, so it covers the noise of training, and that of sampling but "
             "for what the same sample seeds do to every training alike"
             if seeds > 1 else "of one run: it covers the finite sample of images, not another training")  # fmt: skip
    return ("SE and bias are those of the finite number of images at one training seed (root mean square over "
            "seeds). Differences are taken at equal training seeds, sample seeds and labels; the interval is "
            f"{noise}.")  # fmt: skip


def published(bundle: dict[str, Any]) -> str:
    """Numbers of other methods on the same data, best of the first metric first; empty if there are none."""
    others = bundle.get("published", {})
    first, *rest = bundle["metrics"]
    given = {metric for numbers in others.values() if first in numbers for metric in numbers}
    metrics = [first, *(metric for metric in rest if metric in given)]
    known = sorted((numbers[first], name) for name, numbers in others.items() if first in numbers)
    known = known[::-1] if BETTER.get(first) == "higher" else known
    if not known:
        return ""
    numbers = {name: " / ".join(f"{others[name][m]:g}" if m in others[name] else "–" for m in metrics)
               for _, name in known}  # fmt: skip
    labels = " / ".join(LABELS.get(metric, metric) for metric in metrics)
    return f"Published {labels} of other methods: {', '.join(f'{name} {text}' for name, text in numbers.items())}."


def stand_in(bundle: dict[str, Any]) -> bool:
    """Whether a metric of the table only stands in for the paper's."""
    return any(metric in PAPER_NAME for metric in bundle["metrics"])


def markdown(bundle: dict[str, Any]) -> str:
    """The table as Markdown with its protocol, claims and warnings."""
    header, lines = cells(bundle)
    protocol = bundle["rows"][0]["protocol"]
    text = [f"# {bundle['title']}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    seeds = bundle["seeds"]
    spread = "one seed" if len(seeds) == 1 else f"mean ± SD over seeds {', '.join(map(str, seeds))}"
    chosen = "the last snapshot" if bundle["select"] == "last" else "the best snapshot by the reported metric itself"
    draws = f", mean of {protocol['draws']} draws" if protocol.get("draws", 1) > 1 else ""
    text += ["", f"{spread[0].upper()}{spread[1:]}; {chosen}; {protocol['images']} images per number{draws}, labels "
             f"{protocol['labels']}, rounding {protocol['rounding']}, sampled in "
             f"{protocol['precision']}; detector {protocol['detector']}; reference "
             f"{protocol['reference']}. Brightness SD: fixed noise, over training without its first 20 %."]  # fmt: skip
    if stand_in(bundle):
        text += [
            "",
            "FD is the Fréchet distance in this detector's features: it is not FID, and the paper's numbers are "
            "FID on its own dataset, in its column and in parentheses, so only ratios and orders can be compared.",
        ]
    if bundle["metrics"][0] in FRECHET:
        header, lines = certainty(bundle)
        text += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        text += ["| " + " | ".join(line) + " |" for line in lines] + ["", explained(bundle)]
    text += ["", others] if (others := published(bundle)) else []
    text += ["", bundle["notes"]] if bundle["notes"] else []
    text += ["", *(f"**Warning:** {warning}." for warning in bundle["warnings"])] if bundle["warnings"] else []
    if bundle["claims"]:
        text += ["", "| claim | paper | verdict | evidence |", "|---|---|---|---|"]
        text += [f"| {c['id']}: {c['claim']} | {c['paper']} | **{c['verdict']}** | {c['evidence']} |"
                 for c in bundle["claims"]]  # fmt: skip
    return "\n".join(text) + "\n"
