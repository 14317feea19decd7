"""How fast a run will go: as given, as measured by earlier runs, as published by the paper's authors, or as assumed.

A rate is in floating-point operations per second and process, so that a row that computes more takes longer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmd2.core.files import read_json
from dmd2.core.run import RUNS
from dmd2.experiment.config import RunConfig, TrainConfig, digest
from dmd2.experiment.tables import load_base

A100 = "A100"
A100_PEAK = 312e12  # bf16 operations per second of its tensor cores, dense, as NVIDIA states them
UTILISATION = 0.2  # about what the published ImageNet-64 runs reach (`python -m dmd2.planning imagenet64`)

Flops = Callable[[TrainConfig], float]  # of one image in one iteration


@dataclass(frozen=True)
class PublishedRun:
    """A run of the paper as the README of its code states it."""

    gan: bool
    hours: float
    iterations: int
    gpus: int
    batch: int


PUBLISHED = {
    "imagenet64": [PublishedRun(False, 70, 410_000, 7, 280), PublishedRun(True, 53, 200_000, 7, 280)],
    "sd15": [PublishedRun(False, 25, 39_000, 64, 2048), PublishedRun(True, 2, 2_000, 64, 2048)],
    "sdxl": [PublishedRun(True, 57, 19_000, 64, 128)],
}
# Training images, where no manifest says so.
PUBLISHED_IMAGES = {"imagenet64": 1_281_167, "cifar10": 50_000, "fashion": 60_000, "digits": 1_797}


@dataclass(frozen=True)
class Rate:
    """Operations per second of one process (a GPU, or CPU threads), and where the number is from."""

    flops: float
    device: str
    source: str

    @property
    def unit(self) -> str:
        """What an hour of one process is called."""
        return "CPU" if self.device == "cpu" else "GPU"

    @property
    def kind(self) -> str:
        """``given``, ``measured``, ``published`` or ``assumed``."""
        return self.source.split(" ")[0].rstrip(":")

    def hours(self, operations: float) -> float:
        """Hours of one process."""
        return operations / self.flops / 3600


def rate_of(base: str, run: str, cfg: RunConfig, flops: Flops) -> Rate:
    """The best rate there is for a run that nobody gave one for."""
    return measured(base, run, cfg, flops) or published(base, cfg, flops) or assumed()


def given(seconds: float, processes: int, operations: float) -> Rate:
    """Rate of processes that together take so many seconds for an iteration of so many operations."""
    return Rate(operations / seconds / processes, "GPU", f"given: {seconds:g} s per iteration on {processes} GPUs")


def measured(base: str, run: str, cfg: TrainConfig, flops: Flops) -> Rate | None:
    """Rate of the newest finished run of that base in results/runs, one of the same row if there is one."""
    found: list[tuple[bool, float, Path, dict[str, Any], TrainConfig]] = []
    for path in RUNS.glob(f"{base}/*/seed*/train.json"):
        record = read_json(path)
        if record["seconds"] is None:  # a released student, which was not trained here
            continue
        try:
            trained = TrainConfig.model_validate(record["config"])
        except ValidationError:
            continue  # of another version of the code
        found.append((path.parts[-3] == run, path.stat().st_mtime, path, record, trained))
    if not found:
        return None
    _, _, path, record, trained = max(found, key=lambda entry: entry[:2])
    seconds, processes = record["seconds"] / record["steps"], record.get("processes", 1)
    speed = flops(cfg if digest(cfg) == digest(trained) else trained) * trained.optim.batch / seconds / processes
    where = f"{processes} x {record['device']}"
    if record["device"] == "cpu":
        where += f" with {record['threads']} thread{'s' * (record['threads'] > 1)}"
    name = "/".join(path.parts[-4:-1])
    return Rate(speed, record["device"], f"measured: {name}, {seconds:.3g} s per iteration on {where}")


def published(base: str, cfg: RunConfig, flops: Flops) -> Rate | None:
    """Rate of the paper's run of that base, with or without GAN as this one."""
    runs = PUBLISHED.get(base, [])
    spec = next((entry for entry in runs if entry.gan == cfg.gan.on), runs[0] if runs else None)
    if spec is None:
        return None
    _, reference = load_base(base)
    if not spec.gan:
        off = reference.gan.model_copy(update={"lambda_g": 0.0, "lambda_d": 0.0})
        reference = reference.model_copy(update={"gan": off})
    seconds = spec.hours * 3600 / spec.iterations
    speed = flops(reference) * spec.batch / seconds / spec.gpus
    what = f"{spec.hours:g} h for {spec.iterations:,} iterations on {spec.gpus} {A100}, batch {spec.batch}"
    return Rate(speed, A100, f"published (README of DMD2): {what}, {'with' if spec.gan else 'without'} GAN")


def assumed() -> Rate:
    """Rate of an A100 that nobody measured."""
    return Rate(
        A100_PEAK * UTILISATION, A100, f"assumed: an A100 at {UTILISATION:.0%} of its {A100_PEAK / 1e12:.0f} TFLOP/s"
    )
