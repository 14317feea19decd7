"""The GAN classifier head on the critic's bottleneck features (paper Sec. 4.3; widths and counts of its code)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def _groups(width: int) -> int:
    """32 groups at the paper's widths (768, 1280); fewer on narrow networks, so a group keeps at least 16 values."""
    return max(g for g in range(1, max(1, min(32, width // 16)) + 1) if width % g == 0)


class Head(nn.Sequential):
    """Features ``(B, width, r, r)`` to logits ``(B, 1)``.

    4x4 stride-2 convolutions down to 4x4, one that takes the rest to 1x1, each with GroupNorm and SiLU, then 1x1.
    """

    def __init__(self, width: int, resolution: int) -> None:
        layers: list[nn.Module] = []
        kernels = [(4, 2, 1)] * max(0, round(math.log2(resolution / 4)))
        last = min(4, resolution)
        for size, stride, padding in [*kernels, (last, last, 0)]:
            layers += [nn.Conv2d(width, width, size, stride, padding), nn.GroupNorm(_groups(width), width), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(width, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logit per sample, positive for "real"."""
        return super().forward(features.float()).flatten(1)


class PatchHead(nn.Sequential):
    """Features ``(B, width, h, w)`` to logits ``(B, 1)``: the mean of the logits of overlapping 4x4 patches.

    One 4x4 stride-2 convolution to half the width, GroupNorm, LeakyReLU, then 1x1 (FastGen's head on transformers). Its
    size does not grow with the resolution, as that of `Head` does: 18.9 million weights at width 1536, not 189.
    """

    def __init__(self, width: int) -> None:
        half = width // 2
        groups = max(g for g in range(1, 33) if half % g == 0)
        norm = nn.GroupNorm(groups, half)
        super().__init__(nn.Conv2d(width, half, 4, 2, 1), norm, nn.LeakyReLU(0.2), nn.Conv2d(half, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logit per sample, positive for "real"."""
        return super().forward(features.float()).flatten(1).mean(1, keepdim=True)


class Heads(nn.Module):
    """Features of several blocks side by side ``(B, blocks width, h, w)`` to logits ``(B, blocks)``, a head each."""

    def __init__(self, heads: Iterable[Head | PatchHead]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, positive for "real"; losses are means over blocks, too."""
        parts = features.chunk(len(self.heads), dim=1)
        return torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)], dim=1)


AnyHead = Head | PatchHead | Heads
