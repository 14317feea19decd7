"""Feature moments in float64 that merge exactly over batches, shards and processes, and their Frechet distance.

Recipes (never `sqrtm`): A with a cached factor of the reference and symmetric eigenvalues, and B (`frechet_distance`)
where rounding would spoil A.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import cholesky, eigh
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.data.sets import load_shard, save_shard
from eval.metrics.estimate import Estimate, Features, blocks, linear, matrix

EPS = float(np.finfo(np.float64).eps)
ROWS_AT_ONCE = 4096  # rows of features that are held in float64


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


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with; what depends on it alone is computed once for many sets.

    It counts as fixed: standard error and bias are those of the generated sample. `between_samples` adds its own.

    Args:
        stats: its moments.
        features: of its images ``(m, d)``; None where only moments are known.
        about: what it is, for the record of a number.
        detector: what the network that made it says about itself; None where a file of moments does not say.
    """

    stats: FeatureStats
    features: np.ndarray | None = None
    about: dict[str, Any] = field(default_factory=dict)
    detector: dict[str, Any] | None = None

    def rows(self, metric: str) -> np.ndarray:
        """Features ``(m, d)`` of its images.

        Raises:
            UserError: only moments are known; `metric` is who asks.
        """
        if self.features is None:
            raise UserError(f"{metric} needs images as its reference, but {self.about['path']} holds moments only")
        return self.features

    def distance(self, stats: FeatureStats) -> float:
        """``|m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2))``, good to 1e-9 of ``tr S + tr S_r``.

        Raises:
            UserError: other dimensions, fewer than two images on a side, or moments that are not numbers.
        """
        self._check(stats)
        values = eigh(self._pulled_back(stats.covariance), eigvals_only=True, check_finite=False)
        return self._value(stats, values)

    def _check(self, stats: FeatureStats) -> None:
        if stats.mean.shape != self.stats.mean.shape:
            dims = f"{len(stats.mean)} and {len(self.stats.mean)}"
            raise UserError(f"features of {dims} dimensions cannot be compared: other detectors?")
        for side in (stats, self.stats):
            if not (np.isfinite(side.mean).all() and np.isfinite(side.covariance).all()):
                raise UserError("moments hold NaN or infinity: were the features computed from damaged images?")

    @cached_property
    def _factor(self) -> np.ndarray:
        """``L (d, r)`` with ``L L^T = S_r``: Cholesky, or the range of the eigendecomposition if rank-deficient."""
        covariance = self.stats.covariance
        d = len(covariance)
        try:
            factor = cholesky(covariance, lower=True)
            if factor.diagonal().min() ** 2 > d * EPS * covariance.diagonal().max():
                return factor
        except np.linalg.LinAlgError:
            pass
        values, vectors = eigh(covariance)
        kept = values > d * EPS * values[-1]
        return vectors[:, kept] * np.sqrt(values[kept])

    def _pulled_back(self, covariance: np.ndarray) -> np.ndarray:
        """``L^T S L``, whose eigenvalues are those of ``S S_r``."""
        m = self._factor.T @ covariance @ self._factor
        return (m + m.T) / 2 if m.size else np.zeros((1, 1))  # a reference of equal images has no range

    def _value(self, stats: FeatureStats, values: np.ndarray) -> float:
        """Recipe A from the eigenvalues of ``L^T S L``, or recipe B where rounding would spoil their roots."""
        traces = float(np.trace(stats.covariance) + np.trace(self.stats.covariance))
        # An eigenvalue is known to a few eps of the largest; its root to delta / (2 sqrt(w)), at worst sqrt(delta)
        delta = 8 * EPS * max(values[-1], 0.0)
        if values[0] < -1e-6 * np.abs(values).max():
            raise UserError("a covariance is not positive semi-definite, so it has no Frechet distance")
        roots = np.sqrt(values.clip(0))
        error = np.minimum(delta / (2 * roots.clip(EPS * max(roots[-1], 1e-300))), np.sqrt(delta)).sum()
        if self._factor.shape[1] < len(stats.mean) or error > 1e-9 * traces:
            return frechet_distance(stats, self.stats)
        return settled(float(((stats.mean - self.stats.mean) ** 2).sum()), traces - 2 * float(roots.sum()), traces)

    def estimate(self, features: Features, strata: Features | None = None) -> Estimate:
        """Distance of features ``(n, d)`` with its standard error, first-order influences and second-order bias.

        With ``L^T S L = U diag(w) U^T`` and ``z = diag(w)^(-1/2) U^T L^T (x - m)`` from one eigendecomposition and one
        pass over the features. For ``n < 2 d`` neither error nor bias is known: in directions the sample hardly saw,
        the distance has no expansion. On Gaussians the 95 % interval covers 26 % at n = 1.25 d, 86 % at 2 d and 98 %
        from 4 d on.

        Args:
            features: of the generated images.
            strata: class of every image, see `standard_error`.
        """
        x = matrix(features).cpu().numpy()
        stats = FeatureStats.of(x)
        self._check(stats)
        values, vectors = eigh(self._pulled_back(stats.covariance), check_finite=False)
        roots = np.sqrt(values.clip(0))
        live = values > len(values) * EPS * max(values[-1], 0.0)  # no image varies along the others
        factor = self._factor if self._factor.size else np.zeros((len(stats.mean), 1))
        whitener = factor @ (vectors[:, live] / roots[live])
        shift = stats.mean - self.stats.mean
        trace = float(np.trace(stats.covariance))
        psi, quartic = np.empty(len(x)), np.zeros((live.sum(), live.sum()))
        for rows in blocks(len(x), ROWS_AT_ONCE):
            centred = x[rows].astype(np.float64) - stats.mean
            # float32 is a hundred times finer than the SE needs, and halves the cost of the two large products
            z2 = (centred.astype(np.float32) @ whitener.astype(np.float32)) ** 2
            quartic += z2.T @ z2
            energy = (centred**2).sum(axis=1) - trace - z2 @ roots[live] + roots[live].sum()
            psi[rows] = 2 * centred @ shift + energy
        bias = _bias(trace, roots[live], quartic / len(x), len(x))
        found = linear(self._value(stats, values), psi, bias, strata=strata)
        return found if len(x) >= 2 * len(stats.mean) else replace(found, se=None, bias=None)


