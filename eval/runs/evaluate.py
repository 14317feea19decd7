"""Measure a student's snapshots, or the teacher's samplers: images go from the sampler to the detector as tensors."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from dmd2.core.distributed import Device, local_device
from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import atomic, read_json, read_json_lines, verified, write_json
from dmd2.core.precision import float32_products
from dmd2.core.progress import Progress
from dmd2.core.provenance import recorded, sole_maker
from dmd2.core.run import RunId, commit
from dmd2.data.prompts import EvalPrompts
from dmd2.data.sets import load_shard
from dmd2.experiment.config import RunConfig, Sampler
from dmd2.experiment.metrics import SETTLED
from dmd2.experiment.run_inputs import measured_with
from dmd2.networks.denoisers import SAMPLING, Denoiser
from dmd2.networks.lora import split
from dmd2.networks.quantise import quantise
from dmd2.training.sampling import sample_teacher, student_sample, to_images
from dmd2.training.teachers import build_network, load_teacher, wrap
from eval.pixels import grid
from eval.pixels.resize import resize_uint8
from eval.runs.protocol import Measured, Protocol, Sample, save_influence

SCRATCH = "features"  # folder of the features beside metrics.json, gone once those are written


@dataclass(frozen=True)
class Students:
    """The snapshots of a finished run, one network that takes the weights of each; `images` decodes what it makes."""

    run: RunId
    cfg: RunConfig
    device: torch.device
    network: Denoiser
    record: dict[str, Any]
    images: Callable[[Tensor], Tensor]
    prompts: EvalPrompts | None

    @staticmethod
    def of(run: RunId, cfg: RunConfig, device: torch.device) -> "Students":
        """Snapshots as train.json lists them.

        Raises:
            UserError: the run or its teacher is missing or damaged.
        """
        spec = cfg.teacher
        if cfg.released_whole:
            plain = build_network(spec.network or {}, seed=0)
            network = wrap(plain, spec.parameterisation, SAMPLING[cfg.eval.precision]).eval().to(device)
        else:
            network = teacher_of(cfg, device)  # same network, other weights
        record = read_json(run.folder / "train.json")
        return Students(run, cfg, device, network, record, to_images(cfg, device), EvalPrompts.of(cfg))

    def sample(self, seeds: list[int]) -> Tensor:
        """Images of the snapshot that was loaded last."""
        cond = None if self.prompts is None else self.prompts.condition(seeds, self.device)
        with float32_products(self.cfg.eval.precision):
            return self.images(student_sample(self.network, self.cfg, seeds, self.device, self.cfg.eval.labels, cond))

    def loaded(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Step of every snapshot and what its images depend on, after its weights were verified and loaded."""
        generator = self.cfg.generator.model_dump(mode="json")
        for entry in self.record["files"]:
            plain, _ = split(load_shard(verified(self.run.folder, entry)))  # low-rank factors are merged in it
            self.network.network.load_state_dict(plain)
            yield int(Path(entry["path"]).stem), {"weights": entry["sha256"], "generator": generator}


def evaluate_run(run: RunId, cfg: RunConfig, device: torch.device, out: Path) -> None:
    """Write metrics of every snapshot of a finished run, its brightness stability and its fixed-noise grid."""
    protocol, students = Protocol.of(cfg, device), Students.of(run, cfg, device)
    record = students.record
    stability = brightness_stability(run, record)
    scratch = out.with_name(SCRATCH)
    snapshots: list[dict[str, Any]] = []
    found: dict[int, Measured] = {}
    progress = Progress(f"evaluate {run}", len(record["files"]))
    started = time.monotonic()
    for step, identity in students.loaded():
        found[step] = measured = protocol.measure(students.sample, identity, scratch)
        snapshots.append({"step": step, "student_updates": cfg.critic.student_updates(step), **measured.as_json()})
        progress.update(len(snapshots), {name: e.value for name, e in measured.estimates.items()})
    captions = _save_grid(cfg, students.sample, out.with_name("grid.png"))
    write_json(out, {
        "kind": "metrics", "run": str(run), "key": record["key"], "row": run.name, "seed": run.seed,
        "protocol": protocol.names, **captions,
        **stability, "snapshots": snapshots,
        "student_updates": record["student_updates"], "seconds": record["seconds"], "device": record["device"],
        "deterministic": record.get("deterministic", record["device"] == "cpu"),
        "cost": record["cost"], "train_commit": record["commit"], "eval_commit": commit(),
        "train_code": record.get("code", []),
        "config": cfg.model_dump(mode="json"), "eval_seconds": round(time.monotonic() - started, 1),
        "files": save_influence(out.with_name("influence.safetensors"), found),
    })  # fmt: skip
    shutil.rmtree(scratch, ignore_errors=True)


def brightness_stability(run: RunId, record: dict[str, Any]) -> dict[str, float]:
    """SD of the fixed-noise brightness over training.

    Nothing for a released student, whose training is unknown, and where fewer than two values were logged.

    Raises:
        UserError: the log is not that of the training in `record`.
    """
    if "released" in record:
        return {}
    path, steps = run.folder / "log.jsonl", record["steps"]
    log = [line for line in read_json_lines(path) if line["step"] <= steps]
    if json.dumps(log[-1] if log else {}) != json.dumps(record.get("last", log[-1] if log else {})):
        raise UserError(f"{path} is of another training than train.json: one was begun since; finish it with Snakemake")
    settled = [line["probe/brightness"] for line in log if line["step"] >= SETTLED * steps]
    return {"brightness_std": float(np.std(settled))} if len(settled) > 1 else {}


