"""Feature moments in float64 that merge exactly over batches, shards and processes, and the Frechet distance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.data.sets import load_shard, save_shard
from eval.metrics.estimate import Features, blocks

EPS = float(np.finfo(np.float64).eps)
ROWS_AT_ONCE = 4096  # of features, in float64


@dataclass(frozen=True)
class FeatureStats:
    """Count, mean ``(d,)`` and centred scatter ``(d, d)``, all float64; the covariance divides by count - 1."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @staticmethod
    def of(features: Features) -> FeatureStats:
        """Moments of features ``(n, d)``; 50,000 x 2,048 of them never exist twice in float64."""
        x = features.cpu().numpy() if isinstance(features, Tensor) else features
        return reduce(FeatureStats.merge, (FeatureStats._of_rows(x[rows]) for rows in blocks(len(x), ROWS_AT_ONCE)))

    @staticmethod
    def _of_rows(rows: np.ndarray) -> FeatureStats:
        x = rows.astype(np.float64)
        mean = x.mean(axis=0)
        centred = x - mean
        return FeatureStats(len(x), mean, centred.T @ centred)

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Moments of both samples together (Chan et al. 1983)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return FeatureStats(count, mean, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance.

        Raises:
            UserError: fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


def ones_initialised(stats: FeatureStats, processes: int = 1) -> FeatureStats:
    """The official ImageNet evaluator's quirk: its second-moment accumulator starts at ones in every process."""
    return FeatureStats(stats.count, stats.mean, stats.scatter + processes)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` of features of equal dimensions.

    With ``S = A A^T`` by a symmetric eigendecomposition the last trace is the nuclear norm of ``A^T B``: real by
    construction, exact for rank-deficient covariances, no `sqrtm`.

    Raises:
        UserError: either side has fewer than two samples, or a covariance is none.
    """
    cov_a, cov_b = a.covariance, b.covariance
    cross = np.linalg.svd(_root(a).T @ _root(b), compute_uv=False).sum()
    traces = float(np.trace(cov_a) + np.trace(cov_b))
    return settled(float(((a.mean - b.mean) ** 2).sum() + traces - 2 * cross), 0.0, traces)


def settled(means: float, covariances: float, traces: float) -> float:
    """Sum of the two terms of the distance; a covariance term within rounding of zero is zero.

    Raises:
        UserError: clearly negative, which no two covariances can be.
    """
    distance = means + (0.0 if abs(covariances) <= 64 * EPS * traces else covariances)
    if not distance > -1e-6 * traces - 1e-300:
        raise UserError(f"the Frechet distance came out as {distance:.3g}: a covariance is not positive semi-definite")
    return max(distance, 0.0)


def _root(stats: FeatureStats) -> np.ndarray:
    """A factor ``A`` with ``A A^T`` equal to the covariance."""
    values, vectors = np.linalg.eigh(stats.covariance)
    d = len(values)
    # Fewer images than dimensions: the eigenvalues that must be 0 come out near eps, and their roots near 1e-8
    noise = d * EPS * values[-1] if stats.count <= d else 0.0
    return vectors * np.sqrt(np.where(values > noise, values, 0.0))


def save_stats(stats: FeatureStats, out: Path, about: dict[str, Any]) -> None:
    """Write moments as ``moments.safetensors`` beside the manifest `out`."""
    path = out.parent / "moments.safetensors"
    save_shard(path, {"mean": torch.from_numpy(stats.mean), "scatter": torch.from_numpy(stats.scatter)})
    write_json(out, {"kind": "reference", **about, "count": stats.count, "files": listing([path], out.parent)})


def load_stats(manifest: Path) -> FeatureStats:
    """Read what `save_stats` wrote, verified."""
    entry = read_json(manifest)
    tensors = load_shard(verified(manifest.parent, entry["files"][0]))
    return FeatureStats(entry["count"], tensors["mean"].numpy(), tensors["scatter"].numpy())


def describe(manifest: Path) -> str:
    """``name@checksum`` of a manifest with one heavy file, for the provenance of a number."""
    entry = read_json(manifest)
    return f"{manifest.parent.name}@{entry['files'][0]['sha256'][:8]}"
