"""Scores that are means over images, classes or prompts: Inception score, accuracy, CLIP score, LPIPS diversity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.core.errors import UserError
from eval.metrics.estimate import Estimate, Features, matrix, mean, standard_error

PAIRS_AT_ONCE = 6  # pairs of images: at 512 px the first layer of VGG16 alone holds 2 x 67 MB for each


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
