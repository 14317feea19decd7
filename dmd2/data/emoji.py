"""A small real text-to-image set: the emoji of the font Noto Color Emoji, each with its Unicode name.

The font (OFL) is in the Debian package fonts-noto-color-emoji; it holds bitmaps of one size. Which characters have
names is a matter of the Unicode version of Python: a newer one may know some more emoji.
"""

import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dmd2.core.distributed import part as share
from dmd2.core.errors import UserError
from dmd2.experiment.data_config import Data

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 109  # the only size of its bitmaps
BLOCK = 256
SKIN_TONES = range(0x1F3FB, 0x1F400)  # squares of one colour, shown on faces only in sequences


def emoji(data: Data, pixels: int, part: int = 0, parts: int = 1) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Blocks of images uint8 ``(n, 3, pixels, pixels)`` on white and their names in lower case, by code point.

    Raises:
        UserError: the font is missing, or draws nothing (another build of it, without bitmaps).
    """
    from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

    path = Path(data.source.path or FONT)
    if not path.exists():
        raise UserError(f"data {data.name}: {path} is missing (Debian: apt-get install fonts-noto-color-emoji)")
    try:
        font = ImageFont.truetype(str(path), SIZE)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"data {data.name}: {path} is not the bitmap font of Noto Color Emoji ({error})") from None
    drawn, captions, number = [], [], -1
    wanted = share(sum(1 for _ in _named()), parts, part)
    for character, name in _named():
        number += 1
        if number not in wanted:
            continue
        canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((80, 80), character, font=font, embedded_color=True, anchor="mm")
        if canvas.getbbox() is None:  # the font has no picture of it
            continue
        drawn.append(_square(canvas, pixels))
        captions.append(name.lower())
        if len(drawn) == BLOCK:
            yield np.stack(drawn), captions
            drawn, captions = [], []
    if drawn:
        yield np.stack(drawn), captions


def _named() -> Iterator[tuple[str, str]]:
    """Every character of Unicode outside the alphabets that has a name, in the order of the code points."""
    for point in (*range(0x203C, 0x3300), *range(0x1F000, min(0x1FB00, sys.maxunicode))):
        name = unicodedata.name(chr(point), "")
        if name and point not in SKIN_TONES and not name.startswith(("REGIONAL INDICATOR", "TAG ")):
            yield chr(point), name


def _square(canvas: "Image.Image", pixels: int) -> np.ndarray:  # type: ignore[name-defined]  # noqa: F821
    """The drawing, centred on a white square of its longer side with a small margin, and resized."""
    from PIL import Image

    box = canvas.getbbox()
    assert box is not None
    side = round(max(box[2] - box[0], box[3] - box[1]) * 1.06)
    square = Image.new("RGBA", (side, side), "white")
    picture = canvas.crop(box)
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.convert("RGB").resize((pixels, pixels), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
