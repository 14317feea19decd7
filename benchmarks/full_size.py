"""Full-size networks of a base (random weights) through student updates and a critic-only iteration: time and memory.

Beside each measured peak stands what dmd2/planning/memory.py predicts for the same settings. On the CPU (float32, two
images; 14 GB for ImageNet-64) the peak of the process less what it had before, which has the workspaces of the
convolutions on top, and once that of the tensors alone. On a GPU (40 images, 2 of a text base; see `--batch`) a
Markdown table with a line for each `--precision`, `--compiled` and `--batch`, which are separated by commas. The
weights are random, so the losses mean nothing; no data, no teacher and no pipeline are needed. Stable Diffusion:

    python -m benchmarks.full_size sd15 --checkpointing
    python -m benchmarks.full_size sdxl --checkpointing --lora 64 --states 8bit --batch 1,4
"""

import resource
import sys
import tempfile
import time
from itertools import accumulate, product
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.random_runs import changed, hardware, random_teacher, random_training
from benchmarks.tables import line, listed, markdown
from dmd2.core.errors import readable_errors
from dmd2.core.precision import float32_products
from dmd2.core.run import commit
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import RunConfig
from dmd2.experiment.tables import load_base
from dmd2.method.step import Models
from dmd2.planning.memory import Counted, Setup
from dmd2.planning.plan import varied

GB = 1e9
HEAD = ["precision", "compiled", "images", "s/iteration", "images/s", "peak, GB", "plan, GB", "peak / plan", "reserved"]


def main(
    base: Annotated[str, typer.Argument(help="file in workflow/base, without .yaml")] = "imagenet64",
    batch: Annotated[str, typer.Option(help="by default 2 on the CPU; on a GPU 40, and 2 of a text base")] = "",
    threads: int = 2,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="recompute activations in backward")] = False,
    lora: Annotated[int, typer.Option(help="rank of a low-rank student; 0: as the base says")] = 0,
    states: Annotated[str, typer.Option(help="of AdamW: fp32 or 8bit")] = "fp32",
    precision: Annotated[str, typer.Option(help="by default bf16 on a GPU, fp32 on the CPU")] = "",
    compiled: Annotated[str, typer.Option(help="values of training.compiled of a cluster file")] = "",
    blocks: Annotated[int, typer.Option(help="timed on a GPU, each of critic.ratio iterations")] = 3,
) -> None:
    torch.set_num_threads(threads)
    with readable_errors(), tempfile.TemporaryDirectory() as folder:
        cfg, on_a_gpu = varied(load_base(base), lora, states), torch.cuda.is_available()
        sizes = [int(size) for size in listed(batch)] or [(40 if cfg.data.text is None else 2) if on_a_gpu else 2]
        manifest = random_teacher(cfg, Path(folder))
        kinds = listed(precision) or ["bf16" if on_a_gpu else "fp32"]
        if on_a_gpu:
            print(f"{base}, checkpointing {checkpointing}, low rank {lora}, {torch.cuda.get_device_name()}, torch "
                  f"{torch.__version__}, commit {commit()}, {blocks} blocks\n\n{markdown(HEAD, [])}")  # fmt: skip
        for kind, how, size in product(kinds, listed(compiled) or [None], sizes):
            place = hardware("cuda" if on_a_gpu else "cpu", threads, checkpointing=checkpointing, compiled=how)
            case = changed(cfg, size, kind)
            if on_a_gpu:
                print(line([kind, how or "default", str(size), *on_gpu(case, manifest, place, blocks)]), flush=True)
            else:
                on_cpu(case, manifest, place)


def on_cpu(cfg: RunConfig, manifest: Path, place: Hardware) -> None:
    """Peaks of every phase as /proc tells them, and of the tensors as PyTorch's profiler saw them."""
    counted, ratio, count = Counted(cfg, Setup(checkpointing=place.checkpointing)), cfg.critic.ratio, cfg.optim.batch
    print(f"{cfg.data.name}, batch {count}, {cfg.train.precision}, {place.threads} threads on the CPU")
    print("parameters: " + ", ".join(f"{name} {parameters:,}" for name, parameters in counted.parameters.items()))
    predicted = [
        counted.iteration(count, update_student=True).peak,
        counted.iteration(count, update_student=False).peak,
    ]
    before = status("VmRSS")
    training = random_training(cfg, place, manifest)
    print(f"{'':<22}{'seconds':>8}{'predicted':>11}{'measured':>10}{'ratio':>7}   (GB)")

    def row(name: str, seconds: float, expected: int, measured: int) -> None:
        told = f"{expected / GB:>11.2f}{measured / GB:>10.2f}{measured / expected:>7.2f}"
        print(f"{name:<22}{seconds:>8.1f}{told}", flush=True)

    # The first update makes AdamW's moments, which the prediction takes for granted.
    phases = [("first student update", 0), ("critic-only iteration", 1), ("student update", ratio)]
    for name, it in phases:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident
        training.step, started = it, time.monotonic()
        training.iterate()
        row(name, time.monotonic() - started, predicted[it % ratio > 0], status("VmHWM") - before)
    training.step = ratio
    standing_bytes, started = standing(training.models), time.monotonic()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training.iterate()
    row("  tensors alone", time.monotonic() - started, predicted[0], standing_bytes + allocated_peak(profiler))
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"interpreter and libraries before: {before / GB:.2f} GB; peak of the whole process: {whole / GB:.2f} GB")


def allocated_peak(profiler: profile) -> int:
    """Most bytes that PyTorch's allocator had handed out since the profiler started, less those given back."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


def standing(models: Models) -> int:
    """Bytes of the weights of all networks and of AdamW's states."""
    modules = [models.student, models.teacher, models.critic, models.head]
    states = [*models.student_optimiser.adamw.state.values(), *models.critic_optimiser.adamw.state.values()]
    tensors = [p for module in modules if module is not None for p in module.parameters()]
    return sum(t.nbytes for t in [*tensors, *(value for state in states for value in state.values())])


def on_gpu(cfg: RunConfig, manifest: Path, place: Hardware, blocks: int) -> list[str]:
    """Seconds an iteration, images per second and the peak of what tensors take, as cells of the table."""
    count, ratio = cfg.optim.batch, cfg.critic.ratio
    predicted = Counted(cfg, Setup(checkpointing=place.checkpointing)).iteration(count).peak
    with float32_products(cfg.train.precision):
        try:
            training = random_training(cfg, place, manifest)
            for _ in range(ratio + 1):  # moments, cuDNN's choices, compilation of both kinds of iteration
                training.iterate()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            training.step, started = ratio, time.monotonic()
            for _ in range(blocks * ratio):
                training.iterate()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return ["out of memory", "", "", f"{predicted / GB:.2f}", "", ""]
    seconds = (time.monotonic() - started) / (blocks * ratio)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    del training
    torch.cuda.empty_cache()
    return [f"{seconds:.3f}", f"{count / seconds:.1f}", f"{peak / GB:.2f}", f"{predicted / GB:.2f}",
            f"{peak / predicted:.2f}", f"{reserved / GB:.2f}"]  # fmt: skip


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.exit(typer.run(main))
