"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): joint attention over image and text tokens."""

from typing import Any

from torch import Tensor

from dmd2.networks.condition import Condition
from dmd2.networks.transformers.family import ATTENTION, Family, pooled_of


class SD3(Family):
    """``SD3Transformer2DModel``: the time is 1000 sigma, the output v."""

    pipeline = "StableDiffusion3Pipeline"
    # `to_q` also is the end of the second attention, attn2, that 3.5-medium has in half of its blocks.
    targets = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """See `Family.velocity`."""
        config = network.config
        text, pooled = pooled_of(cond, config.joint_attention_dim, config.pooled_projection_dim, x)
        return network(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * sigma).sample
