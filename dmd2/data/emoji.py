"""A small real text-to-image set: the emoji of the font Noto Color Emoji, each with its Unicode name.

The font (OFL) is in the Debian package fonts-noto-color-emoji; it holds bitmaps of one size. Which characters have
names depends on the Unicode version of Python: a newer one may know some more emoji.
"""

import io
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from dmd2.core.errors import UserError
from dmd2.data.decode import Encoded
from dmd2.experiment.data_config import Data

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
BITMAP_SIZE = 109  # the only one in the font
POINTS = (*range(0x203C, 0x3300), *range(0x1F000, min(0x1FB00, sys.maxunicode)))
SKIN_TONES = range(0x1F3FB, 0x1F400)  # squares of one colour, shown on faces only in sequences


def emoji(data: Data, part: int, parts: int) -> Iterator[Encoded]:
    """Pictures on white of part `part` of `parts` of the characters that have a name, by code point, as PNG; the
    captions are their names in lower case. Characters without a picture in the font are left out.

    Raises:
        UserError: the font is missing or of another kind.
    """
    from dmd2.core.distributed import rows_of_part  # imports PyTorch, which who only asks for the font does not need

    path = Path(data.source.path or FONT)
    if not path.exists():
        raise UserError(f"{path} is missing (Debian: apt-get install fonts-noto-color-emoji)")
    try:
        font = ImageFont.truetype(str(path), BITMAP_SIZE)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} is not the bitmap font of Noto Color Emoji ({error})") from None
    names = {chr(p): unicodedata.name(chr(p), "") for p in POINTS if p not in SKIN_TONES}
    named = [(c, name) for c, name in names.items() if name and not name.startswith(("REGIONAL INDICATOR", "TAG "))]
    for character, name in (named[i] for i in rows_of_part(len(named), parts, part)):
        canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((80, 80), character, font=font, embedded_color=True, anchor="mm")
        if (box := canvas.getbbox()) is not None:
            yield name, _square_png(canvas.crop(box)), name.lower()


def _square_png(picture: Image.Image) -> bytes:
    """The picture centred on a white square that is a little larger than its longer side."""
    side = round(max(picture.size) * 1.06)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    content = io.BytesIO()
    square.convert("RGB").save(content, "png", compress_level=1)
    return content.getvalue()
