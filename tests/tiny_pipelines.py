"""Complete diffusers pipeline folders with random tiny parts, laid out file for file like those on the hub."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

FACTOR, TOKENS, LATENTS = 4, 77, 8  # pixels per latent side, tokens of a prompt, default latent side
WIDTH, WIDTH_2, POOLED = 16, 24, 12  # of the text encoders' states and of SDXL's pooled vector
START, END = "<|startoftext|>", "<|endoftext|>"
# Words that byte-pair encoding joins; every other one stays in more tokens.
WORDS = ("a", "the", "of", "in", "on", "cat", "dog", "red", "blue", "house", "photo", "painting", "beach", "two")
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
UNET = {
    "sample_size": LATENTS, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": (8, 16, 16),
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": (8, 8, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "sample_size": FACTOR * LATENTS,
}  # fmt: skip
TINY_VAE = {
    "latent_channels": 4, "encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3,
    "num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3, "scaling_factor": 1.0,
}  # fmt: skip


def sd15(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 1.5 in small: text (77, 16), images of FACTOR pixels per latent; `folder` is returned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        StableDiffusionPipeline(
            tokenizer=_tokenizer(folder / "tokenizer", END),
            text_encoder=_random(CLIPTextModel(_text_config(WIDTH, 2, "quick_gelu", WIDTH))),
            vae=_random(AutoencoderKL(**VAE, scaling_factor=0.18215)),
            unet=_random(UNet2DConditionModel(
                **UNET, cross_attention_dim=WIDTH, attention_head_dim=2,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            )),
            scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    _tokenizer(folder / "tokenizer", END)
    return folder


def sdxl(folder: Path, seed: int = 0, tiny_vae: bool = True) -> Path:
    """SDXL in small: text (77, 16 + 24), pooled (12,); also its tiny autoencoder, at vae_tiny/."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        StableDiffusionXLPipeline(
            tokenizer=_tokenizer(folder / "tokenizer", END),
            tokenizer_2=_tokenizer(folder / "tokenizer_2", "!"),
            text_encoder=_random(CLIPTextModel(_text_config(WIDTH, 2, "quick_gelu", WIDTH))),
            text_encoder_2=_random(CLIPTextModelWithProjection(_text_config(WIDTH_2, 3, "gelu", POOLED))),
            vae=_random(AutoencoderKL(**VAE, scaling_factor=0.13025, force_upcast=True)),
            unet=_random(UNet2DConditionModel(
                **UNET, cross_attention_dim=WIDTH + WIDTH_2, attention_head_dim=(1, 2, 4),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 3), use_linear_projection=True, addition_embed_type="text_time",
                addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + POOLED,
            )),
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", interpolation_type="linear"),
            force_zeros_for_empty_prompt=True, add_watermarker=False,
        ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
        if tiny_vae:
            _random(AutoencoderTiny(**TINY_VAE)).save_pretrained(folder / "vae_tiny", safe_serialization=True)
    _tokenizer(folder / "tokenizer", END)
    _tokenizer(folder / "tokenizer_2", "!")
    return folder


def _random(module: nn.Module) -> nn.Module:
    """The module in eval mode, with no bias, norm or output layer at 0 or 1, which would hide what feeds it."""
    for parameter in module.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data += 0.1 * torch.randn_like(parameter)
    for embedding in (part for part in module.modules() if isinstance(part, nn.Embedding)):
        embedding.weight.data.normal_(std=0.5)
    return module.eval()


def _text_config(width: int, layers: int, activation: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(_vocabulary()), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=TOKENS, hidden_act=activation, projection_dim=projection,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,  # as on the hub, where they are not the tokenizer's ids
    )  # fmt: skip


def _tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """A CLIP tokenizer in the four files of the hub, without the tokenizer.json that newer transformers write."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in _merges())])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    special: dict[str, Any] = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    kind = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": TOKENS}
    for name, content in {
        "vocab.json": _vocabulary(),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {**kind, **special, "tokenizer_class": "CLIPTokenizer"},
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _vocabulary() -> dict[str, int]:
    """Ids in CLIP's order: bytes ("!" is 0), bytes that end a word, merged pairs, start and, highest of all, end."""
    letters = _letters()
    merged = ["".join(pair) for pair in _merges()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END]
    return {token: number for number, token in enumerate(tokens)}


def _letters() -> list[str]:
    """GPT-2's visible stand-ins for the 256 bytes: printable ones are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def _merges() -> list[tuple[str, str]]:
    """Merges that build WORDS from the left."""
    pairs: dict[tuple[str, str], None] = {}
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        grown = ["".join(letters[: count + 1]) for count in range(len(letters))]
        pairs |= {(start, whole[len(start) :]): None for start, whole in pairwise(grown)}
    return list(pairs)
