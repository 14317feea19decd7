"""KID against the direct double sum, a loop that leaves one out, and the peers on the same subsets."""

import numpy as np
import pytest
import torch
from cleanfid.fid import kernel_distance
from torch_fidelity.metric_kid import kid_features_to_metric

from dmd2.core.errors import UserError
from eval.metrics import kid as module
from eval.metrics.estimate import Estimate
from eval.metrics.kid import kid

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((50, 12)), 1.2 * RNG.standard_normal((60, 12)) + 0.3


def kid_paired(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> Estimate:
    return kid(b, y).minus(kid(a, y))


def kid_subsets(pairs) -> list[float]:
    return [kid(X[i], Y[j]).value for i, j in pairs]


def double_sum(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_full_sample_value_is_the_direct_double_sum() -> None:
    assert kid(X, Y).value == pytest.approx(double_sum(X, Y), rel=1e-11)


def test_blocks_change_nothing(monkeypatch) -> None:
    whole = kid(X, Y)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    assert kid(X, Y).value == pytest.approx(whole.value, rel=1e-11)
    assert kid(X, Y).se == pytest.approx(whole.se, rel=1e-11)


def test_standard_error_is_the_jackknife_that_leaves_one_image_out() -> None:
    variance = 0.0
    for leave, n in ((lambda i: kid(np.delete(X, i, 0), Y), len(X)), (lambda i: kid(X, np.delete(Y, i, 0)), len(Y))):
        variance += (n - 1) ** 2 / n * np.var([leave(i).value for i in range(n)], ddof=1)
    assert kid(X, Y).se == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_paired_standard_error_is_the_jackknife_of_the_difference() -> None:
    b = X + 0.2 * RNG.standard_normal(X.shape)

    def difference(keep_x: np.ndarray, keep_y: np.ndarray) -> float:
        return kid(b[keep_x], Y[keep_y]).value - kid(X[keep_x], Y[keep_y]).value

    all_x, all_y = np.arange(len(X)), np.arange(len(Y))
    without_x = [difference(np.delete(all_x, i), all_y) for i in all_x]
    without_y = [difference(all_x, np.delete(all_y, i)) for i in all_y]
    variance = 49**2 / 50 * np.var(without_x, ddof=1) + 59**2 / 60 * np.var(without_y, ddof=1)
    got = kid_paired(X, b, Y)
    assert got.value == pytest.approx(difference(all_x, all_y), rel=1e-10)
    assert got.se == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_identical_arms_differ_by_exactly_nothing() -> None:
    got = kid_paired(X, X.copy(), Y)
    assert (got.value, got.se) == (0, 0)


def test_torch_fidelity_gives_the_same_value_on_its_own_subsets() -> None:
    peer = kid_features_to_metric(
        torch.from_numpy(X), torch.from_numpy(Y), kid_subsets=9, kid_subset_size=20, rng_seed=5, verbose=False
    )
    rng = np.random.RandomState(5)  # its generator and its order of draws
    values = kid_subsets([rng.choice(n, 20, replace=False) for n in (50, 60)] for _ in range(9))
    assert np.mean(values) == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-10)
    assert np.std(values) == pytest.approx(peer["kernel_inception_distance_std"], rel=1e-10)


def test_clean_fid_gives_the_same_value_on_the_same_subsets() -> None:
    np.random.seed(3)  # clean-fid draws from the global generator, second set first
    pairs = [np.stack([np.random.choice(60, 20, False), np.random.choice(50, 20, False)])[::-1] for _ in range(4)]
    np.random.seed(3)
    peer = kernel_distance(X, Y, num_subsets=4, max_subset_size=20)
    assert np.mean(kid_subsets(pairs)) == pytest.approx(peer, rel=1e-10)


def test_float32_features_lose_little() -> None:
    x, y = RNG.standard_normal((300, 64)).astype(np.float32), RNG.standard_normal((300, 64)).astype(np.float32) + 0.2
    assert kid(x, y).value == pytest.approx(kid(x.astype(float), y.astype(float)).value, rel=1e-5)


def test_half_precision_shards_are_widened_before_the_products() -> None:
    half = X.astype(np.float16)
    assert kid(half, Y.astype(np.float16)).value == pytest.approx(
        kid(half.astype(float), Y.astype(np.float16)).value, rel=1e-5
    )


def test_spread_inside_classes_is_smaller_than_over_all() -> None:
    labels = np.repeat(np.arange(5), 10)
    x = X + 2 * RNG.standard_normal((5, 12))[labels]
    assert kid(x, Y, labels).se < kid(x, Y).se


def test_two_images_have_a_value_and_one_is_refused() -> None:
    assert kid(X[:2], Y[:2]).value == pytest.approx(double_sum(X[:2], Y[:2]), rel=1e-11)
    assert kid(X[:2], Y).se is None
    constant = np.ones((5, 12))
    assert kid(constant, constant).value == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="at least 2 images"):
        kid(X[:1], Y)
    with pytest.raises(UserError, match="11 and 12 dimensions"):
        kid(X[:, :11], Y)
    with pytest.raises(UserError, match="NaN"):
        kid(np.full((4, 12), np.nan), Y)
    with pytest.raises(UserError, match="50 and 49 images"):
        kid_paired(X, X[:49], Y)
