"""Moments and the Frechet distance against closed forms, SciPy's sqrtm, and themselves in pieces."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from dmd2.core.errors import UserError
from dmd2.core.files import read_json
from eval.metrics.stats import FeatureStats, frechet_distance, load_stats, ones_initialised, save_stats

RNG = np.random.default_rng(0)


def moments(mean: np.ndarray, covariance: np.ndarray, count: int = 100) -> FeatureStats:
    return FeatureStats(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def commuting(d: int, power: float) -> tuple[FeatureStats, FeatureStats, float]:
    """Two covariances with common eigenvectors and spectra like k^-power, and their distance in closed form."""
    rng = np.random.default_rng(d)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    s, r = np.arange(1, d + 1.0) ** -power, rng.uniform(0.5, 2, d) * np.arange(1, d + 1.0) ** -power
    a, b = moments(np.zeros(d), q * s @ q.T, 10_000), moments(np.zeros(d), q * r @ q.T, 10_000)
    return a, b, float(((np.sqrt(s) - np.sqrt(r)) ** 2).sum())


def test_one_dimension_is_the_difference_of_means_and_deviations() -> None:
    a, b = moments([1.0], [[4.0]]), moments([3.0], [[9.0]])
    assert frechet_distance(a, b) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2, rel=1e-12)


def test_two_dimensions_with_a_known_root() -> None:
    a, b = moments([0, 0], [[2, 1], [1, 2]]), moments([0, 0], np.diag([1, 3]))
    assert frechet_distance(a, b) == pytest.approx(8 - 2 * np.sqrt(14), abs=1e-12)


@pytest.mark.parametrize("power", [1, 2.5, 4])
def test_commuting_covariances(power: float) -> None:
    a, b, expected = commuting(64, power)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9 * traces)


def test_agrees_with_scipy_sqrtm_on_correlated_features() -> None:
    x = RNG.standard_normal((400, 20)) @ RNG.standard_normal((20, 20))
    y = RNG.standard_normal((300, 20)) @ RNG.standard_normal((20, 20)) + 0.3
    a, b = FeatureStats.of(x), FeatureStats.of(y)
    root = np.real(sqrtm(np.cov(x.T) @ np.cov(y.T)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_identical_and_rank_deficient_sets_are_at_distance_zero() -> None:
    x = RNG.standard_normal((5, 40))
    assert 0 <= frechet_distance(FeatureStats.of(x), FeatureStats.of(x)) < 1e-10
    constant = np.ones((7, 40))
    assert frechet_distance(FeatureStats.of(constant), FeatureStats.of(constant)) == 0


@pytest.mark.parametrize("pieces", [2, 7, 64])
def test_merging_pieces_in_any_order_gives_the_moments_of_the_whole(pieces: int) -> None:
    x = 30 + RNG.standard_normal((1000, 16))
    parts = [FeatureStats.of(part) for part in np.array_split(x, pieces)]
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merged.merge(part)
        whole = FeatureStats.of(x)
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(merged.covariance, np.cov(x.T), atol=1e-12)


def test_quirk_equals_an_accumulator_started_at_ones() -> None:
    x = RNG.standard_normal((50, 8))
    raw = np.ones((8, 8)) + x.T @ x
    official = raw / 49 - np.outer(x.mean(0), x.mean(0)) * 50 / 49
    np.testing.assert_allclose(ones_initialised(FeatureStats.of(x)).covariance, official, atol=1e-13)


def test_one_sample_and_foreign_dimensions_are_refused_in_a_sentence() -> None:
    one, two = FeatureStats.of(np.ones((1, 4))), FeatureStats.of(np.ones((3, 4)))
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance(one, two)
    with pytest.raises(UserError, match="4 and 5 dimensions"):
        frechet_distance(two, FeatureStats.of(np.ones((3, 5))))


def test_saved_moments_come_back_and_damage_is_named(tmp_path) -> None:
    stats = FeatureStats.of(RNG.standard_normal((10, 3)))
    save_stats(stats, tmp_path / "manifest.json", {"detector": "d"})
    loaded = load_stats(tmp_path / "manifest.json")
    assert loaded.count == 10 and np.array_equal(loaded.scatter, stats.scatter)
    path = tmp_path / read_json(tmp_path / "manifest.json")["files"][0]["path"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        load_stats(tmp_path / "manifest.json")
