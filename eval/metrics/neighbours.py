"""Precision, recall, density and coverage from nearest neighbours.

A ball around every image reaches to its k-th neighbour of its own set, itself excluded; a point on the edge is inside
(``<=``, as in ADM and torch-fidelity; clovaai's reference has ``<``, which gives 0 for sets of equal images).
Distances are float64 of centred features: in float32, features far from the origin lose their neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from eval.metrics.estimate import Estimate, Features, blocks, matrices

ROWS_AT_ONCE = 2048  # rows of a distance matrix held at a time
HALVES = 16
EPS = torch.finfo(torch.float64).eps


def prdc(real: Features, fake: Features, k: int = 5, halves: int = HALVES) -> dict[str, Estimate]:
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The standard error is the spread over `halves` random halves of both sets, drawn without replacement: a half of a
    sample varies around the whole as the whole varies around the truth. (With replacement, every duplicate would be
    its own neighbour at distance 0.) A quarter of the full cost each; 0 halves: no standard error.

    Args:
        real: reference features ``(n_r, d)``.
        fake: generated features ``(n, d)``.
        k: which neighbour sets a ball's radius.
        halves: number of random halves.

    Raises:
        UserError: k < 1, or not more than k images on a side, other dimensions, or NaN.
    """
    a, b = matrices(real, fake)
    if not 1 <= k < min(len(a), len(b)):
        raise UserError(f"neighbour {k} needs k >= 1 and more than k images per side, got {len(a)} and {len(b)}")
    centre = a.double().mean(dim=0)
    a, b = a - centre, b - centre
    values = _prdc(a, b, k)
    spreads = dict.fromkeys(values, None) if halves < 2 else _spread_of_halves(a, b, k, halves)
    return {name: Estimate(value, spreads[name], len(b)) for name, value in values.items()}


def _prdc(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    # Equal distances met in another block differ by rounding; they must still count as on the edge
    real_radii, fake_radii = (_radii(side, k) * (1 + 1e-10) for side in (real, fake))
    inside_real = torch.zeros(len(fake), dtype=torch.long, device=real.device)
    inside_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in blocks(len(real), ROWS_AT_ONCE):
        distances = squared_distances(real[rows], fake)
        balls = distances <= real_radii[rows, None]
        inside_real += balls.sum(dim=0)
        covered[rows] = balls.any(dim=1)
        inside_fake[rows] = (distances <= fake_radii).any(dim=1)
    return {
        "precision": float((inside_real > 0).double().mean()),
        "recall": float(inside_fake.double().mean()),
        "density": float(inside_real.double().mean()) / k,
        "coverage": float(covered.double().mean()),
    }


def _spread_of_halves(real: Tensor, fake: Tensor, k: int, halves: int) -> dict[str, float | None]:
    if min(len(real), len(fake)) // 2 <= k:
        return dict.fromkeys(("precision", "recall", "density", "coverage"))
    draws: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    for _ in range(halves):
        parts = [side[torch.from_numpy(rng.permutation(len(side))[: len(side) // 2])] for side in (real, fake)]
        for name, value in _prdc(parts[0], parts[1], k).items():
            draws.setdefault(name, []).append(value)
    return {name: float(np.std(values, ddof=1)) for name, values in draws.items()}


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance ``(n,)`` to the k-th neighbour, self excluded."""
    radii = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for rows in blocks(len(x), ROWS_AT_ONCE):
        distances = squared_distances(x[rows], x)
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf
        radii[rows] = distances.kthvalue(k, dim=1).values
    return radii


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2 (n, m)`` from one product; what is within rounding of zero is exactly zero."""
    energy = (x**2).sum(dim=1)[:, None] + (y**2).sum(dim=1)
    distances = torch.addmm(energy, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= 32 * EPS * energy, 0)
