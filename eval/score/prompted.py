"""Metrics of images drawn for prompts, which need no reference: CLIP score, and LPIPS diversity within a prompt.

Both give one value per image or prompt, so that two models that share prompts are compared value by value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import sha256
from dmd2.core.precision import strict_float32
from dmd2.core.progress import Progress
from dmd2.core.upload import upload
from eval.detectors.clip import PROTOCOL_GEOMETRY, ClipScore
from eval.detectors.networks import FeatureNetwork
from eval.detectors.reading import decoders, read
from eval.detectors.reference import Engine
from eval.detectors.weights import locate
from eval.metrics.measures import cosines, diversities
from eval.pixels.images import ImageSource
from eval.pixels.resize import Geometry

DIVERSITY_GEOMETRY = Geometry("square-crop+lanczos-512")  # of DMD2's diversity (its Table 6)


@dataclass(frozen=True)
class ClipCosines:
    """Cosine of every image and its caption by ``clip-dmd2``.

    The model is loaded by `load` when the first image needs it, after images and captions were checked. Image
    embeddings come from the feature cache of `engine_of`, in the protocol's geometry whatever that of a Frechet
    distance; `captions`, read from `prompts`, are those of the images in their order.
    """

    load: Callable[[], ClipScore]
    engine_of: Callable[[FeatureNetwork, Geometry], Engine]
    prompts: Path
    captions: list[str]
    geometry = PROTOCOL_GEOMETRY

    @cached_property
    def score(self) -> ClipScore:
        """The model."""
        return self.load()

    @cached_property
    def engine(self) -> Engine:
        """Its image tower with the feature cache."""
        return self.engine_of(self.score.images, self.geometry)

    @cached_property
    def texts(self) -> Tensor:
        """Text embeddings ``(n, d)``, computed once for all sets of a call."""
        return self.score.texts(self.captions)

    @property
    def about(self) -> dict[str, Any]:
        """What the values depend on besides the images."""
        captions = {"prompts": str(self.prompts), "prompts_sha256": sha256(self.prompts)}
        return {"protocol": self.score.name, **self.score.about, **captions}

    def check(self, path: Path, count: int) -> None:
        """Refuse `count` images of `path` unless there is a caption for each.

        Raises:
            UserError: another number of captions.
        """
        if len(self.captions) != count:
            raise UserError(
                f"{self.prompts} holds {len(self.captions)} captions but {path} {count} images: give one caption for "
                "each image, in the order of the images"
            )

    def scored(self, source: ImageSource) -> tuple[np.ndarray, int]:
        """Cosines ``(n,)``, and how many images repeat an earlier one."""
        found = self.engine.features(source)
        return cosines(found.features, self.texts), found.duplicates


@dataclass(frozen=True)
class LpipsDiversity:
    """Mean pairwise LPIPS of the images of one prompt: images ``i k .. i k + k - 1`` belong to prompt or class i.

    `per_prompt` is k, at least 2 (DMD2 draws four), `weights` the folder of network weights, `workers` the threads
    that decode images, if given.
    """

    per_prompt: int
    geometry: Geometry
    weights: Path
    device: str
    workers: int | None

    @cached_property
    def network(self) -> tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]:
        """LPIPS, loaded once for all sets of a call, and the checksums of its two files.

        Raises:
            UserError: a file is missing, or its listed checksum differs.
        """
        from dmd2.networks.lpips import LINEAR_FILE, NAME, VGG_FILE, Lpips  # piq takes seconds to import

        found = {file: locate(NAME, self.weights, file) for file in (VGG_FILE, LINEAR_FILE)}
        files = {name: {"sha256": file.sha256, "verified": file.verified} for name, file in found.items()}
        return Lpips(self.weights).to(self.device).eval(), files

    @property
    def about(self) -> dict[str, Any]:
        """What the values depend on besides the images."""
        network = {"network": "LPIPS of VGG16, average pooling (piq)", "files": self.network[1]}
        return {**network, "geometry": self.geometry.name, "per_prompt": self.per_prompt}

    def check(self, path: Path, count: int) -> None:
        """Refuse `count` images of `path` unless they are whole prompts.

        Raises:
            UserError: they are not a multiple of `per_prompt`.
        """
        if count % self.per_prompt:
            raise UserError(f"{path}: {count} images are not a multiple of --per-prompt {self.per_prompt}")

    def scored(self, source: ImageSource) -> tuple[np.ndarray, int]:
        """Mean pairwise distances ``(prompts,)``, and how many images repeat an earlier one."""
        digests: set[int] = set()
        with strict_float32(torch.device(self.device)):
            values = diversities(self._groups(source, digests), self.network[0])
        return values, len(source) - len(digests)

    def _groups(self, source: ImageSource, digests: set[int]) -> Iterator[Tensor]:
        """The images of one prompt at a time; their pixel digests are added to `digests`."""
        k, count = self.per_prompt, len(source)
        progress = Progress(f"diversity {source.id}", count // k)
        groups = [range(start, start + k) for start in range(0, count, k)]
        workers = decoders(source, torch.device(self.device)) if self.workers is None else self.workers
        for done, group in enumerate(read(source, groups, workers), start=1):
            digests.update(group["pixels"].tolist())
            yield upload(group["images"], self.device)
            progress.update(done, {})
