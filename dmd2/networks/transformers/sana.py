"""Sana (Xie et al. 2024): linear attention over image tokens, cross-attention to the text."""

from typing import Any

from torch import Tensor

from dmd2.networks.condition import Condition
from dmd2.networks.transformers.family import Family, text_of


class Sana(Family):
    """``SanaTransformer2DModel``: the time is 1000 sigma in units of the network's ``timestep_scale``, the output v."""

    pipeline = "SanaPipeline"

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """See `Family.velocity`."""
        text, mask = text_of(cond, network.config.caption_channels, x)
        time = 1000 * sigma * network.config.timestep_scale
        # A mask that hides nothing would take attention off its fast path.
        hiding = None if cond.text_mask is None else mask.to(x.dtype)
        return network(x, encoder_hidden_states=text, timestep=time, encoder_attention_mask=hiding).sample
