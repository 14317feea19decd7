"""Real trainings whose teacher and images are random, so that benchmarks need no data, no teacher and no pipeline."""

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import listing, write_json
from dmd2.core.run import RunId
from dmd2.data.sets import TensorSet, save_shard
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.planning.memory import Counted, architecture
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.teachers import build_network
from dmd2.training.trainer import Training

ENDLESS = 10**9  # iterations: nothing is logged or saved before

# Of `tiny_config`: two levels, the lower one with attention.
TINY = {
    "sample_size": 16, "layers_per_block": 1, "block_out_channels": [32, 64],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}  # fmt: skip


def changed(cfg: RunConfig, batch: int, precision: str) -> RunConfig:
    """The run with another batch and precision, which never logs."""
    optim = cfg.optim.model_copy(update={"batch": batch})
    endless = {"steps": ENDLESS, "log_every": ENDLESS, "precision": precision, "init_from": None}
    return cfg.model_copy(update={"optim": optim, "train": cfg.train.model_copy(update=endless)})


def tiny_config(cfg: RunConfig) -> RunConfig:
    """An ADM run, such as that of ImageNet-64, with a small network on images of 16 pixels."""
    assert cfg.teacher.network is not None
    teacher = cfg.teacher.model_copy(update={"network": {**cfg.teacher.network, **TINY}})
    return cfg.model_copy(update={"teacher": teacher, "data": cfg.data.model_copy(update={"resolution": 16})})


def hardware(device: str, threads: int = 1, **options: Any) -> Hardware:
    """How a process runs, with those options that are not None.

    Raises:
        UserError: this version has no such option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = {field.name for field in fields(Hardware)}
    if unknown := given.keys() - known:
        raise UserError(f"trainings have no option {', '.join(sorted(unknown))} here, only {', '.join(sorted(known))}")
    return Hardware(device, threads, **given)


def random_teacher(cfg: RunConfig, folder: Path) -> Path:
    """Manifest of a teacher of the run's architecture with random weights."""
    build_network(architecture(cfg), 0).save_pretrained(folder / "unet")
    return adopt_teacher(cfg.teacher, folder)


def random_rows(cfg: RunConfig, count: int) -> TensorSet:
    """Random images with their conditions, and noise, of the shapes that the network asks for."""

    def like(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, dtype=tensor.dtype)
        return torch.randint(256 if tensor.dtype == torch.uint8 else cfg.data.classes, tensor.shape, dtype=tensor.dtype)

    return TensorSet({name: like(tensor) for name, tensor in Counted(cfg).rows(count).tensors.items()})


def random_training(cfg: RunConfig, place: Hardware, teacher: Path | None = None) -> Training:
    """The training of a run on random images, as many as one batch has, after no iteration.

    A guided teacher of text gets a random unconditional condition, and latents are shown as they are: both would be
    the pipeline's. `teacher` is the manifest of one; by default its weights are drawn, for SDXL in a minute or two.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = teacher or random_teacher(cfg, folder)
        save_shard(folder / "set.safetensors", random_rows(cfg, cfg.optim.batch).tensors)
        real = folder / "set.json"
        write_json(real, {"files": listing([folder / "set.safetensors"], folder)})
        guided = getattr(cfg, "guided", cfg.teacher.guidance > 1)  # an older checkout draws no scales
        null = random_rows(cfg, 1).condition(torch.arange(1)) if guided else None
        with (
            mock.patch("dmd2.training.build.null_condition", lambda *_: null),
            mock.patch("dmd2.training.trainer.to_images", lambda *_: lambda images: images),
        ):
            inputs = Inputs(manifest, real, real if cfg.needs_pairs else None, None)
            return Training(RunId("benchmark", "random", 0), cfg, place, inputs)
