"""How far a row is from the reference row, with a 95 % interval that says which noise it covers.

Rows share training seeds, sample seeds and labels, so differences are taken seed by seed. Over two or more training
seeds the interval is a t-interval of those differences, with all noise but what the common sample seeds do to
every training alike. With one seed it covers the finite sample of images only, from the per-image influences of both
rows; another training could differ by more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.core.files import verified
from dmd2.data.sets import load_shard
from dmd2.experiment.metrics import FRECHET
from eval.metrics.estimate import mean_interval, standard_error

NORMAL = 1.96  # standard errors to either end of a 95 % interval of a thousand or more images


@dataclass(frozen=True)
class Arm:
    """One row: its value and per-image influences ``(n,)`` by training seed; a teacher has one, for all seeds."""

    values: Mapping[int, float]
    influence: Mapping[int, np.ndarray]
    teacher: bool = False

    def at(self, seed: int) -> tuple[float, np.ndarray]:
        """Value and influence beside the other row's `seed`."""
        seed = 0 if self.teacher else seed
        return self.values[seed], self.influence[seed]


def difference(ours: Arm, base: Arm, classes: int | None) -> dict[str, Any]:
    """``ours - base``: mean over common training seeds, interval, and the standard error of the finite samples.

    Args:
        ours, base: the rows.
        classes: image i is of class ``i mod classes`` by design; None if the labels were drawn.
    """
    seeds = sorted(base.values if ours.teacher else ours.values if base.teacher else ours.values.keys() & base.values)
    gaps, errors = [], []
    for seed in seeds:
        (value, psi), (other, base_psi) = ours.at(seed), base.at(seed)
        gaps.append(value - other)
        strata = None if classes is None else np.arange(len(psi)) % classes
        errors.append(standard_error(psi.astype(np.float64) - base_psi, strata) or 0.0)
    sampling = float(np.sqrt(np.sum(np.square(errors)))) / len(seeds)
    if len(seeds) > 1:
        return bounded(*mean_interval(gaps), "training seeds", sampling)
    return around(gaps[0], NORMAL * sampling, "finite sample", sampling)


def bounded(value: float, low: float, high: float, covers: str, sampling_se: float | None = None) -> dict[str, Any]:
    """A difference with its interval, and which noise that covers."""
    return {"value": value, "low": low, "high": high, "sampling_se": sampling_se, "covers": covers}


def around(value: float, half: float, covers: str, sampling_se: float | None = None) -> dict[str, Any]:
    """The same with an interval that reaches equally far to both sides."""
    return bounded(value, value - half, value + half, covers, sampling_se)


def influences(metrics: Mapping[str, Any], folder: Path, step: int, metric: str) -> np.ndarray:
    """Influences of one snapshot on a metric that has them (`Metric.has_influence`), as its evaluation stored them."""
    key = f"{step:07d}" if metric in FRECHET else f"{step:07d}-{metric}"
    return load_shard(verified(folder, metrics["files"][0]))[key].numpy()
