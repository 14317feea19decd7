"""Caption embeddings for the CLIP score of a run, and the model that makes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmd2.core.files import read_json
from dmd2.data.captions import EvalPrompts

if TYPE_CHECKING:  # open_clip takes a second to import
    from eval.detectors.clip import ClipScore
    from eval.detectors.small_clip import SmallClip

TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Alignment:
    """A model whose embeddings of image and caption are compared by their cosine, and the prompts of an evaluation.

    Caption i is that of sample seed i. `known` holds the embeddings of captions by their numbers, since snapshots and
    draws share them.
    """

    model: ClipScore | SmallClip
    prompts: EvalPrompts
    known: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def load(manifest: Path, prompts: EvalPrompts, device: torch.device | str = "cpu") -> Alignment:
        """With the model of a manifest in data/weights: a small CLIP trained here, or an open_clip folder.

        Raises:
            UserError: its weights are missing or changed.
        """
        if read_json(manifest)["kind"] == "clip":
            from eval.detectors.small_clip import SmallClip

            return Alignment(SmallClip.load(manifest, device), prompts)
        from eval.detectors.clip import ClipScore

        return Alignment(ClipScore(manifest.parent, device), prompts)

    def texts(self, seeds: list[int]) -> Tensor:
        """Embeddings ``(n, d)`` of the captions of sample seeds, each computed once for all calls."""
        numbers = [seed % len(self.prompts.captions) for seed in seeds]
        new = sorted(set(numbers) - self.known.keys())
        for start in range(0, len(new), TEXTS_AT_ONCE):
            part = new[start : start + TEXTS_AT_ONCE]
            states = self.prompts.condition(part).text if self.model.reads_states else None
            self.known.update(zip(part, self.model.texts(self.prompts.captions_of(part), states), strict=True))
        return torch.stack([self.known[number] for number in numbers])
