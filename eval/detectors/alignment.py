"""How well images follow their captions: the CLIP score of a run's samples, and which model it is taken from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dmd2.core.files import read_json
from dmd2.data.prompts import EvalPrompts
from eval.detectors.detectors import Detector
from eval.pixels.resize import Geometry

TEXTS = 256  # captions at once


class Towers(Protocol):
    """A pair of networks whose embeddings of image and caption are compared by their cosine."""

    @property
    def images(self) -> Detector:
        """The image tower."""
        ...

    @property
    def geometry(self) -> Geometry:
        """What is done to an image before it."""
        ...

    def texts(self, captions: list[str], states: Tensor, /) -> Tensor:
        """Embeddings ``(n, d)`` of captions, whose states by the run's text encoder are ``(n, L, D)``."""
        ...


@dataclass(frozen=True)
class Alignment:
    """Towers and the prompts of an evaluation; caption i is that of sample seed i."""

    towers: Towers
    prompts: EvalPrompts

    def texts(self, seeds: list[int]) -> Tensor:
        """Embeddings ``(n, d)`` of the captions of sample seeds; a repeated caption is embedded once."""
        count = len(self.prompts.captions)
        distinct = sorted({seed % count for seed in seeds})
        found = [self._embedded(distinct[start : start + TEXTS]) for start in range(0, len(distinct), TEXTS)]
        place = {number: row for row, number in enumerate(distinct)}
        return torch.cat(found)[[place[seed % count] for seed in seeds]]

    def _embedded(self, seeds: list[int]) -> Tensor:
        states = self.prompts.condition(seeds).text
        assert states is not None
        return self.towers.texts(self.prompts.captions_of(seeds), states).float().cpu()


def load_towers(manifest: Path, device: torch.device | str = "cpu") -> Towers:
    """The model of a manifest in data/weights: a small CLIP trained here, or an open_clip folder.

    Raises:
        UserError: its weights are missing or changed.
    """
    if read_json(manifest)["kind"] == "clip":
        from eval.detectors.small_clip import SmallTowers

        return SmallTowers.load(manifest, device)
    from eval.detectors.clip import ClipScore  # open_clip takes a second to import

    return ClipScore(manifest.parent, device)
