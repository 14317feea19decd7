"""Measure a student's snapshots, or the teacher's samplers: images go from the sampler to the detector as tensors."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import atomic, read_json, read_json_lines, verified, write_json
from dmd2.core.precision import float32_products
from dmd2.core.progress import Progress
from dmd2.core.run import RunId, commit
from dmd2.data.captions import EvalPrompts
from dmd2.data.sets import load_shard
from dmd2.experiment.config import RunConfig
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.metrics import UNSETTLED
from dmd2.experiment.run_inputs import measured_with
from dmd2.experiment.teacher_config import OF_FLOW
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import SAMPLING, Denoiser
from dmd2.networks.lora import split
from dmd2.networks.quantise import quantise
from dmd2.training.sampling import sample_teacher, student_sample, to_images
from dmd2.training.teachers import build_network, load_teacher, wrap
from eval.metrics.estimate import Estimate
from eval.pixels import grid
from eval.pixels.resize import resize_uint8
from eval.runs.protocol import Protocol, save_influence

SCRATCH = "features"  # folder of the features beside metrics.json, gone once those are written


@dataclass(frozen=True)
class Generator:
    """Makes the images of sample seeds: samples under the prompt of each seed, if there are prompts, and decodes.

    `sample` makes images or latents of seeds under their conditions. `snapshots` loads the `total` snapshots one after
    the other and yields the step of each and what its images depend on besides the protocol.
    """

    cfg: RunConfig
    device: torch.device
    network: Denoiser
    sample: Callable[[list[int], Condition | None], Tensor]
    snapshots: Callable[[], Iterator[tuple[int, dict[str, Any]]]]
    total: int = 1

    @cached_property
    def images(self) -> Callable[[Tensor], Tensor]:
        """Decodes what was sampled."""
        return to_images(self.cfg, self.device)

    @cached_property
    def prompts(self) -> EvalPrompts | None:
        """The prompts of the evaluation, None for classes."""
        return EvalPrompts.of(self.cfg)

    def __call__(self, seeds: list[int]) -> Tensor:
        """Images in [-1, 1]."""
        cond = None if self.prompts is None else self.prompts.condition(seeds, self.device)
        with float32_products(self.cfg.eval.precision):
            return self.images(self.sample(seeds, cond))


def student_of(run: RunId, cfg: RunConfig, device: torch.device) -> Generator:
    """The snapshots that a run's train.json lists, loaded into one network.

    Raises:
        UserError: the run or its teacher is missing or damaged.
    """
    spec, files = cfg.teacher, read_json(run.folder / "train.json")["files"]
    if cfg.released_whole:
        plain = build_network(spec.network or {}, seed=0)
        network = wrap(plain, spec.parameterisation, SAMPLING[cfg.eval.precision], **spec.flow).eval().to(device)
    else:
        network = _teacher(cfg, device)  # same network, other weights

    def sample(seeds: list[int], cond: Condition | None) -> Tensor:
        return student_sample(network, cfg, seeds, device, cfg.eval.labels, cond)

    def snapshots() -> Iterator[tuple[int, dict[str, Any]]]:
        settings = cfg.generator.model_dump(mode="json")
        for entry in files:
            plain, _ = split(load_shard(verified(run.folder, entry)))  # low-rank factors are merged in it
            network.network.load_state_dict(plain)
            yield int(Path(entry["path"]).stem), {"weights": entry["sha256"], "generator": settings}

    return Generator(cfg, device, network, sample, snapshots, len(files))


def teacher_of(cfg: RunConfig, spec: Sampler, device: torch.device) -> Generator:
    """The teacher that a config names with one of its samplers, as one snapshot of step 0."""
    network, files = _teacher(cfg, device), read_json(measured_with(cfg)["teacher"])["files"]

    def sample(seeds: list[int], cond: Condition | None) -> Tensor:
        return sample_teacher(network, cfg, spec, seeds, device, cond)

    of_flow = cfg.teacher.settings(include=set(OF_FLOW))
    identity = {"teacher": files, "sampler": spec.model_dump(mode="json"), **of_flow}
    return Generator(cfg, device, network, sample, lambda: iter([(0, identity)]))


def _teacher(cfg: RunConfig, device: torch.device) -> Denoiser:
    teacher, precision = cfg.teacher, SAMPLING[cfg.eval.precision]
    manifest = measured_with(cfg)["teacher"]
    return load_teacher(manifest, teacher.parameterisation, precision, **teacher.flow).to(device)


def evaluate(name: str, generator: Generator, out: Path) -> dict[str, Any]:
    """Measure all snapshots, and write the influences of their images and a grid of samples beside `out`.

    Returns:
        What metrics.json says about them.
    """
    cfg, started = generator.cfg, time.monotonic()
    protocol = Protocol.of(cfg, generator.device)
    found: dict[int, dict[str, Estimate]] = {}
    listed: list[dict[str, Any]] = []
    progress = Progress(f"evaluate {name}", generator.total)
    for step, identity in generator.snapshots():
        found[step] = protocol.measure(generator, identity, out.with_name(SCRATCH))
        numbers = protocol.as_json(found[step])
        listed.append({"step": step, "student_updates": cfg.critic.student_updates(step), **numbers})
        progress.update(len(listed), {key: found[step][key].value for key in numbers["estimates"]})
    captions = _save_grid(generator, out.with_name("grid.png"))
    files = save_influence(out.with_name("influence.safetensors"), protocol.distance, found)
    seconds = round(time.monotonic() - started, 1)
    made = {"eval_commit": commit(), "eval_seconds": seconds, "files": files}
    return {"kind": "metrics", "run": name, "protocol": protocol.names, **captions, "snapshots": listed, **made}


def evaluate_run(run: RunId, cfg: RunConfig, device: torch.device, out: Path) -> None:
    """Write metrics of every snapshot of a finished run, its brightness stability and its fixed-noise grid."""
    generator, record = student_of(run, cfg, device), read_json(run.folder / "train.json")
    stability = brightness_stability(run, record)
    found = evaluate(str(run), generator, out)
    kept = {key: record[key] for key in ("key", "student_updates", "seconds", "device", "cost")}
    training = {
        "deterministic": record.get("deterministic", record["device"] == "cpu"),
        "train_commit": record["commit"],
        "train_code": record.get("code", []),
        "config": cfg.model_dump(mode="json"),
    }
    write_json(out, {**found, "row": run.name, "seed": run.seed, **stability, **kept, **training})
    shutil.rmtree(out.with_name(SCRATCH), ignore_errors=True)


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
    settled = [line["probe/brightness"] for line in log if line["step"] >= UNSETTLED * steps]
    return {"brightness_std": float(np.std(settled))} if len(settled) > 1 else {}


def evaluate_teacher(cfg: RunConfig, name: str, spec: Sampler, device: torch.device, out: Path) -> None:
    """Write the same metrics for one sampler of the teacher, from the same sample seeds."""
    found = evaluate(f"{out.parent.parent.name}/teacher-{name}", teacher_of(cfg, spec, device), out)
    seconds = found.pop("eval_seconds")
    sampler = {"network_calls": spec.network_calls, "sampler": spec.model_dump(mode="json")}
    write_json(out, {**found, "row": f"teacher-{name}", "seed": 0, **sampler, "seconds": seconds})
    shutil.rmtree(out.with_name(SCRATCH), ignore_errors=True)


def fill(generator: Generator, part: int, out: Path, about: dict[str, Any]) -> None:
    """Leave the features that fall to job `part` of ``eval.shards`` for `evaluate`, and a note of that in `out`."""
    protocol = Protocol.of(generator.cfg, generator.device)
    for _, identity in generator.snapshots():
        protocol.fill(generator, identity, out.with_name(SCRATCH), part)
    write_json(out, {"kind": "features", **about, "part": part, "shards": generator.cfg.eval.shards})


def _save_grid(generator: Generator, out: Path) -> dict[str, list[str]]:
    """PNG of fixed-noise samples: one column a class or prompt (of the first ten), `grid.ROWS` rows, no margins.

    Returns:
        The ``captions`` of the columns, nothing for classes.
    """
    cfg, prompts = generator.cfg, generator.prompts
    kinds = (cfg.data.classes or grid.COLUMNS) if prompts is None else len(prompts.captions)
    columns = min(grid.COLUMNS, kinds)
    rows = [[column + row * kinds for column in range(columns)] for row in range(grid.ROWS)]
    seeds = [seed for row in rows for seed in row]
    batches = [seeds] if prompts is None else rows  # decoded images are large
    images = torch.cat([_shown(quantise(generator(batch), cfg.eval.rounding).cpu()) for batch in batches]).numpy()
    c, h, w = images.shape[1:]
    tiled = images.reshape(grid.ROWS, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(grid.ROWS * h, columns * w, c)
    with atomic(out) as temporary:
        Image.fromarray(tiled.squeeze(-1) if c == 1 else tiled).save(temporary, format="PNG")
    return {} if prompts is None else {"captions": prompts.captions[:columns]}


def _shown(images: Tensor) -> Tensor:
    """Images as they stand in a grid: those of a thousand pixels would make it a hundred megabytes."""
    return resize_uint8(images, grid.SIDE) if images.shape[-1] > grid.SIDE else images
