"""Tiny transformers of each family for tests, and the sizes that are published."""

import diffusers
import torch

from dmd2.networks.condition import Condition

TINY = {
    "SD3Transformer2DModel": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 32,
        "pooled_projection_dim": 12, "pos_embed_max_size": 4, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    },
    "FluxTransformer2DModel": {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 12, "pooled_projection_dim": 12, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    },
    "SanaTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "cross_attention_dim": 32, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
        "caption_channels": 12, "sample_size": 8, "patch_size": 2, "interpolation_scale": 1,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "hidden_size": 48, "num_layers": 3,
        "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "cap_feat_dim": 12,
        "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 16, 16),
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4, "dim": 48, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3,
        "cap_feat_dim": 12, "axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16],
    },
}  # fmt: skip


def tiny(kind, seed=0, **changed):
    """A tiny network of a class of diffusers, without zero-initialised layers."""
    torch.manual_seed(seed)
    network = getattr(diffusers, kind).from_config({**TINY[kind], **changed})
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05 if p.ndim > 1 else 0.3)
    return network.eval()


def texts(count, length=6, kept=None, seed=1):
    """Captions of random states, the first `kept` of them no padding."""
    torch.manual_seed(seed)
    mask = None if kept is None else torch.arange(length)[None] < torch.tensor(kept)[:, None]
    return Condition(text=torch.randn(count, length, 12), pooled=torch.randn(count, 12), text_mask=mask)
