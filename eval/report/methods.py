"""All rows trained on one base, of whichever table, side by side: quality, stability, cost, and what they need."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from dmd2.core.errors import UserError
from dmd2.experiment.config import RunConfig
from dmd2.experiment.metrics import BETTER, best_first
from dmd2.publish.table_text import (
    RowRecord,
    TableRecord,
    difference_text,
    label,
    mean_sd,
    number,
    training_time,
    updates,
)
from dmd2.publish.template import template
from eval.metrics.estimate import Estimate
from eval.report import figures
from eval.report.differences import difference
from eval.report.page import TEMPLATES, code, made_from_comment, read_table, setting

HEADS = ["passes per update", "student updates", "passes in all", "training time", "Brightness SD", "seeds", "needs"]


def render(paths: Sequence[Path]) -> str:
    """The page of the tables in these files; those that are no tables are left out."""
    tables = []
    for path in paths:
        with suppress(UserError):
            tables.append(read_table(path))
    return template(TEMPLATES / "methods.html.j2", code=code, value=setting).render(
        record=made_from_comment([path.stem for path in paths], [*paths], []),
        title="Methods side by side",
        groups=[view(group) for group in merged(tables)],
        arms=figures.ARMS,
        better=BETTER,
        marks={},
    )


def merged(tables: Sequence[TableRecord]) -> Iterator[TableRecord]:
    """A table of all rows of each base, first metric and way to select a snapshot, best first.

    Of a row in several tables it is that of most seeds.
    A base of which one row was trained has nothing to compare, and is left out.
    """
    groups: dict[tuple[str, str, str], list[TableRecord]] = {}
    for table in tables:
        groups.setdefault((table["base"], table["metrics"][0], table["select"]), []).append(table)
    for (base, metric, select), group in sorted(groups.items()):
        rows: dict[str, RowRecord] = {}
        for row in (row for table in group for row in table["rows"]):
            if len(row["values"][metric]) > len(rows.get(row["run"], {"values": {metric: {}}})["values"][metric]):
                rows[row["run"]] = row
        students = [row for row in rows.values() if row["kind"] == "student"]
        if len(students) > 1:
            whole = next((row["run"] for row in students if not row["changed"]), None)
            yield {
                "name": f"methods-{base}-{metric}-{select}",
                "base": base,
                "metrics": [metric],
                "tables": [table["name"] for table in group],
                "reference_row": whole or max(group, key=lambda table: len(table["rows"]))["reference_row"],
                "rows": sorted(students, key=lambda row: _rank(row, metric))
                + [row for row in rows.values() if row["kind"] == "teacher"],
            }


def _rank(row: RowRecord, metric: str) -> float:
    mean = fmean(row["values"][metric].values())
    return best_first(metric, mean) if isfinite(mean) else float("inf")


def view(table: TableRecord) -> dict[str, Any]:
    """A merged table with what the template shows of it."""
    metric, styles = table["metrics"][0], figures.styles(table)
    anchors = {run: f"key-{table['name']}-{run}" for run in styles}
    reference = next((row for row in table["rows"] if row["run"] == table["reference_row"]), None)
    return {
        **table,
        "anchors": anchors,
        "symbols": [figures.key(anchors[run], style) for run, style in styles.items()],
        "metric": metric,
        "heads": [label(metric), f"minus `{reference['run']}`, paired, 95 %" if reference else "", *HEADS],
        "cells": [
            [mean_sd(row["values"][metric].values()), gap(row, reference, metric), *facts(row)] for row in table["rows"]
        ],
        "curves": figures.training_curves(table)[1:],  # over student updates and network passes
    }


def gap(row: RowRecord, reference: RowRecord | None, metric: str) -> str:
    """The paired difference to the reference with its interval over training seeds; it needs two seeds in common."""
    if reference is None or row is reference:
        return ""
    ours, theirs = row["values"][metric], reference["values"][metric]
    if row["kind"] == "teacher":  # its one value is compared with every seed
        ours = dict.fromkeys(theirs, next(iter(ours.values())))
    gaps = [Estimate(ours[s] - theirs[s], None, 1) for s in sorted(ours.keys() & theirs)]
    return difference_text(difference(gaps) if len(gaps) > 1 else None)


def facts(row: RowRecord) -> list[str]:
    """The texts under `HEADS`: cost, stability and needs of a row."""
    steadiness = mean_sd(row["values"].get("brightness_std", {}).values())
    if row["kind"] == "teacher":
        return ["", updates(row), "", "", steadiness, "", ""]
    passes = row.get("passes")
    return [
        number(passes),
        updates(row),
        "–" if passes is None else f"{passes * row['student_updates']:,.0f}",
        training_time(row),
        steadiness,
        str(len(row["seconds"])),
        needs(row["config"]),
    ]


def needs(config: Mapping[str, Any]) -> str:
    """What a training of this config needs besides teacher and student; nothing is said of another version's config."""
    try:
        cfg = RunConfig.model_validate(config)
    except ValidationError:
        return "–"
    found = {
        "critic": cfg.trains_critic,
        "GAN's head": cfg.gan.on,
        "real images": cfg.needs_real,
        "teacher pairs": cfg.needs_pairs,
        "guidance": cfg.guided,
    }
    return ", ".join(name for name, needed in found.items() if needed) or "nothing"
