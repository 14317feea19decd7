"""Options that command lines share. A command imports PyTorch when it has work to do, so that ``--help`` is at once."""

import os
from pathlib import Path
from typing import Annotated

import typer

from dmd2.core.errors import UserError

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where this process sees a GPU")]

WORKSPACE = "DMD2_WORKSPACE"
# What only the workspace of this project has; results/runs is that of one whose tables lie beside the Snakefile.
MARKS = ("workflow/base", "workflow/tables", "results/runs")


def workspace() -> Path | None:
    """The folder of the user's tables and results: ``$DMD2_WORKSPACE``, else the nearest that has them; else None.

    Raises:
        UserError: the variable names no folder.
    """
    if named := os.environ.get(WORKSPACE):
        if not Path(named).is_dir():
            raise UserError(f"the workspace {named} (--workspace or ${WORKSPACE}) is no folder")
        return Path(named).absolute()
    here = Path.cwd()
    return next((place for place in (here, *here.parents) if any((place / mark).is_dir() for mark in MARKS)), None)


def workspace_or_cache(place: Path) -> Path:
    """A folder of the workspace, for example ``data/features``; outside any workspace, that in the user's cache."""
    if (home := workspace()) is not None:
        return place if home == Path.cwd() else home / place
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmd2" / place.name
