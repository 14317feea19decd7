"""Paired differences of table rows: what the interval covers, and against closed forms."""

import numpy as np
import pytest
from scipy.stats import t

from dmd2.publish.table_text import difference_text
from eval.metrics.estimate import linear
from eval.report.differences import difference

RNG = np.random.default_rng(0)
PSI = RNG.standard_normal(1000)


def test_over_training_seeds_it_is_the_t_interval_of_the_seeds_differences() -> None:
    pairs = zip((3.0, 5.0, 4.0), (1.0, 2.0, 3.0), strict=True)
    found = difference([linear(ours, PSI).minus(linear(base, PSI)) for ours, base in pairs])
    half = t.ppf(0.975, 2) * np.std([2, 3, 1], ddof=1) / np.sqrt(3)
    assert (found["value"], found["covers"], found["sampling_se"]) == (2.0, "training seeds", 0)
    assert (found["low"], found["high"]) == pytest.approx((2 - half, 2 + half))


def test_one_seed_covers_the_images_only_and_pairing_cancels_what_rows_share() -> None:
    own = 0.1 * RNG.standard_normal(1000)
    found = difference([linear(2.0, PSI + own).minus(linear(1.0, PSI))])
    assert (found["value"], found["covers"]) == (1.0, "finite sample")
    assert found["sampling_se"] == pytest.approx(own.std(ddof=1) / np.sqrt(1000))
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * found["sampling_se"])


def test_balanced_classes_count_the_spread_inside_classes_only() -> None:
    by_class = linear(1.0, np.arange(1000) % 10.0, strata=np.arange(1000) % 10)
    found = difference([by_class.minus(linear(0.0, np.zeros(1000)))])
    assert found["sampling_se"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [(1.0, -0.5, 2.5, "+1.00 [-0.50, +2.50]"), (-120.0, -150.0, -90.0, "**-120 [-150, -90]**")],
)
def test_an_interval_without_zero_is_bold(value: float, low: float, high: float, text: str) -> None:
    assert difference_text({"value": value, "low": low, "high": high}) == text


def test_no_reference_row_no_difference() -> None:
    assert difference_text(None) == "–"
