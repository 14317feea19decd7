"""Latents and text states of flow-matching transformers: their own diffusers pipelines draw the same images from them."""

import shutil
from copy import deepcopy

import diffusers
import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.core.files import read_json
from dmd2.data.make_pipeline import make_pipeline
from dmd2.data.pipelines import Pipeline
from dmd2.data.prepare import text_rows
from dmd2.data.sets import TensorSet, condition_of, load_shard
from dmd2.experiment.config import Data
from dmd2.experiment.eval_config import Sampler
from dmd2.method.batches import Batches
from dmd2.method.samplers import teacher_sample
from dmd2.method.step import Models, train_step
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.schedules import shift_of_tokens
from dmd2.training.build import build_head
from dmd2.training.optimiser import Optimiser
from dmd2.training.teachers import unconditional
from tests import tiny, tiny_flow_pipelines
from tests.tiny_flow_pipelines import FAMILIES, SHIFTS, STATES
from tests.tiny_pipelines import FACTOR, LATENTS

CPU, STEPS, SIDE = torch.device("cpu"), 3, FACTOR * LATENTS
PROMPTS = ["a red cat on the beach", "the house of two dogs"]
TEXT = {"pipeline": {"name": "tiny"}, "latents": True}
DATA = Data(name="set", source={"kind": "latents"}, resolution=LATENTS, channels=4, classes=0, text=TEXT)
LENGTHS = {"sd3": 77 + 256, "flux": 512, "sana": 300, "lumina2": 256, "z-image": 512}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """Name of the family, its folder, and the pipeline as it is read of that."""
    folder = tiny_flow_pipelines.pipeline(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, Pipeline.load(make_pipeline(DATA, folder, CPU))


def sampled(family, pipe, z):
    """Images of the family's pipeline by Euler's method: of noise, in [-1, 1]."""
    options = {
        "sd3": {"guidance_scale": 4.0}, "flux": {"guidance_scale": 3.5}, "sana": {"guidance_scale": 4.0, "use_resolution_binning": False},
        "lumina2": {"guidance_scale": 4.0, "cfg_normalization": False}, "z-image": {"guidance_scale": 3.0},
    }[family]  # fmt: skip
    sigmas = [1 - i / STEPS for i in range(STEPS)]
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        list(PROMPTS), height=SIDE, width=SIDE, num_inference_steps=STEPS, sigmas=sigmas, latents=z, output_type="latent", **options
    )  # fmt: skip
    latents = found.images
    if family == "flux":
        latents = pipe._unpack_latents(latents, SIDE * 8 // FACTOR, SIDE * 8 // FACTOR, 8)
    return latents


def test_its_own_pipeline_draws_the_same_images(made):
    family, folder, pipeline = made
    pipe = getattr(diffusers, FAMILIES[family]).from_pretrained(folder)
    z = torch.randn(2, 4, LATENTS, LATENTS, generator=torch.Generator().manual_seed(0))
    given = pipe._pack_latents(z, 2, 4, LATENTS, LATENTS) if family == "flux" else z
    shift = shift_of_tokens((LATENTS // 2) ** 2) if family == "flux" else SHIFTS[family]
    guidance = 1.0 if family == "flux" else 4.0
    cond, null = pipeline.encode_prompts(PROMPTS), pipeline.unconditional().expand(2)
    assert cond.text.shape == (2, LENGTHS[family], STATES) and cond.time_ids is None
    assert (cond.pooled is not None) == (family in ("sd3", "flux")) == (cond.text_mask is None)
    spec = Sampler(solver="euler", steps=STEPS, guidance=guidance)
    ours = teacher_sample(FlowDenoiser(pipe.transformer, shift=shift), z, cond, null, spec, None)
    with torch.no_grad():
        theirs = sampled(family, pipe, given.clone())
        scale, moved = pipe.vae.config.scaling_factor, getattr(pipe.vae.config, "shift_factor", 0.0)
        images = pipe.vae.decode(theirs / scale + moved).sample
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    torch.testing.assert_close(pipeline.decode(ours), images, rtol=1e-3, atol=1e-4 * float(images.abs().max()))


def test_latents_are_shifted_and_scaled_and_decoding_is_the_inverse(made):
    family, folder, pipeline = made
    assert pipeline.factor == FACTOR
    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, SIDE, SIDE, generator=g) * 2 - 1
    noise = torch.randn(2, 4, LATENTS, LATENTS, generator=g)
    with torch.no_grad():
        found = pipeline.vae.encode(images)
    z = found.latent if family == "sana" else found.latent_dist.mean + found.latent_dist.std * noise
    shift, scale = {"sana": (0.0, 0.41407), "sd3": (0.0609, 1.5305)}.get(family, (0.1159, 0.3611))
    torch.testing.assert_close(pipeline.encode_images(images, noise), (z - shift) * scale)
    torch.testing.assert_close(pipeline.decode((z - shift) * scale), pipeline.vae.decode(z).sample)


def test_states_are_stored_and_one_turn_of_each_is_trained_on_them(made, tmp_path, monkeypatch):
    family, folder, pipeline = made
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/pipelines").mkdir(parents=True)
    (tmp_path / "data/pipelines/tiny").symlink_to(folder)
    rows = text_rows(pipeline, PROMPTS * 2, SIDE)
    wide = family in ("lumina2", "z-image")  # of float32 up to 3e38, not 65504
    assert rows["text"].dtype == (torch.bfloat16 if wide else torch.float16)
    assert set(rows) == {"text", "pooled" if family in ("sd3", "flux") else "text_mask"}
    stored, null = condition_of(rows), unconditional(DATA)
    torch.testing.assert_close(stored.text[:2], pipeline.encode_prompts(PROMPTS).text, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(null.text, pipeline.unconditional().text, rtol=1e-2, atol=1e-2)
    assert null.time_ids is None
    cfg = tiny.config(
        "eps-text", data__text=TEXT, teacher__parameterisation="flow", teacher__guidance=1.0 if family == "flux" else 2.0,
        teacher__shift=3.0, generator__time=1.0, critic__weighting="v", critic__ratio=2, optim__batch=2,
        eval__teacher_samplers={}, regression__pairs=None,
    )  # fmt: skip
    kind = tiny_flow_pipelines.transformer_class(family)
    network = getattr(diffusers, kind).from_pretrained(folder / "transformer")
    teacher = FlowDenoiser(network, shift=3.0).eval().requires_grad_(False)
    student, critic = (deepcopy(teacher).train().requires_grad_(True) for _ in range(2))
    head = build_head(critic, cfg, 0, CPU)
    optimisers = (Optimiser(modules, cfg.optim, cfg.optim.lr) for modules in ([student], [critic, head]))
    models = Models(student, teacher, critic, head, *optimisers, null=null, distance=None)
    real = TensorSet({**rows, "images": torch.randn(4, 4, LATENTS, LATENTS)})
    batches = Batches(cfg, 0, CPU, 2, real, None)
    before = [tiny.weights(module) for module in (student, critic)]
    for it in range(2):
        logs = train_step(models, batches.at(it), it, cfg)
        assert logs and all(bool(torch.isfinite(value).all()) for value in logs.values())
    assert not tiny.same(before[0], student) and not tiny.same(before[1], critic)


def test_fewer_tokens_are_a_setting_of_transformers_alone(made, tmp_path):
    family, folder, _ = made
    text = {**TEXT, "pipeline": {"name": "tiny", "max_sequence_length": 20}}
    data = DATA.model_copy(update={"text": Data.model_validate({**DATA.settings(), "text": text}).text})
    short = shutil.copytree(folder, tmp_path / "short")
    pipeline = Pipeline.load(make_pipeline(data, short, CPU))
    length = 20 + (77 if family == "sd3" else 0)
    assert pipeline.encode_prompts(PROMPTS).text.shape[1] == pipeline.null.text.shape[1] == length
    if family == "flux":
        (short / "model_index.json").unlink()
        with pytest.raises(
            UserError, match=r"max_sequence_length is of .*FluxPipeline.* and .*model_index.json does not"
        ):
            make_pipeline(data, short, CPU)
        shutil.rmtree(short / "tokenizer")
        shutil.copytree(short / "tokenizer_2", short / "tokenizer")
        with pytest.raises(UserError, match=r"is a T5EncoderModel: only CLIPTextModel, .* without a model_index\.json"):
            make_pipeline(DATA, short, CPU)


def test_null_is_read_from_its_file_and_a_missing_part_is_told(made, tmp_path):
    family, folder, pipeline = made
    null = load_shard(folder / "null.safetensors")
    assert (
        torch.equal(pipeline.null.text, null["text"].float())
        and read_json(folder / "manifest.json")["kind"] == "pipeline"
    )
    if family == "sd3":
        part = shutil.copytree(folder, tmp_path / "part")
        shutil.rmtree(part / "text_encoder_3")
        with pytest.raises(UserError, match="has no text_encoder_3: put the diffusers pipeline there"):
            make_pipeline(DATA, part, CPU)
