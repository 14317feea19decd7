"""The Frechet distance by its three recipes against closed forms and peers; degenerate sets; SE, bias, pairing."""

import warnings

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_distance
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_statistics_to_metric

from dmd2.core.errors import UserError
from dmd2.core.files import read_json
from eval.metrics.estimate import Estimate
from eval.metrics.frechet import (
    FeatureStats,
    Reference,
    between_samples,
    frechet_distance,
    load_stats,
    ones_initialised,
    save_stats,
)

RNG = np.random.default_rng(0)


def stats(mean: np.ndarray, covariance: np.ndarray, count: int = 100) -> FeatureStats:
    return FeatureStats(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def commuting(d: int, power: float) -> tuple[FeatureStats, FeatureStats, float]:
    """Two covariances with common eigenvectors and spectra like k^-power, and their distance in closed form."""
    rng = np.random.default_rng(d)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    s, r = np.arange(1, d + 1.0) ** -power, rng.uniform(0.5, 2, d) * np.arange(1, d + 1.0) ** -power
    a, b = stats(np.zeros(d), q * s @ q.T, 10_000), stats(np.zeros(d), q * r @ q.T, 10_000)
    return a, b, float(((np.sqrt(s) - np.sqrt(r)) ** 2).sum())


def sample(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / np.sqrt(d) + rng.standard_normal(d)


def paired(reference: Reference, a: np.ndarray, b: np.ndarray) -> Estimate:
    return reference.estimate(b).minus(reference.estimate(a))


def from_features(x: np.ndarray, y: np.ndarray) -> float:
    """The distance without a covariance: the last trace is the nuclear norm of ``X Y^T`` (centred, scaled)."""
    a, b = ((side - side.mean(0)) / np.sqrt(len(side) - 1) for side in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def recipe_a(a: FeatureStats, b: FeatureStats) -> float:
    return Reference(b).distance(a)


def traces(a: FeatureStats, b: FeatureStats) -> float:
    return float(np.trace(a.covariance) + np.trace(b.covariance))


@pytest.mark.parametrize("distance", [recipe_a, frechet_distance])
def test_closed_forms_in_one_and_two_dimensions(distance) -> None:
    assert distance(stats([1.0], [[4.0]]), stats([3.0], [[9.0]])) == pytest.approx(5, rel=1e-12)
    a, b = stats([0, 0], [[2, 1], [1, 2]]), stats([0, 0], np.diag([1, 3]))
    assert distance(a, b) == pytest.approx(8 - 2 * np.sqrt(14), abs=1e-12)
    assert distance(a, stats([3, 4], [[2, 1], [1, 2]])) == pytest.approx(25, rel=1e-12)  # equal covariances


@pytest.mark.parametrize("power", [1, 2.5, 4])
def test_commuting_covariances_with_steep_spectra(power: float) -> None:
    a, b, expected = commuting(256, power)
    assert recipe_a(a, b) == pytest.approx(expected, abs=1e-9 * traces(a, b))


def test_all_three_recipes_agree_on_full_rank() -> None:
    x, y = sample(300, 40, 1), sample(260, 40, 2)
    a, b = FeatureStats.of(x), FeatureStats.of(y)
    expected = frechet_distance(a, b)
    assert recipe_a(a, b) == pytest.approx(expected, abs=1e-9 * traces(a, b))
    assert from_features(x, y) == pytest.approx(expected, abs=1e-9 * traces(a, b))


@pytest.mark.parametrize(("n", "m"), [(20, 30), (2, 2), (20, 400), (400, 20)])
def test_recipes_agree_with_fewer_images_than_dimensions(n: int, m: int) -> None:
    x, y = sample(n, 64, 1), sample(m, 64, 2)
    a, b = FeatureStats.of(x), FeatureStats.of(y)
    expected = from_features(x, y)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9 * traces(a, b))
    assert recipe_a(a, b) == pytest.approx(expected, abs=1e-9 * traces(a, b))


@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 40), (64, 500), (300, 20)])
def test_identical_sets_are_at_distance_exactly_zero(n: int, d: int) -> None:
    x = sample(n, d)
    assert 0 <= recipe_a(FeatureStats.of(x), FeatureStats.of(x)) < 1e-10 * np.trace(FeatureStats.of(x).covariance)


