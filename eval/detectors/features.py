"""Features of image sets, extracted once into shards of 1,000 rows that any number of processes fill and resume.

A shard's rows are global sample indices: features, moments and labels do not depend on batches, processes or workers.
The cache is addressed by content: the digests of the images and of the detector, never a name somebody chose.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fcntl import LOCK_EX, flock
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmd2.core.errors import UserError
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.core.progress import Progress
from dmd2.data.sets import load_shard, save_shard
from eval.metrics.stats import FeatureStats
from eval.pixels.images import ImageSource, pixel_digest
from eval.pixels.resize import NONE, Geometry

if TYPE_CHECKING:  # spawned workers import this module, and networks take seconds to import
    from eval.detectors.detectors import Detector

ROWS = 1000  # per shard: 8 MB of 2,048 features, two minutes of Inception on two CPU cores
NAME = re.compile(r"features-(\d+)-(\d+)\.json")


@dataclass(frozen=True)
class FeatureSet:
    """Features float32 ``(n, d)`` in sample order, and what they are of and from.

    `logits` ``(n, classes)`` are there if the detector classifies; `pixels` ``(n,)`` are int64 digests of the images.
    """

    features: np.ndarray
    logits: np.ndarray | None
    pixels: np.ndarray
    source: dict[str, Any]
    detector: dict[str, Any]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def duplicates(self) -> int:
        """Images whose pixels equal those of an earlier one; a grey image equals its RGB replica."""
        return len(self.pixels) - len(np.unique(self.pixels))


@dataclass(frozen=True)
class Sampled:
    """`ImageSource` that draws image i from sample seed i: no image file between generator and metric.

    Args:
        id: digest of everything the images depend on (weights, config, label rule, rounding); it addresses the cache.
        count: number of images, sample seeds ``0 .. count - 1``.
        sample: sample seeds to uint8 ``(n, C, H, W)``, the same image for a seed in whatever company.
    """

    id: str
    count: int
    sample: Callable[[list[int]], Tensor]
    geometry: Geometry = NONE
    small: int = 0

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: range) -> Tensor:
        """uint8 ``(n, C, H, W)`` on the CPU."""
        return self.geometry(self.sample(list(indices)).cpu())


def account(detector: Detector) -> dict[str, Any]:
    """Name of a detector and what it says about itself; equal accounts give comparable features."""
    return {"name": detector.name, "label": detector.label, **detector.about}


def identity(source: ImageSource) -> dict[str, Any]:
    """What identifies the images of a source; `small` counts those without a patch."""
    return {"id": source.id, "images": len(source), "geometry": source.geometry.name, "small": source.small}


def blocks(count: int) -> list[range]:
    """Row ranges of the shards of `count` images."""
    return [range(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


def share(count: int, process: int, processes: int) -> list[range]:
    """Shards that fall to one process: every one to exactly one, none padded or repeated.

    Raises:
        UserError: there is no such process.
    """
    if not 0 <= process < processes:
        raise UserError(f"there is no shard {process}/{processes}: write i/k with i from 0 to k - 1, for example 0/8")
    return blocks(count)[process::processes]


def cache_folder(source: ImageSource, detector: Detector, cache: Path) -> Path:
    """Folder of the shards of these very images under this very detector."""
    content = json.dumps([identity(source), account(detector)], sort_keys=True)
    return cache / hashlib.sha256(content.encode()).hexdigest()[:16]


def extract(
    source: ImageSource,
    detector: Detector,
    cache: Path,
    rows: Sequence[range] | None = None,
    batch: int = 64,
    workers: int = 0,
    start_method: str | None = None,
) -> Path:
    """Write the shards that are not there yet; a kill loses at most the shard in work.

    Args:
        source: the images.
        detector: uint8 batches to features and logits.
        cache: root of all caches.
        rows: some of `blocks` (see `share`); by default all of them.
        batch: images per call of the detector; batches never cross a shard, so a resumed run repeats the same ones.
        workers: processes that decode images; 0 decodes in this one, which on a CPU costs least.
        start_method: of the workers: fork, spawn or forkserver; by default Python's.

    Returns:
        The folder of the shards.

    Raises:
        UserError: an image cannot be read, or features are too few or not finite.
    """
    folder = cache_folder(source, detector, cache)
    wanted = blocks(len(source)) if rows is None else list(rows)
    todo = [block for block in wanted if not all(path.exists() for path in _paths(folder, block))]
    write_json(folder / "about.json", {"source": identity(source), "detector": account(detector)})
    total = sum(map(len, wanted))
    done = total - sum(map(len, todo))
    progress = Progress(f"features {detector.name} {source.id}", total, done)
    pieces = [block[start : start + batch] for block in todo for start in range(0, len(block), batch)]
    batches = zip(pieces, read(source, pieces, workers, start_method), strict=True)
    for block in todo:
        parts: list[dict[str, Tensor]] = []
        while sum(len(part["features"]) for part in parts) < len(block):
            indices, images = next(batches)
            parts.append(_embed(images, indices, detector))
            done += len(indices)
            progress.update(done, {})
        _publish(folder, block, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, batch)
    return folder


def _publish(folder: Path, block: range, tensors: dict[str, Tensor], batch: int) -> None:
    """Write a shard and its note, unless another process did so since: theirs may differ in rounding."""
    path, note = _paths(folder, block)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        flock(lock, LOCK_EX)
        if not (path.exists() and note.exists()):
            save_shard(path, tensors)
            write_json(note, {"batch": batch, "torch": torch.__version__, "files": listing([path], folder)})


def join(folder: Path, count: int) -> FeatureSet:
    """All shards of `count` images as one set.

    Raises:
        UserError: rows are missing, there twice, too many, or a shard is truncated or changed.
    """
    about = read_json(folder / "about.json")
    return _feature_set(list(_shards(folder, count)), about["source"], about["detector"])


def stream_moments(folder: Path, count: int) -> FeatureStats:
    """Moments of all shards with one of them in memory at a time; refuses what `join` refuses."""
    return reduce(FeatureStats.merge, (FeatureStats.of(shard["features"]) for shard in _shards(folder, count)))


def _paths(folder: Path, block: range) -> tuple[Path, Path]:
    """A shard and the note with its checksum, which is written last and so marks it complete."""
    name = f"features-{block.start:06d}-{block.stop:06d}"
    return folder / f"{name}.safetensors", folder / f"{name}.json"


class _Pieces(Dataset):
    """Batches of a source by position, for loader processes."""

    def __init__(self, source: ImageSource, pieces: list[range]) -> None:
        self.source, self.pieces = source, pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, position: int) -> Tensor | UserError:
        try:
            return self.source.batch(self.pieces[position])
        except UserError as error:
            return error  # raised in a worker, it would arrive as a traceback instead of a sentence


def read(
    source: ImageSource, pieces: list[range], workers: int = 0, start_method: str | None = None
) -> Iterator[Tensor]:
    """Batches of a source by their index ranges, in this order, decoded by `workers` processes (see `extract`)."""
    dataset = _Pieces(source, pieces)
    context = start_method if workers else None
    for item in DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context):
        if isinstance(item, UserError):
            raise item
        yield item


def _embed(images: Tensor, indices: range, detector: Detector) -> dict[str, Tensor]:
    """Features, logits and pixel digests of one batch."""
    with torch.inference_mode():
        features, logits = detector(images)
    for what, got in (("images", images), ("features", features)):
        if len(got) != len(indices):
            raise UserError(f"samples {indices.start} to {indices.stop - 1} gave {len(got)} {what}")
    if not torch.isfinite(features).all():
        row = indices[int((~torch.isfinite(features)).any(dim=1).nonzero()[0])]
        raise UserError(f"{detector.name} gave NaN or infinite features for image {row}")
    out = {"features": features.float().cpu(), "pixels": torch.tensor([pixel_digest(image) for image in images])}
    return out if logits is None else {**out, "logits": logits.float().cpu()}


def _shards(folder: Path, count: int) -> Iterator[dict[str, Tensor]]:
    """Tensors of every shard in order, after their rows were found to be exactly ``0 .. count - 1``."""
    found = sorted((int(m[1]), int(m[2]), path) for path in folder.iterdir() if (m := NAME.fullmatch(path.name)))
    expected = 0
    for start, stop, path in found:
        if start > expected:
            break
        if start < expected:
            raise UserError(f"{path} repeats rows {start} to {min(stop, expected) - 1} of another shard: delete one")
        expected = stop
    if expected < count:
        until = min((start for start, _, _ in found if start > expected), default=count)
        raise UserError(f"{folder}: features of images {expected} to {until - 1} are missing: extract them first")
    if expected > count:
        raise UserError(f"{folder} holds features of {expected} images instead of {count}: delete the folder")
    for start, stop, path in found:
        tensors = load_shard(verified(folder, read_json(path)["files"][0]))
        if any(len(tensor) != stop - start for tensor in tensors.values()):
            raise UserError(f"{path} is named for {stop - start} rows but holds {len(tensors['features'])}: delete it")
        yield tensors


def _feature_set(parts: list[dict[str, Tensor]], source: dict[str, Any], detector: dict[str, Any]) -> FeatureSet:
    whole = {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}
    return FeatureSet(whole["features"], whole.get("logits"), whole["pixels"], source, detector)
