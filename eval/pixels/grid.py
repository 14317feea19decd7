"""The grid of fixed-noise samples (grid.png): how many it shows, and how pages show it."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dmd2.core.errors import UserError

ROWS, COLUMNS = 6, 10  # samples of each class or prompt, and of how many of those
SIDE = 256  # pixels: larger samples are scaled down to it
SMALL, WIDTH = 340, 640  # pixels: a page enlarges grids up to the first, and scales them down beyond the second


@dataclass(frozen=True)
class Grid:
    """A grid of samples as a data URL; a small one is shown enlarged by a whole factor."""

    url: str
    width: int
    height: int
    small: bool

    @property
    def wide(self) -> int:
        """Width on a screen, in CSS pixels."""
        return self.width * max(1, 270 // self.width)

    @property
    def narrow(self) -> int:
        """Width on a phone, in CSS pixels."""
        return self.width * max(1, 358 // self.width)


def sample_side(data: dict[str, Any]) -> int | None:
    """Side of a sample in pixels; None for latents, whose decoded size only the grid itself shows."""
    return None if (data.get("text") or {}).get("latents") else data["resolution"]


def sample_grid(path: Path, side: int | None) -> Grid:
    """The grid of `side` x `side` samples: a small one with gaps, a wide one scaled down and as JPEG.

    Without `side` it is that of a grid of `ROWS` rows.

    Raises:
        UserError: the file is missing or is not an image.
    """
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            if small := image.width <= SMALL:
                shown = _spaced(image.convert("LA" if image.mode == "L" else "RGBA"), side or image.height // ROWS)
                shown.save(buffer, "PNG", optimize=True)
            else:
                width = min(image.width, WIDTH)
                shown = image.convert("RGB").resize((width, round(image.height * width / image.width)))
                shown.save(buffer, "JPEG", quality=85)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as an image"
        fix = f"delete {path.with_name('metrics.json')} if it is there and make the table again with Snakemake"
        raise UserError(f"sample grid {path} {reason}: {fix}, or run from the repository root") from error
    kind, content = "png" if small else "jpeg", base64.b64encode(buffer.getvalue()).decode()
    return Grid(f"data:image/{kind};base64,{content}", *shown.size, small)


def _spaced(image: Image.Image, side: int) -> Image.Image:
    """One clear pixel between samples, through which the page shows."""
    columns, rows = max(1, image.width // side), max(1, image.height // side)
    spaced = Image.new(image.mode, (image.width + columns - 1, image.height + rows - 1))
    for row in range(rows):
        for column in range(columns):
            x, y = column * side, row * side
            spaced.paste(image.crop((x, y, x + side, y + side)), (x + column, y + row))
    return spaced
