"""Encoded images as pixels: decoding side by side, sizes, grey and transparency."""

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dmd2.core.errors import UserError
from dmd2.experiment.data_config import Data

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BLOCK_IMAGES, BLOCK_BYTES = 500, 1 << 26  # at most so many images, and bytes of their pixels, are decoded at a time
EMOJI_BLOCK_IMAGES = 256  # the noise of latents is drawn by block, so another number would make other latents
BROKEN = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
Encoded = tuple[str, bytes, Any]  # name and content of an image, and its label or caption
Block = tuple[np.ndarray, list[Any]]  # images (n, C, H, W), and their labels or captions


def decoded(images: Iterable[Encoded], data: Data, size: int) -> Iterator[Block]:
    """Blocks of decoded images of ``size`` x ``size``; as many threads as torch uses decode side by side."""
    images, emoji = iter(images), data.source.kind == "emoji"
    most = BLOCK_BYTES // ((data.channels if data.text is None else 3) * size**2)
    length = max(1, min(EMOJI_BLOCK_IMAGES if emoji else BLOCK_IMAGES, most))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while block := list(islice(images, length)):
            names, contents, labels = zip(*block, strict=True)
            yield np.stack(list(pool.map(partial(decode, data=data, size=size), contents, names))), list(labels)


def decode(content: bytes, name: str, data: Data, size: int) -> np.ndarray:
    """Pixels uint8 ``(C, size, size)`` of one image; palettes become RGB, grey becomes RGB in a set of 3 channels.

    Images with captions become RGB, on white where they are transparent.

    Raises:
        UserError: unreadable, more than 8 bits, of other size or channels than the config says, or transparent in a
            set with labels.
    """
    grey = data.text is None and data.channels == 1
    try:
        image = _without_alpha(eight_bits(content), white=data.text is not None)
        if grey and image.mode not in ("L", "1"):
            raise UserError(f"is {image.mode}, but data.channels is 1: convert it to grey or set data.channels: 3")
        image = image.convert("L" if grey else "RGB")
        if data.source.resize == "center-crop" or data.source.kind == "emoji":
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        if image.size != (size, size):
            raise UserError(
                f"is {image.width}x{image.height} instead of {size}x{size}: set data.source.resize: center-crop, or "
                "make a set of that size (EDM's dataset_tool.py --resolution)"
            )
        return np.asarray(image).reshape(size, size, 1 if grey else 3).transpose(2, 0, 1)
    except UserError as error:
        raise UserError(f"{name} {error}") from None
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not a readable image ({error}); make it again") from None


def eight_bits(content: bytes) -> Image.Image:
    """An encoded image, whose pixels are not read yet.

    Raises:
        UserError: its pixels have more than 8 bits.
        OSError, Image.DecompressionBombError: it is no image, or one of too many pixels; or another of `BROKEN`.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # whose text is an address in memory
        raise OSError("no format of images that is known") from None
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
