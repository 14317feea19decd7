"""How far a row is from the reference row, with a 95 % interval that says which noise it covers.

Rows share training seeds, sample seeds and labels, so differences are taken seed by seed. Over two or more training
seeds the interval is a t-interval of those differences, with all noise but what the common sample seeds do to
every training alike. With one seed it covers the finite sample of images only, from the per-image influences of both
rows; another training could differ by more.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dmd2.core.files import verified
from dmd2.experiment.metrics import FRECHET
from eval.metrics.estimate import Estimate, linear, mean_interval

NORMAL = 1.96  # standard errors to either end of a 95 % interval of a thousand or more images


def difference(gaps: Sequence[Estimate]) -> dict[str, Any]:
    """Mean over training seeds of ``ours - base``, interval, and the standard error of the finite samples.

    Args:
        gaps: the difference at every common training seed (`with_influences`).
    """
    values, errors = [gap.value for gap in gaps], [gap.se or 0.0 for gap in gaps]
    sampling = float(np.sqrt(np.sum(np.square(errors)))) / len(gaps)
    if len(gaps) > 1:
        return bounded(*mean_interval(values), "training seeds", sampling)
    return around(values[0], NORMAL * sampling, "finite sample", sampling)


def bounded(value: float, low: float, high: float, covers: str, sampling_se: float | None = None) -> dict[str, Any]:
    """A difference with its interval, and which noise that covers."""
    return {"value": value, "low": low, "high": high, "sampling_se": sampling_se, "covers": covers}


def around(value: float, half: float, covers: str, sampling_se: float | None = None) -> dict[str, Any]:
    """The same with an interval that reaches equally far to both sides."""
    return bounded(value, value - half, value + half, covers, sampling_se)


def with_influences(
    metrics: Mapping[str, Any], folder: Path, step: int, metric: str, value: float, classes: int | None
) -> Estimate:
    """A metric of one snapshot with the influence of each of its images, as its evaluation stored them.

    Args:
        metrics: the metrics.json of `folder`.
        folder: where the file of influences lies.
        step: of the snapshot.
        metric: one that has influences (`Metric.has_influence`).
        value: of the metric.
        classes: image i is of class ``i mod classes`` by design; None if the labels were drawn.

    Raises:
        UserError: the file is missing or damaged.
    """
    key = f"{step:07d}" if metric in FRECHET else f"{step:07d}-{metric}"
    psi = load_file(verified(folder, metrics["files"][0]))[key].astype(np.float64)
    return linear(value, psi, strata=None if classes is None else np.arange(len(psi)) % classes)
