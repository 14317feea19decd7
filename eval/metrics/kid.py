"""Kernel Inception Distance: the unbiased full-sample value with its standard error.

Kernel ``(x . y / d + 1)^3`` (Binkowski et al. 2018). The products run in the features' own precision on their device,
in blocks; the sums are float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from eval.metrics.estimate import Estimate, Features, blocks, linear, matrices

ROWS_AT_ONCE = 2048  # rows and columns of the kernel matrix held at a time


def kid(x: Features, y: Features, strata: Features | None = None) -> Estimate:
    """Full-sample unbiased KID of generated ``x (n, d)`` to reference ``y (m, d)``; may be slightly negative.

    The standard error is the delete-one jackknife over both samples, which row sums of the kernel give in closed form;
    where the two distributions agree it is too large (the first-order variance vanishes there).

    Args:
        x: features of the generated images.
        y: features of the reference images, a finite draw too.
        strata: class of every generated image, see `standard_error`.

    Raises:
        UserError: fewer than two images on a side, other dimensions, or NaN.
    """
    a, b = matrices(x, y)
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise UserError(f"KID needs at least 2 images on both sides, got {n} and {m}")
    self_x, self_y = _self_sums(a), _self_sums(b)
    cross_x, cross_y = _cross_sums(a, b)
    own = self_x.sum() / (n * (n - 1)) + self_y.sum() / (m * (m - 1))
    value = float(own - 2 * cross_x.sum() / (n * m))
    if min(n, m) < 3:  # leaving one out must leave a pair
        return Estimate(value, None, n)
    ours, theirs = _pseudo_values(self_x, cross_x / m), _pseudo_values(self_y, cross_y / n)
    return linear(value, ours, of_reference=theirs, strata=strata)


def _pseudo_values(own: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Jackknife pseudo-values of one side up to a constant: the SE of their mean is the value's."""
    # leaving image i out changes the value by -2 (own_i / (n - 2) - cross_i) / (n - 1), plus a constant
    return 2 * (own / (len(own) - 2) - cross)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _self_sums(x: Tensor) -> np.ndarray:
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows in blocks(len(x), ROWS_AT_ONCE):
        block = _kernel(x[rows], x[rows]).fill_diagonal_(0)
        sums[rows] += block.sum(dim=1, dtype=torch.float64)
        for columns in blocks(rows.start, ROWS_AT_ONCE):  # the matrix is symmetric: each block below serves two
            block = _kernel(x[rows], x[columns])
            sums[rows] += block.sum(dim=1, dtype=torch.float64)
            sums[columns] += block.sum(dim=0, dtype=torch.float64)
    return sums.cpu().numpy()


def _cross_sums(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    sums_x = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    sums_y = torch.zeros(len(y), dtype=torch.float64, device=x.device)
    for rows in blocks(len(x), ROWS_AT_ONCE):
        for columns in blocks(len(y), ROWS_AT_ONCE):
            block = _kernel(x[rows], y[columns])
            sums_x[rows] += block.sum(dim=1, dtype=torch.float64)
            sums_y[columns] += block.sum(dim=0, dtype=torch.float64)
    return sums_x.cpu().numpy(), sums_y.cpu().numpy()
