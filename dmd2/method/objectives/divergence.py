"""Weights of images in L_DM that make it follow another divergence than the reverse KL (f-distill, arXiv 2502.15681).

The head's logit of a noised image estimates the log of the ratio r of real to student density. A divergence has a
weight h(r); reverse KL's is 1. Estimates are divided by their mean at like noise levels, weights by their mean.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd2.core.distributed import sum_over

BINS = 10  # of noise levels over the index range
LOGITS, RATIOS = 10.0, (0.1, 20.0)  # largest absolute logit, and the ratios that are told apart
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda r: r,  # forward
    "js": lambda r: r / (1 + r),
    "sf": lambda r: 1 / (1 + r),  # softened reverse
    "sh": lambda r: r.sqrt(),  # squared Hellinger
    "jf": lambda r: 1 + r,  # Jeffreys
    "neyman": lambda r: 1 / r,
}


def divergence_weights(logits: Tensor, index: Tensor, index_range: tuple[int, int], kind: str) -> Tensor:
    """Weights ``(B,)`` with mean 1 over the samples of all processes.

    Args:
        logits: of the head, ``(B, ...)``; their mean counts. index: level of each sample, ``(B,)`` in `index_range`.
    """
    low, high = index_range
    r = logits.flatten(1).mean(1).clamp(-LOGITS, LOGITS).exp().clamp(*RATIOS)
    bins = ((index - low) * BINS // (high - low + 1)).clamp(0, BINS - 1)
    sums = torch.zeros(2, BINS, device=r.device).index_add_(1, bins, torch.stack([r, torch.ones_like(r)]))
    total, count = sum_over(sums)
    return normalised(WEIGHTS[kind](r / (total / count.clamp(min=1))[bins]))


def normalised(weights: Tensor) -> Tensor:
    """Weights ``(B,)`` over their mean, over the samples of all processes."""
    total, count = sum_over(torch.stack([weights.sum(), weights.new_full((), len(weights))]))
    return weights * count / total
