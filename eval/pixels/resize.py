"""Geometry and the image resizers of the field, each as its definition says (evaluation protocols).

On the CPU, Pillow itself filters. Other devices do the same by matrices: a separable antialiased filter is one matrix
per axis, and a float64 product reproduces Pillow's 8-bit arithmetic bit for bit (all products are whole numbers below
2^53) and its float arithmetic to 1e-4 of a grey level.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
from dmd2.experiment.eval_config import GEOMETRIES

INCEPTION = 299  # side of Inception's input
PRECISION = 2.0**22  # Pillow's 8-bit filters hold weights as multiples of 2^-22
ELEMENTS = 1 << 20  # float64 values one matrix product may hold at a time: 8 MiB, whatever the batch

Filter = Literal["bicubic", "lanczos"]


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Cubic convolution with a = -0.5 (Keys 1981); torch's own bicubic has a = -0.75."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0.0)


KERNELS: dict[Filter, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


@lru_cache(maxsize=64)
def filter_matrix(name: Filter, source: int, target: int) -> Tensor:
    """Weights ``(target, source)``, float64, of one axis of Pillow's resampling with half-pixel centres.

    The support widens by ``source / target`` when the axis shrinks (antialiasing); rows sum to 1.
    """
    kernel, support = KERNELS[name]
    scale = source / target
    stretch = max(scale, 1.0)
    radius = support * stretch
    centre = (np.arange(target)[:, None] + 0.5) * scale
    taps = np.arange(source)[None, :]
    first, last = np.trunc(centre - radius + 0.5), np.trunc(centre + radius + 0.5)
    weights = kernel((taps - centre + 0.5) * (1 / stretch)) * ((taps >= first) & (taps < last))
    # cumsum adds from left to right like Pillow; sum() adds in pairs and differs in the last bit.
    return torch.from_numpy(weights / weights.cumsum(axis=1)[:, -1:])


def _separable(images: Tensor, across: Tensor, down: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """Horizontal then vertical pass in float64, `finish` after each, a bounded number of images at a time."""
    across, down = across.to(images.device), down.to(images.device)
    largest = max(across.shape) * max(down.shape) * images.shape[1]
    rows = max(1, ELEMENTS // largest)
    parts = [finish(down @ finish(part.double() @ across.T).double()) for part in images.split(rows)]
    return torch.cat(parts)


def _by_pillow(images: Tensor, size: int, name: Filter, dtype: type[np.generic]) -> Tensor:
    """Pillow's resize of every plane of ``(n, C, H, W)``, as 8-bit or float pixels; converts one plane at a time."""
    planes, resample = images.numpy(), Image.Resampling[name.upper()]
    resized = np.empty((*images.shape[:2], size, size), dtype)
    for index in np.ndindex(resized.shape[:2]):
        resized[index] = Image.fromarray(planes[index].astype(dtype)).resize((size, size), resample)
    return torch.from_numpy(resized)


def resize_uint8(images: Tensor, size: int, name: Filter = "lanczos") -> Tensor:
    """Square uint8 images ``(n, C, H, H)`` to ``(n, C, size, size)``, the same bytes as Pillow's ``Image.resize``.

    Raises:
        UserError: the images are not square. Pillow 13 changed the order of the two passes for some rectangles, so
            their bytes depend on its version; crop first.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise UserError(f"images of {height}x{width} cannot be resized to {size}x{size} reproducibly: crop them first")
    return _by_pillow(images, size, name, np.uint8) if images.is_cpu else uint8_by_matrix(images, size, name)


def uint8_by_matrix(images: Tensor, size: int, name: Filter) -> Tensor:
    """`resize_uint8` on the device of the images."""
    weights = filter_matrix(name, images.shape[-1], size) * PRECISION
    weights = torch.trunc(weights + torch.copysign(torch.tensor(0.5), weights))  # half away from zero
    return _separable(images, weights, weights, _to_bytes).to(torch.uint8)


def _to_bytes(sums: Tensor) -> Tensor:
    return ((sums + PRECISION / 2) / PRECISION).floor_().clamp_(0, 255)


def clean(images: Tensor, size: int = INCEPTION) -> Tensor:
    """clean-fid's resize: antialiased bicubic on float images, clipped to 0..255 and never rounded.

    Args:
        images: ``(n, C, H, W)``, uint8 or float grey levels.
        size: side of the result.

    Returns:
        float32 ``(n, C, size, size)`` in grey levels; Inception takes ``(v - 128) / 128``.
    """
    if not images.is_cpu:
        return clean_by_matrix(images, size)
    return _by_pillow(images, size, "bicubic", np.float32).clamp_(0, 255)


def clean_by_matrix(images: Tensor, size: int) -> Tensor:
    """`clean` on the device of the images."""
    height, width = images.shape[-2:]
    across, down = filter_matrix("bicubic", width, size), filter_matrix("bicubic", height, size)
    return _separable(images, across, down, Tensor.float).clamp_(0, 255)


def tf1(images: Tensor, size: int = INCEPTION) -> Tensor:
    """TensorFlow 1 bilinear of the 2015 Inception graph: corner-aligned origin, no antialiasing, not rounded.

    Output pixel i samples the input at ``i * W / size``, without the half-pixel shift; coordinates and sums are
    float32 as in TensorFlow's kernel.

    Args:
        images: ``(n, C, H, W)``, uint8 or float grey levels.
        size: side of the result.

    Returns:
        float32 ``(n, C, size, size)`` in grey levels; Inception takes ``(v - 128) / 128``.
    """
    across = _lerp(images.float(), size)
    return _lerp(across.mT, size).mT.contiguous()


def _lerp(x: Tensor, size: int) -> Tensor:
    """Linear interpolation of the last axis at ``i * W / size``."""
    width = x.shape[-1]
    position = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(width / size)
    low = position.long()
    left, right = x[..., low], x[..., (low + 1).clamp_max(width - 1)]
    return left + (right - left) * (position - low)


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
