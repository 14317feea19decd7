"""LPIPS regression distance through piq, with every weight read from local files (algorithm: DMD Sec. 4.2)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from piq.perceptual import ContentLoss
from torch import Tensor, nn
from torchvision.models import vgg16

from dmd2.core.errors import UserError

# torchvision's vgg16.features index of relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
LAYERS = ("3", "8", "15", "22", "29")
CHANNELS = (64, 128, 256, 512, 512)  # of these layers
# In data/weights/NAME/, as eval/detectors/weights.yaml lists them
NAME, VGG_FILE, LINEAR_FILE = "lpips-vgg16", "vgg16-397923af.pth", "lpips_weights.pt"


class Lpips(nn.Module):
    """Mean LPIPS (VGG16, average pooling, inputs in [0, 1]) of images in [-1, 1], upsampled to at least 224.

    Args:
        weights: parent of the folder ``lpips-vgg16`` with the two weight files; None to count what it takes.

    Raises:
        UserError: a file is missing or not of these networks.
    """

    def __init__(self, weights: Path | None = Path("data/weights")) -> None:
        super().__init__()
        vgg, linear = vgg16(weights=None), [torch.empty(1, channels, 1, 1) for channels in CHANNELS]
        if weights is not None:
            folder = weights / NAME
            state = _load(folder / VGG_FILE, "torchvision's VGG16 weights")
            linear = _load(folder / LINEAR_FILE, "piq's LPIPS weights, release v0.4.0")
            try:
                vgg.load_state_dict(state)
            except RuntimeError:
                raise UserError(f"{folder / VGG_FILE} holds another network than torchvision's VGG16") from None
        self.loss = ContentLoss(
            vgg.features, layers=LAYERS, weights=linear, replace_pooling=True, normalize_features=True
        ).requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move what piq keeps outside of buffers, too, and would upload in each call."""
        loss = self.loss
        loss.mean, loss.std, loss.weights = fn(loss.mean), fn(loss.std), [fn(weight) for weight in loss.weights]
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Mean distance of ``x`` and ``target`` ``(B, 1 or 3, H, W)`` in [-1, 1]; gradient flows into ``x``."""
        return self.loss(_prepare(x), _prepare(target))


def _prepare(images: Tensor) -> Tensor:
    images = images.float().expand(-1, 3, -1, -1) / 2 + 0.5
    if images.shape[-1] < 224:
        images = F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False)
    return images


def _load(path: Path, what: str) -> Any:
    if not path.exists():
        raise UserError(f"LPIPS needs {path} ({what}), which is missing: put it there or run: dmd2 eval weights {NAME}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports unreadable files by half a dozen types
        raise UserError(f"{path} is not a readable weight file ({str(error).splitlines()[0]})") from error
