"""Factors in kohya's format: diffusers loads what is written here, and files of others are merged or refused."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from dmd2.convert.kohya import from_kohya, is_kohya, kohya_name, merge, write_kohya
from dmd2.core.errors import UserError
from dmd2.networks.lora import ALPHA, DOWN, UP, add_lora, lora_state, merged_state
from tests import full_size, tiny, tiny_pipelines
from tests.unit.test_lora import RANK, with_factors

PIPELINES = {
    "sd15": (tiny_pipelines.sd15, StableDiffusionPipeline),
    "sdxl": (tiny_pipelines.sdxl, StableDiffusionXLPipeline),
}


def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    size = tiny_pipelines.FACTOR * tiny_pipelines.LATENTS
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": size, "width": size}
    return pipe("a red house", generator=generator, output_type="latent", **options).images


@pytest.mark.parametrize("kind", PIPELINES)
def test_diffusers_own_loader_makes_the_images_of_the_merged_weights(tmp_path, kind):
    make, pipeline = PIPELINES[kind]
    pipe = pipeline.from_pretrained(make(tmp_path / kind))
    before, student = latents(pipe), with_factors(pipe.unet)
    write_kohya(tmp_path / "lora.safetensors", lora_state(student), torch.float32)
    merged = deepcopy(pipe.unet)
    merged.load_state_dict(merged_state(student))
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    theirs = latents(pipe)
    pipe.unload_lora_weights()
    pipe.unet = merged
    ours = latents(pipe)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    assert (ours - before).abs().max() > 0.1
    assert len(load_file(tmp_path / "lora.safetensors")) == len(lora_state(student))


@pytest.fixture
def written(tmp_path):
    """A network, its student with factors, and the tensors of the student's file."""
    network = tiny.network("eps-sdxl", 0)
    student = with_factors(network)
    write_kohya(tmp_path / "lora.safetensors", lora_state(student), torch.float32)
    return network, student, load_file(tmp_path / "lora.safetensors")


def test_a_file_comes_back_and_merges_to_the_students_weights(tmp_path, written):
    network, student, state = written
    factors = from_kohya(state, network.state_dict(), tmp_path)
    assert is_kohya(state) and not is_kohya(network.state_dict())
    assert factors.keys() == lora_state(student).keys()
    base = tiny.weights(network)
    whole = merge(network.state_dict(), factors)
    assert tiny.same(base, network)
    for name, value in merged_state(student).items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-7)
    half = merge(network.state_dict(), factors, 0.5)
    for name, value in base.items():
        torch.testing.assert_close(half[name], (value + whole[name]) / 2, rtol=0, atol=1e-6)


def test_half_precision_is_what_is_released(tmp_path, written):
    network, student, state = written
    write_kohya(tmp_path / "half.safetensors", lora_state(student))
    half = load_file(tmp_path / "half.safetensors")
    assert {value.dtype for value in half.values()} == {torch.float16}
    for name, value in state.items():
        torch.testing.assert_close(half[name].float(), value, rtol=1e-3, atol=1e-6)


def test_the_names_are_those_of_the_released_file():
    network = full_size.unet(full_size.SDXL)
    weights = network.state_dict()
    with torch.device("meta"):
        add_lora(network, 64, 8.0)
    state = {kohya_name(name): value.to("meta") for name, value in lora_shapes(network).items()}
    assert len(state) == 1576 + 788
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert state[f"{conv}.lora_down.weight"].shape == (64, 320, 3, 3)
    assert state[f"{conv}.lora_up.weight"].shape == (320, 64, 1, 1)
    linear = "lora_unet_mid_block_attentions_0_transformer_blocks_9"
    assert state[f"{linear}_attn2_to_out_0.lora_down.weight"].shape == (64, 1280)
    assert state[f"{linear}_ff_net_0_proj.lora_up.weight"].shape == (10240, 64)
    assert from_kohya(state, weights, Path("lora.safetensors")).keys() == lora_shapes(network).keys()


def lora_shapes(network):
    """Factors as `lora_state` has them, of a network without memory for its weights."""
    names = {".lora_A.default.weight": DOWN, ".lora_B.default.weight": UP}
    factors = {
        name.removesuffix(theirs) + ours: parameter
        for name, parameter in network.named_parameters()
        for theirs, ours in names.items()
        if name.endswith(theirs)
    }
    return factors | {name.removesuffix(UP) + ALPHA: torch.tensor(8.0) for name in factors if name.endswith(UP)}


def test_without_an_alpha_the_rank_is_it(tmp_path, written):
    network, _, state = written
    bare = {name: value for name, value in state.items() if not name.endswith(".alpha")}
    factors = from_kohya(bare, network.state_dict(), tmp_path)
    assert {float(value) for name, value in factors.items() if name.endswith(".alpha")} == {float(RANK)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": 1}, "block names of Stability's code"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": 1}, "text encoders are not read"),
        ({"lora_unet_down_blocks_9_resnets_0_conv1.lora_down.weight": 1}, "the file is of another network"),
        ({"lora_unet_mid_block_resnets_0_conv1.dora_scale": 1}, "LoHa, LoKr and DoRA are not read"),
        ({"lora_unet_mid_block_resnets_0_conv1.lora_up.weight": None}, "conv1.lora_up.weight is missing: the file is not"),
        ({"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": None}, "conv1.lora_down.weight is missing"),
        ({"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": (RANK, 8, 3, 3)}, "do not fit a weight of (16, 16, 3, 3)"),
        ({"lora_unet_mid_block_resnets_0_conv1.lora_up.weight": (16, RANK)}, "do not fit a weight of (16, 16, 3, 3)"),
        ({"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": ()}, "do not fit a weight of (16, 16, 3, 3)"),
        ({"lora_unet_mid_block_resnets_0_conv1.alpha": 2}, "conv1.alpha is no single number"),
    ],
)  # fmt: skip
def test_what_does_not_belong_is_told(tmp_path, written, change, said):
    network, _, state = written
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError) as told:
        from_kohya(load_file(tmp_path / "lora.safetensors"), network.state_dict(), tmp_path / "lora.safetensors")
    assert said in str(told.value) and str(tmp_path / "lora.safetensors") in str(told.value)
