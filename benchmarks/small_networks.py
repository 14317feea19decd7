"""Iterations of small networks on one CPU thread, of this checkout and of another side by side, as a Markdown table.

    git worktree add /tmp/release 8819aa2
    python -m benchmarks.small_networks digits/dmd2 fashion-tiny/dmd2 --against /tmp/release

Both checkouts train the same run on random images, each in its process, in turns of a few iterations; times are of the
process, not of the clock, so that other work on the machine matters little. One process of the same code is up to 8 %
faster than the next, by where its memory happens to lie, so every round starts new ones.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.tables import markdown
from dmd2.core.errors import UserError, readable_errors

ROOT = Path(__file__).parents[1]
RUNS = ["digits/dmd2", "digits/no-regression", "fashion-tiny/dmd2"]
ITERATIONS = 10  # of a turn: two updates of the student at ratio 5
# The first package comes from here, what it imports of dmd2 from the checkout.
CHILD = (
    "import sys, benchmarks, tests; sys.path.insert(0, sys.argv[1]); import benchmarks.small_networks as b;b.serve()"
)


def serve() -> None:
    """In a process of its own: a turn for each line of stdin, whose milliseconds an iteration go to stdout."""
    import torch

    from benchmarks.random_runs import changed, hardware, random_training
    from dmd2.experiment.tables import load_experiment
    from dmd2.method.step import train_step

    torch.set_num_threads(1)
    base, _, run = sys.argv[2].partition("/")
    cfg = load_experiment().runs[base, run]
    training = random_training(changed(cfg, cfg.optim.batch, cfg.train.precision), hardware("cpu"))
    step = 0
    for _ in sys.stdin:
        started = time.process_time()
        for it in range(step, step + ITERATIONS):
            train_step(training.models, training.batches.at(it), it, training.cfg)
        step += ITERATIONS
        print(1000 * (time.process_time() - started) / ITERATIONS, flush=True)


def times(run: str, checkouts: list[Path], turns: int) -> list[list[float]]:
    """Milliseconds an iteration of every turn but the first, which warms up, in each checkout.

    Raises:
        UserError: a checkout cannot train the run.
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, str(place.resolve()), run],
            cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )
        for place in checkouts
    ]  # fmt: skip
    found: list[list[float]] = [[] for _ in checkouts]
    for _ in range(turns + 1):
        for child, place, mine in zip(children, checkouts, found, strict=True):
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            if not (answer := child.stdout.readline()):
                raise UserError(f"{place} cannot train {run}; its messages are above")
            mine.append(float(answer))
    for child in children:
        child.communicate()
    return [mine[1:] for mine in found]


def main(
    runs: Annotated[list[str] | None, typer.Argument(help=f"BASE/RUN; default: {' '.join(RUNS)}")] = None,
    against: Annotated[Path | None, typer.Option(help="another checkout")] = None,
    turns: Annotated[int, typer.Option(min=1, help=f"of {ITERATIONS} iterations each, in a round")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="each with new processes")] = 7,
) -> None:
    """Milliseconds of an iteration on one CPU thread, and the ratio of medians to another checkout."""
    with readable_errors():
        rows, checkouts = [], [ROOT, *([against] if against else [])]
        for run in runs or RUNS:
            found = [[median(mine) for mine in times(run, checkouts, turns)] for _ in range(rounds)]
            ours, *theirs = map(median, zip(*found, strict=True))
            compared = ["", ""]
            if theirs:
                ratios = [one / other for one, other in found]
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                compared = [f"{theirs[0]:.1f}", f"{ours / theirs[0]:.2f} ({spread})"]
            rows.append([run, f"{ours:.1f}", *compared])
        print(markdown(["run", "ms", f"ms, {against or 'another checkout'}", "ratio of medians (of each round)"], rows))


if __name__ == "__main__":
    typer.run(main)
