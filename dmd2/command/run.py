"""``dmd2 run``: Snakemake in the workspace, with a profile, and with runs by their names."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from dmd2.core.errors import UserError, did_you_mean, readable_errors, show
from dmd2.experiment.cluster import import_environment
from dmd2.experiment.tables import BASES, TABLES, readable_tables
from dmd2.experiment.yaml_file import ORIGIN, read_yaml, workflow_files
from dmd2.launch.names import complete, run_named, runs_named

PROFILES = Path("workflow/profiles")
DEFAULT = "demo"
RULES = ("digits",)  # of the Snakefile, with the name of a base
FOLDERS = ("data", "logs", "results", "workflow")
SNAKEFILES = ("workflow/Snakefile", "Snakefile")


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
        named = (word for word in words if word not in ("-n", "--dry-run"))
        _check_names(takewhile(lambda word: not word.startswith("-"), named))  # afterwards it may be an option's value
        _check_tables(words or [DEFAULT])
        os.environ.update(import_environment())
        if again:
            _train_again(words, place)
        own = any(Path(name).exists() for name in SNAKEFILES)
        start = [sys.executable, "-m", "snakemake", *([] if own else ["--snakefile", str(ORIGIN / SNAKEFILES[0])])]
        files = [file for word in words for file in _files(word)]
        os.execv(sys.executable, [*start, "--profile", str(place), *files])


def _check_tables(words: list[str]) -> None:
    """Warn of what tables need and is not here; it may be there where jobs run.

    Raises:
        UserError: one of them cannot be read. Of others Snakemake warns.
    """
    from dmd2.command.needs import lacks

    experiment, wrong = readable_tables()
    for word in words:
        if word in wrong:
            raise UserError(wrong[word])
        needed = lacks(experiment, word, gpu=True) if word in experiment.tables else []
        if missing := [need for need in needed if not need.startswith("weights ")]:  # those are fetched
            show(f"warning: {word} needs what is not here: {', '.join(missing)}")


def _profile(name: str) -> Path:
    """Folder of a profile: one of the workspace, one beside the Snakefile, or a path.

    Raises:
        UserError: there is none.
    """
    places = [PROFILES / name, ORIGIN / PROFILES / name, Path(name)]
    found = next((place for place in places if (place / "config.yaml").exists()), None)
    if found is None:
        known = sorted({path.parent.name for place in places[:2] for path in place.parent.glob("*/config.yaml")})
        hint = did_you_mean(name, known, f"; known: {', '.join(known)}")
        raise UserError(f"there is no profile {PROFILES / name}{hint}")
    return found


def _check_names(words: Iterable[str]) -> None:
    """Refuse a name that is almost that of a table, base or rule. Others may be those of a Snakefile of the user's.

    Raises:
        UserError: with the name that is meant.
    """
    bases, tables = workflow_files(BASES), workflow_files(TABLES)
    known = {*bases, *tables, *(f"{base}-{part}" for base in bases for part in ("data", "teacher", "runs"))}
    for folder in (Path("workflow"), ORIGIN / "workflow"):
        for file in (folder / "Snakefile", *folder.glob("rules/*.smk")):
            if file.exists():
                known |= set(re.findall(r"^rule (\w+):", file.read_text(encoding="utf-8"), re.M))
    for word in words:
        if re.fullmatch(r"[\w-]+", word) and word not in known and (hint := did_you_mean(word, known)):
            raise UserError(f"there is no table, base or rule {word}{hint}")


def _files(word: str) -> list[str]:
    """A word for Snakemake: the measurements of the runs that it names, else the word itself."""
    row = re.fullmatch(r"([\w-]+)/[\w-]+(/seed\d+)?", word)
    bases = workflow_files(BASES)
    is_base = word in bases and word not in (*workflow_files(TABLES), *RULES)
    if row and row[1] not in (*bases, *FOLDERS) and did_you_mean(row[1], bases):
        raise UserError(f"there is no base {row[1]}{did_you_mean(row[1], bases)}")
    if is_base or (row and row[1] in bases):
        return [str(run.folder / "metrics.json") for run in runs_named([word])]
    return [word]


def _train_again(words: list[str], profile: Path) -> None:
    """Train one run from the start.

    Raises:
        UserError: the words are not the name of one run.
    """
    if {"-n", "--dry-run"} & {*words}:
        raise UserError("--again trains the run from the start and measures it: leave out -n to have it do so")
    if len(words) != 1:
        raise UserError("--again takes one run, for example dmd2 run digits/dmd2/seed0 --again")
    config: Any = read_yaml(profile / "config.yaml")[0].get("config") or []
    settings = dict(entry.split("=", 1) for entry in config) if isinstance(config, list) else config
    cluster = str(settings.get("cluster", "local"))
    train = ["-m", "dmd2.launch", "train", str(run_named(words[0])), "--again", "--cluster", cluster]
    if status := subprocess.run([sys.executable, *train], check=False).returncode:
        sys.exit(status)
