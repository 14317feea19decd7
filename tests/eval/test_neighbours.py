"""Precision, recall, density, coverage against 20 lines of brute force, torch-fidelity, and degenerate sets."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from dmd2.core.errors import UserError
from eval.metrics import neighbours
from eval.metrics.neighbours import prdc

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.standard_normal((120, 6)), 0.8 * RNG.standard_normal((100, 6)) + 0.4


def brute_force(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))

    def radii(x: np.ndarray) -> np.ndarray:
        own = distances(x, x)
        np.fill_diagonal(own, np.inf)
        return np.sort(own, axis=1)[:, k - 1]

    between = distances(real, fake)
    balls = between <= radii(real)[:, None]
    return {
        "precision": balls.any(axis=0).mean(),
        "recall": (between <= radii(fake)[None]).any(axis=1).mean(),
        "density": balls.sum(axis=0).mean() / k,
        "coverage": balls.any(axis=1).mean(),
    }


def values(real: np.ndarray, fake: np.ndarray, k: int = 5) -> dict[str, float]:
    return {name: estimate.value for name, estimate in prdc(real, fake, k, halves=0).items()}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_all_four_equal_the_brute_force_reference(k: int) -> None:
    expected = brute_force(REAL, FAKE, k)
    assert 0.2 < expected["recall"] < 0.99 or k == 5
    assert values(REAL, FAKE, k) == pytest.approx(expected, rel=1e-12)


def test_blocks_change_nothing(monkeypatch) -> None:
    whole = values(REAL, FAKE)
    monkeypatch.setattr(neighbours, "ROWS_AT_ONCE", 7)
    assert values(REAL, FAKE) == whole


def test_torch_fidelity_gives_the_same_precision_and_recall() -> None:
    precision, recall = calculate_precision_recall_full(torch.from_numpy(FAKE), torch.from_numpy(REAL), 3)
    ours = prdc(REAL, FAKE, k=3)
    assert ours["precision"].value == pytest.approx(precision, rel=1e-6)
    assert ours["recall"].value == pytest.approx(recall, rel=1e-6)


def test_a_generator_that_forgets_half_the_classes_keeps_precision_and_loses_recall() -> None:
    real = np.concatenate([RNG.standard_normal((100, 4)), RNG.standard_normal((100, 4)) + 20])
    got = values(real, RNG.standard_normal((200, 4)))
    assert got["precision"] > 0.8 and 0.3 < got["recall"] < 0.55 and 0.3 < got["coverage"] < 0.55


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_equal_images_everywhere_are_perfect_by_the_closed_ball(constant: float) -> None:
    x = np.full((30, 9), constant) * np.linspace(1, 2, 9)
    got = values(x, x)
    assert (got["precision"], got["recall"], got["coverage"]) == (1, 1, 1)


@pytest.mark.parametrize("d", [6, 301])
def test_identical_sets_in_another_order_are_perfect_and_as_dense_as_themselves(d: int) -> None:
    real = RNG.standard_normal((203, d))
    got = values(real, real[RNG.permutation(203)], 5)
    assert got == pytest.approx({"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}, rel=1e-12)


def test_copies_of_duplicated_images_lie_in_their_balls_of_radius_zero() -> None:
    real = np.repeat(RNG.standard_normal((37, 301)), 6, axis=0)  # the fifth neighbour is a copy too
    got = values(real, real[::4])
    assert (got["precision"], got["coverage"], got["density"]) == (1, 1, 6 / 5)


@pytest.mark.parametrize(("scale", "offset", "dtype"), [(1e-3, 10, np.float32), (1, 1e7, np.float64)])
def test_features_far_from_the_origin_keep_their_neighbours(scale: float, offset: float, dtype: type) -> None:
    real, fake = ((offset + scale * x).astype(dtype) for x in (REAL, FAKE))
    assert values(real, fake) == pytest.approx(brute_force(real.astype(float), fake.astype(float), 5), rel=1e-12)


def test_standard_errors_are_reproducible_and_absent_for_tiny_sets() -> None:
    first, second = prdc(REAL, FAKE), prdc(REAL, FAKE)
    assert first == second and all(estimate.se > 0 for estimate in first.values())
    assert all(estimate.se is None for estimate in prdc(REAL, FAKE[:10], k=5).values())
    assert prdc(REAL, FAKE, halves=0)["recall"].se is None


def test_bad_sets_are_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="more than k images"):
        prdc(REAL, FAKE[:5], k=5)
    with pytest.raises(UserError, match="k >= 1"):
        prdc(REAL, FAKE, k=0)
    with pytest.raises(UserError, match="6 and 5 dimensions"):
        prdc(REAL, FAKE[:, :5])
    with pytest.raises(UserError, match="infinity"):
        prdc(REAL, np.full((20, 6), np.inf))
