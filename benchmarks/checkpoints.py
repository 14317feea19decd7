"""Cost of checkpoints at the interval of a base: written in the loop, and by a thread while training goes on.

    python -m benchmarks.checkpoints digits fashion-tiny

Blocks of iterations without a checkpoint, with one in the loop and with one by the thread take turns in one process;
what one costs is the median of a block's time less the median without. Weights and images are random.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.random_runs import changed, hardware, random_training
from benchmarks.tables import markdown
from dmd2.core.errors import readable_errors
from dmd2.core.precision import float32_products
from dmd2.experiment.tables import load_base
from dmd2.training.checkpoints.checkpoint import Checkpoints
from dmd2.training.checkpoints.parts import flat
from dmd2.training.checkpoints.thread import CheckpointThread
from dmd2.training.trainer import Training

HEAD = ["base", "checkpoint, MB", "ms/iteration", "interval", "written", "loop held, ms", "costs, ms", "of the time"]


def main(
    bases: Annotated[list[str], typer.Argument(help="files in workflow/base, without .yaml")],
    batch: Annotated[int, typer.Option(help="images of an iteration; 0: the base's")] = 0,
    block: Annotated[int, typer.Option(help="iterations in which the thread can write")] = 10,
    rounds: int = 7,
    threads: int = 1,
    folder: Annotated[Path | None, typer.Option(help="where checkpoints are written; by default in /tmp")] = None,
) -> None:
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with readable_errors(), tempfile.TemporaryDirectory(dir=folder) as made:
        rows = []
        for base in bases:
            cfg = load_base(base)
            precision = cfg.train.precision if device == "cuda" else "fp32"
            with float32_products(precision):
                training = random_training(changed(cfg, batch or cfg.optim.batch, precision), hardware(device, threads))
                interval = cfg.train.checkpoint_every
                rows += [[base, *cells] for cells in measured(training, Path(made) / base, interval, block, rounds)]
        print(markdown(HEAD, rows))


def measured(training: Training, folder: Path, interval: int, block: int, rounds: int) -> list[list[str]]:
    """Cells of both ways to write."""
    checkpoints = Checkpoints(folder)
    with CheckpointThread(checkpoints) as writer:
        ways: dict[str, Callable[[], None]] = {
            "never": lambda: None,
            "in the loop": lambda: checkpoints.save(training.step, training.state()),
            "by the thread": lambda: writer.save(training.step, training.state()),
        }
        whole: dict[str, list[float]] = {name: [] for name in ways}
        held: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, save in ways.items():
                _wait()
                started = time.perf_counter()
                save()
                held[name].append(time.perf_counter() - started)
                for _ in range(block):
                    training.iterate()
                _wait()
                writer.wait()
                whole[name].append(time.perf_counter() - started)
            if number == 0:  # moments are made, pinned memory is taken
                whole, held = {name: [] for name in ways}, {name: [] for name in ways}
    plain = statistics.median(whole.pop("never"))
    size = sum(value.nbytes for _, value in flat(training.state()) if isinstance(value, torch.Tensor))
    found = []
    for name, times in whole.items():
        cost = statistics.median(times) - plain
        share = cost / (plain / block * interval)
        found.append([f"{size / 1e6:.1f}", f"{1e3 * plain / block:.1f}", str(interval), name,
                      f"{1e3 * statistics.median(held[name]):.1f}", f"{1e3 * cost:.1f}", f"{share:.2%}"])  # fmt: skip
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
