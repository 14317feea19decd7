"""Lumina-Image 2.0 (Qin et al. 2025): one sequence of caption and image tokens."""

from typing import Any

import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.networks.condition import Condition
from dmd2.networks.transformers.family import Family, text_of


class Lumina2(Family):
    """``Lumina2Transformer2DModel``: time runs from noise to data, ``1 - sigma``, and the output is -v."""

    pipeline = "Lumina2Pipeline"
    lists = ("layers",)
    lengths_vary = True

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """See `Family.velocity`.

        Raises:
            UserError: the tensors have no numbers, as in planning.
        """
        if x.is_meta:
            told = "diffusers' class reads the lengths of the captions, which are not known before a pass"
            raise UserError(f"what {type(network).__name__} takes cannot be counted: {told}")
        text, mask = text_of(cond, network.config.cap_feat_dim, x)
        found = network(x, timestep=1 - sigma, encoder_hidden_states=text, encoder_attention_mask=mask)
        return -found.sample

    def image_tokens(self, hidden: Tensor, count: int, cond: Condition) -> Tensor:
        """The tokens after each sample's caption, which is as long as its mask says."""
        if cond.text_mask is None:
            return hidden[:, -count:]
        places = cond.text_mask.sum(dim=1, keepdim=True) + torch.arange(count, device=hidden.device)
        return hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))

    def width(self, network: Any) -> int:
        """Features of a token."""
        return network.config.hidden_size
