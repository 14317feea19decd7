"""``dmd2 compare A B``.

A and B are git revisions, DVC experiments, workspaces, results folders or folders of tables; B is the current workspace
if it is not given. Markdown goes to stdout; with --fail-if-worse the exit status is 1 and stderr has a sentence per row
that got worse, cannot be compared or is gone; 2 means that nothing was compared.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dmd2.core.errors import UserError
from dmd2.core.files import write_json, write_text
from dmd2.core.options import workspace


def side(text: str) -> str:
    """What a user named: a folder from where the user stands, whose workspace may lie above."""
    return str(Path(text).absolute()) if Path(text).exists() and workspace() not in (None, Path.cwd()) else text


def main(
    a: Annotated[str, typer.Argument(help="git revision, DVC experiment or folder", parser=side, show_default=False)],
    b: Annotated[str, typer.Argument(help="the same; by default the current workspace", parser=side)] = "workspace",
    html_file: Annotated[Path | None, typer.Option("--html", help="write one page with the images here")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all numbers here")] = None,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="exit 1 if a row got worse, cannot be compared or is gone")
    ] = False,
    margin: Annotated[float, typer.Option(min=0, help="differences below this count as none")] = 0.0,
) -> None:
    """Say in Markdown how the results of B differ from those of A: values, configs, claims and images."""
    from eval.compare.command import compare, failures
    from eval.compare.page import html, markdown
    from eval.compare.versions import open_side

    try:
        with TemporaryDirectory() as scratch:
            sides = open_side(a, Path(scratch) / "a"), open_side(b, Path(scratch) / "b")
            comparison = compare(*sides, margin)
            if html_file:
                write_text(html_file, html(comparison, *sides))
            if json_file:
                write_json(json_file, comparison)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None  # 1 means that something got worse
    print(markdown(comparison), end="")
    if fail_if_worse and (bad := failures(comparison)):
        print("\n".join(bad), file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
