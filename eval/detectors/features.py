"""Features of image sets, extracted once into shards of 1,000 rows that any number of processes fill and resume.

A shard's rows are global sample indices: features, moments and labels do not depend on batches, processes or workers.
The cache is addressed by content: the digests of the images and of the detector, never a name somebody chose.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fcntl import LOCK_EX, flock
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.core.progress import Progress
from dmd2.data.sets import Rows, load_shard, save_shard
from dmd2.networks.quantise import refuse_unless
from eval.detectors.beside import Stream, after_current, into, second
from eval.detectors.reading import decoders, digests, read
from eval.metrics.frechet import FeatureStats
from eval.pixels.images import ImageSource

ROWS = 1000  # per shard: 8 MB of 2,048 features, two minutes of Inception on two CPU cores
HELD = 1 << 28  # bytes of images and outputs that may wait on a GPU to be copied to the host
BATCH, GPU_BATCH = 64, 128  # images per call of the observer
NAME = re.compile(r"features-(\d+)-(\d+)\.json")


class Observer(Protocol):
    """A detector, or several networks that look at the same images in one pass."""

    name: str
    device: torch.device
    about: dict[str, Any]
    """Checksum of the weights, resize, input size, layer, precision: the provenance of every number."""

    @property
    def label(self) -> str:
        """How a Frechet distance of its features is called: ``FID`` or ``FD (<name>)``."""

    def look(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs for uint8 ``(n, C, H, W)``, of any device, by name: ``features`` ``(n, d)``, ``logits`` and others.

        On a GPU it should read nothing back, for which the host would wait.
        """


def account(observer: Observer) -> dict[str, Any]:
    """Name of an observer and what it says about itself; equal accounts give comparable features."""
    return {"name": observer.name, "label": observer.label, **observer.about}


@dataclass(frozen=True)
class FeatureSet:
    """Outputs of an observer for a set of images by name, float32, in sample order.

    `source` and `detector` say what it is of and from; ``pixels`` ``(n,)`` are int64 digests of the images.
    """

    found: dict[str, np.ndarray]
    source: dict[str, Any]
    detector: dict[str, Any]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def features(self) -> np.ndarray:
        """Those of the detector ``(n, d)``."""
        return self.found["features"]

    @property
    def duplicates(self) -> int:
        """Images whose pixels equal those of an earlier one; a grey image equals its RGB replica."""
        return len(self) - len(np.unique(self.found["pixels"]))


def identity(source: ImageSource) -> dict[str, Any]:
    """Identity of the images of a source, for the address of a cache; `small` counts those without a patch."""
    return {"id": source.id, "images": len(source), "geometry": source.geometry.name, "small": source.small}


def shards_of(count: int, process: int = 0, processes: int = 1) -> list[range]:
    """Rows of the shards of `count` images that fall to one process: every shard to exactly one, none padded.

    Raises:
        UserError: there is no such process.
    """
    if not 0 <= process < processes:
        raise UserError(f"there is no shard {process}/{processes}: write i/k with i from 0 to k - 1, for example 0/8")
    return [range(start, min(start + ROWS, count)) for start in range(0, count, ROWS)][process::processes]


def cache_folder(source: ImageSource, observer: Observer, cache: Path) -> Path:
    """Folder of the shards of these very images under this very observer."""
    content = json.dumps([identity(source), account(observer)], sort_keys=True)
    return cache / hashlib.sha256(content.encode()).hexdigest()[:16]


def extract(
    source: ImageSource,
    observer: Observer,
    cache: Path,
    rows: Sequence[range] | None = None,
    batch: int | None = None,
    workers: int | None = None,
) -> Path:
    """Write the shards that are not there yet; a kill loses at most the shard in work, on a GPU the one before, too.

    A GPU looks at images beside making the next ones. Outputs stay there until a shard is whole or `HELD` bytes wait;
    then a thread copies them to the host, checks and stores them, so that the GPU never waits for the host.

    Args:
        source: the images.
        observer: looks at batches of them.
        cache: root of all caches.
        rows: some of `shards_of`; by default all of them.
        batch: images per call of the observer, by default `BATCH`, on a GPU `GPU_BATCH`; batches never cross a shard,
            so a resumed run repeats the same ones.
        workers: threads that decode images ahead; by default those of `decoders`.

    Returns:
        The folder of the shards.

    Raises:
        UserError: an image cannot be read, or images or features are too few or not finite.
    """
    folder, on_gpu = cache_folder(source, observer, cache), observer.device.type != "cpu"
    wanted, batch = shards_of(len(source)) if rows is None else list(rows), batch or (GPU_BATCH if on_gpu else BATCH)
    todo = [shard for shard in wanted if not all(path.exists() for path in _paths(folder, shard))]
    write_json(folder / "about.json", {"source": identity(source), "detector": account(observer)})
    total = sum(map(len, wanted))
    done = total - sum(map(len, todo))
    progress = Progress(f"features {observer.name} {source.id}", total, done)
    pieces = [shard[start : start + batch] for shard in todo for start in range(0, len(shard), batch)]
    batches = read(source, pieces, decoders(source, observer.device) if workers is None else workers)
    made = {"batch": batch, "device": observer.device.type, "torch": torch.__version__}
    stream = second(observer.device)
    with ThreadPoolExecutor(1) if on_gpu else _AtOnce() as storing:
        stored: Future[None] | None = None
        for shard in todo:
            outputs, held = _Outputs(folder, shard, observer.name, made, stream), list[Rows]()
            for indices in (piece for piece in pieces if piece[0] in shard):
                given = next(batches)
                with after_current(stream, given.values()):
                    held.append(_observed(given, indices, observer))
                if not on_gpu or indices[-1] == shard[-1] or _bytes(held) > HELD:
                    if stored is not None:
                        stored.result()  # so that no more than one task waits for the device
                    stored, held = storing.submit(outputs.store, held), []
                done += len(indices)
                progress.update(done, {})
        if stored is not None:
            stored.result()
    return folder


