"""What encodes prompts and images agrees with diffusers' own pipelines, on complete tiny folders of both families."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline

from dmd2.core.errors import UserError
from dmd2.data.make_pipeline import make_pipeline
from dmd2.data.pipelines import Pipeline, time_ids
from dmd2.experiment.config import Data
from tests import tiny_pipelines
from tests.tiny_pipelines import FACTOR, LATENTS, POOLED, TOKENS, WIDTH, WIDTH_2

CPU = torch.device("cpu")
PROMPTS = ["a red cat on the beach", "", "Zebra's caf\u00e9,  the Photo of\ntwo dogs!", "the cat in a house " * 30]
FAMILIES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
DATA = Data(
    name="set", source={"kind": "latents"}, resolution=LATENTS, channels=4, classes=0,
    text={"pipeline": {"name": "tiny"}, "latents": True},
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: getattr(tiny_pipelines, name)(tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def theirs(folders):
    found = {name: kind.from_pretrained(folders[name], use_safetensors=True) for name, kind in FAMILIES.items()}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def ours(folders):
    return {name: Pipeline.load(make_pipeline(DATA, folder, CPU)) for name, folder in folders.items()}


def encoded(pipe, prompts, **options):
    with torch.no_grad():
        return pipe.encode_prompt(prompts, device=CPU, num_images_per_prompt=1, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_itself_samples_from_the_tiny_folders(theirs, family):
    for size in (32, 64):
        images = theirs[family]("a cat", num_inference_steps=2, height=size, width=size, output_type="pt").images
        assert images.shape == (1, 3, size, size) and images.isfinite().all() and images.std() > 0.01


def test_sd15_takes_the_last_state_and_the_encoded_empty_prompt(ours, theirs):
    text, null = encoded(theirs["sd15"], PROMPTS, do_classifier_free_guidance=True, negative_prompt=[""] * 4)
    found = ours["sd15"].encode_prompts(PROMPTS)
    assert found.text.shape == (4, TOKENS, WIDTH) and found.text.dtype == torch.float32 and found.pooled is None
    torch.testing.assert_close(found.text, text)
    torch.testing.assert_close(ours["sd15"].null.text, null[:1], atol=2e-3, rtol=1e-3)  # is stored in float16
    assert ours["sd15"].null.text.abs().mean() > 0.1
    torch.testing.assert_close(found.text[1:2], null[:1])


def test_sdxl_takes_both_second_to_last_states_the_projection_and_zeros(ours, theirs):
    text, no_text, pooled, no_pooled = encoded(theirs["sdxl"], PROMPTS, do_classifier_free_guidance=True)
    found = ours["sdxl"].encode_prompts(PROMPTS)
    assert found.text.shape == (4, TOKENS, WIDTH + WIDTH_2) and found.pooled.shape == (4, POOLED)
    torch.testing.assert_close(found.text, text)
    torch.testing.assert_close(found.pooled, pooled)
    assert found.text.dtype == found.pooled.dtype == torch.float32 and found.time_ids is None
    null = ours["sdxl"].null
    torch.testing.assert_close(null.text, no_text[:1], atol=0, rtol=0)
    torch.testing.assert_close(null.pooled, no_pooled[:1], atol=0, rtol=0)
    assert not null.text.any() and not null.pooled.any()
    assert found.text[1].any() and found.pooled[1].any()  # of the empty prompt, which is only the null of SD 1.5


def test_the_second_tokenizer_pads_with_id_0(ours, folders, tmp_path):
    """With the first tokenizer twice, as in the official evaluator, the second tower's states of the padding differ."""
    wrong = shutil.copytree(folders["sdxl"], tmp_path / "wrong")
    shutil.rmtree(wrong / "tokenizer_2")
    shutil.copytree(wrong / "tokenizer", wrong / "tokenizer_2")
    other = Pipeline.load(make_pipeline(DATA, wrong, CPU)).encode_prompts(["a cat"])
    right = ours["sdxl"].encode_prompts(["a cat"])
    same = (other.text == right.text).all(0)
    assert same[:, :WIDTH].all() and same[:4].all()  # the first tower; start, two words and end come before padding
    assert not same[4:, WIDTH:].all(1).any()
    tokenizer = ours["sdxl"]._text[1][0]
    assert tokenizer(["a cat"], padding="max_length").input_ids[0][4:] == [0] * (TOKENS - 4)


def test_no_zeros_where_a_pipeline_does_not_ask_for_them(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "encoded")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    pipeline = Pipeline.load(make_pipeline(DATA, folder, CPU))
    empty = pipeline.encode_prompts([""])
    torch.testing.assert_close(pipeline.null.text, empty.text, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(pipeline.null.pooled, empty.pooled, atol=2e-3, rtol=1e-3)


def test_the_size_condition_is_diffusers(theirs):
    pipe = theirs["sdxl"]
    ids = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, text_encoder_projection_dim=POOLED)
    torch.testing.assert_close(time_ids(64), ids[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_and_images_are_diffusers(ours, theirs, family):
    pipeline, pipe, g = ours[family], theirs[family], torch.Generator().manual_seed(0)
    assert pipeline.factor == pipe.vae_scale_factor == FACTOR
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=g, dtype=torch.uint8)
    inputs = pipe.image_processor.preprocess(pixels.float() / 255)
    with torch.no_grad():
        posterior = pipe.vae.encode(inputs).latent_dist
        expected = posterior.sample(torch.Generator().manual_seed(1)) * pipe.vae.config.scaling_factor
        noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        images = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(pipeline.encode_images(pixels, noise), expected)
    torch.testing.assert_close(pipeline.encode_images(inputs, noise), expected)
    latents = expected.clone().requires_grad_()
    decoded = pipeline.decode(latents)
    torch.testing.assert_close(decoded.detach(), images)
    decoded.square().mean().backward()
    assert latents.grad.any()


def test_the_tiny_autoencoder_decodes_with_its_own_scale(ours, folders):
    latents = torch.randn(2, 4, LATENTS, LATENTS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tiny = AutoencoderTiny.from_pretrained(folders["sdxl"] / "vae_tiny")
    decoded = ours["sdxl"].decode(latents, "vae_tiny")
    torch.testing.assert_close(decoded, tiny.decode(latents).sample)
    assert decoded.shape == (2, 3, 32, 32)
    decoded.square().mean().backward()
    assert latents.grad.any()
    with pytest.raises(UserError, match=r"has no vae_tiny: put this part"):
        ours["sd15"].decode(latents, "vae_tiny")


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae"])
def test_a_missing_part_is_told(folders, tmp_path, part):
    folder = shutil.copytree(folders["sd15"], tmp_path / "sd15")
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=rf"pipeline tiny: .* has no {part}: put the diffusers pipeline there"):
        make_pipeline(DATA, folder, CPU)


def test_a_changed_file_is_told(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "sd15")
    manifest = make_pipeline(DATA, folder, CPU)
    with open(folder / "text_encoder/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match=r"text_encoder/model\.safetensors does not match the checksum"):
        Pipeline.load(manifest).encode_prompts(["a"])