def evaluate_teacher(cfg: RunConfig, name: str, spec: Sampler, device: torch.device, out: Path) -> None:
    """Write the same metrics for one sampler of the teacher, from the same sample seeds."""
    protocol, started = Protocol.of(cfg, device), time.monotonic()
    sample, identity = teacher_sampler(cfg, spec, device)
    scratch = out.with_name(SCRATCH)
    measured = protocol.measure(sample, identity, scratch)
    captions = _save_grid(cfg, sample, out.with_name("grid.png"))
    write_json(out, {
        "kind": "metrics", "run": f"{out.parent.parent.name}/teacher-{name}", "row": f"teacher-{name}", "seed": 0,
        "protocol": protocol.names, **captions,
        "network_calls": spec.network_calls, "sampler": spec.model_dump(mode="json"),
        "snapshots": [{"step": 0, "student_updates": 0, **measured.as_json()}], "eval_commit": commit(),
        "seconds": round(time.monotonic() - started, 1),
        "files": save_influence(out.with_name("influence.safetensors"), {0: measured}),
    })  # fmt: skip
    shutil.rmtree(scratch, ignore_errors=True)


def teacher_of(cfg: RunConfig, device: torch.device) -> Denoiser:
    """The teacher that a config names."""
    precision = SAMPLING[cfg.eval.precision]
    return load_teacher(measured_with(cfg)["teacher"], cfg.teacher.parameterisation, precision).to(device)


def teacher_sampler(cfg: RunConfig, spec: Sampler, device: torch.device) -> tuple[Sample, dict[str, Any]]:
    """Images of seeds by one of the teacher's samplers, and what they depend on."""
    teacher = teacher_of(cfg, device)
    files = read_json(measured_with(cfg)["teacher"])["files"]
    identity = {"teacher": files, "sampler": spec.model_dump(mode="json")}
    images, prompts = to_images(cfg, device), EvalPrompts.of(cfg)

    def sample(seeds: list[int]) -> Tensor:
        cond = None if prompts is None else prompts.condition(seeds, device)
        with float32_products(cfg.eval.precision):
            return images(sample_teacher(teacher, cfg, spec, seeds, device, cond))

    return sample, identity


def _save_grid(cfg: RunConfig, sample: Sample, out: Path) -> dict[str, list[str]]:
    """PNG of fixed-noise samples: one column a class or prompt (of the first ten), `grid.ROWS` rows, no margins.

    Returns:
        The ``captions`` of the columns, nothing for classes.
    """
    prompts = EvalPrompts.of(cfg)
    kinds = cfg.data.classes if prompts is None else len(prompts.captions)
    columns = min(grid.COLUMNS, kinds)
    rows = [[column + row * kinds for column in range(columns)] for row in range(grid.ROWS)]
    seeds = [seed for row in rows for seed in row]
    batches = [seeds] if prompts is None else rows  # decoded images are large
    images = torch.cat([_shown(quantise(sample(batch), cfg.eval.rounding).cpu()) for batch in batches]).numpy()
    c, h, w = images.shape[1:]
    tiled = images.reshape(grid.ROWS, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(grid.ROWS * h, columns * w, c)
    with atomic(out) as temporary:
        Image.fromarray(tiled.squeeze(-1) if c == 1 else tiled).save(temporary, format="PNG")
    return {} if prompts is None else {"captions": prompts.captions[:columns]}


def _shown(images: Tensor) -> Tensor:
    """Images as they stand in a grid: those of a thousand pixels would make it a hundred megabytes."""
    return resize_uint8(images, grid.SIDE) if images.shape[-1] > grid.SIDE else images


app = typer.Typer(help=__doc__)
Config = Annotated[str, typer.Option(help="JSON of the run")]
Part = Annotated[int | None, typer.Option(help="only fill the features that fall to job PART of eval.shards")]


@app.command()
def run(name: str, out: Path, config: Config, part: Part = None, threads: int = 1, device: Device = "auto") -> None:
    """Evaluate every snapshot of the run NAME (base/run/seedN)."""
    torch.set_num_threads(threads)
    with readable_errors():
        run, cfg = RunId.parse(name), RunConfig.model_validate(json.loads(config))
        place = local_device(device, "evaluate")
        if part is None:
            inputs = [*measured_with(cfg).values(), run.folder / "train.json"]
            with recorded(out, json.loads(config), inputs, beside=[out.with_name("grid.png")]):
                evaluate_run(run, cfg, place, out)
            return
        with sole_maker(out):
            protocol, students = Protocol.of(cfg, place), Students.of(run, cfg, place)
            for _, identity in students.loaded():
                protocol.fill(students.sample, identity, out.with_name(SCRATCH), part)
            write_json(out, {"kind": "features", "run": name, "part": part, "shards": cfg.eval.shards})


@app.command()
def teacher(
    sampler: str, out: Path, config: Config, part: Part = None, threads: int = 1, device: Device = "auto"
) -> None:
    """Evaluate one of the teacher's samplers."""
    torch.set_num_threads(threads)
    with readable_errors():
        cfg, place = RunConfig.model_validate(json.loads(config)), local_device(device, "evaluate")
        spec = cfg.eval.teacher_samplers[sampler]
        if part is None:
            with recorded(out, json.loads(config), measured_with(cfg).values(), beside=[out.with_name("grid.png")]):
                evaluate_teacher(cfg, sampler, spec, place, out)
            return
        with sole_maker(out):
            Protocol.of(cfg, place).fill(*teacher_sampler(cfg, spec, place), out.with_name(SCRATCH), part)
            write_json(out, {"kind": "features", "sampler": sampler, "part": part, "shards": cfg.eval.shards})


if __name__ == "__main__":
    app()
