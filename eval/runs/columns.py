"""Several features of every image in one pass of the sampler: all of them stand side by side in one feature shard.

Columns: features of the detector, of the detector on the patch, CLIP's image embedding, and one column for each
appearance statistic. The second and third are there where the run's evaluation asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from eval.detectors.detectors import Detector
from eval.metrics import appearance
from eval.pixels.resize import Geometry


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
        statistics: functions of `eval.metrics.appearance`, of images as they were generated. The last column is always
            brightness, of what the detector sees.
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
        scalars = [*(getattr(appearance, name)(images) for name in self.statistics), appearance.brightness(seen)]
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
