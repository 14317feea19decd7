"""Geometry and the image resizers of the field, each as its definition says (evaluation protocols).

A CPU filters by Pillow. A GPU multiplies by the matrix of the same filter in float64: 8-bit images are Pillow's bytes,
float images agree with its float filter to 2e-5 of a grey level. Torch's antialiased filters differ from Pillow's bytes
by up to two grey levels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from dmd2.core.errors import UserError
from dmd2.core.upload import upload
from dmd2.experiment.eval_config import GEOMETRIES

INCEPTION = 299  # side of Inception's input
SUPPORT = {"bicubic": 2, "lanczos": 3}  # pixels on either side of a filter's centre
FIXED_POINT = 1 << 22  # Pillow's unit of a filter's weights for 8-bit pixels, which are integers
AT_ONCE = 1 << 26  # float64 values that a GPU filters at once: 512 MiB

Filter = Literal["bicubic", "lanczos"]


def _by_pillow(images: Tensor, size: int, name: Filter, dtype: type[np.generic]) -> Tensor:
    """Pillow's resize of every plane of ``(n, C, H, W)``, as 8-bit or float pixels; converts one plane at a time."""
    planes, resample = images.numpy(), Image.Resampling[name.upper()]
    resized = np.empty((*images.shape[:2], size, size), dtype)
    for index in np.ndindex(resized.shape[:2]):
        resized[index] = Image.fromarray(planes[index].astype(dtype)).resize((size, size), resample)
    return torch.from_numpy(resized)


def weights(source: int, size: int, name: Filter) -> np.ndarray:
    """Weight of every pixel of a row in every pixel of the resized row, float64 ``(size, source)``; rows sum to 1.

    The filter is widened by the factor that a row shrinks, and cut where Pillow cuts it.
    """
    shrink = max(source / size, 1.0)
    centre = (np.arange(size)[:, None] + 0.5) * (source / size)
    first, last = (np.trunc(centre + side * SUPPORT[name] * shrink + 0.5) for side in (-1, 1))
    pixel = np.arange(source)
    x = np.abs(pixel + 0.5 - centre) / shrink
    if name == "lanczos":
        found = np.sinc(x) * np.sinc(x / 3)
    else:  # Keys (1981) with a = -1/2
        found = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    found = np.where((pixel >= first) & (pixel < last) & (x < SUPPORT[name]), found, 0.0)
    return found / found.sum(axis=1, keepdims=True)


@lru_cache(maxsize=32)
def _matrix(source: int, size: int, name: Filter, fixed: bool, device: torch.device) -> Tensor:
    """`weights` on a device, where they stay; in units of Pillow's `FIXED_POINT` if `fixed`."""
    found = weights(source, size, name)
    if fixed:
        found = np.trunc(found * FIXED_POINT + np.copysign(0.5, found))
    return upload(torch.from_numpy(found), device)


