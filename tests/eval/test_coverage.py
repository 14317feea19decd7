"""Standard errors, biases and 95 % intervals against 200 or more repetitions of synthetic draws with a known answer."""

from collections.abc import Callable

import numpy as np
import pytest

from eval.metrics.estimate import Estimate, mean
from eval.metrics.frechet import FeatureStats, Reference, between_samples
from eval.metrics.kid import kid
from eval.metrics.measures import accuracy, inception_score
from eval.metrics.neighbours import prdc

REPEATS = 200


class Gaussians:
    """Two correlated generators and a reference, all Gaussian with commuting covariances: distances in closed form."""

    def __init__(self, d: int) -> None:
        rng = np.random.default_rng(d)
        self.q = np.linalg.qr(rng.standard_normal((d, d)))[0]
        self.scale = np.arange(1, d + 1.0) ** -0.5  # a spectrum 1/k, as real features have
        self.scale_a = self.scale * rng.uniform(0.7, 1.5, d)
        self.mean_a = 0.2 * self.scale * rng.standard_normal(d)
        self.scale_b = self.scale_a * rng.uniform(0.85, 1.25, d)  # a relative of a, as arms of one ablation are
        self.mean_b = self.mean_a + 0.05 * self.scale * rng.standard_normal(d)
        self.reference = Reference(FeatureStats(10**6, np.zeros(d), self._covariance() * (10**6 - 1)))
        self.distance_a = (self.mean_a**2).sum() + ((self.scale_a - self.scale) ** 2).sum()
        self.distance_b = (self.mean_b**2).sum() + ((self.scale_b - self.scale) ** 2).sum()

    def _covariance(self) -> np.ndarray:
        return self.q * self.scale**2 @ self.q.T

    def real(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return (rng.standard_normal((n, len(self.scale))) * self.scale) @ self.q.T

    def arms(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        z, own = rng.standard_normal((2, n, len(self.scale)))
        a = z * self.scale_a + self.mean_a
        b = (0.9 * z + np.sqrt(1 - 0.9**2) * own) * self.scale_b + self.mean_b
        return a @ self.q.T, b @ self.q.T


def repeat(one: Callable[[np.random.Generator], Estimate], repeats: int = REPEATS) -> list[Estimate]:
    return [one(np.random.default_rng([7, seed])) for seed in range(repeats)]


def paired(metric, a: np.ndarray, b: np.ndarray) -> Estimate:
    return metric(b).minus(metric(a))


def coverage(estimates: list[Estimate], truth: float) -> float:
    intervals = [e.interval for e in estimates]
    assert all(interval is not None for interval in intervals)
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def error_ratio(estimates: list[Estimate]) -> float:
    """Mean standard error over the true spread of the (bias-corrected) value."""
    spread = np.std([e.value - (e.bias or 0) for e in estimates], ddof=1)
    return float(np.mean([e.se for e in estimates]) / spread)


def check(name: str, estimates: list[Estimate], truth: float, at_least: float = 0.90, at_most: float = 0.98) -> None:
    covered, ratio = coverage(estimates, truth), error_ratio(estimates)
    print(f"{name}: coverage {100 * covered:.1f} %, SE/SD {ratio:.3f}")
    assert at_least <= covered <= at_most and 0.85 < ratio < 1.2


@pytest.mark.parametrize(("d", "n"), [(32, 960), (32, 2000), (64, 2000)])
def test_interval_of_the_distance_covers_the_truth(d: int, n: int) -> None:
    world = Gaussians(d)
    estimates = repeat(lambda rng: world.reference.estimate(world.arms(rng, n)[0]), 400 if d == 32 else REPEATS)
    check(f"FD d={d} n={n}", estimates, world.distance_a)


@pytest.mark.parametrize(("d", "n"), [(32, 960), (64, 2000)])
def test_interval_of_the_paired_difference_covers_the_truth(d: int, n: int) -> None:
    world = Gaussians(d)
    estimates = repeat(lambda rng: paired(world.reference.estimate, *world.arms(rng, n)), 400)
    check(f"paired FD d={d} n={n}", estimates, world.distance_b - world.distance_a)
    a, b = (world.reference.estimate(arm) for arm in world.arms(np.random.default_rng(1), n))
    assert np.mean([e.se for e in estimates]) < 0.8 * np.hypot(a.se, b.se)  # as independent arms


def test_interval_between_two_finite_samples_covers_the_truth() -> None:
    world = Gaussians(32)
    estimates = repeat(lambda rng: between_samples(world.arms(rng, 1500)[0], world.real(rng, 1000)))
    check("FD of two samples", estimates, world.distance_a)


@pytest.mark.parametrize(("d", "n"), [(32, 256), (64, 512)])
def test_distance_extrapolated_to_infinite_samples_is_within_a_tenth_of_the_bias(d: int, n: int) -> None:
    world = Gaussians(d)
    estimates = repeat(lambda rng: world.reference.estimate(world.arms(rng, n)[0]))
    bias = np.mean([e.value for e in estimates]) - world.distance_a
    corrected = np.mean([e.value - e.bias for e in estimates])
    print(f"bias d={d}: true {bias:.4f}, left over {100 * (corrected - world.distance_a) / bias:.1f} %")
    assert abs(corrected - world.distance_a) < 0.1 * bias
    assert coverage(estimates, world.distance_a) >= 0.90
    assert coverage([Estimate(e.value, e.se, e.n) for e in estimates], world.distance_a) < 0.7  # uncorrected


def polynomial_kernel_mean(m1: np.ndarray, c1: np.ndarray, m2: np.ndarray, c2: np.ndarray, d: int) -> float:
    """``E (x . y / d + 1)^3`` of independent Gaussians, by the raw moments of x . y."""
    first = m1 @ m2
    second = np.trace((c1 + np.outer(m1, m1)) @ (c2 + np.outer(m2, m2)))
    # given y, x . y is normal with mean m1 . y and variance y^T c1 y: E t^3 = (m1 . y)^3 + 3 (m1 . y) (y^T c1 y)
    mean, spread = m1 @ m2, m1 @ c2 @ m1
    cross = mean * (np.trace(c1 @ c2) + m2 @ c1 @ m2) + 2 * m1 @ c2 @ c1 @ m2
    third = mean**3 + 3 * mean * spread + 3 * cross
    return float(third / d**3 + 3 * second / d**2 + 3 * first / d + 1)


def true_kid(world: Gaussians, scale: np.ndarray, mean: np.ndarray) -> float:
    d, zero = len(scale), np.zeros(len(scale))
    x, y = (mean, np.diag(scale**2)), (zero, np.diag(world.scale**2))
    return polynomial_kernel_mean(*x, *x, d) + polynomial_kernel_mean(*y, *y, d) - 2 * polynomial_kernel_mean(*x, *y, d)


def test_interval_of_kid_covers_the_truth() -> None:
    world = Gaussians(32)
    estimates = repeat(lambda rng: kid(world.arms(rng, 400)[0], world.real(rng, 300)))
    check("KID", estimates, true_kid(world, world.scale_a, world.mean_a))


def test_interval_of_paired_kid_covers_the_truth() -> None:
    world = Gaussians(32)

    def one(rng: np.random.Generator) -> Estimate:
        (a, b), y = world.arms(rng, 400), world.real(rng, 300)
        return paired(lambda x: kid(x, y), a, b)

    estimates = repeat(one)
    truth = true_kid(world, world.scale_b, world.mean_b) - true_kid(world, world.scale_a, world.mean_a)
    check("paired KID", estimates, truth)


def test_kid_of_equal_distributions_errs_on_the_safe_side() -> None:
    world = Gaussians(32)
    estimates = repeat(lambda rng: kid(world.real(rng, 300), world.real(rng, 300)))
    print(f"KID of equal distributions: coverage {coverage(estimates, 0):.3f}, SE/SD {error_ratio(estimates):.2f}")
    assert coverage(estimates, 0) > 0.95 and 1 < error_ratio(estimates) < 3


@pytest.mark.parametrize("n", [10, 500])
def test_intervals_of_means_cover_the_truth(n: int) -> None:
    check(f"mean n={n}", repeat(lambda rng: mean(rng.standard_normal(n) + 3), 1000), 3)
    arms = repeat(lambda rng: paired(mean, a := rng.standard_normal(n), a + 0.1 * rng.standard_normal(n) + 0.2), 1000)
    check(f"paired mean n={n}", arms, 0.2)


def test_interval_of_a_high_accuracy_covers_the_truth_with_few_images() -> None:
    def one(rng: np.random.Generator) -> Estimate:
        right = rng.random(40) < 0.95
        return accuracy(np.eye(2)[right.astype(int)], np.ones(40, dtype=int))

    assert coverage(repeat(one), 0.95) >= 0.90


def test_interval_of_the_inception_score_covers_the_truth() -> None:
    centres = 2 * np.random.default_rng(3).standard_normal((5, 5))

    def logits(rng: np.random.Generator, n: int) -> np.ndarray:
        return centres[rng.integers(0, 5, n)] + rng.standard_normal((n, 5))

    truth = inception_score(logits(np.random.default_rng(9), 2_000_000)).value
    check("Inception score", repeat(lambda rng: inception_score(logits(rng, 300))), truth)


def test_standard_errors_of_neighbour_metrics_match_their_spread() -> None:
    world = Gaussians(8)
    draws = repeat(lambda rng: prdc(world.real(rng, 400), world.arms(rng, 400)[0], k=5), 100)
    for name in ("precision", "recall", "density", "coverage"):
        ratio = error_ratio([draw[name] for draw in draws])
        print(f"{name}: SE/SD {ratio:.3f}")
        assert 0.75 < ratio < 1.4
