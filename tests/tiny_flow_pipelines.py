"""diffusers' own pipelines of flow-matching transformers: complete folders of random tiny parts (see `tests.tiny_pipelines`),
and pipelines around a transformer alone, from embedded prompts to latents.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderDC, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dmd2.networks.condition import Condition
from tests.tiny_pipelines import (
    END,
    VAE,
    WIDTH,
    WIDTH_2,
    WORDS,
    _letters,
    _random,
    _text_config,
    _tokenizer,
)
from tests.tiny_transformers import TINY

STATES = 40  # width of T5's and the language models' states: no less than that of both CLIPs
FAMILIES = {
    "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "sana": "SanaPipeline", "lumina2": "Lumina2Pipeline",
    "z-image": "ZImagePipeline",
}  # fmt: skip
TOWERS = {"sd3": 3, "flux": 2}  # text encoders; one of others
SHAPE = (2, 4, 8, 8)
SHIFTS = {"sd3": 3.0, "flux": 1.0, "sana": 3.0, "lumina2": 6.0, "z-image": 6.0}
ATTENTION = {
    "hidden_size": STATES, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"


def pipeline(family: str, folder: Path, seed: int = 0) -> Path:
    """A pipeline of the family, with images of FACTOR pixels per latent; `folder` is returned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {**_text(family, folder), "vae": _autoencoder(family), "transformer": _transformer(family)}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFTS[family], use_dynamic_shifting=family == "flux")
        kind = getattr(diffusers, FAMILIES[family])
        kind(**parts, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
    for suffix, end in {"sd3": {"": END, "_2": "!"}, "flux": {"": END}}.get(family, {}).items():
        _tokenizer(folder / f"tokenizer{suffix}", end)
    return folder


def transformer_class(family: str) -> str:
    """Class of the family's network."""
    return {"sd3": "SD3", "flux": "Flux", "sana": "Sana", "lumina2": "Lumina2", "z-image": "ZImage"}[
        family
    ] + "Transformer2DModel"


def pipeline_of(kind, network, scheduler):
    """The pipeline of a family, which can be given embedded prompts only."""
    family = next(family for family in FAMILIES if transformer_class(family) == kind)
    suffixes = ("", "_2", "_3")[: TOWERS.get(family, 1)]
    parts = [f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in suffixes]
    made = getattr(diffusers, FAMILIES[family])(
        transformer=network, scheduler=scheduler, vae=None, **dict.fromkeys(parts)
    )
    made.set_progress_bar_config(disable=True)
    return made


def condition(seed, kept=None, length=6):
    """Random embedded prompts of two samples; `kept` of their states are no padding."""
    g = torch.Generator().manual_seed(seed)
    mask = None if kept is None else torch.arange(length)[None] < torch.tensor(kept)[:, None]
    text, pooled = torch.randn(2, length, 12, generator=g), torch.randn(2, 12, generator=g)
    return Condition(text=text, pooled=pooled, text_mask=mask)


def prompts(kind, cond, prefix=""):
    """Arguments of a pipeline's call for embedded prompts."""
    if kind == "ZImageTransformer2DModel":
        return {f"{prefix}prompt_embeds": [one[kept] for one, kept in zip(cond.text, cond.text_mask, strict=True)]}
    found = {f"{prefix}prompt_embeds": cond.text}
    if kind in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        return {**found, f"{prefix}pooled_prompt_embeds": cond.pooled}
    return {**found, f"{prefix}prompt_attention_mask": cond.text_mask.long()}


def latents_of(kind, pipe, z, **options):
    """Latents that a pipeline makes from noise `z`, packed for FLUX's as it is handed them, and unpacked again."""
    side = z.shape[-1] * pipe.vae_scale_factor
    if kind == "SanaTransformer2DModel":
        options |= {"use_resolution_binning": False, "negative_prompt": None}
    if kind == "FluxTransformer2DModel":
        z = pipe._pack_latents(z, *z.shape)
    found = pipe(latents=z.clone(), height=side, width=side, output_type="latent", **options).images
    return pipe._unpack_latents(found, side, side, pipe.vae_scale_factor) if found.ndim == 3 else found


def kept_of(kind):
    """Kept states of two prompts, None for families that read padding, too."""
    return None if kind in ("SD3Transformer2DModel", "FluxTransformer2DModel") else ([6, 3], [5, 2])


def _transformer(family: str) -> Any:
    wide = {
        "sd3": {"joint_attention_dim": STATES, "pooled_projection_dim": WIDTH + WIDTH_2},
        "flux": {"joint_attention_dim": STATES, "pooled_projection_dim": WIDTH, "guidance_embeds": True},
        "sana": {"caption_channels": STATES},
        "lumina2": {"cap_feat_dim": STATES, "axes_lens": (512, 16, 16)},
        "z-image": {"cap_feat_dim": STATES, "axes_lens": [1024, 16, 16]},
    }[family]
    kind = transformer_class(family)
    return _random(getattr(diffusers, kind).from_config({**TINY[kind], **wide}))


def _autoencoder(family: str) -> Any:
    if family == "sana":
        dc = {
            "latent_channels": 4, "encoder_block_out_channels": (8, 8, 16), "decoder_block_out_channels": (8, 8, 16),
            "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
            "encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1), "attention_head_dim": 8,
            "encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ()), "scaling_factor": 0.41407,
        }  # fmt: skip
        return _random(AutoencoderDC(**dc))
    scaling = (
        {"scaling_factor": 1.5305, "shift_factor": 0.0609}
        if family == "sd3"
        else {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    )
    return _random(AutoencoderKL(**VAE, **scaling, use_quant_conv=False, use_post_quant_conv=False))


def _text(family: str, folder: Path) -> dict[str, Any]:
    if family in ("sana", "lumina2"):
        tokenizer = GemmaTokenizer(vocab=_gemma_vocabulary(), padding_side="right")
        begins = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = begins
        return {
            "tokenizer": tokenizer,
            "text_encoder": _random(Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **ATTENTION))),
        }
    if family == "z-image":
        vocabulary = {letter: number for number, letter in enumerate([*_letters(), "<|endoftext|>"])}
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, chat_template=CHAT)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        return {
            "tokenizer": tokenizer,
            "text_encoder": _random(Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **ATTENTION))),
        }
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    t5 = T5Tokenizer(vocab=words, extra_ids=0)
    encoder = _random(
        T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=STATES,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        )
    )
    clip = _tokenizer(folder / "tokenizer", END)
    if family == "flux":
        model = CLIPTextModel(_text_config(WIDTH, 2, "quick_gelu", WIDTH))
        return {"tokenizer": clip, "text_encoder": _random(model), "tokenizer_2": t5, "text_encoder_2": encoder}
    towers = (
        CLIPTextModelWithProjection(_text_config(width, 2, kind, width))
        for width, kind in ((WIDTH, "quick_gelu"), (WIDTH_2, "gelu"))
    )
    first, second = (_random(tower) for tower in towers)
    return {
        "tokenizer": clip, "text_encoder": first, "tokenizer_2": _tokenizer(folder / "tokenizer_2", "!"),
        "text_encoder_2": second, "tokenizer_3": t5, "text_encoder_3": encoder,
    }  # fmt: skip


def _gemma_vocabulary() -> dict[str, int]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {token: number for number, token in enumerate([*special, *bytes_, "▁", *map(chr, range(97, 123))])}
