"""Every metric has a direction or is said to have none, and everything that prints a table knows its name."""

from math import nan

import pytest

from dmd2.experiment.metrics import BETTER, PARTS, UNDIRECTED, best_first, measured
from dmd2.publish.table_text import LABELS
from eval.catalogue.columns import METRICS
from eval.runs.protocol import KNOWN


def test_every_number_of_an_evaluation_has_a_direction_or_none_a_label_and_a_meaning() -> None:
    numbers = {*measured(list(KNOWN)), "brightness_std"}
    assert not set(BETTER) & set(UNDIRECTED)
    assert numbers == {*BETTER, *UNDIRECTED} == set(LABELS) == {*METRICS, "brightness_std"}
    assert all(name in KNOWN and not set(parts) & set(KNOWN) for name, parts in PARTS.items())


@pytest.mark.parametrize(("metric", "values"), [("fd", [1.0, 2.0, nan]), ("accuracy", [0.9, 0.8, nan])])
def test_the_best_comes_first_and_nan_last(metric, values) -> None:
    assert sorted(reversed(values), key=lambda value: best_first(metric, value)) == values


def test_brightness_has_no_best() -> None:
    with pytest.raises(KeyError):
        best_first("brightness", 0.5)
