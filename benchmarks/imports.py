"""What commands and jobs import before they work: seconds by ``python -X importtime``, here and in another checkout.

git worktree add /tmp/release 8819aa2
python -m benchmarks.imports --against /tmp/release
"""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.tables import markdown
from dmd2.core.errors import UserError, readable_errors

ROOT = Path(__file__).parents[1]
HELP = "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('{}', run_name='__main__', alter_sys=True)"
# Commands, and the module that has them in release 8819aa2 where that is another.
COMMANDS = {
    "dmd2.launch": "", "dmd2.planning": "", "dmd2.data": "", "dmd2.training": "dmd2.training.make_teacher",
    "dmd2.convert": "", "eval": "", "eval.runs": "eval.runs.evaluate", "eval.detectors": "eval.detectors.detectors",
    "eval.detectors.weights": "", "eval.report.tables": "", "eval.report.page": "", "eval.compare": "",
    "eval.catalogue": "", "dmd2.publish.export": "", "dmd2.publish.prune": "", "dmd2.publish.restore": "",
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


def measured(places: list[Path], codes: list[str], rounds: int) -> list[str]:
    """Medians of the seconds of each checkout, which take turns."""
    found: list[list[float]] = [[] for _ in places]
    for _ in range(rounds):
        for place, code, mine in zip(places, codes, found, strict=True):
            mine.append(seconds(place, code))
    return [f"{median(mine):.1f}" for mine in found]


def main(
    against: Annotated[Path | None, typer.Option(help="another checkout")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="of which the median is told")] = 3,
) -> None:
    """Seconds that commands import for before they show their help, and jobs before they work."""
    with readable_errors():
        rows, places = [], [*([against] if against else []), ROOT]
        for name, old in COMMANDS.items():
            codes = [HELP.format(old if old and place != ROOT else name) for place in places]
            rows.append([f"`python -m {name} --help`", *measured(places, codes, rounds)])
        for job, code in JOBS.items():
            rows.append([job, *measured(places, [code] * len(places), rounds)])
        print(markdown(["seconds", *([str(against)] if against else []), "here"], rows))


if __name__ == "__main__":
    typer.run(main)