class _AtOnce(Executor):
    """Runs a task when it is submitted: on a CPU nobody waits for a device."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """See `Executor`; what the task raises is raised here."""
        done: Future[Any] = Future()
        done.set_result(task(*args, **options))
        return done


def _bytes(held: list[Rows]) -> int:
    return sum(tensor.nbytes for part in held for tensor in part.values())


def _observed(given: Rows, indices: range, observer: Observer) -> Rows:
    """Outputs for one batch beside what `read` gave, without images whose digests are known."""
    with torch.no_grad():
        found = {what: tensor.float() for what, tensor in observer.look(given["images"]).items()}
    for what, tensor in {**given, **found}.items():
        if len(tensor) != len(indices):
            raise UserError(f"samples {indices.start} to {indices.stop - 1} gave {len(tensor)} {what}")
    return {what: tensor for what, tensor in given.items() if what != "images" or "pixels" not in given} | found


@dataclass(frozen=True)
class _Outputs:
    """Outputs for the images of a shard, made as `made` says; those that are on the host already are `kept`."""

    folder: Path
    shard: range
    observer: str
    made: dict[str, Any]
    stream: Stream
    kept: list[Rows] = field(default_factory=list)

    def store(self, held: list[Rows]) -> None:
        """Move what the `stream` of the device has made to the host, checked; write the shard once it is whole."""
        first = self.shard.start + sum(len(part["pixels"]) for part in self.kept)
        with into(self.stream):
            found = {what: torch.cat([part[what] for part in held]).cpu() for what in held[0]}
        if "finite" in found:
            refuse_unless(found.pop("finite"), "image {}", first)
        if "images" in found:
            found["pixels"] = digests(found.pop("images"))
        for what, tensor in found.items():
            if not torch.isfinite(tensor).all():
                row = first + int((~torch.isfinite(tensor)).reshape(len(tensor), -1).any(dim=1).nonzero()[0])
                raise UserError(f"{self.observer} gave NaN or infinite {what} for image {row}")
        self.kept.append(found)
        if first + len(found["pixels"]) == self.shard.stop:
            joined = {what: torch.cat([part[what] for part in self.kept]) for what in found}
            _publish(self.folder, self.shard, joined, self.made)


def _publish(folder: Path, shard: range, tensors: Rows, made: dict[str, Any]) -> None:
    """Write a shard and its note (how it was `made`), unless another process did: theirs may differ in rounding."""
    path, note = _paths(folder, shard)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        flock(lock, LOCK_EX)
        if not (path.exists() and note.exists()):
            save_shard(path, tensors)
            write_json(note, {**made, "files": listing([path], folder)})


def join(folder: Path, count: int) -> FeatureSet:
    """All shards of `count` images as one set.

    Raises:
        UserError: rows are missing, there twice, too many, or a shard is truncated or changed.
    """
    about, shards = read_json(folder / "about.json"), list(_shards(folder, count))
    found = {name: np.concatenate([shard[name].numpy() for shard in shards]) for name in shards[0]}
    return FeatureSet(found, about["source"], about["detector"])


def stream_moments(folder: Path, count: int) -> FeatureStats:
    """Moments of all shards with one of them in memory at a time; refuses what `join` refuses."""
    return reduce(FeatureStats.merge, (FeatureStats.of(shard["features"]) for shard in _shards(folder, count)))


def _paths(folder: Path, shard: range) -> tuple[Path, Path]:
    """A shard and the note with its checksum, which is written last and so marks it complete."""
    name = f"features-{shard.start:06d}-{shard.stop:06d}"
    return folder / f"{name}.safetensors", folder / f"{name}.json"


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
