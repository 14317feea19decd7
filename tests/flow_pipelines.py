"""Diffusers' own pipelines around tiny transformers, without encoders and autoencoders: from embedded prompts to latents."""

import diffusers
import torch

from dmd2.networks.condition import Condition

PIPELINES = {  # class of the transformer: pipeline, its parts besides transformer and scheduler
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", 3),
    "FluxTransformer2DModel": ("FluxPipeline", 2),
    "SanaTransformer2DModel": ("SanaPipeline", 1),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline", 1),
    "ZImageTransformer2DModel": ("ZImagePipeline", 1),
}
SHAPE = (2, 4, 8, 8)


def pipeline_of(kind, network, scheduler):
    """The pipeline of a family, which can be given embedded prompts only."""
    name, towers = PIPELINES[kind]
    parts = [f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")[:towers]]
    made = getattr(diffusers, name)(transformer=network, scheduler=scheduler, vae=None, **dict.fromkeys(parts))
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
