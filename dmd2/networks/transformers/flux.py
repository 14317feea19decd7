"""FLUX.1 (Black Forest Labs): double blocks, then single blocks over text and image tokens of 2x2 latents."""

from typing import Any

import torch
from torch import Tensor

from dmd2.networks.condition import Condition
from dmd2.networks.transformers.family import ATTENTION, Family, pooled_of


class Flux(Family):
    """``FluxTransformer2DModel``: the time is sigma, the output v, both of packed latents.

    A network with a guidance embedder (dev) is told `guidance_embed`, which is no classifier-free guidance.
    """

    pipeline = "FluxPipeline"
    lists = ("transformer_blocks", "single_transformer_blocks")
    targets = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """See `Family.velocity`."""
        config = network.config
        text, pooled = pooled_of(cond, config.joint_attention_dim, config.pooled_projection_dim, x)
        v = network(
            pack(x),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=image_ids(x),
            txt_ids=x.new_zeros(text.shape[1], 3),
            guidance=torch.full_like(sigma, self.guidance_embed) if config.guidance_embeds else None,
        ).sample
        return unpack(v, x.shape)

    @property
    def unguided(self) -> float:
        """What its embedder is told, which its pipeline calls so."""
        return self.guidance_embed

    def patch(self, network: Any) -> int:
        """Two: the packing's side."""
        return 2


def pack(x: Tensor) -> Tensor:
    """Latents ``(B, C, H, W)`` as tokens of 2x2 ``(B, HW / 4, 4 C)``, row by row, channels first within a token."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The latents of `shape` that `pack` made the tokens of."""
    _, channels, height, width = shape
    grid = tokens.unflatten(2, (channels, 2, 2)).unflatten(1, (height // 2, width // 2))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def image_ids(x: Tensor) -> Tensor:
    """Row and column of each token of packed latents: ``(HW / 4, 3)``, the first column 0."""
    rows, columns = (torch.arange(side // 2, device=x.device, dtype=x.dtype) for side in x.shape[-2:])
    return torch.cartesian_prod(x.new_zeros(1), rows, columns)
