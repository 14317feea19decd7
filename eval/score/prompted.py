"""Metrics of images drawn for prompts, which need no reference: CLIP score, and LPIPS diversity within a prompt.

Both give one value per image or prompt, so that two models that share prompts are compared value by value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import sha256
from dmd2.core.precision import strict_float32
from dmd2.core.progress import Progress
from dmd2.data.captions import read_captions
from eval.detectors.clip import PROTOCOL_GEOMETRY, ClipImages, ClipScore
from eval.detectors.features import identity, read
from eval.detectors.reference import Engine, open_exactly
from eval.detectors.weights import entry_of, locate
from eval.metrics.scores import Scored, cosines, diversities
from eval.pixels.images import ImageSource, pixel_digest
from eval.pixels.resize import Geometry

DIVERSITY_GEOMETRY = Geometry("square-crop+lanczos-512")  # of DMD2's diversity (its Table 6)


@dataclass(frozen=True)
class Machine:
    """Where and how a call computes; none of it changes a number."""

    cache: Path
    weights: Path
    batch: int = 64
    workers: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Chosen:
    """Which images of a set a call uses: the `first` of them, which must then be exactly `images`."""

    images: int | None = None
    first: int | None = None

    def open(self, path: Path, geometry: Geometry) -> ImageSource:
        """See `open_exactly`."""
        return open_exactly(path, geometry, self.images, self.first)


@dataclass(frozen=True)
class ClipCosines:
    """Cosine of every image and its caption by ``clip-dmd2``; image embeddings come from the feature cache.

    Args:
        folder: of an open_clip model.
        prompts: captions by image, see `read_captions`.
        machine: where it runs.
        chosen: which images.
        tower: the model as a detector, if it is loaded already.
    """

    folder: Path
    prompts: Path
    machine: Machine
    chosen: Chosen = Chosen()
    tower: ClipImages | None = None

    @cached_property
    def score(self) -> ClipScore:
        """The model, loaded once for all sets of a call."""
        return ClipScore(self.folder, self.machine.device, self.tower)

    @cached_property
    def captions(self) -> list[str]:
        """The captions of the chosen images."""
        return read_captions(self.prompts)[: self.chosen.first]

    @cached_property
    def texts(self) -> Tensor:
        """Text embeddings ``(n, d)``, computed once for all sets of a call."""
        return self.score.texts(self.captions)

    @property
    def engine(self) -> Engine:
        """The image tower with the protocol's geometry, whatever the geometry of a Frechet distance."""
        machine = self.machine
        return Engine(self.score.images, PROTOCOL_GEOMETRY, machine.cache, machine.batch, machine.workers)

    @property
    def about(self) -> dict[str, Any]:
        """What the values depend on besides the images."""
        captions = {"prompts": str(self.prompts), "prompts_sha256": sha256(self.prompts)}
        return {"protocol": self.score.name, **self.score.about, **captions}

    def open(self, path: Path) -> ImageSource:
        """The images of a set, as many as there are captions.

        Raises:
            UserError: another number of captions, or as `open_exactly` and `read_captions`.
        """
        captions, source = self.captions, self.chosen.open(path, PROTOCOL_GEOMETRY)
        if len(captions) != len(source):
            raise UserError(
                f"{self.prompts} holds {len(captions)} captions but {path} {len(source)} images: give one caption for "
                "each image, in the order of the images"
            )
        return source

    def scored(self, source: ImageSource) -> Scored:
        """Cosines ``(n,)`` of what `open` opened."""
        found = self.engine.features(source)
        return Scored(cosines(found.features, self.texts), found.source, found.duplicates)


@dataclass(frozen=True)
class LpipsDiversity:
    """Mean pairwise LPIPS of the images of one prompt: images ``i k .. i k + k - 1`` belong to prompt or class i.

    Args:
        per_prompt: k, at least 2; DMD2 draws four.
        machine: where it runs.
        chosen: which images.
        geometry: what is done to every image.
    """

    per_prompt: int
    machine: Machine
    chosen: Chosen = Chosen()
    geometry: Geometry = DIVERSITY_GEOMETRY

    @cached_property
    def network(self) -> tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]:
        """LPIPS, loaded once for all sets of a call, and the checksums of its two files.

        Raises:
            UserError: a file is missing, or its listed checksum differs.
        """
        from dmd2.networks.lpips import Lpips  # piq takes seconds to import

        entry, weights = entry_of("lpips-vgg16"), self.machine.weights
        found = {file.file: locate(entry.name, weights, file.file) for file in entry.files}
        files = {name: {"sha256": file.sha256, "verified": file.verified} for name, file in found.items()}
        return Lpips(weights).to(self.machine.device).eval(), files

    @property
    def about(self) -> dict[str, Any]:
        """What the values depend on besides the images."""
        return {"network": "LPIPS of VGG16, average pooling (piq)", "files": self.network[1],
                "geometry": self.geometry.name, "per_prompt": self.per_prompt}  # fmt: skip

    def open(self, path: Path) -> ImageSource:
        """The images of a set, whole prompts of them.

        Raises:
            UserError: the images are not a multiple of `per_prompt`, or as `open_exactly`.
        """
        source = self.chosen.open(path, self.geometry)
        if len(source) % self.per_prompt:
            raise UserError(f"{path}: {len(source)} images are not a multiple of --per-prompt {self.per_prompt}")
        return source

    def scored(self, source: ImageSource) -> Scored:
        """Mean pairwise distances ``(prompts,)`` of what `open` opened."""
        digests: set[int] = set()
        with strict_float32(torch.device(self.machine.device)):
            values = diversities(self._groups(source, digests), self.network[0])
        return Scored(values, identity(source), len(source) - len(digests))

    def _groups(self, source: ImageSource, digests: set[int]) -> Iterator[Tensor]:
        """The images of one prompt at a time; their pixel digests are added to `digests`."""
        k, count = self.per_prompt, len(source)
        progress = Progress(f"diversity {source.id}", count // k)
        pieces = [range(start, start + k) for start in range(0, count, k)]
        for done, group in enumerate(read(source, pieces, self.machine.workers)):
            digests.update(map(pixel_digest, group))
            yield group.to(self.machine.device)
            progress.update(done + 1, {})
