"""Seconds until a command shows its help, and that jobs import for before they work, here and in another checkout.

git worktree add /tmp/release 30db794
python -m benchmarks.imports --against /tmp/release
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import typer

from benchmarks.tables import markdown
from dmd2.core.errors import UserError, readable_errors

ROOT = Path(__file__).parents[1]
# Commands, and the module that was one in release 30db794.
COMMANDS = {
    "": "", "plan": "dmd2.planning", "run": "", "doctor": "", "status": "dmd2.launch", "print": "dmd2.launch",
    "prune": "dmd2.publish.prune", "eval": "eval", "eval score": "eval", "eval weights": "eval.detectors.weights",
    "compare": "eval.compare", "catalogue": "eval.catalogue", "convert": "dmd2.convert",
    "export": "dmd2.publish.export", "restore": "dmd2.publish.restore",
}  # fmt: skip
LIGHT = """
from dmd2.experiment.tables import load_experiment
data = load_experiment().bases['{}'].data
try:
    from dmd2.networks.light_diffusers import light_diffusers
    light_diffusers(data)
except ImportError:
    pass
import {}
"""
JOBS = {
    "train a run of digits": LIGHT.format("digits", "dmd2.training.trainer, torch._dynamo"),
    "train a run of emoji (text)": LIGHT.format("emoji", "dmd2.training.trainer, torch._dynamo"),
    "evaluate a run of digits": LIGHT.format("digits", "eval.runs.evaluate"),
    "make pairs of digits": LIGHT.format("digits", "dmd2.training.pairs, dmd2.training.teachers, dmd2.method.samplers"),
    "train a detector": "import eval.detectors.detectors, torch._dynamo",
}


def seconds(checkout: Path, code: str) -> float:
    """The sum of what importtime says of each module.

    Raises:
        UserError: the code failed.
    """
    line = [sys.executable, "-X", "importtime", "-c", code]
    env = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{checkout}: {(done.stderr.strip() or code).splitlines()[-1]}")
    lines = [text.split(":")[1].split("|")[0] for text in done.stderr.splitlines() if text.startswith("import time:")]
    return sum(int(own) for own in lines if own.strip().isdigit()) / 1e6


def help_seconds(checkout: Path, words: list[str]) -> float:
    """Wall time of ``python -m WORDS --help``.

    Raises:
        UserError: it failed.
    """
    env, started = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}, perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words, "--help"], cwd=checkout, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{checkout}: {' '.join(words)}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return perf_counter() - started


def measured(calls: list[Callable[[], float]], rounds: int) -> list[str]:
    """Medians of what each call measures; they take turns."""
    found = [[call() for call in calls] for _ in range(rounds)]
    return [f"{median(mine):.2f}" for mine in zip(*found, strict=True)]


def main(
    against: Annotated[Path | None, typer.Option(help="another checkout")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="of which the median is told")] = 3,
) -> None:
    """Seconds until commands show their help (wall), and that jobs import for before they work."""
    with readable_errors():
        rows, places = [], [*([against] if against else []), ROOT]
        for name, old in COMMANDS.items():
            now = partial(help_seconds, ROOT, ["dmd2", *name.split()])
            before = [partial(help_seconds, against, [old])] if against and old else []
            gone = ["-"] if against and not old else []
            rows.append([f"`{' '.join(['dmd2', *name.split()])} --help`", *gone, *measured([*before, now], rounds)])
        for job, code in JOBS.items():
            rows.append([job, *measured([partial(seconds, place, code) for place in places], rounds)])
        print(markdown(["seconds", *([str(against)] if against else []), "here"], rows))


if __name__ == "__main__":
    typer.run(main)
