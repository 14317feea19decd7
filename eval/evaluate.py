"""Measure a student's snapshots, or the teacher's samplers: images go from the sampler to the detector as tensors."""

import json
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

from dmd2.config import RunConfig, Sampler
from dmd2.data import load_shard
from dmd2.denoisers import Denoiser
from dmd2.errors import UserError, readable_errors
from dmd2.files import atomic, read_json, read_json_lines, verified, write_json
from dmd2.progress import Progress
from dmd2.rng import sample_labels
from dmd2.run import RunId, commit
from dmd2.sample import quantise, sample_teacher, student_sample
from dmd2.teachers import load_teacher
from eval.claims import SETTLED
from eval.detectors import Detector, load_detector
from eval.stats import FeatureStats, describe, frechet_distance, load_stats, ones_initialised

REFS = Path("data/refs")
KNOWN_METRICS = ("fd", "accuracy", "brightness")
GRID_ROWS = 6  # fixed-noise samples shown per class

Sample = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Protocol:
    """Everything a number depends on besides the weights."""

    cfg: RunConfig
    detector: Detector
    reference: FeatureStats
    names: dict[str, Any]

    @staticmethod
    def of(cfg: RunConfig) -> "Protocol":
        """Load what the run's eval section names.

        Raises:
            UserError: a metric is unknown, or a detector or reference is missing.
        """
        unknown = [name for name in cfg.eval.metrics if name not in KNOWN_METRICS]
        if unknown:
            raise UserError(f"eval.metrics: {unknown[0]} cannot be measured by this version; known: {KNOWN_METRICS}")
        reference = REFS / f"{cfg.eval.reference}-{cfg.eval.detector}" / "manifest.json"
        stats = load_stats(reference)
        names = {
            "detector": describe(Path("data/weights") / cfg.eval.detector / "manifest.json"),
            "reference": f"{describe(reference)} ({stats.count} images)",
            "images": cfg.eval.images, "draws": cfg.eval.draws, "labels": cfg.eval.labels,
            "rounding": cfg.eval.rounding, "covariance_init": cfg.eval.covariance_init,
        }  # fmt: skip
        return Protocol(cfg, load_detector(cfg.eval.detector), stats, names)

    def measure(self, sample: Sample) -> dict[str, float]:
        """Metrics of a sampler, averaged over draws; draw d uses the sample seeds d*images ... (d+1)*images - 1."""
        n = self.cfg.eval.images
        draws = [self._draw(sample, range(d * n, (d + 1) * n)) for d in range(self.cfg.eval.draws)]
        return {name: float(np.mean([draw[name] for draw in draws])) for name in self.cfg.eval.metrics}

    def _draw(self, sample: Sample, seeds: range) -> dict[str, float]:
        stats: FeatureStats | None = None
        right, brightness = 0, 0.0
        for chunk in _chunks(seeds, self.cfg.eval.batch):
            images = quantise(sample(chunk), self.cfg.eval.rounding).cpu()
            features, logits = self.detector(images)
            part = FeatureStats.of(features)
            stats = part if stats is None else stats.merge(part)
            brightness += float(images.double().mean(dim=(1, 2, 3)).sum()) / 255
            if logits is not None:
                labels = sample_labels(chunk, self.cfg.data.classes, self.cfg.eval.labels)
                right += int(logits.argmax(1).eq(labels).sum())
        assert stats is not None
        if self.cfg.eval.covariance_init == "ones":
            stats = ones_initialised(stats)
        fd = frechet_distance(stats, self.reference)
        return {"fd": fd, "accuracy": right / len(seeds), "brightness": brightness / len(seeds)}


def _chunks(seeds: range, size: int) -> Iterator[list[int]]:
    for start in range(0, len(seeds), size):
        yield list(seeds[start : start + size])


