"""What generated images are compared with, and how images of either side become features.

A reference is images, moments in a peer's npz (EDM, clean-fid), or our manifest of moments. What was made by another
detector or geometry is refused, never compared.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from dmd2.core.distributed import Device, local_device
from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import read_json, sha256
from dmd2.core.provenance import recorded
from dmd2.experiment.run_inputs import WEIGHTS
from eval.detectors.detectors import Detector, load_detector
from eval.detectors.features import FeatureSet, account, extract, identity, join, share, stream_moments
from eval.metrics.frechet import FrechetReference, moments
from eval.metrics.stats import FeatureStats, load_stats, save_stats
from eval.pixels.images import ImageSource, open_images
from eval.pixels.resize import NONE, Geometry

# numpy raises whatever its zip and array readers raise; TypeError: a single array instead of an archive
NPZ_ERRORS = (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)

FEATURES = Path("data/features")  # cache of all feature shards


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with: moments, and features if the reference came as images.

    `about` says what it is; `detector` is None where a file of moments does not say which network made them.
    """

    stats: FeatureStats
    features: FeatureSet | None
    about: dict[str, Any]
    detector: dict[str, Any] | None

    @cached_property
    def frechet(self) -> FrechetReference:
        """The moments with their factor computed once."""
        return FrechetReference(self.stats)

    def rows(self, metric: str) -> np.ndarray:
        """Features ``(n, d)``.

        Raises:
            UserError: the reference is moments only.
        """
        if self.features is None:
            raise UserError(f"{metric} needs images as its reference, but {self.about['path']} holds moments only")
        return self.features.features


@dataclass(frozen=True)
class Engine:
    """How images become features: one detector, one geometry, one cache for every set of a comparison."""

    detector: Detector
    geometry: Geometry
    cache: Path
    batch: int = 64
    workers: int = 0

    def open(self, path: Path, images: int | None = None, first: int | None = None) -> ImageSource:
        """Images of `path`; with `images`, exactly that many.

        Raises:
            UserError: as `open_exactly`.
        """
        return open_exactly(path, self.geometry, images, first)

    def features(self, source: ImageSource) -> FeatureSet:
        """All features of a source, from the cache as far as they are there."""
        folder = extract(source, self.detector, self.cache, None, self.batch, self.workers)
        return join(folder, len(source))

    def fill(self, source: ImageSource, process: int, processes: int) -> int:
        """Put one process's share of the features into the cache; returns the number of images."""
        rows = share(len(source), process, processes)
        extract(source, self.detector, self.cache, rows, self.batch, self.workers)
        return sum(map(len, rows))

    def reference(self, path: Path) -> Reference:
        """Images, an npz of moments (EDM, clean-fid) or features (clean-fid's KID), or our manifest of moments.

        Raises:
            UserError: unreadable, or made by another detector or geometry.
        """
        found = _moments_of(path, self) or _from_images(path, self)
        same_detector(account(self.detector), found)
        return found


def open_exactly(path: Path, geometry: Geometry, images: int | None = None, first: int | None = None) -> ImageSource:
    """Images of `path`, of which there must be `images` (after `first` of them were taken).

    Raises:
        UserError: as `open_images`, or another number of images.
    """
    source = open_images(path, geometry, first)
    if images is not None and len(source) != images:
        raise UserError(f"{path} holds {len(source)} images but the protocol asks for exactly {images}")
    return source


