"""Noise-image pairs of the teacher for the regression loss, in shards addressed by seed (DMD Sec. 4.2)."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from dmd2.core.distributed import rows_of_part
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.core.progress import Progress
from dmd2.core.rng import sample_labels, sample_noise
from dmd2.core.upload import upload
from dmd2.data.sets import CONDITIONS, Rows, condition_of, load_set, save_shard
from dmd2.experiment.config import Data, Section, Teacher, TrainConfig
from dmd2.experiment.method_config import Pairs
from dmd2.experiment.run_inputs import pair_prompts

FIRST_SEED = 1_000_000_000  # far from the seeds that evaluation uses
BATCH = 250
ELEMENTS = 1 << 18  # latent values that a text-to-image network samples at once: 16 images of 512 pixels, 4 of 1024
CPU = torch.device("cpu")


class PairSource(Section):
    """The part of a regression section that pairs depend on."""

    pairs: Pairs


class PairsConfig(Section):
    """All that pairs depend on. Other settings of a row, such as loss weights, do not make them again."""

    data: Data
    teacher: Teacher
    regression: PairSource


def shard_seeds(count: int, shards: int, index: int) -> range:
    """Seeds of one shard: contiguous, every seed in exactly one shard, sizes differing by at most one."""
    rows = rows_of_part(count, shards, index)
    return range(FIRST_SEED + rows.start, FIRST_SEED + rows.stop)


def make_shard(
    cfg: PairsConfig | TrainConfig, teacher_manifest: Path, index: int, out: Path, device: torch.device = CPU
) -> None:
    """Write shard `index` (noise, images, conditions) and its manifest `out`; the teacher samples on `device`."""
    from dmd2.core.precision import float32_products
    from dmd2.method.samplers import (
        teacher_sample,  # diffusers takes seconds to import, which joining shards need not pay
    )
    from dmd2.networks.denoisers import SAMPLING
    from dmd2.training.teachers import load_teacher, null_condition

    pairs, data = cfg.regression.pairs, cfg.data
    assert pairs is not None  # of a run that has them
    spec = pairs.sampler
    form, precision = cfg.teacher.parameterisation, SAMPLING[pairs.precision]
    teacher = load_teacher(teacher_manifest, form, precision, **cfg.teacher.flow).to(device)
    seeds = list(shard_seeds(pairs.count, pairs.shards, index))
    shape = data.shape
    null = null_condition(cfg.data, spec.guidance, teacher.network)
    conditions, rows = _conditions(cfg), list[dict[str, torch.Tensor]]()
    progress = Progress(f"pairs {out.parent.parent.name}/{out.parent.name} shard {index}", len(seeds))
    batch = BATCH if data.text is None else max(1, min(BATCH, ELEMENTS // math.prod(shape)))
    for start in range(0, len(seeds), batch):
        chunk = seeds[start : start + batch]
        z, drawn = sample_noise(chunk, shape, "noise"), conditions(chunk)
        cond = condition_of(drawn).to(device)
        unconditional = null and null.to(device).expand(len(chunk))
        with float32_products(pairs.precision):
            images = teacher_sample(teacher, upload(z, device), cond, unconditional, spec, _no_noise)
        rows.append({"noise": z, "images": images.cpu(), **drawn})
        progress.update(start + len(chunk), {})
    path = out.with_suffix(".safetensors")
    save_shard(path, {name: torch.cat([row[name] for row in rows]) for name in rows[0]})
    about = {"kind": "pairs-shard", "seeds": [seeds[0], seeds[-1]], "precision": pairs.precision}
    write_json(out, {**about, "files": listing([path], out.parent)})


def _conditions(cfg: PairsConfig | TrainConfig) -> Callable[[list[int]], Rows]:
    """Conditions of pair seeds as sets keep them: none, uniform labels, or prompts drawn from those of training."""
    manifest = pair_prompts(cfg.data)
    if manifest is None:
        if not cfg.data.labelled:
            return lambda _: {}
        return lambda seeds: {"labels": sample_labels(seeds, cfg.data.classes, "random")}
    prompts = load_set(manifest)
    return lambda seeds: prompts.rows(sample_labels(seeds, len(prompts), "random"), CONDITIONS)


def _no_noise(step: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def join_shards(shards: list[Path], out: Path) -> None:
    """One manifest over all shards, after verifying each file."""
    entries = [entry for shard in shards for entry in read_json(shard)["files"]]
    for entry in entries:
        verified(out.parent, entry)
    seeds = [read_json(shard)["seeds"] for shard in shards]
    count = sum(last - first + 1 for first, last in seeds)
    write_json(out, {"kind": "pairs", "count": count, "seeds": [seeds[0][0], seeds[-1][1]], "files": entries})
