"""Loss rows of algorithm.md appendix A."""

import math

import pytest
import torch

from dmd2.method.objectives.denoising import denoising_loss
from dmd2.method.objectives.distribution_matching import distribution_matching_gradient, distribution_matching_loss
from dmd2.method.objectives.gan import discriminator_loss, generator_gan_loss
from dmd2.networks.schedules import KarrasSchedule, loss_weight

N = torch.arange(24, dtype=torch.float64)
X, R, F = (v.reshape(2, 3, 2, 2) for v in (N.sin(), N.cos(), (2 * N).sin()))
DTYPES = {torch.float64: 1e-8, torch.float32: 1e-5}


def gradient(x, real, fake):
    return distribution_matching_gradient(x, real, fake)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dm_loss_value(dtype):
    x, r, f = X.to(dtype), R.to(dtype), F.to(dtype)
    assert distribution_matching_loss(x, gradient(x, r, f)).item() == pytest.approx(0.6214892101, rel=DTYPES[dtype])


def test_dm_normaliser_per_sample():
    first, second = ((F - R) / gradient(X, R, F)).flatten(1).tolist()
    assert first == pytest.approx([0.8497954610] * 12, rel=1e-8)
    assert second == pytest.approx([0.9109516] * 12, rel=1e-7)


def test_dm_first_four_of_g():
    expected = [-1.17675375, 0.43421639, -0.40086782, 0.83617415]
    assert gradient(X, R, F).flatten()[:4].tolist() == pytest.approx(expected, abs=6e-9)


def test_dm_norm_of_g():
    assert gradient(X, R, F).norm().item() == pytest.approx(5.4618204, abs=6e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dm_gradient_in_x_is_g_over_24(dtype):
    x = X.clone().to(dtype).requires_grad_()
    distribution_matching_loss(x, gradient(x, R.to(dtype), F.to(dtype))).backward()
    expected = [-0.04903141, 0.01809235, -0.01670283, 0.03484059]
    assert x.grad.flatten()[:4].tolist() == pytest.approx(expected, rel=1e-5)


def test_dm_with_constant_offsets():
    g = gradient(X, X - 2, X - 1)
    assert g.flatten().tolist() == pytest.approx([0.5] * 24, abs=1e-12)
    assert distribution_matching_loss(X, g).item() == pytest.approx(0.125, abs=1e-12)


def test_dm_of_a_perfect_student_is_zero_and_not_nan():
    x = X.clone().requires_grad_()
    loss = distribution_matching_loss(x, gradient(x, X, X))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(X))


def test_dm_moves_the_student_from_the_fake_towards_the_real_prediction():
    g = gradient(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), -1.0))
    assert g.item() == -2  # descending it raises x


def test_edm_critic_weights():
    weights = loss_weight(KarrasSchedule(), torch.tensor([0.5, 20.0], dtype=torch.float64), "edm")
    assert weights.tolist() == pytest.approx([8, 4.0025], rel=1e-12)


def test_edm_critic_weights_at_the_ends_of_the_grid():
    weights = loss_weight(KarrasSchedule(), torch.tensor([0.002, 80.0], dtype=torch.float64), "edm")
    assert weights.tolist() == pytest.approx([250004, 4.00016], rel=1e-6)


def test_edm_critic_loss():
    weights = loss_weight(KarrasSchedule(), torch.tensor([0.5, 20.0], dtype=torch.float64), "edm")
    assert denoising_loss(R, X, weights).item() == pytest.approx(5.7431642255, rel=1e-6)


def test_gan_losses():
    fake, real = torch.tensor([[-1.0], [2.0]]), torch.tensor([[0.5], [-0.3]])
    assert discriminator_loss(fake, real).item() == pytest.approx(1.8843109636, rel=1e-6)
    assert generator_gan_loss(fake).item() == pytest.approx(0.7200948493, rel=1e-6)


def test_gan_losses_at_chance():
    zeros = torch.zeros(3, 1)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert generator_gan_loss(zeros).item() == pytest.approx(math.log(2), rel=1e-6)
