"""How fast a run will go: as given, as measured by earlier runs, as published by the paper's authors, or as assumed.

A rate is in floating-point operations per second and process, so that a row that computes more takes longer.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from dmd2.core.files import read_json
from dmd2.core.run import RUNS
from dmd2.experiment.config import RunConfig, TrainConfig
from dmd2.experiment.tables import load_base

A100 = "A100"
A100_PEAK = 312e12  # bf16 operations per second of its tensor cores, dense, as NVIDIA states them
UTILISATION = 0.2  # about what the published ImageNet-64 runs reach (`dmd2 plan imagenet64`)
# Hours, iterations, A100s and batch of the paper's runs as the README of its code states them, by base and GAN.
PUBLISHED = {
    ("imagenet64", False): (70, 410_000, 7, 280),
    ("imagenet64", True): (53, 200_000, 7, 280),
    ("sd15", False): (25, 39_000, 64, 2048),
    ("sd15", True): (2, 2_000, 64, 2048),
    ("sdxl", True): (57, 19_000, 64, 128),
}

Flops = Callable[[TrainConfig], float]  # of one image in one iteration


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
    """The measured rate of a run, else the published one, else that of an A100 at an assumed utilisation."""
    assumed = f"assumed: an A100 at {UTILISATION:.0%} of its {A100_PEAK / 1e12:.0f} TFLOP/s"
    return measured(base, run, flops) or published(base, cfg, flops) or Rate(A100_PEAK * UTILISATION, A100, assumed)


def given(seconds: float, processes: int, operations: float) -> Rate:
    """Rate of processes that together take so many seconds for an iteration of so many operations."""
    return Rate(operations / seconds / processes, "GPU", f"given: {seconds:g} s per iteration on {processes} GPUs")


def measured(base: str, run: str, flops: Flops) -> Rate | None:
    """Rate of the newest finished run of that base in results/runs, one of the same row if there is one."""
    found = []
    for path in RUNS.glob(f"{base}/*/seed*/train.json"):
        record = read_json(path)
        with suppress(ValidationError):  # a config of another version of the code
            if record["seconds"] is not None:  # of a released student it is: it was not trained here
                trained = TrainConfig.model_validate(record["config"])
                found.append((path.parts[-3] == run, path.stat().st_mtime, path, record, trained))
    if not found:
        return None
    _, _, path, record, trained = max(found, key=lambda entry: entry[:2])
    seconds, processes = record["seconds"] / record["steps"], record.get("processes", 1)
    speed = flops(trained) * trained.optim.batch / seconds / processes
    where = f"{processes} x {record['device']}"
    if record["device"] == "cpu":
        where += f" with {record['threads']} thread{'s' * (record['threads'] > 1)}"
    name = "/".join(path.parts[-4:-1])
    return Rate(speed, record["device"], f"measured: {name}, {seconds:.3g} s per iteration on {where}")


def published(base: str, cfg: RunConfig, flops: Flops) -> Rate | None:
    """Rate of the paper's run of that base: with or without GAN as this one, or else the other run."""
    gan = next((gan for gan in (cfg.gan.on, not cfg.gan.on) if (base, gan) in PUBLISHED), None)
    if gan is None:
        return None
    hours, iterations, gpus, batch = PUBLISHED[base, gan]
    reference = load_base(base)
    if not gan:
        off = reference.gan.model_copy(update={"lambda_g": 0.0, "lambda_d": 0.0})
        reference = reference.model_copy(update={"gan": off})
    speed = flops(reference) * batch * iterations / (hours * 3600) / gpus
    what = f"{hours:g} h for {iterations:,} iterations on {gpus} {A100}, batch {batch}"
    return Rate(speed, A100, f"published (README of DMD2): {what}, {'with' if gan else 'without'} GAN")
