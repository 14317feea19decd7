"""Exported students of flow-matching transformers: what diffusers' own pipelines make of the folder, as its card tells it."""

import json
import re
import runpy
from copy import deepcopy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd2.core.run import RunId
from dmd2.data.make_pipeline import make_pipeline
from dmd2.data.pipelines import Pipeline
from dmd2.experiment.config import Data, Teacher
from dmd2.experiment.data_config import Text
from dmd2.method.samplers import few_step
from dmd2.networks.quantise import quantise
from dmd2.networks.transformers.family import FAMILIES
from dmd2.publish.diffusers_folder import export
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.sampling import student_sample
from dmd2.training.snapshot import find_snapshot
from dmd2.training.teachers import wrap
from tests import tiny as tiny_run
from tests import tiny_flow_pipelines, tiny_pipelines
from tests.exported import run_alone, student, trained, written
from tests.tiny_flow_pipelines import SHAPE, condition, kept_of, latents_of, pipeline_of, prompts, transformer_class
from tests.tiny_pipelines import LATENTS
from tests.tiny_transformers import tiny
from tests.unit.test_lora import ALPHA, RANK, with_factors

SHIFT, SEED, PROMPT = 3.0, 3, "a red cat on the beach"
OUT = Path("out")
TEXT = {"pipeline": {"name": "tiny"}, "latents": True}
DATA = Data(name="set", source={"kind": "latents"}, resolution=LATENTS, channels=4, classes=0, text=TEXT)
pytestmark = pytest.mark.usefixtures("own_folder")


def exported(network, steps, base=None, **changes):
    """The folder of a student with these weights, and its config."""
    (base or network).save_pretrained("data/teachers/tiny/unet", safe_serialization=True)
    adopt_teacher(Teacher(name="tiny", parameterisation="flow", guidance=1.0), Path("data/teachers/tiny"))
    generator = {"input": "noise" if steps == 1 else "backward_simulation", "steps": steps, "time": 1.0}
    cfg = tiny_run.config(
        "eps-text", generator=generator | ({"lora": {"rank": RANK, "alpha": ALPHA}} if base else {}),
        **{"teacher__name": "tiny", "teacher__parameterisation": "flow", "teacher__shift": SHIFT,
           "teacher__guidance_embed": 2.5, "critic__weighting": "v",
           "data__text": TEXT, **changes},
    ).training()  # fmt: skip
    export(find_snapshot(written(RunId("tiny", "student", 0), cfg, network)), OUT)
    return cfg


def close(theirs, ours):
    assert theirs.shape == ours.shape and ours.std() > 0.1
    assert (theirs - ours).abs().max() < 1e-4 * max(1.0, float(ours.abs().max()))


@torch.no_grad()
def ours(network, cfg, z, cond, noise):
    """Latents of our sampler at these draws."""
    denoiser = wrap(network, "flow", **cfg.teacher.flow)
    times = denoiser.schedule.step_times(cfg.generator.steps, 1.0)
    return few_step(denoiser, z, times, cond, noise and noise.__getitem__)


def loaded(kind):
    """The network and scheduler of the exported folder, by diffusers."""
    network = getattr(diffusers, kind).from_pretrained(OUT, subfolder="transformer")
    return network, diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(OUT, subfolder="scheduler")


