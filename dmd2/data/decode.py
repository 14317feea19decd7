"""Encoded images as pixels: decoding side by side, sizes, grey and transparency."""

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from dmd2.core.errors import UserError
from dmd2.experiment.data_config import Data

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BLOCK, BLOCK_BYTES = 500, 1 << 26  # at most so many images, and bytes of their pixels, are decoded at a time
BROKEN = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
Encoded = tuple[str, bytes, Any]  # name and content of an image, and its label or caption


@dataclass(frozen=True)
class Pixels:
    """What the images of a set are made into: ``channels`` x ``size`` x ``size``.

    name: of the set. crop: whether images of another size are resized from their central square, instead of refused.
    white: whether transparent images are composited on white, instead of refused.
    """

    name: str
    channels: int
    size: int
    crop: bool
    white: bool = False

    @classmethod
    def labelled(cls, data: Data) -> Self:
        """Images as the config says; a transparent one is refused."""
        return cls(data.name, data.channels, data.resolution, data.source.resize == "center-crop")

    @classmethod
    def captioned(cls, data: Data, size: int) -> Self:
        """RGB images; pictures of the web are shown on white where they are transparent."""
        return cls(data.name, 3, size, data.source.resize == "center-crop", white=True)

    @property
    def block(self) -> int:
        """Images decoded at a time."""
        return max(1, min(BLOCK, BLOCK_BYTES // (self.channels * self.size**2)))


def decoded(images: Iterable[Encoded], wanted: Pixels) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """Blocks of pixels and their labels or captions, decoded by as many threads as torch uses.

    Pillow lets them run side by side.
    """
    images = iter(images)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while block := list(islice(images, wanted.block)):
            names, contents, labels = zip(*block, strict=True)
            yield np.stack(list(pool.map(decode, contents, names, [wanted] * len(block)))), list(labels)


def decode(content: bytes, name: str, wanted: Pixels) -> np.ndarray:
    """Pixels uint8 ``(C, H, W)`` of one image; palettes become RGB, grey becomes RGB in a set of 3 channels.

    Raises:
        UserError: unreadable, more than 8 bits, transparent, or of other size or channels than wanted.
    """
    try:
        image = _without_alpha(eight_bits(content), wanted.white)
        if wanted.channels == 1 and image.mode not in ("L", "1"):
            raise UserError(f"is {image.mode}, but data.channels is 1: convert it to grey or set data.channels: 3")
        image = image.convert("L" if wanted.channels == 1 else "RGB")
        return _sized(image, wanted).transpose(2, 0, 1)
    except UserError as error:
        raise UserError(f"data {wanted.name}: {name} {error}") from None
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise UserError(f"data {wanted.name}: {name} is not a readable image ({error}); make it again") from None


def eight_bits(content: bytes) -> Image.Image:
    """An encoded image, whose pixels are not read yet.

    Raises:
        UserError: its pixels have more than 8 bits.
        OSError, Image.DecompressionBombError: it is no image, or one of too many pixels; or another of `BROKEN`.
    """
    image = Image.open(io.BytesIO(content))
    # Pillow opens 16-bit colour PNG as RGB and drops the low bytes; only the header tells (byte 24 is the bit depth).
    if image.mode[0] in "FI" or (image.format == "PNG" and content[24] == 16):
        raise UserError("has more than 8 bits per channel: quantise it to 8 bits first")
    return image


def _without_alpha(image: Image.Image, white: bool) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    whole = image.convert("RGBA")
    if np.asarray(whole.getchannel("A")).min() == 255:
        return image.convert("L" if image.mode == "LA" else "RGB")
    if not white:
        raise UserError("is transparent: composite it on a background first")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), whole).convert("RGB")


def _sized(image: Image.Image, wanted: Pixels) -> np.ndarray:
    """Pixels uint8 ``(H, W, C)``."""
    size = wanted.size
    if wanted.crop:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    if image.size != (size, size):
        raise UserError(
            f"is {image.width}x{image.height} instead of {size}x{size}: set data.source.resize: center-crop, or make a "
            "set of that size (EDM's dataset_tool.py --resolution)"
        )
    return np.asarray(image).reshape(size, size, wanted.channels)
