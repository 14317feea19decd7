"""What generated images are compared with, and how images of either side become features.

A reference is images, moments in a peer's npz (EDM, clean-fid), or our manifest of moments. What was made by another
detector or geometry is refused, never compared.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, sha256
from eval.detectors.features import FeatureSet, account, extract, identity, join, shards_of, stream_moments
from eval.detectors.networks import FeatureNetwork
from eval.metrics.estimate import matrix
from eval.metrics.frechet import FeatureStats, Reference, load_stats, save_stats
from eval.pixels.images import ImageSource, open_images
from eval.pixels.resize import Geometry

# numpy raises whatever its zip and array readers raise; TypeError: a single array instead of an archive
NPZ_ERRORS = (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Engine:
    """How images become features: one detector, one geometry, one cache for every set of a comparison."""

    detector: FeatureNetwork
    geometry: Geometry
    cache: Path
    batch: int | None = None
    workers: int | None = None

    def features(self, source: ImageSource) -> FeatureSet:
        """All features of a source, from the cache as far as they are there."""
        return join(self._extracted(source), len(source))

    def fill(self, source: ImageSource, process: int, processes: int) -> int:
        """Put one process's share of the features into the cache; returns the number of images."""
        rows = shards_of(len(source), process, processes)
        self._extracted(source, rows)
        return sum(map(len, rows))

    def save_moments(self, source: ImageSource, path: Path, out: Path) -> FeatureStats:
        """Write the moments of a source, opened from `path`, to the manifest `out`, one shard in memory at a time."""
        stats = stream_moments(self._extracted(source), len(source))
        made_by = {"detector": self.detector.name, "account": json.dumps(account(self.detector))}
        save_stats(stats, out, {**made_by, "data": str(path), **identity(source)})
        return stats

    def _extracted(self, source: ImageSource, rows: list[range] | None = None) -> Path:
        return extract(source, self.detector, self.cache, rows, self.batch, self.workers)

    def reference(self, path: Path) -> Reference:
        """Images, an npz of moments (EDM, clean-fid) or features (clean-fid's KID), or our manifest of moments.

        Raises:
            UserError: unreadable, or made by another detector or geometry.
        """
        if not holds_moments(path):
            images = self.features(open_images(path, self.geometry))
            about = {"path": str(path), **images.source, "duplicates": images.duplicates}
            return Reference(FeatureStats.of(images.features), images.features, about, images.detector)
        found = _npz(path, self.detector) if path.suffix == ".npz" else _moments(path, self.geometry)
        ours, theirs = account(self.detector), found.detector or {}
        for key, value in theirs.items():
            if value != ours.get(key):
                raise UserError(
                    f"{path} was made by {theirs['name']}, whose {key} is {value} and not {ours.get(key)} as here: "
                    "numbers of different protocols are not comparable"
                )
        return found


def holds_moments(path: Path) -> bool:
    """Whether a reference consists of moments or features, so that it needs no detector."""
    if path.suffix == ".npz":
        try:
            with np.load(path) as file:
                return "mu" in file.files or "feats" in file.files
        except NPZ_ERRORS as error:
            raise UserError(f"{path} is not a readable npz ({error})") from None
    manifest = _manifest(path)
    return manifest.suffix == ".json" and manifest.exists() and read_json(manifest).get("kind") == "reference"


def _manifest(path: Path) -> Path:
    return path / "manifest.json" if path.is_dir() else path


def _moments(path: Path, geometry: Geometry) -> Reference:
    """Moments that `save_stats` wrote; an older manifest names its detector and says nothing else about it."""
    manifest = _manifest(path)
    entry, stats = read_json(manifest), load_stats(manifest)
    made_with = entry.get("geometry", "none")
    if made_with != geometry.name:
        raise UserError(f"{path} was made with geometry {made_with}, but these images with {geometry.name}")
    images, key = entry.get("images", stats.count), entry["files"][0]["sha256"][:16]
    made_by = json.loads(entry["account"]) if "account" in entry else {"name": entry["detector"]}
    return Reference(stats, None, {"path": str(path), "id": key, "images": images, "geometry": made_with}, made_by)


def _npz(path: Path, detector: FeatureNetwork) -> Reference:
    """Inception moments ``mu (d,)`` and ``sigma (d, d)``, or features ``feats (n, d)``, in a peer's format."""
    if not detector.is_fid:
        raise UserError(f"{path} is in the format of Inception statistics, not comparable with {detector.name}")
    about = {"path": str(path), "id": sha256(path)[:16], "images": None, "geometry": "not recorded"}
    try:
        with np.load(path) as file:
            if "feats" in file.files:
                features = matrix(np.asarray(file["feats"], np.float32)).numpy()
                return Reference(FeatureStats.of(features), features, {**about, "images": len(features)})
            mu, sigma = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
    except NPZ_ERRORS as error:
        raise UserError(f"{path}: mu, sigma or feats cannot be read ({error})") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not np.isfinite(sigma).all() or not np.isfinite(mu).all():
        raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not a finite mean and covariance")
    # The file does not say how many images it is of; only the covariance is used, so any count above 1 will do.
    return Reference(FeatureStats(2, mu, sigma), None, about)
