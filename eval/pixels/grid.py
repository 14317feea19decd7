"""The grid of fixed-noise samples (grid.png): how many it shows, and how pages show it."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

from dmd2.core.errors import UserError
from dmd2.core.files import read_json

ROWS, COLUMNS = 6, 10  # samples of each class or prompt, and of how many of those
SIDE = 256  # pixels: larger samples are scaled down to it
HEIGHT = 360  # CSS pixels: a grid of two columns is not enlarged beyond it
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
        return self.width * max(1, min(270 // self.width, HEIGHT // self.height))

    @property
    def narrow(self) -> int:
        """Width on a phone, in CSS pixels."""
        return self.width * max(1, min(358 // self.width, HEIGHT // self.height))


def sample_side(data: dict[str, Any]) -> int | None:
    """Side of a sample in pixels; None for latents, whose decoded size only the grid itself shows."""
    return None if (data.get("text") or {}).get("latents") else data["resolution"]


def sample_grid(path: Path, side: int | None) -> Grid:
    """The grid of `side` x `side` samples: a small one with gaps, a wide one scaled down and as JPEG.

    Without `side` it is that of a grid of `ROWS` rows.

    Raises:
        UserError: the file is missing or is not an image.
    """
    try:
        with Image.open(path) as image:
            return _shown(image, side or image.height // ROWS)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as an image"
        fix = f"delete {path.with_name('metrics.json')} if it is there and make the table again with Snakemake"
        raise UserError(f"sample grid {path} {reason}: {fix}, or run from the repository root") from error


def real_grid(folder: Path, classes: int) -> Grid | None:
    """Images of the real set that lies in `folder`, in the layout of samples; None where no images lie there.

    They are spread evenly over its first shard, in each column over one class if there are `classes`.
    """
    manifest = folder / "manifest.json"
    files = [folder / entry["path"] for entry in read_json(manifest)["files"]] if manifest.exists() else []
    shard = next((file for file in files if file.suffix == ".safetensors" and file.exists()), None)
    if shard is None:
        return None
    with safe_open(shard, "numpy") as tensors:
        images = tensors.get_slice("images") if "images" in tensors.keys() else None  # noqa: SIM118, it is no dict
        if images is None or images.get_dtype() != "U8":  # latents
            return None
        count, channels, height, width = images.get_shape()
        of = tensors.get_tensor("labels") if classes else np.arange(count) * COLUMNS // count
        grid = np.zeros((min(classes or COLUMNS, COLUMNS), ROWS, channels, height, width), np.uint8)
        for column, cells in enumerate(grid):
            found = np.flatnonzero(of == column)
            for row in range(min(ROWS, len(found))):
                at = found[row * len(found) // min(ROWS, len(found))]
                cells[row] = images[int(at) : int(at) + 1][0]
    tiled = grid.transpose(1, 3, 0, 4, 2).reshape(ROWS * height, -1, channels)
    return _shown(Image.fromarray(tiled[..., 0] if channels == 1 else tiled), width)


def _shown(image: Image.Image, side: int) -> Grid:
    buffer = io.BytesIO()
    if small := image.width <= SMALL:
        shown = _spaced(image.convert("LA" if image.mode == "L" else "RGBA"), side)
        shown.save(buffer, "PNG", optimize=True)
    else:
        width = min(image.width, WIDTH)
        shown = image.convert("RGB").resize((width, round(image.height * width / image.width)))
        shown.save(buffer, "JPEG", quality=85)
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
