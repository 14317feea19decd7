"""Trainings of a tiny transformer of each family: guided by classes, with a GAN on two blocks and an EMA; SD3's aligned."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import Teacher
from dmd2.experiment.run_inputs import Inputs
from dmd2.networks.transformers.family import FAMILIES
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.sharding import gathered
from dmd2.training.trainer import Training
from tests import tiny
from tests.tiny_transformers import tiny as transformer

LOW = "low rank in bf16"
LORA = {"input": "noise", "steps": 1, "time": 1.0, "lora": {"rank": 2, "alpha": 2.0}}
MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    LOW: {"train__precision": "bf16-body", "generator": LORA},
}
SPLIT = [*((kind, "fp32") for kind in FAMILIES), ("SD3Transformer2DModel", LOW), ("ZImageTransformer2DModel", LOW)]


def prepare(folder: Path, kinds: Iterable[str] = FAMILIES) -> None:
    """Teachers of these families, and latents with classes."""
    for kind in kinds:
        transformer(kind, seed=5).save_pretrained(folder / kind / "unet", safe_serialization=True)
        adopt_teacher(Teacher(name="t", parameterisation="flow", guidance=1.0), folder / kind)
    g = torch.Generator().manual_seed(9)
    rows = {"images": torch.randn(32, 4, 8, 8, generator=g), "labels": torch.randint(tiny.CLASSES, (32,), generator=g)}
    tiny.real_set(folder / "latents.json", rows=rows)


def training(folder: Path, kind: str, mode: str, hardware: Hardware) -> Training:
    """A training in a folder that `prepare` made; the student starts as the teacher."""
    gan = {"gan__tap": [0, 1], "gan__head": "patches", "teacher__guidance": 2.0, "teacher__shift": 3.0}
    size = {"data__channels": 4, "critic__ratio": 1, "optim__ema": 0.9, "optim__batch": 6}
    aligned = {"critic__ida": 0.5} if kind == "SD3Transformer2DModel" else {}
    cfg = tiny.config("flow-sd3", **{**gan, **size, **aligned, **MODES[mode]})
    inputs = Inputs(folder / kind / "manifest.json", folder / "latents.json", None, None)
    return Training(RunId("tiny", kind, 0), cfg, hardware, inputs)


def trained(t: Training, steps: int) -> dict[str, Tensor]:
    """Whole weights after some iterations, and the gradient norms of the last one; in process 0."""
    for _ in range(steps):
        t.iterate()
    weights = {f"{who}.{name}": v for who, m in t.trained.items() for name, v in gathered(m.state_dict()).items()}
    return weights | {name: v for _, logs in t.recent[-1:] for name, v in logs.items() if name.endswith("grad_norm")}
