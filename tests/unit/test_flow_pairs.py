"""Teacher pairs of flow-matching transformers from encoded prompts: the images that the family's own pipeline makes."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dmd2.core.files import listing, write_json
from dmd2.data.sets import condition_of, load_set, save_shard
from dmd2.experiment.config import Teacher
from dmd2.experiment.run_inputs import pair_prompts, pipeline_manifest
from dmd2.networks.transformers.family import FAMILIES
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.pairs import join_shards, make_shard
from tests import tiny as tiny_run
from tests.tiny_flow_pipelines import condition, kept_of, latents_of, pipeline_of, prompts
from tests.tiny_transformers import tiny

pytestmark = pytest.mark.usefixtures("own_folder")


def stored(cond, dtype):
    """Rows of a condition as sets keep them."""
    found = {name: value for name, value in vars(cond).items() if value is not None}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


def written(manifest, name, rows):
    """The manifest of a set of `rows` in one shard of this name."""
    save_shard(manifest.parent / name, rows)
    write_json(manifest, {"files": listing([manifest.parent / name], manifest.parent)})


def configured(kind, solver, guidance):
    return tiny_run.config(
        "eps-text", data__text={"pipeline": {"name": "tiny"}, "latents": True}, teacher__parameterisation="flow",
        teacher__shift=3.0, teacher__rescale="row" if kind == "Lumina2Transformer2DModel" else None,
        generator__time=1.0, critic__weighting="v", regression__weight=1.0,
        regression__pairs={"count": 3, "shards": 2, "sampler": {"solver": solver, "steps": 4, "guidance": guidance}},
    )  # fmt: skip


def made(cfg, teacher):
    parts = [teacher.parent / f"shard-{i}.json" for i in range(2)]
    for i, part in enumerate(parts):
        make_shard(cfg, teacher, i, part)
    join_shards(parts, teacher.parent / "pairs.json")
    return load_set(teacher.parent / "pairs.json").tensors


@pytest.mark.parametrize("kind", FAMILIES)
def test_pairs_are_those_of_the_familys_own_pipeline(kind, tmp_path):
    network, kept = tiny(kind), kept_of(kind) or (None, None)
    network.save_pretrained(tmp_path / "unet")
    teacher = adopt_teacher(Teacher(name="t", parameterisation="flow", guidance=1.0), tmp_path)
    euler, heun = (configured(kind, solver, 3.0) for solver in ("euler", "heun"))
    # Two prompts with a state beyond float16's range, as of Lumina2 and Z-Image.
    cond, null = (condition(seed, some) for seed, some in zip((1, 2), kept, strict=True))
    cond.text[:, 0, 0] = 1e5
    dtype, first = torch.bfloat16, null.parts(1)[0]
    written(pair_prompts(euler.data), "0.safetensors", stored(cond, dtype))
    written(pipeline_manifest(euler.data), "null.safetensors", stored(first, dtype))
    pairs = made(euler, teacher)
    assert pairs["text"].dtype == dtype and ("text_mask" in pairs) == (kept != (None, None))
    flux = kind == "FluxTransformer2DModel"
    guidance = {"true_cfg_scale": 3.0} if flux else {"guidance_scale": 3.0 - kind.startswith("ZImage")}
    drawn, nulls = condition_of(pairs), condition_of(stored(first, dtype)).expand(3)
    theirs = latents_of(
        kind, pipeline_of(kind, network, FlowMatchEulerDiscreteScheduler(shift=3.0)), pairs["noise"],
        sigmas=[1.0, 0.75, 0.5, 0.25], **prompts(kind, drawn), **prompts(kind, nulls, "negative_"), **guidance,
    )  # fmt: skip
    assert torch.isfinite(theirs).all() and theirs.std() > 0.5
    assert (theirs - pairs["images"]).abs().max() < 1e-4 * theirs.abs().max()
    assert (made(heun, teacher)["images"] - theirs).abs().max() > 1e-3
