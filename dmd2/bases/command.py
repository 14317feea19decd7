"""``dmd2 new-base``: bases of one's own for a folder of images."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import write_text

if TYPE_CHECKING:
    from dmd2.bases.found import Found

WORKFLOW = Path("workflow")


def main(
    name: Annotated[str, typer.Argument(help="of the bases: letters, digits and -")],
    folder: Annotated[Path, typer.Argument(help="images: plain, in class folders, with captions; tar, LMDB, parquet")],
    force: Annotated[bool, typer.Option("--force", help="replace the files of an earlier call")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="print the files and write nothing")] = False,
) -> None:
    """Look at the images in FOLDER, and write bases and a table for them: small, one GPU, and as in the paper."""
    with readable_errors():
        from dmd2.bases.look import look
        from dmd2.bases.propose import minutes, propose, table_of, too_few
        from dmd2.experiment.yaml_file import ORIGIN

        check_name(name)
        found = look(_as_written(folder))
        inside = (WORKFLOW / "schemas").is_dir()
        files = propose(name, found, "../schemas" if inside else (ORIGIN / WORKFLOW / "schemas").as_uri())
        show(found)
        if few := too_few(name, found):
            print(few)
        if dry_run:
            for file, text in files.items():
                print(f"\n==> {WORKFLOW / file}\n{text}", end="")
            return
        write(files, force)
        table = table_of(name, found)
        print(f"\nwrote {', '.join(str(WORKFLOW / file) for file in files)}")
        print(f"next: dmd2 run {table} -n, then dmd2 run {table}")
        time = f"about {minutes(found)} minutes on two CPU cores"
        print(f"The small base takes {time}; the page of its table is then results/report/{table}.html")


def check_name(name: str) -> None:
    """Refuse what is no name of a base, or that of one that others are like.

    Raises:
        UserError: with what to do.
    """
    from dmd2.experiment.tables import BASES, TABLES
    from dmd2.experiment.yaml_file import workflow_files

    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise UserError(f"{name!r} is no name of a base: use small letters, digits and -")
    for folder, names in (
        (BASES, (name, f"{name}-gpu", f"{name}-paper")),
        (TABLES, (f"{name}-table3", f"{name}-table4")),
    ):
        files = workflow_files(folder)
        if brought := [one for one in names if one in files and not (folder / f"{one}.yaml").exists()]:
            raise UserError(f"{brought[0]} comes with dmd2: take another name")


def write(files: dict[str, str], force: bool) -> None:
    """Write the files and read them as a run would; `force` replaces those of an earlier call.

    Raises:
        UserError: a file is there, or the bases of the workspace do not fit together.
    """
    from dmd2.bases.propose import MADE
    from dmd2.experiment.tables import load_experiment, readable_tables

    there = [WORKFLOW / file for file in files if (WORKFLOW / file).exists()]
    told = f"there {'are' if there[1:] else 'is'} {', '.join(map(str, there))}: take another name"
    if there and not force:
        raise UserError(f"{told}, or give --force")
    if foreign := [str(path) for path in there if MADE not in path.read_text(encoding="utf-8")]:
        raise UserError(
            f"{', '.join(foreign)}: not written by new-base, so --force does not replace it; take another name"
        )
    left = of_other_kind(files)
    before = {path: path.read_text(encoding="utf-8") for path in (*there, *left)}
    wrong = dict[str, str]()  # tables that are so already
    with suppress(UserError):
        wrong = readable_tables()[1]
    for path in left:
        path.unlink()
    for file, text in files.items():
        write_text(WORKFLOW / file, text)
    try:
        load_experiment(without=wrong.keys() - {Path(file).stem for file in files})
    except UserError:  # the workspace is then as it was
        for file in files:
            (WORKFLOW / file).unlink()
        for path, text in before.items():
            write_text(path, text)
        raise


def of_other_kind(files: dict[str, str]) -> list[Path]:
    """The table of an earlier call for the same name, whose images had captions where these have none or vice versa.

    Its base is replaced, and has not the metrics that it shows.
    """
    from dmd2.bases.propose import MADE

    tables = {re.sub(r"-table[34]\.yaml$", f"-table{number}.yaml", file) for file in files for number in (3, 4)}
    earlier = [WORKFLOW / file for file in tables - files.keys() if (WORKFLOW / file).exists()]
    return [path for path in earlier if MADE in path.read_text(encoding="utf-8")]


def show(found: "Found") -> None:
    """Say what was found."""
    from dmd2.bases.propose import described

    print(f"found ({found.source.kind}): {described(found)}")
    if found.note:
        print(f"  {found.note}")
    for name, count in list(found.classes.items())[:20]:
        print(f"  class {name}: {count:,}")
    if len(found.classes) > 20:
        print(f"  and {len(found.classes) - 20} classes more")
    for caption in found.captions[:3]:
        print(f"  caption: {caption:.100}")


def _as_written(folder: Path) -> Path:
    """The path as a base has it: relative inside the workspace, the current folder, and absolute elsewhere."""
    folder, here = Path(os.path.abspath(folder)), Path.cwd()  # without .. but with links as they are
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
