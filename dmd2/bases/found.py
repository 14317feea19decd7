"""What is found in a source of images."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from dmd2.core.errors import UserError
from dmd2.data.decode import BROKEN, eight_bits
from dmd2.experiment.data_config import Data, Source

LOOKED_AT = 1000  # images whose header is read


@dataclass(frozen=True)
class Found:
    """What a source holds.

    Args:
        source: its section of a base, without a resize.
        count: number of images.
        sides: shorter sides of the images looked at, in pixels, with their numbers.
        square: whether all of these are square.
        channels: 1 if all are grey, else 3.
        classes: names of the classes with their numbers of images; empty without labels.
        captions: some captions; empty without captions.
        fixed: whether images are read as they are, and not resized.
        note: a sentence on what was not taken, or empty.
    """

    source: Source
    count: int
    sides: Counter[int]
    square: bool
    channels: int
    classes: dict[str, int] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    fixed: bool = False
    note: str = ""

    @property
    def side(self) -> int:
        """The side that nine images of ten have at least."""
        return sorted(self.sides.elements())[self.sides.total() // 10]


@dataclass
class Shapes:
    """Sizes, channels and transparency of encoded images that are looked at."""

    sides: Counter[int] = field(default_factory=Counter)
    square: bool = True
    colours: int = 0

    def add(self, name: str, content: bytes, captioned: bool) -> None:
        """Take an image; those with captions are shown on white where they are transparent.

        Raises:
            UserError: it is unreadable, has more than 8 bits, or is transparent in a set without captions.
        """
        try:
            image = eight_bits(content)
            alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            if alpha and not captioned and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
                raise UserError("is transparent: put your images on a background first")
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        except (*BROKEN, Image.DecompressionBombError) as error:
            raise UserError(f"{name} is not a readable image ({error}): make it again or take it away") from None
        self.sides[min(image.size)] += 1
        self.square &= image.width == image.height
        self.colours += image.mode not in ("L", "1", "LA")

    def found(self, source: Source, count: int, **more: Any) -> Found:
        """What they are like together."""
        return Found(source, count, self.sides, self.square, 3 if self.colours or more.get("captions") else 1, **more)


def reading(source: Source, classes: int = 0, captioned: bool = False) -> Data:
    """A data section that serves to read labels or captions of a source, and not its pixels."""
    text = {"pipeline": {"name": "none"}, "latents": False} if captioned else None
    values = {"name": "look", "source": source, "resolution": 1, "channels": 3, "classes": classes, "text": text}
    return Data.model_validate(values)


def by_number(labels: Counter[int]) -> dict[str, int]:
    """Numbers of images of the classes 0 to the largest."""
    return {str(label): labels[label] for label in range(max(labels, default=-1) + 1)}
