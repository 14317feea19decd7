"""Quantisation against values worked out by hand and against its published arithmetic."""

import numpy as np
import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.networks.quantise import quantise


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("trunc", [0, 0, 63, 126, 127, 128, 254, 255, 255]),
        ("round", [0, 0, 64, 127, 128, 128, 255, 255, 255]),
        ("trunc01", [0, 0, 63, 126, 127, 128, 254, 255, 255]),
    ],
)
def test_quantisation_rules_by_hand(rule: str, expected: list[int]) -> None:
    x = torch.tensor([-2, -1, -0.5, -0.004, 0, 0.004, 0.999, 1, 1.5])
    assert quantise(x, rule).tolist() == expected
    assert quantise(x, rule).dtype == torch.uint8


def test_round_inverts_the_scaling_of_bytes_and_trunc_is_half_a_level_darker() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(levels.double() / 127.5 - 1, "round"), levels)
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    darker = quantise(x, "round").double().mean() - quantise(x, "trunc").double().mean()
    assert darker == pytest.approx(0.5, abs=0.01)


def test_quantisation_refuses_what_is_not_finite_and_unknown_rules() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 1] = float("nan")
    with pytest.raises(UserError, match="image 1 of the batch has NaN"):
        quantise(images, "round")
    with pytest.raises(UserError, match="no quantisation floor: choose one of trunc, round, trunc01"):
        quantise(torch.zeros(1), "floor")


def test_trunc_adds_one_before_it_scales() -> None:
    x = np.float32(-0.254901975)  # one of 645 values in float32 whose byte depends on the order
    assert np.floor(np.float32(127.5) * (x + np.float32(1))) == 94
    assert np.floor(np.float32(127.5) * x + np.float32(127.5)) == 95
    assert quantise(torch.tensor([x]), "trunc").item() == 94
