"""Z-Image (Tongyi Lab 2025): one sequence of image and caption tokens, each padded to a multiple of 32."""

from typing import Any

import torch
from torch import Tensor

from dmd2.networks.condition import Condition
from dmd2.networks.transformers.family import Family, text_of


class ZImage(Family):
    """``ZImageTransformer2DModel``: time runs from noise to data, ``1 - sigma``, and the output is -v.

    It takes lists of samples, with a caption of its own length each. Its pipeline guides by ``c + s (c - u)``: s is
    one less than the scale that means the same here.
    """

    pipeline = "ZImagePipeline"
    lists = ("layers",)
    lengths_vary = True

    def velocity(self, network: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """See `Family.velocity`."""
        text, mask = text_of(cond, network.config.cap_feat_dim, x)
        captions = list(text)
        if cond.text_mask is not None:
            captions = [states[kept] for states, kept in zip(text, mask, strict=True)]
        found = network([sample[:, None] for sample in x], 1 - sigma, captions).sample
        return -torch.stack(found).squeeze(2)

    def image_tokens(self, hidden: Tensor, count: int, cond: Condition) -> Tensor:
        """The first ones."""
        return hidden[:, :count]

    @property
    def unguided(self) -> float:
        """Zero, see above."""
        return 0.0

    def patch(self, network: Any) -> int:
        """Of the first of its patchings, which a pass takes."""
        return network.config.all_patch_size[0]

    def width(self, network: Any) -> int:
        """Features of a token."""
        return network.config.dim
