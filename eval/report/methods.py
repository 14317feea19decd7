"""All rows trained on one base, of whichever table, side by side: quality, stability, cost, and what they need."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from dmd2.core.errors import UserError
from dmd2.core.files import digest_of
from dmd2.experiment.config import RunConfig
from dmd2.experiment.metrics import BETTER, best_first
from dmd2.experiment.protocols import of_record
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

MEASURED_BY = ("detector", "reference", "images")  # values of a protocol: distances by others are not compared
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
    """A table of all rows of each base that were measured alike, best first.

    Alike: by the same first metric of a snapshot selected in the same way, with equal `MEASURED_BY`; a detector that
    was trained anew is another. Of a row in several tables it is that of most seeds. What has one trained row has
    nothing to compare, and is left out.
    """
    groups: dict[tuple[str, ...], list[tuple[TableRecord, RowRecord]]] = {}
    trained: dict[str, dict[str, RowRecord]] = {}
    for table in tables:
        trained.setdefault(table["base"], {}).update({r["run"]: r for r in table["rows"] if r["kind"] == "student"})
        for row in table["rows"]:
            measured_by = (str(of_record(row)[key]) for key in MEASURED_BY)
            key = (table["base"], table["metrics"][0], table["select"], *measured_by)
            groups.setdefault(key, []).append((table, row))
    for key, group in sorted(groups.items()):
        base, metric, select, *_ = key
        rows: dict[str, RowRecord] = {}
        for _, row in group:
            if len(row["values"][metric]) > len(rows.get(row["run"], {"values": {metric: {}}})["values"][metric]):
                rows[row["run"]] = row
        students = [_whole(row, trained[base]) for row in rows.values() if row["kind"] == "student"]
        if len(students) > 1:
            whole = next((row["run"] for row in students if not row["changed"]), None)
            yield {
                "name": f"methods-{base}-{metric}-{select}-{digest_of(key)}",
                "base": base,
                "metrics": [metric],
                "measured_by": ", ".join(key[3:]),
                "tables": list(dict.fromkeys(table["name"] for table, _ in group)),
                "reference_row": whole or max(group, key=lambda found: len(found[0]["rows"]))[0]["reference_row"],
                "rows": sorted(students, key=lambda row: _rank(row, metric))
                + [row for row in rows.values() if row["kind"] == "teacher"],
            }


def _whole(row: RowRecord, rows: Mapping[str, RowRecord]) -> RowRecord:
    """A trained row with its updates and passes ``in_all``: those of the run from whose student it started come first.

    Such a run that is not among `rows`, those of the base, adds nothing; `needs` names it.
    """
    passes = row.get("passes")
    own = {"student_updates": row["student_updates"], "passes": passes and passes * row["student_updates"]}
    origin = rows.get(row["config"]["train"].get("init_from") or "")
    if origin is None:
        return {**row, "in_all": own}
    before = _whole(origin, {run: other for run, other in rows.items() if run != row["run"]})["in_all"]
    return {
        **row,
        "in_all": {axis: _sum(value, before[axis]) for axis, value in own.items()},
        "curves": {
            seed: [point | {axis: _sum(point.get(axis), start) for axis, start in before.items()} for point in points]
            for seed, points in row["curves"].items()
        },
    }


def _sum(value: float | None, start: float | None) -> float | None:
    return None if value is None or start is None else value + start


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
    in_all = row["in_all"]
    return [
        number(row.get("passes")),
        str(in_all["student_updates"]),
        "–" if in_all["passes"] is None else f"{in_all['passes']:,.0f}",
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
        f"the student of {cfg.train.init_from}": cfg.train.init_from is not None,
    }
    return ", ".join(name for name, needed in found.items() if needed) or "nothing"