def test_distance_is_symmetric_and_keeps_under_rotation_and_shift() -> None:
    x, y = sample(200, 16, 1), sample(200, 16, 2)
    q = np.linalg.qr(RNG.standard_normal((16, 16)))[0]
    here = recipe_a(FeatureStats.of(x), FeatureStats.of(y))
    assert recipe_a(FeatureStats.of(y), FeatureStats.of(x)) == pytest.approx(here, rel=1e-10)
    assert recipe_a(FeatureStats.of(x @ q + 5), FeatureStats.of(y @ q + 5)) == pytest.approx(here, rel=1e-9)


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated")
@pytest.mark.parametrize("d", [2, 48])
def test_peers_give_the_same_distance_from_the_same_moments(d: int) -> None:
    a, b = FeatureStats.of(sample(20 * d, d, 3)), FeatureStats.of(sample(25 * d, d, 4))
    ours = recipe_a(a, b)
    peer = fid_statistics_to_metric(*({"mu": s.mean, "sigma": s.covariance} for s in (a, b)), verbose=False)
    assert ours == pytest.approx(peer["frechet_inception_distance"], rel=1e-9)
    with warnings.catch_warnings():  # clean-fid asks SciPy for `disp`, which 1.18 no longer has
        warnings.simplefilter("ignore", DeprecationWarning)
        assert ours == pytest.approx(cleanfid_distance(a.mean, a.covariance, b.mean, b.covariance), rel=1e-9)
    root = np.trace(sqrtm(a.covariance @ b.covariance)).real
    assert ours == pytest.approx(((a.mean - b.mean) ** 2).sum() + traces(a, b) - 2 * root, rel=1e-9)


def test_peers_stay_close_where_one_covariance_is_rank_deficient() -> None:
    a, b = FeatureStats.of(sample(30, 48, 3)), FeatureStats.of(sample(500, 48, 4))
    peer = fid_statistics_to_metric(*({"mu": s.mean, "sigma": s.covariance} for s in (a, b)), verbose=False)
    assert recipe_a(a, b) == pytest.approx(peer["frechet_inception_distance"], abs=1e-5)


def test_features_that_are_always_zero_change_nothing() -> None:
    x, y = sample(400, 12, 1), sample(400, 12, 2)
    dead_x, dead_y = (np.hstack([side, np.zeros((400, 3))]) for side in (x, y))
    plain = Reference(FeatureStats.of(y)).estimate(x)
    dead = Reference(FeatureStats.of(dead_y)).estimate(dead_x)
    assert dead.value == pytest.approx(plain.value, rel=1e-9)
    assert (dead.se, dead.bias) == (pytest.approx(plain.se, rel=1e-5), pytest.approx(plain.bias, rel=1e-5))


def test_constant_images_have_a_distance_and_no_error() -> None:
    y = sample(300, 6)
    reference, constant = Reference(FeatureStats.of(y)), np.full((50, 6), 0.3)
    got = reference.estimate(constant)
    b = reference.stats
    assert got.value == pytest.approx(((0.3 - b.mean) ** 2).sum() + np.trace(b.covariance), rel=1e-12)
    assert (got.se, got.bias) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert Reference(FeatureStats.of(constant)).distance(FeatureStats.of(constant)) == 0
    against_constant = Reference(FeatureStats.of(constant)).estimate(y)
    assert against_constant.value == pytest.approx(got.value, rel=1e-12)
    assert np.isfinite(against_constant.se)


def test_fewer_images_than_twice_the_dimensions_give_a_value_but_no_claim_of_certainty() -> None:
    reference = Reference(FeatureStats.of(sample(300, 24)))
    for n in (2, 10, 24, 47):
        got = reference.estimate(sample(n, 24, 5))
        assert np.isfinite(got.value) and (got.se, got.bias, got.interval) == (None, None, None)
        assert paired(reference, sample(n, 24, 5), sample(n, 24, 6)).se is None
    assert reference.estimate(sample(48, 24, 5)).se is not None
    assert between_samples(sample(60, 24), sample(20, 24)).se is None


