"""One function for every metric of features: a `Sample` of generated images to its numbers.

`dmd2.experiment.metrics` says everything else about a metric, such as the names of the numbers and their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.experiment.metrics import Metric
from eval.metrics.estimate import Estimate, mean
from eval.metrics.frechet import Reference, between_samples
from eval.metrics.kid import kid
from eval.metrics.neighbours import prdc
from eval.metrics.scores import accuracy, inception_score


@dataclass(frozen=True)
class Sample:
    """Generated images as one network sees them.

    Args:
        features: ``(n, d)``.
        logits: ``(n, classes)``, where the network classifies.
        detector: name of the network.
        reference: what the features are compared with.
        labels: class that every image was drawn for ``(n,)``.
        strata: the same where the classes were fixed beforehand and not drawn: errors then count the spread inside
            classes only.
        reference_sampled: the Frechet distance's error counts the reference's own sampling, too.
    """

    features: np.ndarray
    logits: np.ndarray | None
    detector: str
    reference: Reference | None
    labels: Tensor | None = None
    strata: Tensor | None = None
    reference_sampled: bool = False

    @property
    def compared(self) -> Reference:
        """The reference.

        Raises:
            UserError: there is none.
        """
        if self.reference is None:
            raise UserError("metrics that compare with a reference need its images or moments as REFERENCE")
        return self.reference

    @property
    def classified(self) -> np.ndarray:
        """The logits.

        Raises:
            UserError: the detector gives none.
        """
        if self.logits is None:
            raise UserError(f"{self.detector} does not classify: is and accuracy need a classifier")
        return self.logits


def measure(
    metric: Metric, samples: Mapping[str, Sample], values: Mapping[str, np.ndarray], strata: Tensor | None = None
) -> dict[str, Estimate]:
    """The numbers of a metric by name.

    Args:
        metric: what to measure.
        samples: the images as each network sees them, by `Metric.sees`.
        values: one value per image or prompt ``(n,)`` by metric, of the metrics that are means of them.
        strata: of those values, as in a `Sample`; the metrics of prompts have none.

    Raises:
        UserError: something that it needs is missing, or too few or unusable images.
    """
    if metric.name in values:
        return {metric.name: mean(values[metric.name], None if metric.sees == "lpips" else strata)}
    function = globals()[metric.function]  # one of those below
    return dict(zip(metric.gives, function(samples[metric.sees]), strict=True))


def frechet(sample: Sample) -> Sequence[Estimate]:
    """Frechet distance to the reference."""
    if sample.reference_sampled:
        return [between_samples(sample.features, sample.compared.rows("--reference-sampled"), sample.strata)]
    return [sample.compared.estimate(sample.features, sample.strata)]


def kernel(sample: Sample) -> Sequence[Estimate]:
    """Kernel distance to the images of the reference."""
    return [kid(sample.features, sample.compared.rows("kid"), sample.strata)]


def neighbours(sample: Sample) -> Sequence[Estimate]:
    """Precision, recall, density and coverage of the fifth neighbours."""
    return [*prdc(sample.compared.rows("prdc"), sample.features).values()]


def two_neighbours(sample: Sample) -> Sequence[Estimate]:
    """Precision and recall of the third neighbours, as is usual for these two."""
    return [*prdc(sample.compared.rows("pr"), sample.features, k=3).values()][:2]


def inception(sample: Sample) -> Sequence[Estimate]:
    """Inception score."""
    return [inception_score(sample.classified, sample.strata)]


def class_accuracy(sample: Sample) -> Sequence[Estimate]:
    """Share of images classified as their labels."""
    if sample.labels is None:
        raise UserError("accuracy needs the number of classes (--classes C): image i was drawn for class i mod C")
    return [accuracy(sample.classified, sample.labels, sample.strata)]
