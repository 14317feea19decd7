"""Metrics of one feature set, or the paired difference of two, against one reference, with every number's protocol.

What was computed by different protocols is refused, never compared.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from scipy.stats import t
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.rng import sample_labels
from dmd2.core.run import commit
from eval.detectors.features import FeatureSet
from eval.detectors.reference import Reference, same_detector
from eval.metrics.estimate import Estimate
from eval.metrics.frechet import between_samples, moments, paired
from eval.metrics.kid import kid, kid_paired
from eval.metrics.neighbours import prdc, precision_recall
from eval.metrics.scores import Scored, accuracy, inception_score, paired_mean
from eval.metrics.stats import ones_initialised

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "timm", "open-clip-torch")
IMAGES_PER_DIMENSION = 4  # below, the bias estimate is off by more than about 16 %


Labels = Tensor | None


def given(reference: Reference | None) -> Reference:
    """The reference.

    Raises:
        UserError: there is none.
    """
    if reference is None:
        raise UserError(f"{', '.join(COMPARE)} compare with a reference: give its images or moments as REFERENCE")
    return reference


def _fd(sample: FeatureSet, reference: Reference | None, labels: Labels) -> dict[str, Estimate]:
    return {sample.detector["label"]: given(reference).frechet.estimate(sample.features, labels)}


def _kid(sample: FeatureSet, reference: Reference | None, labels: Labels) -> dict[str, Estimate]:
    return {"KID": kid(sample.features, given(reference).rows("kid"), labels)}


def _prdc(sample: FeatureSet, reference: Reference | None, labels: Labels) -> dict[str, Estimate]:
    return {f"{name} (k=5)": e for name, e in prdc(given(reference).rows("prdc"), sample.features).items()}


def _pr(sample: FeatureSet, reference: Reference | None, labels: Labels) -> dict[str, Estimate]:
    return {f"{name} (k=3)": e for name, e in precision_recall(given(reference).rows("pr"), sample.features).items()}


def _is(sample: FeatureSet, reference: Reference | None, labels: Labels) -> dict[str, Estimate]:
    return {sample.detector["label"].replace("FID", "IS").replace("FD", "IS"): inception_score(_logits(sample), labels)}


def _accuracy(sample: FeatureSet, reference: Reference | None, labels: Labels) -> dict[str, Estimate]:
    logits, wanted = _classified(sample, labels)
    return {"accuracy": accuracy(logits, wanted)}


def _logits(sample: FeatureSet) -> np.ndarray:
    if sample.logits is None:
        raise UserError(f"{sample.detector['name']} does not classify: is and accuracy need a classifier")
    return sample.logits


def _classified(sample: FeatureSet, labels: Labels) -> tuple[np.ndarray, Tensor]:
    if labels is None:
        raise UserError("accuracy needs the number of classes (--classes C): image i was drawn for class i mod C")
    return _logits(sample), labels


METRICS: dict[str, Callable[[FeatureSet, Reference | None, Labels], dict[str, Estimate]]] = {
    "fd": _fd, "kid": _kid, "prdc": _prdc, "pr": _pr, "is": _is, "accuracy": _accuracy,
}  # fmt: skip
COMPARE = ("fd", "kid", "prdc", "pr")  # the others need no reference


def _paired_accuracy(a: FeatureSet, b: FeatureSet, labels: Labels) -> Estimate:
    return paired_mean(_hits(a, labels), _hits(b, labels), labels)


def _hits(sample: FeatureSet, labels: Labels) -> np.ndarray:
    logits, wanted = _classified(sample, labels)
    return (logits.argmax(axis=1) == wanted.numpy()).astype(np.float64)


PAIRED: dict[str, Callable[[FeatureSet, FeatureSet, Reference | None, Labels], Estimate]] = {
    "fd": lambda a, b, reference, labels: paired(given(reference).frechet, a.features, b.features, labels),
    "kid": lambda a, b, reference, labels: kid_paired(a.features, b.features, given(reference).rows("kid"), labels),
    "accuracy": lambda a, b, reference, labels: _paired_accuracy(a, b, labels),
}


def known(metrics: Sequence[str], table: dict[str, Any]) -> Sequence[str]:
    """The metrics asked for.

    Raises:
        UserError: none, or one that does not exist.
    """
    unknown = [name for name in metrics if name not in table]
    if unknown or not metrics:
        raise UserError(f"there is no metric {', '.join(unknown) or 'given'}: choose from {', '.join(table)}")
    return metrics


def cyclic(count: int, classes: int | None) -> Labels:
    """Class of every sample by its global index, None if the images have no classes."""
    return None if classes is None else sample_labels(list(range(count)), classes, "cyclic")


def measure(
    sample: FeatureSet, reference: Reference | None, metrics: Sequence[str], classes: int | None = None,
    reference_sampled: bool = False,
) -> dict[str, Estimate]:  # fmt: skip
    """Metrics by their printed names.

    Args:
        sample: features of the generated images.
        reference: what they are compared with; None if no metric compares.
        metrics: some of `METRICS`.
        classes: image i is of class ``i mod classes``; standard errors then count the spread inside classes only.
        reference_sampled: standard error and bias of the Frechet distance count the reference's own sampling, too.

    Raises:
        UserError: unknown metrics, different protocols, no reference, or a value that is not finite.
    """
    if reference is not None:
        same_detector(sample.detector, reference)
    labels = cyclic(len(sample), classes)
    found: dict[str, Estimate] = {}
    for name in known(metrics, METRICS):
        if name == "fd" and reference_sampled:
            drawn = given(reference).rows("--reference-sampled")
            found[sample.detector["label"]] = between_samples(sample.features, drawn, labels)
        else:
            found |= METRICS[name](sample, reference, labels)
    return _finite(found)


def from_ones(sample: FeatureSet, reference: Reference, processes: int) -> dict[str, Estimate]:
    """The Frechet distance that the official ImageNet evaluator prints, see `ones_initialised`; never the right one.

    What it differs by is no property of the images, so it has neither standard error nor bias of its own.
    """
    stats = ones_initialised(moments(sample.features), processes)
    name = f"{sample.detector['label']}, covariance from ones x {processes}"
    return _finite({name: Estimate(reference.frechet.distance(stats), None, len(sample))})


def compare(
    a: FeatureSet, b: FeatureSet, reference: Reference | None, metrics: Sequence[str], classes: int | None = None
) -> dict[str, Estimate]:
    """Differences ``b - a`` of two sets whose images at one index share seed and label or prompt.

    Raises:
        UserError: unknown metrics, other detectors, geometries or numbers of images, or a value that is not finite.
    """
    ours, theirs = _protocol(a), _protocol(b)
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"the two sets differ in {key}, {ours.get(key)} and {theirs.get(key)}: they are not comparable"
            )
    if reference is not None:
        same_detector(a.detector, reference)
    labels = cyclic(len(a), classes)
    names = {"fd": a.detector["label"], "kid": "KID", "accuracy": "accuracy"}
    return _finite({names[m]: PAIRED[m](a, b, reference, labels) for m in known(metrics, PAIRED)})


def _protocol(sample: FeatureSet) -> dict[str, Any]:
    return {**sample.detector, "geometry": sample.source["geometry"], "number of images": len(sample)}


def _finite(estimates: dict[str, Estimate]) -> dict[str, Estimate]:
    for name, estimate in estimates.items():
        if not math.isfinite(estimate.value):
            raise UserError(f"{name} of {estimate.n} images is {estimate.value}: too few or degenerate images")
    return estimates


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
