"""The page of one table: a self-contained HTML file, the same bytes for the same inputs."""

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from markupsafe import Markup, escape

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import read_json, sha256, write_text
from dmd2.core.provenance import made_from
from dmd2.core.run import commit
from dmd2.experiment.metrics import BETTER, UNSETTLED
from dmd2.experiment.run_inputs import REAL
from dmd2.experiment.table_config import MIN_SEEDS
from dmd2.experiment.tables import PAGE
from dmd2.publish.table_text import (
    SENTENCES,
    TableRecord,
    certainty,
    columns,
    evidence,
    from_paper,
    label,
    mean,
    mean_sd,
    number,
    published,
    stand_in,
    too_few_seeds,
)
from dmd2.publish.template import template
from eval.pixels.grid import real_grid, sample_grid, sample_side
from eval.report import figures, files, training_log

TEMPLATES = Path(__file__).with_name("templates")
REPORT = Path("results/report")
NEEDED = {"name", "title", "base", "rows", "claims", "warnings", "metrics", "columns", "seeds", "select", "notes",
          "reference_row"}  # fmt: skip
MARKS = {"supported": "✓", "refuted": "✗", "undecided": "?"}


def read_table(path: Path) -> TableRecord:
    """A table as `eval.report.tables` wrote it.

    Raises:
        UserError: the file is missing, is not JSON or holds something else.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: make it with dmd2 run {path.stem}")
    table = read_json(path)
    missing = NEEDED - table.keys() if isinstance(table, dict) else {"rows"}
    if missing:
        raise UserError(f"{path} is no table, it has no {min(missing)}: make it with dmd2 run {path.stem}")
    if not figures.rows_of(table, "student"):
        raise UserError(f"{path} has no trained row: give the table rows in workflow/tables/{path.stem}.yaml")
    return table


def render(path: Path, beside: Sequence[Path] = ()) -> str:
    """The page of the table in this file, with links to the files `beside` it.

    Raises:
        UserError: the table or one of its sample grids is missing or unreadable.
    """
    table = read_table(path)
    filters = {"code": code, "yaml": _yaml, "value": setting, "costs": costs, "mean_sd": mean_sd}
    return template(TEMPLATES / "table.html.j2", **filters).render(
        record=made_from_comment(None, [path], [*beside]),
        title=table["title"],
        table=view(table),
        source=path,
        checksum=sha256(path)[:12],
        commit=commit(),
        date=date_of("HEAD"),
        beside=[file.name for file in beside],
        arms=figures.ARMS,
        marks=MARKS,
        min_seeds=MIN_SEEDS,
        settled=UNSETTLED,
        better=BETTER,
    )


def view(table: TableRecord) -> dict[str, Any]:
    """A table with what the template shows of it besides, computed."""
    students, styles, metric = figures.rows_of(table, "student"), figures.styles(table), table["metrics"][0]
    anchors = {run: f"key-{table['name']}-{run}" for run in styles}
    curves = {row["run"]: figures.curve(row, "step", metric) for row in students}
    data = students[0]["config"]["data"]
    side = sample_side(data)
    return {
        **table,
        "anchors": anchors,
        "symbols": [figures.key(anchors[run], style) for run, style in styles.items()],
        "metric": label(metric),
        "shown": columns(table)[1:],
        "best": {metric: figures.best_runs(table, metric) for metric in BETTER},
        "certainty": certainty(table),
        "explained": SENTENCES.explained(table["seeds"]),
        "others": published(table),
        "stand_in": stand_in(table),
        "from_paper": from_paper(table) or any(claim["paper"] for claim in table["claims"]),
        "too_few_seeds": too_few_seeds(table),
        "claims": [{**claim, "evidence": evidence(table, claim)} for claim in table["claims"]],
        "curves": figures.training_curves(table),
        "behind": curves,  # the numbers behind the first of them
        "steps": sorted({step for points in curves.values() for step in points}),
        "brightness": figures.brightness(table),
        "training": training_log.panels(table),
        "durations": durations(table),
        "chain": chain(table),
        "real": real_grid(REAL / data["name"], data["classes"]),
        "grids": [(row, sample_grid(Path(next(iter(row["grid"].values()))), side)) for row in table["rows"]],
    }


def chain(table: TableRecord) -> list[tuple[str, str]]:
    """The steps that made a table, in order, with what each is of: the rules of the workflow."""
    students = figures.rows_of(table, "student")
    config, seeds = students[0]["config"], len(table["seeds"])
    trained = [row for row in students if row["config"]["train"]["released"] is None]
    paired = [row for row in trained if row["config"]["regression"]["weight"] > 0]
    rows, teachers = len(students) * seeds, len(table["rows"]) - len(students)
    steps = [
        ("data", config["data"]["name"]),
        ("teacher", config["teacher"]["name"]),
        ("pairs", f"for {len(paired)} row{'' if len(paired) == 1 else 's'}" if paired else ""),
        ("trainings", f"{len(trained)} rows × {seeds} seed{'' if seeds == 1 else 's'}" if trained else ""),
        ("evaluations", f"{rows + teachers}, {teachers} of the teacher" if teachers else str(rows)),
        ("table", table["name"]),
        ("page", "and list of tables"),
    ]
    return [(step, of) for step, of in steps if of]


def durations(table: TableRecord) -> list[list[str]]:
    """Seconds of each row over all seeds: training, evaluation and both; in the end of all rows."""
    found = []
    for row in table["rows"]:
        taken = [value for value in row["seconds"].values() if value is not None]
        measured = [value for value in row.get("eval_seconds", {}).values() if value is not None]
        of_row = (sum(taken), sum(measured)) if row["kind"] == "student" else (0.0, sum(taken))
        found.append((f"`{row['run']}`", *of_row))
    found.append(("all", *(sum(seconds) for seconds in zip(*(of_row[1:] for of_row in found), strict=True))))
    return [[run, number(trained), number(measured), number(trained + measured)] for run, trained, measured in found]


def costs(per_seed: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the training of each seed cost, and who counted it."""
    told = {}
    for seed, cost in per_seed.items():
        gpus = f"{mean([cost['gpu_hours']])} GPU-hours and " if cost["gpu_hours"] else ""
        starts = f", {cost['starts']} start{'' if cost['starts'] == 1 else 's'}" if "starts" in cost else ""
        told[seed] = f"{gpus}{mean([cost['cpu_hours']])} CPU-hours by {cost['source']}{starts}"
    return told