def part_of(text: str) -> tuple[int, int]:
    """Process and number of processes from ``i/k``.

    Raises:
        UserError: written otherwise.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise UserError(f"{text!r} is no shard: write i/k with i from 0 to k - 1, for example 0/8")
    return int(match[1]), int(match[2])


def save_moments(engine: Engine, source: ImageSource, path: Path, out: Path) -> FeatureStats:
    """Write the moments of a source to the manifest `out`, one shard of features in memory at a time."""
    folder = extract(source, engine.detector, engine.cache, None, engine.batch, engine.workers)
    stats = stream_moments(folder, len(source))
    made_by = json.dumps(account(engine.detector))
    save_stats(
        stats, out, {"detector": engine.detector.name, "account": made_by, "data": str(path), **identity(source)}
    )
    return stats


def holds_moments(path: Path) -> bool:
    """Whether a reference is moments or features already, so that no image of it needs a detector."""
    if path.suffix == ".npz":
        return any(key in _keys(path) for key in ("mu", "feats"))
    manifest = path / "manifest.json" if path.is_dir() else path
    return manifest.suffix == ".json" and manifest.exists() and read_json(manifest).get("kind") == "reference"


def _from_images(path: Path, engine: Engine) -> Reference:
    source = engine.open(path)
    features = engine.features(source)
    about = {"path": str(path), **features.source, "duplicates": features.duplicates}
    return Reference(moments(features.features), features, about, features.detector)


def _moments_of(path: Path, engine: Engine) -> Reference | None:
    if not holds_moments(path):
        return None
    if path.suffix == ".npz":
        return _npz(path, engine)
    manifest = path / "manifest.json" if path.is_dir() else path
    entry, stats = read_json(manifest), load_stats(manifest)
    geometry = entry.get("geometry", "none")
    if geometry != engine.geometry.name:
        raise UserError(f"{path} was made with geometry {geometry}, but these images with {engine.geometry.name}")
    about = {"path": str(path), "id": entry["files"][0]["sha256"][:16], "images": entry.get("images", stats.count),
             "geometry": geometry}  # fmt: skip
    made_by = json.loads(entry["account"]) if "account" in entry else {"name": entry["detector"]}
    return Reference(stats, None, about, made_by)


def _keys(path: Path) -> list[str]:
    try:
        with np.load(path) as file:
            return list(file.files)
    except NPZ_ERRORS as error:
        raise UserError(f"{path} is not a readable npz ({error})") from None


def _npz(path: Path, engine: Engine) -> Reference:
    """Inception moments ``mu (d,)`` and ``sigma (d, d)``, or features ``feats (n, d)``, in a peer's format."""
    if not engine.detector.is_fid:
        raise UserError(f"{path} is in the format of Inception statistics, not comparable with {engine.detector.name}")
    about = {"path": str(path), "id": sha256(path)[:16], "images": None, "geometry": "not recorded"}
    try:
        with np.load(path) as file:
            if "feats" in file.files:
                feats = np.asarray(file["feats"], np.float32)
                unknown = np.arange(len(feats))
                features = FeatureSet(feats, None, unknown, about, account(engine.detector))
                return Reference(moments(feats), features, {**about, "images": len(feats)}, None)
            mu, sigma = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
    except NPZ_ERRORS as error:
        raise UserError(f"{path}: mu, sigma or feats cannot be read ({error})") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not np.isfinite(sigma).all() or not np.isfinite(mu).all():
        raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not a finite mean and covariance")
    # The file does not say how many images it is of; only the covariance is used, so any count above 1 will do.
    return Reference(FeatureStats(2, mu, sigma), None, about, None)


def same_detector(ours: dict[str, Any], reference: Reference) -> None:
    """Refuse a reference whose detector gave another account of itself than `ours`.

    Raises:
        UserError: the first point in which they differ.
    """
    theirs = reference.detector
    if theirs is None:
        return
    other = [key for key in theirs if theirs[key] != ours.get(key)]  # an older manifest gives the name only
    if other:
        key = other[0]
        raise UserError(
            f"{reference.about['path']} was made by {theirs['name']}, whose {key} is {theirs[key]} and not "
            f"{ours.get(key)} as here: numbers of different protocols are not comparable"
        )


def main(
    source: Path, out: Path, detector: Annotated[str, typer.Option(help="network of the features")],
    geometry: Annotated[str, typer.Option(help="what is done to the images first")] = NONE.name, threads: int = 1,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Write the feature moments of SOURCE (a real set's manifest, or an npz of moments) to the manifest OUT."""
    torch.set_num_threads(threads)
    with readable_errors():
        if not source.exists():
            raise UserError(f"{source} is missing: put the reference statistics (npz with mu and sigma) there")
        place = local_device(device, "reference")
        engine = Engine(load_detector(detector, device=place), Geometry(geometry), FEATURES)
        with recorded(out, [detector, geometry], [WEIGHTS / detector / "manifest.json", source]):
            if holds_moments(source):
                about = {"detector": detector, "data": str(source), "images": None, "geometry": geometry}
                save_stats(engine.reference(source).stats, out, about)
            else:
                save_moments(engine, engine.open(source), source, out)


if __name__ == "__main__":
    typer.run(main)
