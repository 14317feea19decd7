"""Full-size networks of a base (random weights) through student updates and a critic-only iteration: time and memory.

Beside each measured peak stands what dmd2/planning/memory.py predicts for the same settings. On the CPU (float32, two
images; 14 GB for ImageNet-64) the peak of the process less what it had before, which has the workspaces of the
convolutions on top, and once that of the tensors alone. On a GPU (bf16, 40 images, 2 of a text base; see `--batch`)
also with compiled network bodies unless activations are recomputed. The weights are random, so the losses mean
nothing; no data, no teacher and no pipeline are needed.
Stable Diffusion on one GPU:

    python -m benchmarks.full_size sd15 --checkpointing
    python -m benchmarks.full_size sdxl --checkpointing --lora 64 --states 8bit --batch 1
"""

import resource
import sys
import tempfile
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dmd2.core.errors import readable_errors
from dmd2.data.sets import TensorSet
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.experiment.tables import load_base
from dmd2.method.batches import Batches
from dmd2.method.step import Models, train_step
from dmd2.planning.memory import Counted, Setup, architecture
from dmd2.planning.plan import varied
from dmd2.training.build import build_models
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.sharding import materialise, recompute_activations
from dmd2.training.teachers import build_network

GB = 1e9
BLOCKS = 3  # timed on a GPU, each of critic.ratio iterations


def main(
    base: Annotated[str, typer.Argument(help="file in workflow/base, without .yaml")] = "imagenet64",
    batch: Annotated[int, typer.Option(help="0: 2 on the CPU; on a GPU 40, and 2 of a text base")] = 0,
    threads: int = 2,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="recompute activations in backward")] = False,
    lora: Annotated[int, typer.Option(help="rank of a low-rank student; 0: as the base says")] = 0,
    states: Annotated[str, typer.Option(help="of AdamW: fp32 or 8bit")] = "fp32",
) -> None:
    torch.set_num_threads(threads)
    with readable_errors(), tempfile.TemporaryDirectory() as folder:
        cfg = load_base(base)
        cfg, setup = varied(cfg, lora, states), Setup(checkpointing=checkpointing)
        manifest = _teacher(cfg, Path(folder))
        if torch.cuda.is_available():
            on_gpu(_changed(cfg, batch or (40 if cfg.data.text is None else 2), "bf16"), manifest, setup)
        else:
            on_cpu(_changed(cfg, batch or 2, "fp32"), manifest, setup)


def on_cpu(cfg: RunConfig, manifest: Path, setup: Setup) -> None:
    """Peaks of every phase as /proc tells them, and of the tensors as PyTorch's profiler saw them."""
    counted, device, ratio, count = Counted(cfg, setup), torch.device("cpu"), cfg.critic.ratio, cfg.optim.batch
    print(f"{cfg.data.name}, batch {count}, float32, {torch.get_num_threads()} threads on the CPU")
    print("parameters: " + ", ".join(f"{name} {parameters:,}" for name, parameters in counted.parameters.items()))
    predicted = [
        counted.iteration(count, update_student=True).peak,
        counted.iteration(count, update_student=False).peak,
    ]
    before = _status("VmRSS")
    models, batches = random_models(cfg, manifest, device, setup), random_batches(cfg, device)
    print(f"{'':<22}{'seconds':>8}{'predicted':>11}{'measured':>10}{'ratio':>7}   (GB)")

    def row(name: str, seconds: float, expected: int, measured: int) -> None:
        told = f"{expected / GB:>11.2f}{measured / GB:>10.2f}{measured / expected:>7.2f}"
        print(f"{name:<22}{seconds:>8.1f}{told}", flush=True)

    # The first update makes AdamW's moments, which the prediction takes for granted.
    phases = [("first student update", 0), ("critic-only iteration", 1), ("student update", ratio)]
    for name, it in phases:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident
        started = time.monotonic()
        train_step(models, batches.at(it), it, cfg)
        row(name, time.monotonic() - started, predicted[it % ratio > 0], _status("VmHWM") - before)
    standing, started = _standing(models), time.monotonic()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(models, batches.at(ratio), ratio, cfg)
    row("  tensors alone", time.monotonic() - started, predicted[0], standing + allocated_peak(profiler))
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"interpreter and libraries before: {before / GB:.2f} GB; peak of the whole process: {whole / GB:.2f} GB")


