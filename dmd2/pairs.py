"""Noise-image pairs of the teacher for the regression loss, in shards addressed by seed (DMD Sec. 4.2)."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from dmd2.condition import Condition
from dmd2.config import Data, Pairs, Section, Teacher, TrainConfig
from dmd2.data import save_shard
from dmd2.distributed import local_device, part
from dmd2.errors import UserError, readable_errors
from dmd2.files import listing, read_json, verified, write_json
from dmd2.made import recorded
from dmd2.progress import Progress
from dmd2.rng import sample_labels, sample_noise

FIRST_SEED = 1_000_000_000  # far from the seeds that evaluation uses
BATCH = 250
CPU = torch.device("cpu")


class PairSource(Section):
    """The part of a regression section that makes pairs."""

    pairs: Pairs


class PairsConfig(Section):
    """All that pairs depend on: a row's loss weights or length neither change nor remake them."""

    data: Data
    teacher: Teacher
    regression: PairSource


def shard_seeds(count: int, shards: int, index: int) -> range:
    """Seeds of one shard: contiguous, every seed in exactly one shard, sizes differing by at most one."""
    rows = part(count, shards, index)
    return range(FIRST_SEED + rows.start, FIRST_SEED + rows.stop)


def make_shard(
    cfg: PairsConfig | TrainConfig, teacher_manifest: Path, index: int, out: Path, device: torch.device = CPU
) -> None:
    """Write shard `index` (noise, images, labels) and its manifest `out`; the teacher samples on `device`."""
    from dmd2.samplers import teacher_sample  # diffusers takes seconds to import, which joining shards need not pay
    from dmd2.teachers import load_teacher, null_condition

    seeds = list(shard_seeds(cfg.regression.pairs.count, cfg.regression.pairs.shards, index))
    teacher = load_teacher(teacher_manifest, cfg.teacher.parameterisation).to(device)
    spec, data = cfg.regression.pairs.sampler, cfg.data
    shape = (data.channels, data.resolution, data.resolution)
    null = null_condition(cfg.data, spec.guidance)
    noise, images, labels = [], [], []
    progress = Progress(f"pairs {out.parent.parent.name}/{out.parent.name} shard {index}", len(seeds))
    for start in range(0, len(seeds), BATCH):
        chunk = seeds[start : start + BATCH]
        z, drawn = sample_noise(chunk, shape, "noise"), sample_labels(chunk, cfg.data.classes, "random")
        unconditional = null and null.expand(len(chunk)).to(device)
        cond = Condition(labels=drawn.to(device))
        images.append(teacher_sample(teacher, z.to(device), cond, unconditional, spec, _no_noise).cpu())
        noise.append(z)
        labels.append(drawn)
        progress.update(start + len(chunk), {})
    path = out.with_suffix(".safetensors")
    save_shard(path, {"noise": torch.cat(noise), "images": torch.cat(images), "labels": torch.cat(labels)})
    write_json(out, {"kind": "pairs-shard", "seeds": [seeds[0], seeds[-1]], "files": listing([path], out.parent)})


def _no_noise(step: int) -> torch.Tensor:
    raise UserError("regression.pairs.sampler is stochastic: pairs need a deterministic one (churn and eta 0)")


def join_shards(shards: list[Path], out: Path) -> None:
    """One manifest over all shards, after verifying each file."""
    entries = [entry for shard in shards for entry in read_json(shard)["files"]]
    for entry in entries:
        verified(out.parent, entry)
    seeds = [read_json(shard)["seeds"] for shard in shards]
    count = sum(last - first + 1 for first, last in seeds)
    write_json(out, {"kind": "pairs", "count": count, "seeds": [seeds[0][0], seeds[-1][1]], "files": entries})


app = typer.Typer(help=__doc__)


@app.command()
def shard(
    config: Annotated[str, typer.Option(help="JSON of data, teacher and regression.pairs")],
    teacher: Path,
    index: int,
    out: Path,
    threads: int = 1,
) -> None:
    """Make one shard."""
    torch.set_num_threads(threads)
    with readable_errors():
        with recorded(out, json.loads(config), [teacher]):
            make_shard(PairsConfig.model_validate(json.loads(config)), teacher, index, out, local_device("auto"))


@app.command()
def join(out: Path, shards: list[Path]) -> None:
    """Write the manifest OUT of finished SHARDS."""
    with readable_errors():
        with recorded(out, None, shards):
            join_shards(shards, out)


if __name__ == "__main__":
    app()
