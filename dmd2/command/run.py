"""``dmd2 run``: Snakemake in the workspace, with a profile, and with runs by their names."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dmd2.core.errors import UserError, readable_errors
from dmd2.experiment.cluster import import_environment
from dmd2.experiment.yaml_file import ORIGIN, read_yaml
from dmd2.launch.names import complete, run_named, runs_named

PROFILES = Path("workflow/profiles")


def run(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="tables, runs (digits/dmd2/seed0), all runs below (digits/dmd2), rules or files; "
            "options of Snakemake, which are handed on (-n: only say what would be done)",
            autocompletion=complete,
        ),
    ] = None,
    profile: Annotated[str, typer.Option(help="folder in workflow/profiles: local, or slurm")] = "local",
    again: Annotated[bool, typer.Option("--again", help="train one run from the start, then measure it")] = False,
) -> None:
    """Make TARGETS, by default the demo, and all that they need: what is there already is not made again.

    Ctrl-C loses nothing: the same command goes on.
    """
    with readable_errors():
        words, place = targets or [], _profile(profile)
        if again:
            _train_again(words, place)
        own = any(Path(place).exists() for place in ("Snakefile", "workflow/Snakefile"))
        started = [] if own else ["--snakefile", str(ORIGIN / "workflow/Snakefile")]
        files = [file for word in words for file in _files(word)]
        command = [sys.executable, "-P", "-m", "snakemake", *started, "--profile", str(place), *files]
        os.execv(sys.executable, command)


def _profile(name: str) -> Path:
    """Folder of a profile: one of the workspace, one beside the Snakefile, or a path.

    Raises:
        UserError: there is none.
    """
    places = [PROFILES / name, ORIGIN / PROFILES / name, Path(name)]
    found = next((place for place in places if (place / "config.yaml").exists()), None)
    if found is None:
        known = sorted({path.parent.name for place in places[:2] for path in place.parent.glob("*/config.yaml")})
        raise UserError(f"there is no profile {PROFILES / name}: choose one of {', '.join(known) or 'none'}")
    return found


def _files(word: str) -> list[str]:
    """A word for Snakemake: the measurements of the runs that it names, else the word itself."""
    row = re.fullmatch(r"([\w-]+)/[\w-]+(/seed\d+)?", word)
    if not row or row[1] in ("data", "results", "workflow"):
        return [word]
    return [str(run.folder / "metrics.json") for run in runs_named([word])]


def _train_again(words: list[str], profile: Path) -> None:
    """Train one run from the start.

    Raises:
        UserError: the words are not the name of one run.
    """
    if len(words) != 1:
        raise UserError("--again takes one run, for example dmd2 run digits/dmd2/seed0 --again")
    config: Any = read_yaml(profile / "config.yaml")[0].get("config") or []
    settings = dict(entry.split("=", 1) for entry in config) if isinstance(config, list) else config
    cluster = str(settings.get("cluster", "local"))
    train = ["-m", "dmd2.launch", "train", str(run_named(words[0])), "--again", "--cluster", cluster]
    environment = os.environ | import_environment()
    if status := subprocess.run([sys.executable, *train], check=False, env=environment).returncode:
        sys.exit(status)
