"""Tables of algorithm.md 1.2 to 1.4 and the schedule rows of appendix A."""

import math

import numpy as np
import pytest
import torch

from dmd2.networks.denoisers import EdmDenoiser
from dmd2.networks.schedules import LEVELS, KarrasSchedule, VPSchedule, add_noise, karras_sigmas, step_indices
from tests import reference
from tests.stubs import NO_CONDITION, LinearEdm, LinearEps

KARRAS = {
    0: (0.002, -1.553652), 1: (0.00205020, -1.547455), 20: (0.00323159, -1.433695), 100: (0.0167514, -1.022318),
    250: (0.170312, -0.442530), 500: (2.52651, 0.231709), 750: (17.6173, 0.717220), 980: (72.0539, 1.069354),
    998: (79.5638, 1.094140), 999: (80.0, 1.095507),
}  # fmt: skip
VP = {
    0: (0.99915000, 0.99957491, 0.02915476, 0.02916716), 20: (0.98131436, 0.99061312, 0.13669542, 0.13799072),
    249: (0.67543241, 0.82184695, 0.56970833, 0.69320490), 399: (0.42608636, 0.65275291, 0.75757088, 1.16057832),
    499: (0.27766965, 0.52694369, 0.84990020, 1.61288619), 749: (0.05662349, 0.23795691, 0.97127571, 4.08172936),
    980: (0.00584378, 0.07644464, 0.99707383, 13.04308319), 999: (0.00466010, 0.06826491, 0.99766723, 14.61464123),
}  # fmt: skip
N = torch.arange(24, dtype=torch.float64)
X, R = N.sin().reshape(2, 3, 2, 2), N.cos().reshape(2, 3, 2, 2)
TIMES = torch.tensor([999, 399])


@pytest.mark.parametrize("index", KARRAS)
def test_karras_grid_has_the_listed_sigma(index):
    sigma = float(KarrasSchedule().time(torch.tensor([index])))
    assert sigma == pytest.approx(KARRAS[index][0], rel=4e-6)
    assert math.log(sigma) / 4 == pytest.approx(KARRAS[index][1], abs=6e-7)


def test_karras_buffer_is_float32_and_ends_at_80_up_to_rounding():
    sigmas = KarrasSchedule().sigmas
    assert sigmas.dtype == torch.float32
    assert float(sigmas[-1]) == pytest.approx(79.999985, rel=3e-7)


def test_a_third_of_the_karras_grid_lies_below_half_and_a_third_above_ten():
    sigmas = KarrasSchedule().sigmas
    assert (sigmas < 0.5).float().mean().item() == pytest.approx(0.339, abs=5e-4)
    assert (sigmas > 10).float().mean().item() == pytest.approx(0.330, abs=5e-4)


@pytest.mark.parametrize("count", [2, 18, 1000])
def test_karras_sigmas_equal_the_reference_grid(count):
    np.testing.assert_allclose(karras_sigmas(count).numpy(), reference.karras_grid(count), rtol=1e-12)


def test_karras_generator_time_is_the_literal_80():
    assert KarrasSchedule().step_times(1, 80.0) == [80.0]


@pytest.mark.parametrize("t", VP)
def test_vp_schedule_has_the_listed_scales(t):
    abar, expected_alpha, expected_sigma, ratio = VP[t]
    alpha, sigma = (v.item() for v in VPSchedule().alpha_sigma(torch.tensor([t]), torch.float64))
    assert alpha**2 == pytest.approx(abar, abs=6e-9)
    assert (alpha, sigma) == pytest.approx((expected_alpha, expected_sigma), abs=6e-9)
    assert sigma / alpha == pytest.approx(ratio, rel=1e-7)


def test_vp_schedule_equals_the_reference_product_everywhere():
    np.testing.assert_allclose(VPSchedule().abar.numpy(), reference.ABAR, rtol=1e-12)


def test_edm_preconditioning_at_80():
    denoiser, one, t = LinearEdm(output=0.0), torch.ones(1, 1, 1, 1), torch.tensor([80.0])
    skip = denoiser(one, t, NO_CONDITION).item()
    c_in, c_noise = (v.item() for v in denoiser.network_input(one, t))
    c_out = LinearEdm(output=1.0)(one, t, NO_CONDITION).item() - skip
    assert skip == pytest.approx(3.90610e-5, rel=2e-6)
    assert c_out == pytest.approx(0.4999902, abs=6e-8)
    assert c_in == pytest.approx(0.01249976, abs=6e-9)
    assert c_noise == pytest.approx(1.0955067, abs=6e-8)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
def test_edm_preconditioning_equals_the_reference(sigma):
    want, t, one = reference.edm_coefficients(sigma), torch.tensor([sigma]), torch.ones(1, 1, 1, 1)
    zero, unit = (LinearEdm(output=v)(one, t, NO_CONDITION).item() for v in (0.0, 1.0))
    c_in, c_noise = (v.item() for v in EdmDenoiser.network_input(LinearEdm(), one, t))
    got = {"skip": zero, "out": unit - zero, "in": c_in, "noise": c_noise}
    assert got == pytest.approx(want, rel=2e-5)


def test_step_list_of_four_is_999_749_499_249():
    assert step_indices(4) == [999, 749, 499, 249]
    assert VPSchedule().step_times(4, 999) == [999, 749, 499, 249]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 16, 999])
def test_step_list_goes_down_in_whole_strides(steps):
    assert step_indices(steps) == reference.step_list(steps)


def test_step_lists_named_by_the_specification():
    assert step_indices(2) == [999, 499]
    assert step_indices(3) == [999, 666, 333]
    assert step_indices(8) == [999, 874, 749, 624, 499, 374, 249, 124]


def test_one_step_sdxl_starts_at_399():
    assert VPSchedule().step_times(1, 399) == [399]


def test_vp_noising_golden_numbers():
    x_t = add_noise(VPSchedule(), X, R, TIMES).flatten(1)[:, :3].numpy()
    expected = [[0.99766723, 0.59648485, -0.35310295], [0.28902965, 0.96172051, 0.75020997]]
    np.testing.assert_allclose(x_t, expected, atol=6e-9)


def test_x0_golden_numbers():
    x0 = LinearEps(output=(N + 0.5).sin().reshape(2, 3, 2, 2))(X, TIMES, NO_CONDITION).flatten(1)[:, :3].numpy()
    expected = [[-7.00663224, -2.2514798, 4.57367279], [-0.7450436, -0.28917012, 0.43256504]]
    np.testing.assert_allclose(x0, expected, rtol=2e-6)


def test_karras_noising_leaves_the_image_unscaled():
    t = torch.tensor([0.5, 20.0], dtype=torch.float64)
    np.testing.assert_allclose(
        add_noise(KarrasSchedule(), X, R, t).numpy(), X.numpy() + reference.column(t.numpy()) * R.numpy()
    )


def test_noising_keeps_the_dtype_of_the_image():
    for schedule, t in ((KarrasSchedule(), torch.tensor([1.0, 2.0])), (VPSchedule(), TIMES)):
        assert add_noise(schedule, X.float(), R.float(), t).dtype == torch.float32


def test_both_grids_have_1000_levels():
    assert len(KarrasSchedule().sigmas) == len(VPSchedule().abar) == LEVELS == 1000
