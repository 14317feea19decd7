"""Every loss against the float64 NumPy formulas, on random values and on the cases that break."""

import numpy as np
import pytest
import torch

from dmd2.method.objectives.denoising import denoising_loss
from dmd2.method.objectives.distribution_matching import distribution_matching_gradient, distribution_matching_loss
from dmd2.method.objectives.gan import discriminator_loss, generator_gan_loss
from dmd2.networks.schedules import KarrasSchedule, VPSchedule, loss_weight
from tests import reference
from tests.stubs import arrays

SHAPE = (3, 2, 4, 4)
X, REAL, FAKE = (arrays(seed, *SHAPE) for seed in (1, 2, 3))
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-5}


def tensors(dtype, *values):
    return [torch.from_numpy(v.copy()).to(dtype) for v in values]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dm_gradient_equals_reference(dtype):
    g = distribution_matching_gradient(*tensors(dtype, X, REAL, FAKE))
    np.testing.assert_allclose(g.double().numpy(), reference.dm_gradient(X, REAL, FAKE), rtol=DTYPES[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dm_loss_equals_reference(dtype):
    x, real, fake = tensors(dtype, X, REAL, FAKE)
    loss = distribution_matching_loss(x, distribution_matching_gradient(x, real, fake))
    assert loss.item() == pytest.approx(reference.dm_loss(X, REAL, FAKE), rel=DTYPES[dtype])


def test_dm_normaliser_is_per_sample_and_not_per_batch():
    scaled = REAL + np.array([0, 5, 50]).reshape(3, 1, 1, 1)
    g = distribution_matching_gradient(*tensors(torch.float64, X, scaled, FAKE))
    alone = [
        distribution_matching_gradient(*tensors(torch.float64, X[i : i + 1], scaled[i : i + 1], FAKE[i : i + 1]))
        for i in range(3)
    ]
    np.testing.assert_allclose(g.numpy(), torch.cat(alone).numpy())


def test_dm_gradient_takes_the_widest_dtype_given():
    x, real, fake = tensors(torch.float64, X, REAL, FAKE)
    assert distribution_matching_gradient(x.float(), real, fake).dtype == torch.float64
    assert distribution_matching_gradient(x.float(), real.float(), fake.float()).dtype == torch.float32


def test_dm_loss_keeps_the_dtype_of_the_student():
    x, real, fake = tensors(torch.float64, X, REAL, FAKE)
    assert distribution_matching_loss(x.float(), distribution_matching_gradient(x, real, fake)).dtype == torch.float32


def test_dm_gradient_carries_no_graph():
    x, real, fake = (v.requires_grad_() for v in tensors(torch.float64, X, REAL, FAKE))
    assert not distribution_matching_gradient(x, real, fake).requires_grad


def test_dm_gradient_replaces_nan_and_infinity():
    x = torch.zeros(3, 1, 1, 2)
    real, fake = torch.zeros_like(x), torch.tensor([[0.0, 1.0], [-1.0, 1.0], [0.0, 0.0]]).reshape(3, 1, 1, 2)
    g = distribution_matching_gradient(x, real, fake).flatten()
    top = torch.finfo(torch.float32).max
    assert g.tolist() == [0.0, top, -top, top, 0.0, 0.0]


def test_dm_floor_is_added_to_the_normaliser():
    x, real, fake = tensors(torch.float64, X, REAL, FAKE)
    g = distribution_matching_gradient(x, real, fake, normaliser_eps=0.25)
    expected = (FAKE - REAL) / (reference.column(reference.dm_weight(X, REAL)) + 0.25)
    np.testing.assert_allclose(g.numpy(), expected, rtol=1e-12)


def test_dm_factor_multiplies_each_sample():
    factor = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    x, real, fake = tensors(torch.float64, X, REAL, FAKE)
    g = distribution_matching_gradient(x, real, fake, factor=factor)
    np.testing.assert_allclose(g.numpy(), factor.numpy() * reference.dm_gradient(X, REAL, FAKE), rtol=1e-12)


def test_dm_floor_keeps_a_perfect_teacher_match_finite():
    x = torch.zeros(1, 1, 2, 2)
    g = distribution_matching_gradient(x, x, x + 1, normaliser_eps=1e-6)
    assert g.flatten().tolist() == pytest.approx([1e6] * 4)


def test_edm_critic_loss_equals_reference():
    sigma = np.array([0.002, 0.7, 80.0])
    weight = loss_weight(KarrasSchedule(), torch.from_numpy(sigma), "edm")
    x, denoised = tensors(torch.float64, X, REAL)
    expected = reference.critic_loss_edm(REAL, X, sigma)
    assert denoising_loss(denoised, x, weight).item() == pytest.approx(expected, rel=1e-6)


def test_eps_weighting_of_the_x0_error_is_the_noise_error():
    t = np.array([0, 499, 999])
    x, noise, eps = X, REAL, FAKE
    x0 = reference.vp_x0(reference.vp_noised(x, noise, t), eps, t)
    weight = loss_weight(VPSchedule(), torch.from_numpy(t), "eps")
    loss = denoising_loss(*tensors(torch.float64, x0, x), weight)
    assert loss.item() == pytest.approx(reference.critic_loss_eps(eps, noise), rel=1e-6)


def test_x0_weighting_is_the_plain_mean_square():
    weight = loss_weight(VPSchedule(), torch.tensor([0, 499, 999]), "x0")
    loss = denoising_loss(*tensors(torch.float64, REAL, X), weight)
    assert loss.item() == pytest.approx(((REAL - X) ** 2).mean(), rel=1e-6)


def test_critic_loss_is_the_unweighted_error_of_the_raw_network_output():
    sigma, raw = np.array([0.1, 2.0, 30.0]), FAKE
    c = {k: reference.column([reference.edm_coefficients(s)[k] for s in sigma]) for k in ("skip", "out")}
    x_t = X + reference.column(sigma) * REAL
    denoised = c["skip"] * x_t + c["out"] * raw
    expected = ((raw - (X - c["skip"] * x_t) / c["out"]) ** 2).mean()
    weight = loss_weight(KarrasSchedule(), torch.from_numpy(sigma), "edm")
    assert denoising_loss(*tensors(torch.float64, denoised, X), weight).item() == pytest.approx(expected, rel=1e-6)


def test_critic_loss_is_differentiable_in_the_prediction():
    x, prediction = tensors(torch.float64, X, REAL)
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    denoising_loss(prediction.requires_grad_(), x, weight).backward()
    expected = 2 * reference.column(weight.numpy()) * (REAL - X) / X.size
    np.testing.assert_allclose(prediction.grad.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_gan_losses_equal_reference_even_for_large_logits(size):
    fake, real = size * arrays(4, 5, 1), size * arrays(5, 5, 1)
    got = discriminator_loss(*tensors(torch.float64, fake, real)).item()
    assert got == pytest.approx(reference.discriminator_loss(fake, real), rel=1e-9)
    generator = generator_gan_loss(torch.from_numpy(fake)).item()
    assert generator == pytest.approx(reference.generator_gan_loss(fake), rel=1e-9)


def test_generator_wants_larger_and_discriminator_smaller_fake_logits():
    for loss, sign in ((generator_gan_loss, -1), (lambda v: discriminator_loss(v, torch.zeros(2, 1)), 1)):
        logits = torch.zeros(2, 1, requires_grad=True)
        loss(logits).backward()
        assert (logits.grad * sign > 0).all()
