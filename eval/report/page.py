"""The page over the tables that were asked for: one self-contained HTML file, the same bytes for the same inputs."""

import json
import re
import subprocess
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
import yaml
from markupsafe import Markup, escape

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import read_json, sha256, write_text
from dmd2.core.provenance import made_from
from dmd2.core.run import commit
from dmd2.experiment.metrics import BETTER, FRECHET, SETTLED, best_first
from dmd2.publish.table_text import (
    NONE,
    Table,
    certainty,
    columns,
    explained,
    label,
    mean,
    mean_sd,
    published,
    stand_in,
)
from dmd2.publish.template import template
from eval.pixels.grid import sample_grid, sample_side
from eval.report import figures
from eval.report.rules import MIN_SEEDS

TEMPLATES = Path(__file__).parent / "templates"
NEEDED = ("name", "title", "base", "rows", "claims", "warnings", "metrics", "columns", "seeds", "select",
          "notes", "reference_row")  # fmt: skip
MARKS = {"supported": "✓", "refuted": "✗", "undecided": "?"}


def read_bundle(path: Path) -> Table:
    """A table as `eval.report.tables` wrote it.

    Raises:
        UserError: the file is missing, is not JSON or holds something else.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: make it with snakemake --profile local results/tables/{path.stem}.md")
    bundle = read_json(path)
    missing = [key for key in NEEDED if key not in bundle] if isinstance(bundle, dict) else ["rows"]
    if missing:
        raise UserError(
            f"{path} is no table bundle, it has no {missing[0]}: make it with python -m eval.report.tables NAME"
        )
    if not figures.students(bundle):
        raise UserError(f"{path} has no trained row: give the table rows in workflow/tables/{path.stem}.yaml")
    return bundle


def render(paths: list[Path]) -> str:
    """The whole page for these bundles.

    Raises:
        UserError: a bundle or one of its sample grids is missing or unreadable.
    """
    page = template(TEMPLATES / "report.html.j2", code=code, yaml=_yaml, value=setting, costs=costs)
    bundles = [read_bundle(path) for path in paths]
    return page.render(
        tables=[view(bundle) for bundle in bundles],
        sources=[(path, sha256(path)[:12]) for path in paths],
        commit=commit(),
        date=_commit_date(),
        arms=figures.ARMS,
        marks=MARKS,
        min_seeds=MIN_SEEDS,
        stand_in=any(map(stand_in, bundles)),
    )


def view(bundle: Table) -> dict[str, Any]:
    """What the template shows of one table, computed."""
    styles = figures.styles(bundle)
    anchors = {run: f"key-{bundle['name']}-{run}" for run in styles}
    first, data = bundle["metrics"][0], figures.students(bundle)[0]["config"]["data"]
    return {
        **bundle,
        "anchors": anchors,
        "symbols": [figures.key(anchors[run], style) for run, style in styles.items()],
        "metric": label(first),
        "header": header(bundle),
        "certainty": certainty(bundle) if first in FRECHET else None,
        "explained": explained(bundle),
        "others": published(bundle),
        "lines": lines(bundle),
        "verdicts": [(mark, sum(c["verdict"] == mark for c in bundle["claims"])) for mark in MARKS],
        "curves": figures.training_curves(bundle),
        "behind": behind(bundle),
        "brightness": figures.brightness(bundle),
        "settled": SETTLED,
        "grids": [
            (row, sample_grid(Path(next(iter(row["grid"].values()))), sample_side(data))) for row in bundle["rows"]
        ],
    }


def header(bundle: Table) -> list[dict[str, str]]:
    """Column heads with the direction that is better."""
    return [
        {"text": column.head, "kind": column.kind, "better": f"{way} is better" if way else ""}
        for column in columns(bundle)
        for way in [BETTER.get(column.kind)]
    ]


def lines(bundle: Table) -> list[dict[str, Any]]:
    """The table's rows: text cells as in the Markdown, each with its kind and whether it is the best student's."""
    best = {metric: best_runs(bundle, metric) for metric in BETTER}
    found = []
    for row in bundle["rows"]:
        shown = []
        for column in columns(bundle)[1:]:
            text, _, aside = column.text(row).partition(" (")
            is_best = row["run"] in best.get(column.kind, ())
            shown.append({"text": text, "aside": aside and f"({aside}", "kind": column.kind, "best": is_best})
        found.append({"run": row["run"], "kind": row["kind"], "cells": shown})
    return found


def best_runs(bundle: Table, metric: str) -> list[str]:
    """The student rows with the best mean; none where there is nothing to compare."""
    means = {r["run"]: fmean(r["values"][metric].values()) for r in figures.students(bundle) if metric in r["values"]}
    finite = {run: mean for run, mean in means.items() if isfinite(mean)}
    if len(set(finite.values())) < 2:
        return []
    best = min(finite.values(), key=lambda mean: best_first(metric, mean))
    return [run for run, mean in finite.items() if mean == best]


def behind(bundle: Table) -> dict[str, Any]:
    """The numbers behind the training curves: for every snapshot's step, each student's value over seeds."""
    curves = {r["run"]: figures.curve(r, "step", bundle["metrics"][0]) for r in figures.students(bundle)}
    steps = sorted({step for points in curves.values() for step in points})
    shown = [[mean_sd(points[step]) if step in points else NONE for points in curves.values()] for step in steps]
    return {"runs": list(curves), "lines": list(zip(steps, shown, strict=True))}


def costs(per_seed: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the training of each seed cost, and who counted it."""
    return {seed: _cost(cost) for seed, cost in per_seed.items()}


def _cost(cost: dict[str, Any]) -> str:
    gpus = f"{mean([cost['gpu_hours']])} GPU-hours and " if cost["gpu_hours"] else ""
    starts = f", {cost['starts']} start{'' if cost['starts'] == 1 else 's'}" if "starts" in cost else ""
    return f"{gpus}{mean([cost['cpu_hours']])} CPU-hours by {cost['source']}{starts}"


def code(text: str) -> Markup:
    """Escaped text with `...` set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=100, default_flow_style=None).strip()


def setting(value: Any) -> str:
    """A setting on one line, as it would be written in the table's file."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _commit_date() -> str:
    """Day of the checked-out commit, or nothing outside git; never the clock, so that the page can be made again."""
    try:
        shown = subprocess.run(["git", "log", "-1", "--format=%cs"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return shown.stdout.strip()


def main(
    tables: Annotated[list[Path], typer.Argument(help="bundles written by eval.report.tables", show_default=False)],
    out: Annotated[Path, typer.Option(help="the page")] = Path("results/report.html"),
) -> None:
    """Write one HTML page over TABLES: numbers beside the paper's, verdicts, curves and samples."""
    with readable_errors():
        shown = list(dict.fromkeys(tables))
        record = {key: value for key, value in made_from(None, shown).items() if key != "origins"}
        write_text(out, f"<!-- made from {json.dumps(record)} -->\n{render(shown)}")


if __name__ == "__main__":
    typer.run(main)