def allocated_peak(profiler: profile) -> int:
    """Most bytes that PyTorch's allocator had handed out since the profiler started, less those given back."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


def _standing(models: Models) -> int:
    modules = [models.student, models.teacher, models.critic, models.head]
    states = [*models.student_optimiser.adamw.state.values(), *models.critic_optimiser.adamw.state.values()]
    tensors = [p for module in modules if module is not None for p in module.parameters()]
    return sum(t.nbytes for t in [*tensors, *(value for state in states for value in state.values())])


def on_gpu(cfg: RunConfig, manifest: Path, setup: Setup) -> None:
    """Images per second and the peak of what tensors take, plain and with compiled bodies."""
    device, count, ratio = torch.device("cuda"), cfg.optim.batch, cfg.critic.ratio
    predicted = Counted(cfg, setup).iteration(count)
    print(
        f"{cfg.data.name}, batch {count}, bf16, {torch.cuda.get_device_name()}, predicted {predicted.peak / GB:.2f} GB"
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for compiled in (False,) if setup.checkpointing else (False, True):
        models, batches = random_models(cfg, manifest, device, setup), random_batches(cfg, device)
        if compiled:
            for denoiser in (models.student, models.teacher, models.critic):
                denoiser.network.compile()
        for it in range(ratio + 1):  # moments, cuDNN's choices, compilation of both kinds of iteration
            train_step(models, batches.at(it), it, cfg)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        for it in range(ratio, (1 + BLOCKS) * ratio):
            train_step(models, batches.at(it), it, cfg)
        torch.cuda.synchronize()
        seconds = (time.monotonic() - started) / (BLOCKS * ratio)
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(
            f"{'compiled' if compiled else 'plain':<10}{seconds:>7.3f} s/iteration{count / seconds:>8.1f} images/s  "
            f"peak {peak / GB:.2f} GB, {peak / predicted.peak:.2f} of the prediction; reserved {reserved / GB:.2f} GB",
            flush=True,
        )
        del models
        torch.cuda.empty_cache()


def _changed(cfg: RunConfig, batch: int, precision: str) -> RunConfig:
    optim, train = cfg.optim.model_copy(update={"batch": batch}), cfg.train.model_copy(update={"precision": precision})
    return cfg.model_copy(update={"optim": optim, "train": train})


def _teacher(cfg: RunConfig, folder: Path) -> Path:
    """Manifest of a teacher of that architecture with random weights."""
    build_network(architecture(cfg), 0).save_pretrained(folder / "unet")
    return adopt_teacher(cfg.teacher, folder)


def random_models(cfg: RunConfig, manifest: Path, device: torch.device, setup: Setup) -> Models:
    """Models of a run with the teacher of a manifest, guided by a random condition."""

    def place(name: str, network: nn.Module, dtype: torch.dtype | None) -> None:
        if setup.checkpointing and name in ("student", "critic"):
            recompute_activations(network.network)
        materialise(network, device, dtype, own=name != "teacher")

    unguided = cfg.model_copy(update={"teacher": cfg.teacher.model_copy(update={"guidance": 1.0})})
    models = build_models(unguided, 0, Inputs(manifest, None, None, None), device, place)
    if cfg.teacher.guidance == 1:
        return models
    return replace(models, null=random_rows(cfg, 1).condition(torch.arange(1), device))


def random_batches(cfg: RunConfig, device: torch.device) -> Batches:
    """Batches over as many random images as one batch has."""
    return Batches(cfg, 0, device, cfg.optim.batch, random_rows(cfg, cfg.optim.batch))


def random_rows(cfg: RunConfig, count: int) -> TensorSet:
    """Random images with their conditions, of the shapes that the network asks for."""

    def like(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, dtype=tensor.dtype)
        return torch.randint(256 if tensor.dtype == torch.uint8 else cfg.data.classes, tensor.shape, dtype=tensor.dtype)

    return TensorSet({name: like(tensor) for name, tensor in Counted(cfg).rows(count).tensors.items()})


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.exit(typer.run(main))