def by_products(images: Tensor, size: int, name: Filter, dtype: torch.dtype) -> Tensor:
    """Pillow's resize of ``(n, C, H, W)`` on the device of the images: along rows, then columns, rounded after each.

    `dtype` is uint8, whose sums are of integers and thus exact on every device, or float32.
    """
    fixed, (channels, height, width) = dtype == torch.uint8, images.shape[1:]
    resized = []
    for part in images.split(max(1, AT_ONCE // (channels * max(height, size) * max(width, size)))):
        x = part.to(dtype)
        for axis, length in ((-1, width), (-2, height)):
            if length != size:
                matrix = _matrix(length, size, name, fixed, images.device)
                sums = x.double() @ matrix.T if axis == -1 else matrix @ x.double()
                x = ((sums / FIXED_POINT + 0.5).floor().clamp(0, 255) if fixed else sums).to(dtype)
        resized.append(x)
    return torch.cat(resized)


def resize_uint8(images: Tensor, size: int, name: Filter = "lanczos") -> Tensor:
    """Square uint8 images ``(n, C, H, H)`` to ``(n, C, size, size)``, the same bytes as Pillow's ``Image.resize``.

    Raises:
        UserError: the images are not square. Pillow 13 changed the order of the two passes for some rectangles, so
            their bytes depend on its version; crop first.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise UserError(f"images of {height}x{width} cannot be resized to {size}x{size} reproducibly: crop them first")
    return _by_pillow(images, size, name, np.uint8) if images.is_cpu else by_products(images, size, name, torch.uint8)


def clean(images: Tensor, size: int = INCEPTION) -> Tensor:
    """clean-fid's resize: antialiased bicubic on float images, clipped to 0..255 and never rounded.

    Args:
        images: ``(n, C, H, W)``, uint8 or float grey levels.
        size: side of the result.

    Returns:
        float32 ``(n, C, size, size)`` in grey levels; Inception takes ``(v - 128) / 128``.
    """
    if images.is_cpu:
        return _by_pillow(images, size, "bicubic", np.float32).clamp_(0, 255)
    return by_products(images, size, "bicubic", torch.float32).clamp_(0, 255)


def pt(images: Tensor, size: int = INCEPTION) -> Tensor:
    """pytorch-fid's resize: half-pixel bilinear without antialiasing.

    Args:
        images: ``(n, C, H, W)``, uint8 or float grey levels.
        size: side of the result.

    Returns:
        float32 ``(n, C, size, size)`` in grey levels; its Inception takes ``v / 127.5 - 1``.
    """
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=False)


def square_crop(images: Tensor) -> Tensor:
    """Centre square ``(n, C, S, S)`` with ``S = min(H, W)`` of ``(n, C, H, W)``, rounded as torchvision does."""
    side = min(images.shape[-2:])
    return center_crop(images, [side, side])


@dataclass(frozen=True)
class Geometry:
    """What is done to an image before any network sees it, named in the protocol of every number.

    `name` is ``none``, ``square-crop+lanczos-S``, or ``patch-S``: the centre SxS of the original pixels, without
    resizing. Images with a side below S have no patch: ``patch-S`` refuses them, ``patch-S-skip`` omits them,
    ``patch-S-official`` stretches the whole image by `clean` as DMD2's evaluator does with S = 299 (here rounded to
    uint8, which moves a pixel by at most half a grey level).

    Raises:
        UserError: any other name.
    """

    name: str = "none"

    def __post_init__(self) -> None:
        if not re.match(GEOMETRIES, self.name):
            raise UserError(
                f"there is no geometry {self.name}: choose none, square-crop+lanczos-S (S in pixels), patch-S, "
                "patch-S-skip or patch-S-official, such as patch-299"
            )

    @property
    def side(self) -> int:
        """Pixels of a side of the result, 0 if the image is left as it is."""
        return int(found[0]) if (found := re.findall(r"\d+", self.name)) else 0

    @property
    def is_patch(self) -> bool:
        """Whether images must reach `side` pixels on both sides."""
        return self.name.startswith("patch")

    @property
    def policy(self) -> str:
        """What becomes of images without a patch: ``skip``, ``official``, or empty: they are refused."""
        return self.name.split("-")[2] if self.is_patch and self.name.count("-") == 2 else ""

    def too_small(self, height: int, width: int) -> bool:
        """Whether an image of this size has no patch (always False for the other geometries)."""
        return self.is_patch and min(height, width) < self.side

    def __call__(self, images: Tensor) -> Tensor:
        """Apply to uint8 ``(n, C, H, W)``.

        Raises:
            UserError: images smaller than the patch under a policy other than ``official``.
        """
        if self.name == "none":
            return images
        if not self.is_patch:
            return resize_uint8(square_crop(images), self.side, "lanczos")
        height, width = images.shape[-2:]
        if not self.too_small(height, width):
            return center_crop(images, [self.side, self.side])
        if self.policy == "official":
            return clean(images, self.side).round_().to(torch.uint8)
        patch = f"patch-{self.side}"
        raise UserError(
            f"an image of {height}x{width} has no {self.side}x{self.side} patch: see {patch}-skip, {patch}-official"
        )


NONE = Geometry("none")