@pytest.mark.parametrize(
    ("kind", "steps", "sampler"),
    [*((kind, steps, "renoise") for kind in FAMILIES for steps in (1, 4)), ("SanaTransformer2DModel", 3, "euler")],
)
def test_the_familys_own_pipeline_makes_our_latents_as_the_card_says(kind, steps, sampler):
    network = tiny(kind)
    cfg = exported(network, steps, generator__sampler=sampler)
    cond, g = condition(1, (kept_of(kind) or (None,))[0]), torch.Generator().manual_seed(7)
    z = torch.randn(SHAPE, generator=g)
    card = (OUT / "README.md").read_text()
    [(sigmas, scale)] = re.findall(
        r'"a photo of a cat", height=side, width=side.*?, sigmas=(\[.*?\]), guidance_scale=([\d.]+)\)', card
    )
    pipe = pipeline_of(kind, *loaded(kind))
    torch.manual_seed(SEED)
    options = {"generator": torch.default_generator} if kind == "SanaTransformer2DModel" else {}
    theirs = latents_of(
        kind, pipe, z, sigmas=eval(sigmas), guidance_scale=float(scale), **prompts(kind, cond), **options
    )
    torch.manual_seed(SEED)
    drawn = [torch.randn((2, 16, 16) if kind == "FluxTransformer2DModel" else SHAPE) for _ in range(3)]
    noise = [pipe._unpack_latents(one, 64, 64, 8) for one in drawn] if kind == "FluxTransformer2DModel" else drawn
    close(theirs, ours(network, cfg, z, cond, noise if sampler == "renoise" else None))
    assert ("stochastic_sampling`: between" in card) == (sampler == "renoise" and steps > 1)

    # The script, from a file.
    fields = {name: value for name, value in vars(cond).items() if value is not None}
    save_file(
        {
            "noise": z,
            **{f"step{i}": one for i, one in enumerate(noise[: steps - 1 if sampler == "renoise" else 0])},
            **fields,
        },
        "inputs.safetensors",
    )
    plain = runpy.run_path(str(OUT / "sample.py"))
    close(plain["sample"](*plain["load"](), load_file("inputs.safetensors")), theirs)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_familys_own_pipeline_with_the_exported_lora_makes_our_latents(kind):
    base = tiny(kind)
    student = with_factors(base)
    cfg = exported(student, 1, base)
    cond = condition(1, (kept_of(kind) or (None,))[0])
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    pipe = pipeline_of(kind, deepcopy(base), loaded(kind)[1])
    expected, options = ours(student, cfg, z, cond, None), prompts(kind, cond)
    options |= {"sigmas": [1.0], "guidance_scale": wrap(deepcopy(base), "flow", **cfg.teacher.flow).family.unguided}
    assert (latents_of(kind, pipe, z, **options) - expected).abs().max() > 0.01
    pipe.load_lora_weights(OUT, weight_name="lora.safetensors")
    close(latents_of(kind, pipe, z, **options), expected)
    assert 'load_lora_weights(STUDENT, weight_name="lora.safetensors")' in (OUT / "README.md").read_text()


def test_factors_that_a_pipeline_cannot_load_are_merged_and_the_card_says_so(monkeypatch):
    monkeypatch.setattr(diffusers, "SanaPipeline", object)
    base = tiny("SanaTransformer2DModel")
    exported(with_factors(base), 1, base)
    assert "diffusers' `SanaPipeline` loads no LoRA" in (OUT / "README.md").read_text()
    assert not (OUT / "lora.safetensors").exists()


def test_the_card_tells_levels_shift_guidance_and_the_double_shift():
    exported(tiny("ZImageTransformer2DModel"), 4, teacher__guidance=6.0, teacher__rescale="channels")
    card = " ".join((OUT / "README.md").read_text().split())
    assert "at noise levels 1, 0.9, 0.75, 0.5, without guidance" in card
    assert "of shift 3 with `stochastic_sampling`" in card and "**unshifted** `sigmas=[1.0, 0.75, 0.5, 0.25]`" in card
    assert "A number of steps alone makes it 1, 0.858, 0.602, 0.00893, which are shifted twice, and sigmas" in card
    assert "6 in `u + s (c - u)` (Z-Image's own pipeline, which adds `s (c - u)` to `c`, calls it 5)" in card
    assert "rescaled to the norm of `c` over each of its places, is part of its weights" in card
    assert "guidance_scale=0.0" in card and "unet" not in card


def test_the_card_tells_the_range_that_guidance_was_drawn_from():
    exported(tiny("SD3Transformer2DModel"), 4, dm__guidance=[2.0, 8.0])
    card = " ".join((OUT / "README.md").read_text().split())
    assert "that of its teacher, 2 to 8, drawn for each image, in `u + s (c - u)` is part of its weights" in card


def test_a_one_step_card_has_no_levels_to_mistake_and_flux_is_told_its_guidance():
    exported(tiny("FluxTransformer2DModel"), 1)
    card = (OUT / "README.md").read_text()
    assert "stochastic_sampling" not in card and "A number of steps alone" not in card
    assert "Its guidance embedder is told 2.5" in card and "sigmas=[1.0], guidance_scale=2.5" in card


