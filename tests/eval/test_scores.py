"""Means, accuracy, Inception score and LPIPS diversity against hand-made cases and torch-fidelity; the estimate type."""

import json

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from dmd2.core.errors import UserError
from eval.metrics.estimate import Estimate, mean
from eval.metrics.measures import accuracy, diversities, inception_score

RNG = np.random.default_rng(0)


def paired_mean(a, b) -> Estimate:
    return mean(b).minus(mean(a))


def test_mean_and_its_standard_error() -> None:
    got = mean(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (got.value, got.se) == (3, pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2))
    assert mean(np.array([5.0])) == Estimate(5, None, 1)


def test_interval_is_centred_on_the_corrected_value_and_written_as_json() -> None:
    estimate = Estimate(3.0, 0.5, 1_000_000, bias=1.0)
    assert estimate.interval == pytest.approx((2 - 0.98, 2 + 0.98), abs=1e-4)
    read = json.loads(json.dumps(estimate.as_json()))
    assert read["bias"] == 1 and read["low"] == pytest.approx(1.02, abs=1e-4)
    assert Estimate(1.0, None, 1).as_json()["low"] is None
    low, high = Estimate(0.0, 1.0, 3).interval
    assert high == pytest.approx(4.303, abs=1e-3) == -low  # Student's t with 2 degrees of freedom


def test_paired_mean_of_identical_arms_is_exactly_zero() -> None:
    a = RNG.standard_normal(50)
    assert paired_mean(a, a) == Estimate(0, 0, 50)
    got = paired_mean(a, a + np.linspace(0, 1, 50))
    assert got.value == pytest.approx(0.5) and got.se == pytest.approx(np.linspace(0, 1, 50).std(ddof=1) / np.sqrt(50))


def test_strata_take_the_spread_between_classes_away() -> None:
    labels = np.array([0, 0, 1, 1, 1, 2])
    values = np.array([1.0, 3.0, 10.0, 11.0, 12.0, 50.0])
    # class 2 has one image and joins the largest class
    joined = values[2:].var(ddof=1)
    expected = np.sqrt((2 / 6) ** 2 * values[:2].var(ddof=1) / 2 + (4 / 6) ** 2 * joined / 4)
    assert mean(values, labels).se == pytest.approx(expected)
    assert mean(values[:5], labels[:5]).se < mean(values[:5]).se
    assert mean(values, np.zeros(6)).se == mean(values).se


def test_accuracy_counts_hits_and_never_claims_certainty() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3, 0]]
    got = accuracy(logits, torch.tensor([0, 1, 2, 3, 1]))
    assert got.value == 0.8 and got.n == 5
    perfect = accuracy(logits, torch.tensor([0, 1, 2, 3, 0]))
    assert perfect.value == 1 and perfect.se == pytest.approx(np.sqrt(7 / 9 * 2 / 9 / 9))


def test_inception_score_equals_torch_fidelity_with_one_split() -> None:
    logits = 3 * torch.from_numpy(RNG.standard_normal((200, 10)))
    peer = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert inception_score(logits).value == pytest.approx(peer, rel=1e-12)


def test_inception_score_of_certain_balanced_and_of_equal_predictions() -> None:
    certain = inception_score(1000.0 * np.eye(8)[np.arange(80) % 8])
    assert certain.value == pytest.approx(8, rel=1e-9)
    equal = inception_score(np.zeros((30, 8)))
    assert (equal.value, equal.se, equal.bias) == (pytest.approx(1), pytest.approx(0), pytest.approx(0))
    collapsed = inception_score(1000.0 * np.eye(8)[np.zeros(30, dtype=int)])
    assert collapsed.value == pytest.approx(1) and np.isfinite(collapsed.bias)
    assert inception_score(np.zeros((1, 8))).se is None


def test_diversity_is_the_mean_over_prompts_of_all_pairs() -> None:
    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert x.min() >= -1 and x.max() <= 1
        return (x - y).abs().mean()

    groups = [
        torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        for levels in ([0, 255, 0], [9, 9, 9])
    ]
    got = mean(diversities(groups, distance))
    assert got.value == pytest.approx((4 / 3 + 0) / 2) and got.n == 2
    with pytest.raises(UserError, match="prompt 1 has 1"):
        diversities([groups[0], groups[0][:1]], distance)


def test_diversity_of_many_images_is_summed_in_parts_of_bounded_size() -> None:
    sizes = []

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return (x - y).abs().mean()

    levels = torch.arange(0, 70, 10, dtype=torch.uint8)  # 21 pairs
    got = diversities([levels.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)], distance)
    x = levels.double() / 127.5
    assert got[0] == pytest.approx(float(torch.pdist(x[:, None]).mean()), rel=1e-5)
    assert sum(sizes) == 21 and max(sizes) == 6


def test_bad_values_are_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="one finite value"):
        mean(np.array([1.0, np.nan]))
    with pytest.raises(UserError, match="one finite value"):
        mean(np.zeros((3, 2)))
    with pytest.raises(UserError, match="3 and 2 values"):
        paired_mean(np.zeros(3), np.zeros(2))
    with pytest.raises(UserError, match="one class each"):
        mean(np.zeros(3), np.zeros(2))
    with pytest.raises(UserError, match=r"0\.\.3"):
        accuracy(np.eye(4), np.array([0, 1, 2, 4]))
    with pytest.raises(UserError, match="one label each"):
        accuracy(np.eye(4), np.array([0, 1, 2]))
    with pytest.raises(UserError, match="logits hold NaN"):
        inception_score(np.full((3, 4), np.nan))
