"""Kernel Inception Distance: the unbiased full-sample value with its standard error, and the peers' subset form.

Kernel ``(x . y / d + 1)^3`` (Binkowski et al. 2018). The products run in the features' own precision on their device,
in blocks; the sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from eval.metrics.estimate import Estimate, Features, blocks, matrices, standard_error

BLOCK = 2048  # rows and columns of the kernel matrix held at a time


def kid(x: Features, y: Features, strata: Features | None = None) -> Estimate:
    """Full-sample unbiased KID of generated ``x (n, d)`` to reference ``y (m, d)``; may be slightly negative.

    The standard error is the delete-one jackknife over both samples, which row sums of the kernel give in closed form;
    where the two distributions agree it is too large (the first-order variance vanishes there).

    Args:
        x: features of the generated images.
        y: features of the reference images, a finite draw too.
        strata: class per generated image ``(n,)`` if the number of images per class was fixed beforehand.

    Raises:
        UserError: fewer than two images on a side, other dimensions, or NaN.
    """
    terms = _Terms.of(x, y)
    return Estimate(terms.value, _se(terms.influence_x, terms.influence_y, strata), len(terms.self_x))


def kid_paired(a: Features, b: Features, y: Features, strata: Features | None = None) -> Estimate:
    """``KID(b, y) - KID(a, y)`` of two arms whose images at one index share seed and label or prompt.

    Raises:
        UserError: as `kid`, or the arms have different numbers of images.
    """
    if len(a) != len(b):
        raise UserError(f"paired arms need the same seeds, got {len(a)} and {len(b)} images")
    first, second = _Terms.of(a, y), _Terms.of(b, y)
    dx, dy = second.influence_x - first.influence_x, second.influence_y - first.influence_y
    return Estimate(second.value - first.value, _se(dx, dy, strata), len(dx))


def random_subsets(n: int, m: int, subsets: int = 100, size: int = 1000, seed: int = 2020) -> Iterator[np.ndarray]:
    """Index pairs ``(2, size)`` into samples of `n` and `m`, the draws of torch-fidelity for the same seed.

    Raises:
        UserError: a subset is larger than a sample.
    """
    if size > min(n, m):
        raise UserError(f"KID subsets of {size} images need as many on both sides, got {n} and {m}")
    rng = np.random.RandomState(seed)
    for _ in range(subsets):
        yield np.stack([rng.choice(n, size, replace=False), rng.choice(m, size, replace=False)])


def kid_subsets(x: Features, y: Features, pairs: Iterable[np.ndarray]) -> tuple[float, float]:
    """Mean and spread of KID over index subsets, for comparison with published values only.

    The spread is not a standard error: the subsets overlap, and it shrinks with the subset size instead of n.
    """
    a, b = matrices(x, y)
    values = [_Terms.of(a[torch.from_numpy(i)], b[torch.from_numpy(j)]).value for i, j in pairs]
    return float(np.mean(values)), float(np.std(values))


@dataclass(frozen=True)
class _Terms:
    """Row sums of the three kernel matrices, without their diagonals."""

    self_x: np.ndarray  # (n,) sum over j != i of k(x_i, x_j)
    self_y: np.ndarray  # (m,)
    cross_x: np.ndarray  # (n,) sum over j of k(x_i, y_j)
    cross_y: np.ndarray  # (m,)

    @staticmethod
    def of(x: Features, y: Features) -> _Terms:
        a, b = matrices(x, y)
        if min(len(a), len(b)) < 2:
            raise UserError(f"KID needs at least 2 images on both sides, got {len(a)} and {len(b)}")
        return _Terms(_self_sums(a), _self_sums(b), *_cross_sums(a, b))

    @property
    def value(self) -> float:
        n, m = len(self.self_x), len(self.self_y)
        own = self.self_x.sum() / (n * (n - 1)) + self.self_y.sum() / (m * (m - 1))
        return float(own - 2 * self.cross_x.sum() / (n * m))

    @property
    def influence_x(self) -> np.ndarray:
        """Jackknife pseudo-values of the generated images up to a constant: their mean's SE is the value's."""
        return _pseudo_values(self.self_x, self.cross_x / len(self.self_y))

    @property
    def influence_y(self) -> np.ndarray:
        return _pseudo_values(self.self_y, self.cross_y / len(self.self_x))


def _pseudo_values(own: np.ndarray, cross: np.ndarray) -> np.ndarray:
    # leaving image i out changes the value by -2 (own_i / (n - 2) - cross_i) / (n - 1), plus a constant
    return 2 * (own / max(len(own) - 2, 1) - cross)


def _se(x: np.ndarray, y: np.ndarray, strata: Features | None) -> float | None:
    if min(len(x), len(y)) < 3:  # leaving one out must leave a pair
        return None
    ours, theirs = standard_error(x, strata), standard_error(y)
    return None if ours is None or theirs is None else float(np.hypot(ours, theirs))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _self_sums(x: Tensor) -> np.ndarray:
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows in blocks(len(x), BLOCK):
        block = _kernel(x[rows], x[rows]).fill_diagonal_(0)
        sums[rows] += block.sum(dim=1, dtype=torch.float64)
        for columns in blocks(rows.start, BLOCK):  # the matrix is symmetric: each block below serves two
            block = _kernel(x[rows], x[columns])
            sums[rows] += block.sum(dim=1, dtype=torch.float64)
            sums[columns] += block.sum(dim=0, dtype=torch.float64)
    return sums.cpu().numpy()


def _cross_sums(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    sums_x = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    sums_y = torch.zeros(len(y), dtype=torch.float64, device=x.device)
    for rows in blocks(len(x), BLOCK):
        for columns in blocks(len(y), BLOCK):
            block = _kernel(x[rows], y[columns])
            sums_x[rows] += block.sum(dim=1, dtype=torch.float64)
            sums_y[columns] += block.sum(dim=0, dtype=torch.float64)
    return sums_x.cpu().numpy(), sums_y.cpu().numpy()
