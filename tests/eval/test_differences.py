"""Paired differences of table rows: what the interval covers, and against closed forms."""

import numpy as np
import pytest
from scipy.stats import t

from dmd2.publish.table_text import difference_text
from eval.report.differences import Arm, difference

RNG = np.random.default_rng(0)
PSI = RNG.standard_normal(1000)


def test_over_training_seeds_it_is_the_t_interval_of_the_seeds_differences() -> None:
    ours = Arm({0: 3.0, 1: 5.0, 2: 4.0}, dict.fromkeys(range(3), PSI))
    base = Arm({0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), PSI))
    found = difference(ours, base, None)
    half = t.ppf(0.975, 2) * np.std([2, 3, 1], ddof=1) / np.sqrt(3)
    assert (found["value"], found["covers"]) == (2.0, "training seeds")
    assert (found["low"], found["high"]) == pytest.approx((2 - half, 2 + half))


def test_one_seed_covers_the_images_only_and_pairing_cancels_what_rows_share() -> None:
    own = 0.1 * RNG.standard_normal(1000)
    found = difference(Arm({0: 2.0}, {0: PSI + own}), Arm({0: 1.0}, {0: PSI}), None)
    assert found["covers"] == "finite sample"
    assert found["sampling_se"] == pytest.approx(own.std(ddof=1) / np.sqrt(1000))
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * found["sampling_se"])


def test_identical_rows_differ_by_nothing_for_sure() -> None:
    arm = Arm({0: 2.0}, {0: PSI})
    assert difference(arm, arm, 10)["sampling_se"] == 0


def test_a_teacher_stands_beside_every_seed() -> None:
    found = difference(Arm({0: 2.0}, {0: PSI}, teacher=True), Arm({1: 5.0, 7: 7.0}, {1: PSI, 7: PSI}), None)
    assert found["value"] == -4


def test_only_common_seeds_count() -> None:
    found = difference(Arm({0: 2.0, 1: 9.0}, {0: PSI, 1: PSI}), Arm({0: 1.0}, {0: PSI}), None)
    assert (found["value"], found["covers"]) == (1.0, "finite sample")


def test_balanced_classes_count_the_spread_inside_classes_only() -> None:
    by_class = np.arange(1000) % 10.0
    found = difference(Arm({0: 2.0}, {0: by_class}), Arm({0: 1.0}, {0: np.zeros(1000)}), 10)
    assert found["sampling_se"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [(1.0, -0.5, 2.5, "+1.00 [-0.50, +2.50]"), (-120.0, -150.0, -90.0, "**-120 [-150, -90]**")],
)
def test_an_interval_without_zero_is_bold(value: float, low: float, high: float, text: str) -> None:
    assert difference_text({"value": value, "low": low, "high": high}) == text


def test_no_reference_row_no_difference() -> None:
    assert difference_text(None) == "–"
