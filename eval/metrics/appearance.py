"""Statistics of pixels: uint8 images ``(n, C, H, W)`` to one value each, float64 ``(n,)``."""

import torch.nn.functional as F
from torch import Tensor

from eval.pixels.channels import per_channel

LUMA = (0.299, 0.587, 0.114)  # Rec. 601


def brightness(images: Tensor) -> Tensor:
    """Mean pixel on the scale 0..1."""
    return images.double().mean(dim=(1, 2, 3)) / 255


def saturation(images: Tensor) -> Tensor:
    """Mean over pixels of HSV's saturation ``(max - min) / max`` of the channels, 0 for black: in 0..1."""
    high, low = images.amax(dim=1).double(), images.amin(dim=1).double()
    return ((high - low) / high.clamp(min=1)).mean(dim=(1, 2))


def sharpness(images: Tensor) -> Tensor:
    """Root mean square of luma (0..1) minus its 3x3 mean, over pixels with eight neighbours.

    What averaging neighbours takes away, so fine texture and edges: over-smooth images lack it.
    """
    pixels = images.expand(-1, 3, -1, -1).double()
    luma = (pixels * per_channel(LUMA, pixels)).sum(dim=1, keepdim=True) / 255
    fine = luma[:, :, 1:-1, 1:-1] - F.avg_pool2d(luma, 3, stride=1)
    return fine.square().mean(dim=(1, 2, 3)).sqrt()