def test_bad_features_are_refused_in_a_sentence() -> None:
    x = sample(30, 4)
    reference = Reference(FeatureStats.of(x))
    with pytest.raises(UserError, match="at least 2 images"):
        reference.estimate(x[:1])
    with pytest.raises(UserError, match="3 and 4 dimensions"):
        reference.estimate(x[:, :3])
    with pytest.raises(UserError, match="got shape"):
        reference.estimate(x[:0])
    broken = x.copy()
    broken[7, 2] = np.nan
    with pytest.raises(UserError, match="row 7"):
        reference.estimate(broken)
    with pytest.raises(UserError, match="moments hold NaN"):
        reference.distance(FeatureStats.of(broken))
    with pytest.raises(UserError, match="30 and 29 images"):
        paired(reference, x, x[:29])
    with pytest.raises(UserError, match="one class each"):
        reference.estimate(x, strata=np.zeros(29))
    with pytest.raises(UserError, match="not positive semi-definite"):
        reference.distance(FeatureStats(30, x.mean(0), -FeatureStats.of(x).scatter))


def test_influence_is_the_derivative_of_the_distance() -> None:
    x, reference = sample(200, 5, 1), Reference(FeatureStats.of(sample(500, 5, 2)))
    psi = reference.estimate(x).influence
    assert psi.mean() == pytest.approx(0, abs=0.02 * psi.std())
    mean, second = x.mean(0), np.cov(x.T)
    for i in (0, 17):
        step = 1e-5  # the moments of the mixture (1 - step) P + step delta_x
        delta = x[i] - mean
        mixed = stats(mean + step * delta, (1 - step) * second + step * (1 - step) * np.outer(delta, delta))
        slope = (reference.distance(mixed) - reference.distance(FeatureStats.of(x))) / step
        assert slope == pytest.approx(psi[i], rel=1e-3, abs=1e-3)


def test_batches_of_moments_and_tensors_give_the_same_estimate() -> None:
    x, reference = sample(5000, 8, 1).astype(np.float32), Reference(FeatureStats.of(sample(500, 8, 2)))
    np.testing.assert_allclose(FeatureStats.of(x).covariance, np.cov(x.T.astype(float)), rtol=1e-12)
    assert reference.estimate(torch.from_numpy(x)) == reference.estimate(x)
    assert reference.estimate(x).value == pytest.approx(reference.distance(FeatureStats.of(x)), rel=1e-12)
    x.flags.writeable = False  # a memory-mapped shard
    reference.estimate(x)


def test_identical_arms_differ_by_exactly_nothing() -> None:
    x, reference = sample(300, 10, 1), Reference(FeatureStats.of(sample(500, 10, 2)))
    got = paired(reference, x, x.copy())
    assert (got.value, got.se, got.bias) == (0, 0, 0)


def test_spread_inside_classes_is_smaller_than_over_all() -> None:
    labels = np.repeat(np.arange(10), 40)
    x = sample(400, 6, 1) + 3 * sample(10, 6, 5)[labels]
    reference = Reference(FeatureStats.of(sample(500, 6, 2)))
    psi = reference.estimate(x).influence
    expected = np.sqrt(sum(0.1**2 * psi[labels == c].var(ddof=1) / 40 for c in range(10)))
    assert reference.estimate(x, labels).se == pytest.approx(expected, rel=1e-12)
    assert reference.estimate(x, labels).se < 0.8 * reference.estimate(x).se
    assert reference.estimate(x, np.arange(400)).se == pytest.approx(reference.estimate(x).se)  # one image per class


@pytest.mark.parametrize("processes", [1, 8])
def test_quirk_of_the_official_evaluator_is_an_accumulator_started_at_ones(processes: int) -> None:
    x, reference = sample(300, 7, 1), Reference(FeatureStats.of(sample(300, 7, 2)))
    second = processes * np.ones((7, 7)) + x.T @ x
    official = stats(x.mean(0), (second - 300 * np.outer(x.mean(0), x.mean(0))) / 299)
    quirky = reference.distance(ones_initialised(FeatureStats.of(x), processes))
    assert quirky == pytest.approx(reference.distance(official), abs=1e-10)


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


def test_saved_moments_come_back_and_damage_is_named(tmp_path) -> None:
    stats = FeatureStats.of(RNG.standard_normal((10, 3)))
    save_stats(stats, tmp_path / "manifest.json", {"detector": "d"})
    loaded = load_stats(tmp_path / "manifest.json")
    assert loaded.count == 10 and np.array_equal(loaded.scatter, stats.scatter)
    path = tmp_path / read_json(tmp_path / "manifest.json")["files"][0]["path"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        load_stats(tmp_path / "manifest.json")
