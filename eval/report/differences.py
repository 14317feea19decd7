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
from scipy.stats import t

from dmd2.core.files import verified
from dmd2.data.sets import load_shard
from dmd2.experiment.metrics import FRECHET
from eval.metrics.estimate import standard_error


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
    mean, sampling = float(np.mean(gaps)), float(np.sqrt(np.sum(np.square(errors)))) / len(seeds)
    if len(seeds) > 1:
        half = float(t.ppf(0.975, len(seeds) - 1)) * float(np.std(gaps, ddof=1)) / len(seeds) ** 0.5
    else:
        half = 1.96 * sampling
    covers = "training seeds" if len(seeds) > 1 else "finite sample"
    return {"value": mean, "low": mean - half, "high": mean + half, "sampling_se": sampling, "covers": covers}


WITH_INFLUENCES = (*FRECHET, "patch_fd", "patch_fid", "clip_score")  # metrics whose evaluation leaves them per image


def influences(metrics: Mapping[str, Any], folder: Path, step: int, metric: str) -> np.ndarray:
    """Influences of one snapshot on a metric (see `WITH_INFLUENCES`), as its evaluation stored them."""
    key = f"{step:07d}" if metric in FRECHET else f"{step:07d}-{metric}"
    return load_shard(verified(folder, metrics["files"][0]))[key].numpy()


def shown(found: Mapping[str, Any] | None) -> str:
    """``+1.2 [-0.3, +2.7]``; bold where the interval excludes 0."""
    if found is None:
        return "–"
    digits = max(0, 2 - int(np.floor(np.log10(max(abs(found["value"]), found["high"] - found["low"], 1e-9)))))
    text = "{value:+.{d}f} [{low:+.{d}f}, {high:+.{d}f}]".format(
        **{k: found[k] for k in ("value", "low", "high")}, d=digits
    )
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text
