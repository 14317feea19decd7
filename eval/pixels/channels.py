"""Constants of the channels of images, made on the device of the images: an upload of a few numbers waits for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """``(C, 1, 1)`` in the dtype and on the device of `like`."""
    each = [torch.full((1, 1), value, dtype=like.dtype, device=like.device) for value in values]
    return torch.stack(each)


def normalised(images: Tensor, mean: Sequence[float], sd: Sequence[float]) -> Tensor:
    """``(x - mean) / sd`` of every channel of float ``(n, C, H, W)``; torchvision's function waits for the device."""
    return (images - per_channel(mean, images)) / per_channel(sd, images)
