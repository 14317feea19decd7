"""One function for every metric of features: a `View` of generated images to its numbers.

`dmd2.experiment.metrics` says everything else about a metric, such as the names of the numbers and their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from dmd2.core.errors import UserError
from eval.metrics.estimate import Estimate, Linear, Mean
from eval.metrics.frechet import FrechetReference, between_samples
from eval.metrics.kid import kid
from eval.metrics.neighbours import prdc
from eval.metrics.scores import accuracy, inception_score


class Compared(Protocol):
    """What generated images are compared with, see `eval.detectors.reference.Reference`."""

    @property
    def frechet(self) -> FrechetReference:
        """Its moments."""
        ...

    def rows(self, metric: str) -> np.ndarray:
        """Its features ``(m, d)``.

        Raises:
            UserError: it has moments only; `metric` is who asks.
        """
        ...


@dataclass(frozen=True)
class View:
    """Generated images as one network sees them.

    `labels` are the classes that images were drawn for; where they were fixed beforehand and not drawn, they are
    `strata`, too. With `reference_sampled` the reference is a finite draw in every metric.
    """

    features: np.ndarray  # (n, d)
    logits: np.ndarray | None  # (n, classes)
    detector: str
    reference: Compared | None
    labels: Tensor | None  # (n,)
    strata: Tensor | None  # (n,)
    reference_sampled: bool = False

    @property
    def compared(self) -> Compared:
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


Found = Linear | Mean | Estimate  # an estimate has no paired difference


def frechet(view: View) -> Sequence[Found]:
    """Frechet distance to the reference."""
    if view.reference_sampled:
        return [between_samples(view.features, view.compared.rows("--reference-sampled"), view.strata)]
    return [view.compared.frechet.linearised(view.features)]


def kernel(view: View) -> Sequence[Found]:
    """Kernel distance to the images of the reference."""
    return [kid(view.features, view.compared.rows("kid"))]


def neighbours(view: View) -> Sequence[Found]:
    """Precision, recall, density and coverage of the fifth neighbours."""
    return [*prdc(view.compared.rows("prdc"), view.features).values()]


def two_neighbours(view: View) -> Sequence[Found]:
    """Precision and recall of the third neighbours, as is usual for these two."""
    return [*prdc(view.compared.rows("pr"), view.features, k=3).values()][:2]


def inception(view: View) -> Sequence[Found]:
    """Inception score."""
    return [inception_score(view.classified, view.strata)]


def class_accuracy(view: View) -> Sequence[Found]:
    """Share of images classified as their labels."""
    if view.labels is None:
        raise UserError("accuracy needs the number of classes (--classes C): image i was drawn for class i mod C")
    return [accuracy(view.classified, view.labels)]