def released(family, tokens=None):
    """A pipeline whose text encoders lie in bfloat16, as published ones do, and our reading of it."""
    folder = tiny_flow_pipelines.pipeline(family, Path("data/pipelines/tiny"))
    for encoder in folder.glob("text_encoder*"):
        weights = load_file(encoder / "model.safetensors")
        save_file({n: w.bfloat16() for n, w in weights.items()}, encoder / "model.safetensors", {"format": "pt"})
        config = json.loads((encoder / "config.json").read_text())
        (encoder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    text = {**TEXT, "pipeline": {"name": "tiny", "max_sequence_length": tokens}}
    data = DATA.model_copy(update={"text": Text.model_validate(text)})
    network = getattr(diffusers, transformer_class(family)).from_pretrained(folder / "transformer")
    return folder, network, Pipeline.load(make_pipeline(data, folder, torch.device("cpu"))), text


@pytest.mark.parametrize("tokens", [None, 9])
def test_the_script_makes_images_of_prompts(tokens):
    folder, network, pipeline, text = released("sd3", tokens)
    cfg = exported(network, 4, data__text=text, data__resolution=LATENTS)
    plain = runpy.run_path(str(OUT / "sample.py"))
    [image] = plain["generate"](str(folder), [PROMPT], SEED)
    torch.manual_seed(SEED)
    z, *noise = (torch.randn(1, 4, LATENTS, LATENTS) for _ in range(4))
    latents = ours(network, cfg, z, pipeline.encode_prompts([PROMPT]), noise)
    expected = quantise(pipeline.decode(latents), "round")[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(image, dtype=np.int16) - expected).max() <= 1 < expected.std()


@pytest.mark.parametrize("precision", ["fp32", "bf16-all"])
@pytest.mark.parametrize("family", tiny_flow_pipelines.FAMILIES)
def test_the_script_samples_as_was_trained(family, precision):
    """At the size, with the tokens and in the precision of the training, whatever the pipeline has for defaults."""
    folder, network, pipeline, text = released(family, 24)
    exported(network, 1, data__text=text, data__resolution=LATENTS, train__precision=precision)
    plain, told = runpy.run_path(str(OUT / "sample.py")), []
    kind, lowered = type(network), precision == "bf16-all"
    forward = kind.forward

    def heard(self, *args, **kwargs):
        told.append(kwargs.get("encoder_hidden_states", kwargs.get("cap_feats", args[2] if len(args) > 2 else None)))
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", heard)
        [image] = plain["generate"](str(folder), [PROMPT], SEED)
    side = LATENTS * tiny_pipelines.FACTOR
    assert image.size == (side, side) and np.asarray(image).std() > 1
    states = told[0][0] if isinstance(told[0], list) else told[0]
    assert states.dtype == (torch.bfloat16 if lowered else torch.float32)
    expected = pipeline.encode_prompts([PROMPT])
    kept = expected.text_mask.sum() if family == "z-image" else expected.text.shape[1]
    assert states.shape[-2] == kept
    card = (OUT / "README.md").read_text()
    assert f"torch_dtype=torch.{'bfloat16' if lowered else 'float32'})" in card and "max_sequence_length=24" in card


def test_a_script_of_classes_alone_makes_our_images_at_the_same_noise():
    run = trained("flow-sd3", 4, first=1.0, teacher__shift=3.0)
    export(find_snapshot(run), OUT)
    run_alone((OUT / "sample.py").absolute(), ["--out", "floats.safetensors", "--seeds", "0", "1", "2", "5"])
    denoiser, cfg = student("flow-sd3", run)
    denoiser.schedule = wrap(denoiser.network, "flow", shift=3.0).schedule
    expected = student_sample(denoiser, cfg, [0, 1, 2, 5], torch.device("cpu"))
    theirs = load_file(OUT / "floats.safetensors")["images"]
    assert (theirs - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (OUT / "samples.png").exists()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_script_of_classes_has_every_familys_condition(kind):
    network = tiny(kind)
    cfg = exported(network, 1, data__text=None, data__classes=4, data__channels=4)
    plain = runpy.run_path(str(OUT / "sample.py"))
    seeds = [0, 1, 2]
    theirs = plain["sample"](*plain["load"](), plain["draw"](seeds))
    close(theirs, student_sample(wrap(network, "flow", **cfg.teacher.flow), cfg, seeds, torch.device("cpu")))
