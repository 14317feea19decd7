"""Runs as users name them: ``digits/dmd2/seed0``; ``digits/dmd2``, ``digits`` and a table mean all runs below."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from dmd2.core.errors import UserError, did_you_mean
from dmd2.core.options import workspace
from dmd2.core.run import RunId, run_folders
from dmd2.experiment.tables import readable_tables


def runs_named(names: Sequence[str]) -> list[RunId]:
    """Runs by their names, those below a row or a base, or those of a table; without names, all that have a folder.

    Raises:
        UserError: a name is none of these.
    """
    found = list(run_folders()[0])
    if not names:
        return found
    if all(name in set(map(str, found)) for name in names):
        return list(dict.fromkeys(map(RunId.parse, names)))  # also beside a table that is in error
    tables, below, wrong = _known(found)
    chosen: list[RunId] = []
    for name in names:
        parent, _, seed = name.rpartition("/")
        if name in tables or name in below:
            chosen += tables.get(name) or below[name]
        elif parent in below and "/" in parent and re.fullmatch(r"seed\d+", seed):
            chosen.append(RunId.parse(name))  # of any seed, as a training takes it
        else:
            known = [*tables, *below, *(str(run) for runs in below.values() for run in runs)]
            hint = did_you_mean(name, known, f"; tables: {', '.join(tables) or 'none'}")
            raise UserError(wrong.get(name, f"no run or table is called {name}{hint}"))
    return list(dict.fromkeys(chosen))


def run_named(name: str) -> RunId:
    """The one run that a name means; see `runs_named`.

    Raises:
        UserError: it means several.
    """
    first, *others = runs_named([name])
    if others:
        raise UserError(f"{name} is {len(others) + 1} runs: name one of them, for example {first}")
    return first


def _known(found: list[RunId]) -> tuple[dict[str, list[RunId]], dict[str, list[RunId]], dict[str, str]]:
    """Runs of each table, and of each base and row, and what is wrong with tables; `found` are those with a folder."""
    experiment, wrong = readable_tables()
    tables = {
        name: [RunId(table.base, row.run, seed) for row in experiment.rows[name] for seed in table.seeds]
        for name, table in experiment.tables.items()
    }
    below: dict[str, list[RunId]] = {}
    for run in sorted({*found, *(run for of_table in tables.values() for run in of_table)}):
        for name in (run.base, f"{run.base}/{run.name}"):
            below.setdefault(name, []).append(run)
    return tables, below, wrong


def complete(incomplete: str) -> list[str]:
    """Names of tables, bases, rows and runs that begin so, for a shell; what lies below one once it is whole."""
    with suppress(UserError, OSError):
        os.chdir(workspace() or ".")
        tables, below, _ = _known(list(run_folders()[0]))
        names = {*tables, *below, *(str(run) for runs in below.values() for run in runs)}
        return sorted(
            n for n in names if n.startswith(incomplete) and "/" not in n[len(incomplete) :].removeprefix("/")
        )
    return []


Run = Annotated[str, typer.Argument(help="a run, for example digits/dmd2/seed0", autocompletion=complete)]
Names = typer.Argument(help="runs (digits/dmd2/seed0), all below (digits/dmd2), tables", autocompletion=complete)
