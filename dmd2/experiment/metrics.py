"""The metrics: name and meaning of each, what it needs and which function computes it; imports no torch.

A new metric is one entry of `METRICS`, the numbers that it gives in `NUMBERS`, and one function with the name in the
entry: in `eval.metrics.measures` where it is computed from features, in `eval.metrics.appearance` from pixels.
"""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

Direction = Literal["lower", "higher"]
Sees = Literal["detector", "patch", "clip", "lpips", "pixels"]
Need = Literal["reference", "reference images", "patch", "captions", "images per prompt", "labels"]


@dataclass(frozen=True)
class Number:
    """A number in metrics.json, tables and the catalogue.

    Args:
        name: its key.
        label: its name for readers.
        better: direction of better values; None where good values are those of the data.
        unit: of its value.
        meaning: one phrase.
        paper: the paper's metric that it stands in for, if it has another name.
    """

    name: str
    label: str
    better: Direction | None
    unit: str
    meaning: str
    paper: str | None = None


@dataclass(frozen=True)
class Metric:
    """What ``eval.metrics`` of a base, or ``--metrics`` on the command line, may name.

    Args:
        name: its name in ``eval.metrics``.
        sees: the model or pixels that it is computed from. The detector and the patch give features; the others give
            one value for each image (LPIPS: for each prompt), of which the metric is the mean.
        function: name of the function that computes it; empty where it is only that mean.
        numbers: names of its numbers, in the function's order; by default its own name.
        option: its name on the command line; None if that does not have it.
        row: its line in the command line's table. ``{distance}`` is FID or FD (DETECTOR), ``{of}`` what follows FD in
            that, ``{clip}`` the CLIP model and ``{number}`` the number.
        needs: what must be given besides images.
        in_runs: whether ``eval.metrics`` may have it.
        is_paired: whether the command line measures differences by it.
        has_influence: whether an evaluation keeps each image's share of it, for paired differences of runs.
    """

    name: str
    sees: Sees
    function: str = ""
    numbers: tuple[str, ...] = ()
    option: str | None = None
    row: str = "{number}"
    needs: tuple[Need, ...] = ()
    in_runs: bool = True
    is_paired: bool = False
    has_influence: bool = False

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of its numbers."""
        return self.numbers or (self.name,)


_SQUARED, _SHARE = "squared feature units", "0..1"
_NUMBERS = (
    Number("fd", "FD", "lower", _SQUARED, "Frechet distance in the features of protocol_detector", "fid"),
    Number("fid", "FID", "lower", _SQUARED, "Frechet inception distance"),
    Number("patch_fd", "Patch FD", "lower", _SQUARED, "the same of the centre of the images, as protocol_patch says",
           "patch_fid"),
    Number("patch_fid", "Patch FID", "lower", _SQUARED, "the same of Inception features"),
    Number("clip_score", "CLIP", "higher", "-1..1", "mean cosine of image and caption by protocol_clip, no factor"),
    Number("kid", "KID", "lower", "kernel units", "kernel inception distance, unbiased, not multiplied by 1000"),
    Number("precision", "Precision", "higher", _SHARE,
           "share of generated images inside the manifold of the reference"),
    Number("recall", "Recall", "higher", _SHARE, "share of reference images inside the manifold of the generated"),
    Number("density", "Density", "higher", "1",
           "mean count of reference neighbourhoods around a generated image, over k"),
    Number("coverage", "Coverage", "higher", _SHARE, "share of reference images with a generated neighbour"),
    Number("is", "Inception score", "higher", "1..classes", "inception score of all images at once"),
    Number("accuracy", "Class accuracy", "higher", _SHARE,
           "share of images classified as the class they were drawn for"),
    Number("brightness", "Brightness", None, _SHARE, "mean pixel value"),
    Number("saturation", "Saturation", None, _SHARE, "mean of (max - min) / max of a pixel's channels"),
    Number("sharpness", "Sharpness", None, _SHARE,
           "root mean square of luma minus its 3x3 mean, averaged over images"),
    # No metric gives this one: it comes from the log of a training.
    Number("brightness_std", "Brightness SD", "lower", _SHARE, "SD over training of the fixed-noise brightness, "
           "without the first 20 % of the steps; one value per run, repeated for its snapshots"),
)  # fmt: skip
_METRICS = (
    Metric("fd", "detector", "frechet", (), "fd", "{distance}", ("reference",), is_paired=True, has_influence=True),
    Metric("fid", "detector", "frechet", needs=("reference",), has_influence=True),
    Metric("patch_fd", "patch", "frechet", needs=("patch",), has_influence=True),
    Metric("patch_fid", "patch", "frechet", needs=("patch",), has_influence=True),
    Metric("kid", "detector", "kernel", (), "kid", "KID", ("reference", "reference images"), is_paired=True),
    Metric("prdc", "detector", "neighbours", ("precision", "recall", "density", "coverage"), "prdc", "{number} (k=5)",
           ("reference", "reference images")),
    Metric("pr", "detector", "two_neighbours", ("precision", "recall"), "pr", "{number} (k=3)",
           ("reference", "reference images"), in_runs=False),
    Metric("is", "detector", "inception", (), "is", "IS{of}"),
    Metric("accuracy", "detector", "class_accuracy", (), "accuracy", needs=("labels",), is_paired=True),
    Metric("clip_score", "clip", "", (), "clip-score", "CLIP score ({clip})", ("captions",), is_paired=True,
           has_influence=True),
    Metric("lpips_diversity", "lpips", "", (), "lpips-diversity", "LPIPS diversity", ("images per prompt",),
           in_runs=False, is_paired=True),
    Metric("brightness", "pixels", "brightness"),
    Metric("saturation", "pixels", "saturation"),
    Metric("sharpness", "pixels", "sharpness"),
)  # fmt: skip

NUMBERS = {number.name: number for number in _NUMBERS}
METRICS = {metric.name: metric for metric in _METRICS}
UNSETTLED = 0.2  # first share of a training, in which the student leaves its initial state: brightness_std omits it

OF_RUNS = tuple(name for name, metric in METRICS.items() if metric.in_runs)  # what eval.metrics may name
FRECHET = tuple(name for name, metric in METRICS.items() if (metric.function, metric.sees) == ("frechet", "detector"))
WITH_INFLUENCES = tuple(name for name, metric in METRICS.items() if metric.has_influence)
OF_PIXELS = {"brightness_std", *(name for name, metric in METRICS.items() if metric.sees == "pixels")}
BETTER: dict[str, Direction] = {name: number.better for name, number in NUMBERS.items() if number.better}
LABELS = {name: number.label for name, number in NUMBERS.items()}


def of_option(option: str) -> Metric:
    """The metric of that name on the command line.

    Raises:
        KeyError: there is none.
    """
    return {metric.option: metric for metric in METRICS.values() if metric.option}[option]


def options(paired: bool = False) -> tuple[str, ...]:
    """Names on the command line of all metrics, or of those that measure differences."""
    return tuple(m.option for m in METRICS.values() if m.option and (m.is_paired or not paired))


def measured(metrics: list[str]) -> list[str]:
    """Names of the numbers that an evaluation of ``eval.metrics`` writes, in order; an unknown metric stays."""
    return [number for name in metrics for number in (METRICS[name].gives if name in METRICS else (name,))]


def best_first(metric: str, value: float) -> float:
    """Sort key that puts the best value first, and what is not finite last.

    Raises:
        KeyError: neither direction of the metric is better.
    """
    direction = BETTER[metric]
    return inf if not isfinite(value) else value if direction == "lower" else -value