def _bias(trace: float, roots: np.ndarray, quartic: np.ndarray, n: int) -> float:
    """Second-order bias ``tr S / n + 1/n sum_ij Var(y_i y_j) / (2 sqrt(w_i w_j) (sqrt w_i + sqrt w_j))``.

    Here ``y_i = sqrt(w_i) z_i``, so ``Var(y_i y_j) = w_i w_j (E[z_i^2 z_j^2] - delta_ij)``.

    Args:
        trace: of S.
        roots: sqrt w ``(r,)``.
        quartic: mean of ``z_i^2 z_j^2`` ``(r, r)``.
        n: number of images.
    """
    weights = np.outer(roots, roots) / (roots[:, None] + roots)
    spread = (weights * (quartic - np.eye(len(roots)))).sum() / 2
    return float(trace + spread) / n


def between_samples(x: Features, y: Features, strata: Features | None = None) -> Estimate:
    """Distance of two samples ``(n, d)`` and ``(n_r, d)`` when the reference is a finite draw too.

    Adds the reference's standard error and bias, from the same expansion with the roles exchanged.
    """
    ours = Reference(FeatureStats.of(y)).estimate(x, strata)
    theirs = Reference(FeatureStats.of(x)).estimate(y)
    if ours.se is None or ours.bias is None or theirs.se is None or theirs.bias is None:
        return Estimate(ours.value, None, ours.n)
    return Estimate(ours.value, float(np.hypot(ours.se, theirs.se)), ours.n, ours.bias + theirs.bias)


def from_ones(features: Features, reference: Reference, processes: int) -> Estimate:
    """The distance that the official ImageNet evaluator prints, see `ones_initialised`; never the right one.

    What it differs by is no property of the images, so it has neither standard error nor bias of its own.
    """
    stats = ones_initialised(FeatureStats.of(features), processes)
    return Estimate(reference.distance(stats), None, len(features))


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
