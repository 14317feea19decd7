"""Which direction of a metric is better: the one place that claims, tables, report, comparison and export ask."""

from math import inf, isfinite
from typing import Literal

Direction = Literal["lower", "higher"]

BETTER: dict[str, Direction] = {
    "fd": "lower", "fid": "lower", "patch_fd": "lower", "patch_fid": "lower", "kid": "lower", "brightness_std": "lower",
    "precision": "higher", "recall": "higher", "density": "higher", "coverage": "higher", "is": "higher",
    "accuracy": "higher", "clip_score": "higher",
}  # fmt: skip
# What describes images rather than their quality: good values are those of the data, so neither direction is better.
UNDIRECTED = ("brightness", "saturation", "sharpness")
SETTLED = 0.2  # brightness stability ignores this first share of training, while the student leaves its initial state
FRECHET = ("fd", "fid")  # distances of whole images, whose evaluation leaves per-image influences
PARTS = {"prdc": ("precision", "recall", "density", "coverage")}  # what eval.metrics names together


def measured(metrics: list[str]) -> list[str]:
    """The numbers that an evaluation of ``eval.metrics`` writes, in order."""
    return [part for name in metrics for part in PARTS.get(name, (name,))]


def best_first(metric: str, value: float) -> float:
    """A sort key: the best value first, what is not finite last.

    Raises:
        KeyError: neither direction of the metric is better.
    """
    direction = BETTER[metric]
    return inf if not isfinite(value) else value if direction == "lower" else -value
