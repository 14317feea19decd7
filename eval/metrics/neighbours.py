"""Precision, recall, density, coverage from nearest neighbours, and memorisation of training images.

A ball around every image reaches to its k-th neighbour of its own set, itself excluded; a point on the edge is inside
(``<=``, as in ADM and torch-fidelity; clovaai's reference has ``<``, which gives 0 for sets of equal images).
Distances are float64 of centred features: in float32, features far from the origin lose their neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from eval.metrics.estimate import Estimate, Features, blocks, matrices, matrix

BLOCK = 2048  # rows of a distance matrix held at a time
HALVES = 16
EPS = torch.finfo(torch.float64).eps


def prdc(real: Features, fake: Features, k: int = 5, halves: int = HALVES, seed: int = 0) -> dict[str, Estimate]:
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The standard error is the spread over `halves` random halves of both sets, drawn without replacement: a half of a
    sample varies around the whole as the whole varies around the truth. (With replacement, every duplicate would be
    its own neighbour at distance 0.) A quarter of the full cost each; 0 halves: no standard error.

    Args:
        real: reference features ``(n_r, d)``.
        fake: generated features ``(n, d)``.
        k: which neighbour sets a ball's radius.
        halves: number of random halves.
        seed: of the halves.

    Raises:
        UserError: k < 1, or not more than k images on a side, other dimensions, or NaN.
    """
    a, b = matrices(real, fake)
    if not 1 <= k < min(len(a), len(b)):
        raise UserError(f"neighbour {k} needs k >= 1 and more than k images per side, got {len(a)} and {len(b)}")
    centre = a.double().mean(dim=0)
    a, b = a - centre, b - centre
    values = _prdc(a, b, k)
    spreads = dict.fromkeys(values, None) if halves < 2 else _spread_of_halves(a, b, k, halves, seed)
    return {name: Estimate(value, spreads[name], len(b)) for name, value in values.items()}


def precision_recall(
    real: Features, fake: Features, k: int = 3, halves: int = HALVES, seed: int = 0
) -> dict[str, Estimate]:
    """Precision and recall alone, with the usual k = 3; see `prdc`."""
    both = prdc(real, fake, k, halves, seed)
    return {name: both[name] for name in ("precision", "recall")}


def memorisation(generated: Features, train: Features, held_out: Features) -> dict[str, Estimate]:
    """Whether generated images lie nearer to training images than to as many held-out ones of the same source.

    Returns:
        ``train_preference``: share nearer to `train` than to `held_out`, ties one half; 1/2 without memorisation.
        ``copies``: share more than three times nearer to `train`.

    Raises:
        UserError: the two real sets differ in size, so that chance alone would favour the larger.
    """
    if len(train) != len(held_out):
        raise UserError(f"train and held-out sets must be equally large, got {len(train)} and {len(held_out)} images")
    near, far = _nearest(generated, train), _nearest(generated, held_out)
    preference = ((near < far).double() + (near == far).double() / 2).cpu().numpy()
    copies = (near < far / 9).double().cpu().numpy()  # squared distances
    n = len(preference)
    return {
        "train_preference": Estimate(float(preference.mean()), 0.5 / float(np.sqrt(n)), n),
        "copies": Estimate(float(copies.mean()), float(copies.std() / np.sqrt(n)), n),
    }


def _prdc(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    # Equal distances met in another block differ by rounding; they must still count as on the edge
    real_radii, fake_radii = (_radii(side, k) * (1 + 1e-10) for side in (real, fake))
    inside_real = torch.zeros(len(fake), dtype=torch.long, device=real.device)
    inside_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in blocks(len(real), BLOCK):
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


def _spread_of_halves(real: Tensor, fake: Tensor, k: int, halves: int, seed: int) -> dict[str, float | None]:
    if min(len(real), len(fake)) // 2 <= k:
        return dict.fromkeys(("precision", "recall", "density", "coverage"))
    draws: dict[str, list[float]] = {}
    rng = np.random.default_rng(seed)
    for _ in range(halves):
        parts = [side[torch.from_numpy(rng.permutation(len(side))[: len(side) // 2])] for side in (real, fake)]
        for name, value in _prdc(parts[0], parts[1], k).items():
            draws.setdefault(name, []).append(value)
    return {name: float(np.std(values, ddof=1)) for name, values in draws.items()}


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance ``(n,)`` to the k-th neighbour, self excluded."""
    radii = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for rows in blocks(len(x), BLOCK):
        distances = squared_distances(x[rows], x)
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf
        radii[rows] = distances.kthvalue(k, dim=1).values
    return radii


def _nearest(x: Features, y: Features) -> Tensor:
    """Squared distance ``(n,)`` from every x to its nearest y."""
    b, a = matrices(matrix(y), matrix(x))
    centre = b.double().mean(dim=0)
    a, b = a - centre, b - centre
    return torch.cat([squared_distances(a[rows], b).amin(dim=1) for rows in blocks(len(a), BLOCK)])


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2 (n, m)`` from one product; what is within rounding of zero is exactly zero."""
    energy = (x**2).sum(dim=1)[:, None] + (y**2).sum(dim=1)
    distances = torch.addmm(energy, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= 32 * EPS * energy, 0)
