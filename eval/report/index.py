"""The list of all tables that were made, with a link to the page of each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import write_text
from dmd2.core.provenance import Artefact
from dmd2.publish.table_text import too_few_seeds
from dmd2.publish.template import template
from eval.report import methods
from eval.report.figures import ARMS, rows_of
from eval.report.page import MARKS, REPORT, TEMPLATES, date_of, made_from_comment, outputs, read_table, write


def render(tables: Sequence[Path], folder: Path) -> str:
    """The list of the tables in these files, whose pages lie in `folder`; pages that are not there are made.

    A page that was made from other contents of its table is made again. A table of which no page can be made is listed
    with the reason.
    """
    return template(TEMPLATES / "index.html.j2").render(
        record=made_from_comment([path.stem for path in tables], [*tables], []),
        title="Tables of results",
        tables=[_listed(path, folder) for path in tables],
        arms=ARMS,
        marks=MARKS,
    )


def _listed(path: Path, folder: Path) -> dict[str, Any]:
    page, problem = folder / f"{path.stem}.html", ""
    try:
        table = read_table(path)
    except UserError as error:
        return {"title": path.stem, "page": "", "problem": str(error), "warnings": 0, "rows": []}
    if not page.exists() or Artefact([*map(str, outputs(path.stem, folder))], None, [str(path)]).outdated():
        try:
            write(path, folder)
        except UserError as error:
            problem = str(error)
    commits = sorted({commit for row in rows_of(table, "student") for commit in row["commits"].values()})
    return {
        **{key: table[key] for key in ("name", "title", "base", "seeds")},
        "page": "" if problem else page.name,
        "problem": problem,
        "warnings": len(table["warnings"]),
        "rows": [row["run"] for row in table["rows"]],
        "too_few_seeds": too_few_seeds(table),
        "claims": len(table["claims"]),
        "verdicts": [(mark, sum(claim["verdict"] == mark for claim in table["claims"])) for mark in MARKS],
        "commits": [(commit, date_of(commit.rstrip("+"))) for commit in commits],
    }


def main(out: Annotated[Path, typer.Option(help="folder of the pages")] = REPORT) -> None:
    """Write the list of the tables in results/tables, the pages that it lacks, and the page of all methods."""
    with readable_errors():
        tables = sorted(Path("results/tables").glob("*.json"))
        write_text(out / "methods.html", methods.render(tables))
        write_text(out / "index.html", render(tables, out))


if __name__ == "__main__":
    typer.run(main)