def code(text: str) -> Markup:
    """Escaped text with `...` set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=100, default_flow_style=None).strip()


def setting(value: Any) -> str:
    """A setting on one line, as it would be written in the table's file."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def date_of(revision: str) -> str:
    """Day of a commit, or nothing where git does not know it; never the clock, so that a page can be made again."""
    try:
        shown = subprocess.run(
            ["git", "log", "-1", "--format=%cs", revision, "--"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return shown.stdout.strip()


def made_from_comment(config: Any, inputs: list[Path], beside: list[Path]) -> Markup:
    """The record of what a page is made from and together with, as `dmd2.core.provenance` reads it back."""
    record = {key: value for key, value in made_from(config, inputs).items() if key in ("config", "inputs")}
    made = {str(path): sha256(path)[:12] for path in beside}
    return Markup(f"<!-- made from {json.dumps({**record, 'beside': made})} -->")


def outputs(name: str, folder: Path) -> list[Path]:
    """The page of a table and the files beside it."""
    return [folder / f"{name}.{suffix}" for suffix in PAGE]


def write(path: Path, folder: Path) -> None:
    """Write the page of the table in the file `path`, and the files beside it; see `render` for errors."""
    table = read_table(path)
    page, *beside = outputs(path.stem, folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.save({**table, "name": path.stem}, folder)
    write_text(page, render(path, beside))


def main(
    name: Annotated[str, typer.Argument(help="of a table in results/tables", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder")] = REPORT,
) -> None:
    """Write the page of the table NAME (numbers, verdicts, curves and samples), its LaTeX and its figures."""
    with readable_errors():
        write(Path(f"results/tables/{name}.json"), out)


if __name__ == "__main__":
    typer.run(main)
