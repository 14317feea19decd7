"""The engine: metrics of one set of images, for the command line and for evaluations of runs alike."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from scipy.stats import t
from torch import Tensor

from dmd2.core.rng import sample_labels
from dmd2.core.run import commit
from dmd2.experiment.metrics import Metric
from eval.detectors.features import FeatureSet
from eval.detectors.reference import Reference
from eval.metrics import measures
from eval.metrics.estimate import Estimate, Mean
from eval.metrics.frechet import moments
from eval.metrics.measures import Found, View
from eval.metrics.scores import Scored
from eval.metrics.stats import ones_initialised

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "timm", "open-clip-torch")
IMAGES_PER_DIMENSION = 4  # below, the bias estimate is off by more than about 16 %


@dataclass(frozen=True)
class Seen:
    """All that is known of one set of images.

    Args:
        features: of the detector, and of the patch ``(n, d)``, by `Metric.sees`.
        logits: of the detector ``(n, classes)``.
        detector: its name.
        values: one per image or prompt ``(n,)`` by metric, of the metrics that are means of them.
        references: what features are compared with, by `Metric.sees`.
        labels: class of every image ``(n,)``.
        strata: the same where the classes were fixed beforehand and not drawn: errors then count the spread inside
            classes only.
        reference_sampled: the Frechet distance's error counts the reference's own sampling, too.
    """

    features: Mapping[str, np.ndarray]
    logits: np.ndarray | None
    detector: str
    values: Mapping[str, np.ndarray]
    references: Mapping[str, Reference]
    labels: Tensor | None = None
    strata: Tensor | None = None
    reference_sampled: bool = False

    @staticmethod
    def of(
        sample: FeatureSet | None, reference: Reference | None, values: Mapping[str, np.ndarray],
        classes: int | None = None, reference_sampled: bool = False,
    ) -> Seen:  # fmt: skip
        """Of a feature set whose image i is of class ``i mod classes``, and of values."""
        count = len(sample) if sample else max(map(len, values.values()), default=0)
        labels = None if classes is None else sample_labels(list(range(count)), classes, "cyclic")
        references = {"detector": reference} if reference else {}
        features = {"detector": sample.features} if sample else {}
        logits, name = (sample.logits, sample.detector["name"]) if sample else (None, "")
        return Seen(features, logits, name, values, references, labels, labels, reference_sampled)


@dataclass(frozen=True)
class Result:
    """A number of one set, and the classes inside which its error is counted."""

    found: Found
    strata: Tensor | None = None

    @property
    def influence(self) -> np.ndarray:
        """Effect of every image on it ``(n,)``, of a metric that has influences (`Metric.has_influence`)."""
        assert not isinstance(self.found, Estimate)
        return self.found.influence

    @property
    def estimate(self) -> Estimate:
        """The number with its error and bias."""
        return self.found if isinstance(self.found, Estimate) else self.found.estimate(self.strata)

    def minus(self, other: Result) -> Result:
        """Difference to a set whose images at one index share seed and label or prompt; an `Estimate` loses its error.

        Raises:
            UserError: the sets have different numbers of images.
        """
        if isinstance(self.found, Estimate) or isinstance(other.found, Estimate):
            return Result(Estimate(self.estimate.value - other.estimate.value, None, self.estimate.n))
        ours: Any = self.found  # of one metric, so both are of one kind
        return Result(ours.minus(other.found), self.strata)


def measure(metric: Metric, seen: Seen) -> dict[str, Result]:
    """The numbers of a metric by name.

    Raises:
        UserError: something that it needs is missing, or too few or unusable images.
    """
    if metric.name in seen.values:
        return {metric.name: Result(Mean.of(seen.values[metric.name]), None if metric.sees == "lpips" else seen.strata)}
    view = View(
        seen.features[metric.sees], seen.logits, seen.detector, seen.references.get(metric.sees), seen.labels,
        seen.strata, seen.reference_sampled,
    )  # fmt: skip
    found = getattr(measures, metric.function)(view)
    return {number: Result(value, seen.strata) for number, value in zip(metric.gives, found, strict=True)}


def from_ones(features: np.ndarray, reference: Reference, processes: int) -> Estimate:
    """The Frechet distance that the official ImageNet evaluator prints, see `ones_initialised`; never the right one.

    What it differs by is no property of the images, so it has neither standard error nor bias of its own.
    """
    stats = ones_initialised(moments(features), processes)
    return Estimate(reference.frechet.distance(stats), None, len(features))


def warnings(
    sample: FeatureSet | Scored, reference: Reference | None, classes: int | None, reference_sampled: bool = False
) -> list[str]:
    """What a reader must know about numbers of these two sets."""
    found = []
    if isinstance(sample, FeatureSet) and reference is not None:
        found += _sizes(len(sample), sample.features.shape[1], reference, reference_sampled)
    n = sample.source["images"]
    if classes is not None and n % classes:
        found.append(f"{n} images are not a multiple of {classes} classes: the classes are not balanced")
    if sample.source["small"]:
        found.append(f"{sample.source['small']} generated images are smaller than the patch")
    if sample.duplicates:
        found.append(f"{sample.duplicates} generated images repeat an earlier one")
    return found


def _sizes(n: int, d: int, reference: Reference, reference_sampled: bool) -> list[str]:
    """Warnings about n images of d dimensions and their reference."""
    found = []
    if n < 2 * d:
        found.append(f"{n} images for {d} dimensions: below {2 * d} there is no standard error and no bias estimate")
    elif n < IMAGES_PER_DIMENSION * d:
        found.append(f"{n} images for {d} dimensions: below {IMAGES_PER_DIMENSION * d} the bias estimate is unreliable")
    if reference.detector is None:
        found.append(f"{reference.about['path']} does not say which resize made it; that of the detector is assumed")
    images = reference.about["images"]
    if images is not None and images <= d:
        found.append(f"the reference has {images} images for {d} dimensions: its covariance is rank-deficient")
    if reference_sampled and images < 2 * d:
        found.append(f"the reference has {images} images: below {2 * d} its sampling error is not known")
    return found


def verdict(difference: Estimate, margin: float | None = None) -> str:
    """What a paired difference ``b - a`` shows at 95 %, for one pair of runs.

    ``equivalent``: two one-sided tests at 5 % place it inside ``+-margin``; ``b is lower`` or ``b is higher``: the
    interval excludes 0; otherwise ``undecided``, with the number of images that would decide a difference of this size.
    """
    interval = difference.interval
    if difference.se is None or interval is None:
        return "undecided: no standard error"
    centre = sum(interval) / 2
    if margin is not None and abs(centre) + t.ppf(0.95, difference.n - 1) * difference.se < margin:
        return f"equivalent within {margin:g}"
    if interval[0] > 0 or interval[1] < 0:
        return "b is higher" if centre > 0 else "b is lower"
    if not centre:
        return "undecided: no difference seen"
    needed = math.ceil(difference.n * (1.96 * difference.se / centre) ** 2)
    return f"undecided: about {needed} images would be needed"


def provenance(
    sample: FeatureSet | Scored, reference: Reference | None, classes: int | None, seconds: dict[str, float],
    reference_sampled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Everything a number depends on besides the images: it is the same for all numbers of one call."""
    n = sample.source["images"]
    drawn = "counts the sampling of the reference, too" if reference_sampled else "takes the reference as fixed"
    return {
        "detector": sample.detector if isinstance(sample, FeatureSet) else None,
        "reference": None if reference is None else reference.about, "geometry": sample.source["geometry"],
        "n": n, "samples": f"0..{n - 1}", "labels": None if classes is None else f"index mod {classes}",
        "interval": f"95 % around value - bias; FD {drawn}; with labels, within classes",
        "warnings": warnings(sample, reference, classes, reference_sampled), "versions": versions(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python, of what computes the numbers, and of this repository."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, "commit": commit()}
