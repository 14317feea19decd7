"""How much of the time that two processes take to sum gradients is hidden behind the backward pass, on one machine.

    python -m benchmarks.gradient_sums digits --batch 32

Starts two processes of a thread each (gloo on the CPU, NCCL on two GPUs). Blocks of iterations whose gradients are
summed after the backward pass and while it runs take turns, beside blocks that sum nothing. Random weights and images.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.random_runs import changed, hardware, random_teacher, random_training
from benchmarks.tables import markdown
from dmd2.core import distributed
from dmd2.core.distributed import GradientSums
from dmd2.core.precision import float32_products
from dmd2.experiment.tables import load_base
from dmd2.training.trainer import Training

NEVER = 10**9  # backward passes that do not come
WAYS = ("not at all", "after it", "while it runs")


def main(
    base: Annotated[str, typer.Argument(help="file in workflow/base, without .yaml")] = "digits",
    batch: Annotated[int, typer.Option(help="images of both processes; 0: the base's")] = 0,
    rounds: int = 7,
) -> None:
    if "RANK" not in os.environ:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        os.execv(sys.executable, [*start, "-m", "benchmarks.gradient_sums", *sys.argv[1:]])
    torch.set_num_threads(1)
    cfg, device = load_base(base), distributed.local_device("auto", "train")
    precision = cfg.train.precision if device.type == "cuda" else "fp32"
    cfg = changed(cfg, batch or cfg.optim.batch, precision)
    with (
        tempfile.TemporaryDirectory() as folder,
        distributed.process_group(device),
        float32_products(precision),
    ):
        teacher = random_teacher(cfg, Path(folder))
        training = random_training(cfg, hardware(str(device)), teacher)
        times, sizes = measured(training, cfg.critic.ratio, rounds)
        if distributed.rank() == 0:
            print(f"{base}, batch {cfg.optim.batch}, {sizes / 1e6:.1f} MB of gradients an iteration, {device.type}\n")
            rows = [[way, f"{1e3 * statistics.median(times[way]):.1f}"] for way in WAYS]
            print(markdown(["gradients are summed", "ms/iteration"], rows))


def measured(training: Training, ratio: int, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of an iteration by way, in blocks of `ratio` iterations, and bytes summed in an iteration."""
    sums: list[GradientSums] = [optimiser.sums for optimiser in training.optimisers.values()]  # type: ignore[attr-defined]
    finish = GradientSums.finish
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            for one in sums:
                one.passes = training.batches.passes if way == "while it runs" else NEVER
            GradientSums.finish = GradientSums._begin if way == "not at all" else finish  # type: ignore[method-assign]
            _wait()
            started = time.perf_counter()
            for _ in range(ratio):
                training.iterate()
            _wait()
            if number:  # moments are made and buckets laid out in the first round
                times[way].append((time.perf_counter() - started) / ratio)
    student, critic = (4 * sum(p.numel() for p in one.parameters) for one in sums)
    return times, student / ratio + critic


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    distributed.sum_over(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    typer.run(main)
