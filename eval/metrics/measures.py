"""One function for every metric of features: a `Sample` of generated images to its numbers; and scores that are means.

`dmd2.experiment.metrics` says everything else about a metric, such as the names of the numbers and their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.core.errors import UserError, show
from dmd2.core.precision import float32_products
from dmd2.experiment.metrics import Metric
from eval.metrics.estimate import Estimate, Features, matrix, mean, standard_error
from eval.metrics.frechet import Reference, between_samples
from eval.metrics.kid import kid
from eval.metrics.neighbours import prdc

Result = TypeVar("Result")

PAIRS_AT_ONCE = 6  # pairs of images: at 512 px the first layer of VGG16 alone holds 2 x 67 MB for each


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
        device: where kernels and neighbours are computed, which on a CPU would take minutes for 50,000 images.
    """

    features: np.ndarray
    logits: np.ndarray | None
    detector: str
    reference: Reference | None
    labels: Tensor | None = None
    strata: Tensor | None = None
    reference_sampled: bool = False
    device: torch.device | str = "cpu"

    def sides(self, option: str) -> tuple[Tensor, Tensor]:
        """Features of the generated images and of the reference's, which `option` needs, on the device.

        Raises:
            UserError: there is no reference, it has moments only, or features are unusable.
        """
        return matrix(self.features).to(self.device), matrix(self.compared.rows(option)).to(self.device)

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


def on_device(sample: Sample, option: str, function: Callable[[Tensor, Tensor], Result]) -> Result:
    """A function of generated and reference features on the sample's device, or on the CPU where they do not fit."""
    with float32_products("fp32"):
        try:
            return function(*sample.sides(option))
        except torch.OutOfMemoryError:  # 50,000 images take about 6 GB beside detector and sampler
            show(f"{option} of {len(sample.features)} images does not fit on {sample.device}; the CPU takes minutes")
        return function(*replace(sample, device="cpu").sides(option))


def kernel(sample: Sample) -> Sequence[Estimate]:
    """Kernel distance to the images of the reference."""
    return [on_device(sample, "kid", lambda fake, real: kid(fake, real, sample.strata))]


def neighbours(sample: Sample) -> Sequence[Estimate]:
    """Precision, recall, density and coverage of the fifth neighbours."""
    return [*on_device(sample, "prdc", lambda fake, real: prdc(real, fake)).values()]


def two_neighbours(sample: Sample) -> Sequence[Estimate]:
    """Precision and recall of the third neighbours, as is usual for these two."""
    return [*on_device(sample, "pr", lambda fake, real: prdc(real, fake, k=3)).values()][:2]


def inception(sample: Sample) -> Sequence[Estimate]:
    """Inception score."""
    return [inception_score(sample.classified, sample.strata)]


def class_accuracy(sample: Sample) -> Sequence[Estimate]:
    """Share of images classified as their labels."""
    if sample.labels is None:
        raise UserError("accuracy needs the number of classes (--classes C): image i was drawn for class i mod C")
    return [accuracy(sample.classified, sample.labels, sample.strata)]


def accuracy(logits: Features, labels: Features, strata: Features | None = None) -> Estimate:
    """Share of images whose largest logit ``(n, classes)`` is their label ``(n,)``.

    Its error is that of Agresti and Coull (1998), who add two hits and two misses: it is never 0, even when all hit.
    `strata` count in paired differences only.

    Raises:
        UserError: one label per image is missing, or a label is not a class.
    """
    x, y = matrix(logits, "logits").cpu(), torch.as_tensor(labels).cpu()
    if y.shape != (len(x),) or y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= x.shape[1]:
        raise UserError(f"{len(x)} images need one label each in 0..{x.shape[1] - 1}, got shape {tuple(y.shape)}")
    hits, n = (x.argmax(dim=1) == y).double(), len(x)
    share = (int(hits.sum()) + 2) / (n + 4)
    return replace(mean(hits, strata), value=int(hits.sum()) / n, se=float(np.sqrt(share * (1 - share) / (n + 4))))


def cosines(images: Features, texts: Tensor) -> np.ndarray:
    """Cosine of every image and its caption from their embeddings ``(n, d)``: float64 ``(n,)``."""
    return F.cosine_similarity(torch.as_tensor(images), texts).double().numpy()


def inception_score(logits: Features, strata: Features | None = None) -> Estimate:
    """``exp(mean_i KL(p_i || mean p))`` of ``softmax(logits)`` over all images at once (Salimans et al. 2016).

    One split: the customary mean over ten splits has ten times the bias. Standard error and bias to second order: the
    derivative with respect to the marginal vanishes, its curvature is ``-sum_c Var(p_c) / (2 n mean p_c)``.

    Raises:
        UserError: not a matrix, or NaN.
    """
    log_p = matrix(logits, "logits").double().log_softmax(dim=1)
    p = log_p.exp()
    n, marginal = len(p), p.mean(dim=0)
    divergence = (p * (log_p - marginal.log().clamp(min=-745.0))).sum(dim=1).cpu().numpy()
    score, se = float(np.exp(divergence.mean())), standard_error(divergence, strata)
    if se is None:
        return Estimate(score, None, n)
    seen = marginal > 0
    curvature = -float((p.var(dim=0)[seen] / marginal[seen]).sum()) / (2 * n)
    return Estimate(score, score * se, n, score * (curvature + se**2 / 2))


def diversities(groups: Iterable[Tensor], distance: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
    """Mean pairwise LPIPS ``(prompts,)`` of the images of one prompt (DMD2: four images, six pairs).

    Args:
        groups: per prompt uint8 images ``(k, C, H, W)``, k >= 2; one of them is held at a time.
        distance: mean distance of two batches in [-1, 1], such as `dmd2.networks.lpips.Lpips`.

    Raises:
        UserError: a prompt with fewer than two images.
    """
    values = []
    for number, group in enumerate(groups):
        if len(group) < 2:
            raise UserError(f"diversity needs at least 2 images per prompt, prompt {number} has {len(group)}")
        images, total = group.float() / 127.5 - 1, 0.0
        pairs = torch.tensor(list(combinations(range(len(group)), 2)))
        for part in pairs.split(PAIRS_AT_ONCE):
            with torch.no_grad():
                total += len(part) * float(distance(images[part[:, 0]], images[part[:, 1]]))
        values.append(total / len(pairs))
    return np.array(values)