def evaluate_run(run: RunId, cfg: RunConfig, device: torch.device, out: Path) -> None:
    """Write metrics of every snapshot of a finished run, its brightness stability and its fixed-noise grid."""
    record = read_json(run.folder / "train.json")
    protocol = Protocol.of(cfg)
    teacher = load_teacher(Path("data/teachers") / cfg.teacher.name / "manifest.json", cfg.teacher.parameterisation)
    student = teacher.to(device)  # same network; its weights are replaced below

    def sample(seeds: list[int]) -> Tensor:
        return student_sample(student, cfg, seeds, device, cfg.eval.labels)

    snapshots: list[dict[str, Any]] = []
    progress = Progress(f"evaluate {run}", len(record["files"]))
    started = time.monotonic()
    for entry in record["files"]:
        step = int(Path(entry["path"]).stem)
        student.network.load_state_dict(load_shard(verified(run.folder, entry)))
        values = protocol.measure(sample)
        snapshots.append({"step": step, "student_updates": -(-step // cfg.critic.ratio), **values})
        progress.update(len(snapshots), {name: torch.tensor(value) for name, value in values.items()})
    _save_grid(student, cfg, sample, out.with_name("grid.png"))
    log = [line for line in read_json_lines(run.folder / "log.jsonl") if line["step"] >= SETTLED * record["steps"]]
    write_json(out, {
        "kind": "metrics", "run": str(run), "row": run.name, "seed": run.seed, "protocol": protocol.names,
        "brightness_std": float(np.std([line["probe/brightness"] for line in log])), "snapshots": snapshots,
        "student_updates": record["student_updates"], "seconds": record["seconds"], "device": record["device"],
        "cost": record["cost"], "train_commit": record["commit"], "eval_commit": commit(),
        "config": cfg.model_dump(mode="json"), "eval_seconds": round(time.monotonic() - started, 1),
    })  # fmt: skip


def evaluate_teacher(cfg: RunConfig, name: str, spec: Sampler, device: torch.device, out: Path) -> None:
    """Write the same metrics for one sampler of the teacher, from the same sample seeds."""
    protocol = Protocol.of(cfg)
    teacher = load_teacher(Path("data/teachers") / cfg.teacher.name / "manifest.json", cfg.teacher.parameterisation)
    teacher.to(device)

    def sample(seeds: list[int]) -> Tensor:
        return sample_teacher(teacher, cfg, spec, seeds, device)

    started = time.monotonic()
    values = protocol.measure(sample)
    _save_grid(teacher, cfg, sample, out.with_name("grid.png"))
    calls = 2 * spec.steps - 1 if spec.solver == "heun" else spec.steps
    write_json(out, {
        "kind": "metrics", "run": f"{cfg.data.name}/teacher-{name}", "row": f"teacher-{name}", "seed": 0,
        "protocol": protocol.names, "network_calls": calls, "sampler": spec.model_dump(mode="json"),
        "snapshots": [{"step": 0, "student_updates": 0, **values}], "eval_commit": commit(),
        "seconds": round(time.monotonic() - started, 1),
    })  # fmt: skip


def _save_grid(network: Denoiser, cfg: RunConfig, sample: Sample, out: Path) -> None:
    """PNG of fixed-noise samples: one column a class (of the first ten), `GRID_ROWS` rows, no margins."""
    columns = min(10, cfg.data.classes)
    seeds = [column + row * cfg.data.classes for row in range(GRID_ROWS) for column in range(columns)]
    images = quantise(sample(seeds), cfg.eval.rounding).cpu().numpy()
    c, h, w = images.shape[1:]
    grid = images.reshape(GRID_ROWS, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(GRID_ROWS * h, columns * w, c)
    with atomic(out) as temporary:
        Image.fromarray(grid.squeeze(-1) if c == 1 else grid).save(temporary, format="PNG")


app = typer.Typer(help=__doc__)
Config = Annotated[str, typer.Option(help="JSON of the run")]


@app.command()
def run(name: str, out: Path, config: Config, threads: int = 1) -> None:
    """Evaluate every snapshot of the run NAME (base/run/seedN)."""
    torch.set_num_threads(threads)
    with readable_errors():
        evaluate_run(RunId.parse(name), RunConfig.model_validate(json.loads(config)), torch.device(_device()), out)


@app.command()
def teacher(sampler: str, out: Path, config: Config, threads: int = 1) -> None:
    """Evaluate one of the teacher's samplers."""
    torch.set_num_threads(threads)
    with readable_errors():
        cfg = RunConfig.model_validate(json.loads(config))
        evaluate_teacher(cfg, sampler, cfg.eval.teacher_samplers[sampler], torch.device(_device()), out)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    app()
