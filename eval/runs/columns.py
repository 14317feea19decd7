"""Several features of every image in one pass of the sampler: all of them stand side by side in one feature shard.

Columns: features of the detector, of the detector on the patch, CLIP's image embedding, and one column for each
appearance statistic. The second and third are there where the run's evaluation asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.core.errors import UserError
from eval.detectors.detectors import Detector
from eval.detectors.networks import rgb
from eval.pixels.resize import Geometry

LUMA = (0.299, 0.587, 0.114)  # Rec. 601


def brightness(images: Tensor) -> Tensor:
    """Mean pixel ``(n,)`` on the scale 0..1 of uint8 ``(n, C, H, W)``."""
    return images.double().mean(dim=(1, 2, 3)) / 255


def saturation(images: Tensor) -> Tensor:
    """Mean over pixels of HSV's saturation ``(max - min) / max`` of the channels, 0 for black: ``(n,)`` in 0..1."""
    high, low = (extreme(images, dim=1).double() for extreme in (torch.amax, torch.amin))
    return ((high - low) / high.clamp(min=1)).mean(dim=(1, 2))


def sharpness(images: Tensor) -> Tensor:
    """Root mean square of luma (0..1) minus its 3x3 mean, over pixels with eight neighbours: ``(n,)``.

    What averaging neighbours takes away, so fine texture and edges: over-smooth images lack it.
    """
    weights = torch.tensor(LUMA, dtype=torch.float64, device=images.device)[None, :, None, None]
    luma = (rgb(images).double() * weights).sum(dim=1, keepdim=True) / 255
    fine = luma[:, :, 1:-1, 1:-1] - F.avg_pool2d(luma, 3, stride=1)
    return fine.square().mean(dim=(1, 2, 3)).sqrt()


# Statistics of the images as they were generated; brightness is that of what the detector sees.
APPEARANCE: dict[str, Callable[[Tensor], Tensor]] = {"saturation": saturation, "sharpness": sharpness}


@dataclass(frozen=True)
class Tap:
    """One more network that sees every image, after a geometry of its own."""

    detector: Detector
    geometry: Geometry

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(n, d)`` of uint8 ``(n, C, H, W)``."""
        return self.detector(self.geometry(images))[0].double().cpu()


@dataclass(frozen=True)
class Columns:
    """The columns of a joined feature matrix, apart again."""

    features: np.ndarray
    others: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


class Taps:
    """A detector whose row holds all that is measured of an image, so that one cache and one pass serve every metric.

    Args:
        detector: whose features are the first columns; its logits are those of the whole.
        geometry: what is done to an image before it.
        others: more networks by name, in the order of their columns.
        statistics: names of `APPEARANCE`; brightness is always there, as the last column.
    """

    def __init__(
        self, detector: Detector, geometry: Geometry, others: dict[str, Tap], statistics: Sequence[str]
    ) -> None:
        self.inner, self.geometry, self.others, self.statistics = detector, geometry, others, tuple(statistics)
        self.name, self.label, self.is_fid = detector.name, detector.label, detector.is_fid
        beside = {name: [t.detector.name, t.detector.about, t.geometry.name] for name, t in others.items()}
        self.about: dict[str, Any] = {
            **detector.about, "geometry": geometry.name, "others": beside, "columns": [*statistics, "brightness"]
        }  # fmt: skip

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Columns ``(n, d)`` and logits of uint8 ``(n, C, H, W)`` as generated."""
        seen = self.geometry(images)
        features, logits = self.inner(seen)
        columns = [features.double().cpu(), *(tap(images) for tap in self.others.values())]
        scalars = [*(APPEARANCE[name](images) for name in self.statistics), brightness(seen)]
        return torch.cat([*columns, *(scalar[:, None].cpu() for scalar in scalars)], dim=1).float(), logits

    def split(self, matrix: np.ndarray, width: int, widths: dict[str, int]) -> Columns:
        """The columns of ``(n, d)``.

        Args:
            matrix: what `__call__` gave.
            width: of the detector's features, as its reference has them.
            widths: of those of the `others`.

        Raises:
            UserError: together they are not as wide as the matrix.
        """
        found = [width, *(widths[name] for name in self.others), *[1] * (len(self.statistics) + 1)]
        if sum(found) != matrix.shape[1]:
            wanted, had = width + sum(widths.values()), matrix.shape[1] - len(self.statistics) - 1
            raise UserError(f"features of {had} and {wanted} dimensions cannot be compared: other detectors?")
        parts = np.split(matrix, np.cumsum(found)[:-1], axis=1)
        first, *rest = (np.ascontiguousarray(part) for part in parts)
        count = len(self.others)
        scalars = dict(zip([*self.statistics, "brightness"], rest[count:], strict=True))
        return Columns(first, dict(zip(self.others, rest, strict=False)), {k: v[:, 0] for k, v in scalars.items()})
