"""Peak host memory of a training's start and resume on the CPU, without an iteration: ImageNet-64's network.

    python -m benchmarks.resume_memory --width 96     # a quarter of its parameters; 192 is full size, about 10 GB

Anonymous memory is what no file backs; the peak of the process (VmHWM) also counts mapped pages, which are droppable.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.full_size import GB, status
from benchmarks.random_runs import changed, random_rows, random_teacher
from dmd2.core.files import listing, write_json
from dmd2.core.run import RunId
from dmd2.data.sets import save_shard
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.experiment.tables import load_base
from dmd2.training.trainer import Training


def config(width: int) -> RunConfig:
    cfg = load_base("imagenet64")
    assert cfg.teacher.network is not None
    levels = [width * times for times in (1, 2, 3, 4)]
    teacher = cfg.teacher.model_copy(update={"network": {**cfg.teacher.network, "block_out_channels": levels}})
    return changed(cfg.model_copy(update={"teacher": teacher}), 2, "fp32")


def act(phase: str, width: int) -> None:
    """In a process of its own: start, update once with zero gradients and save; or start and resume."""
    peaks, before = [0], status("RssAnon")

    def watch() -> None:
        while True:
            peaks[0] = max(peaks[0], status("RssAnon"))
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    cfg, here = config(width), Path()
    t = Training(RunId("b", "b", 0), cfg, Hardware(), Inputs(here / "manifest.json", here / "set.json", None, None))
    if phase == "resume":
        t.resume()
    weights = sum(p.nbytes for module in t.trained.values() for p in module.parameters())
    started = peaks[0] - before
    if phase == "start":
        for optimiser in t.optimisers.values():
            for p in optimiser.parameters:
                p.grad = torch.zeros_like(p)
            optimiser.adamw.step()
        t.step = 1
        t.checkpoints.save(1, t.state())
    print(f"{phase}: trained weights {weights / GB:.2f} GB; peak above the libraries, anonymous {started / GB:.2f} GB, "
          f"VmHWM {status('VmHWM') / GB:.2f} GB")  # fmt: skip


def main(width: Annotated[int, typer.Option(help="channels of the first level")] = 192, phase: str = "") -> None:
    if phase:
        return act(phase, width)
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(width)
        random_teacher(cfg, Path(folder))
        path = Path(folder, "set.safetensors")
        save_shard(path, {name: t for name, t in random_rows(cfg, 2).tensors.items() if name != "noise"})
        write_json(Path(folder, "set.json"), {"files": listing([path], Path(folder))})
        root = Path(__file__).parents[1]
        env = os.environ | {"PYTHONPATH": str(root)}
        os.symlink(root / "workflow", Path(folder, "workflow"))
        for name in ("start", "resume"):
            command = [sys.executable, "-m", "benchmarks.resume_memory", "--width", str(width), "--phase", name]
            subprocess.run(command, cwd=folder, env=env, check=True)


if __name__ == "__main__":
    typer.run(main)
