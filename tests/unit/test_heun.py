"""EDM's sampler against the NumPy version of Karras et al.'s algorithm, with an exact denoiser."""

import numpy as np
import pytest
import torch

from dmd2.experiment.eval_config import Sampler
from dmd2.method.samplers import heun, teacher_sample
from dmd2.networks.denoisers import EdmDenoiser
from tests import reference
from tests.stubs import NO_CONDITION, MixtureEdm, arrays, tensor

SHAPE = (2, 1, 4, 4)
Z = arrays(0, *SHAPE)
STOCHASTIC = {"churn": 6.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}  # as EDM's ImageNet-64 SDE row, fewer steps


def step_noise(i):
    return arrays(100 + i, *SHAPE)


def ours(steps, denoiser=None, z=Z, **options):
    spec = Sampler(solver="heun", steps=steps, **options)
    denoiser = denoiser or MixtureEdm()
    return heun(denoiser, tensor(z), NO_CONDITION, None, spec, lambda i: tensor(step_noise(i))).double().numpy()


def denoise(x, sigma):
    return reference.mixture_mean(x, np.ones(1), sigma)


@pytest.mark.parametrize("steps", [4, 7, 18])
def test_deterministic_heun_equals_the_reference(steps):
    np.testing.assert_allclose(ours(steps), reference.heun(denoise, Z, steps), atol=2e-5)


@pytest.mark.parametrize("steps", [4, 18])
def test_stochastic_heun_equals_the_reference(steps):
    noise = [step_noise(i) for i in range(steps)]
    expected = reference.heun(denoise, Z, steps, noise, **STOCHASTIC)
    assert np.abs(expected - reference.heun(denoise, Z, steps)).max() > 0.05
    np.testing.assert_allclose(ours(steps, **STOCHASTIC), expected, atol=2e-4)


def test_heun_calls_the_denoiser_twice_a_step_and_once_in_the_last():
    denoiser = MixtureEdm()
    ours(5, denoiser)
    grid = [float(np.float32(s)) for s in reference.karras_grid(5)[::-1]]
    assert denoiser.times == pytest.approx([grid[0], *np.repeat(grid[1:], 2)], rel=1e-6)


def test_churn_raises_the_noise_level_only_between_s_min_and_s_max():
    denoiser = MixtureEdm()
    ours(5, denoiser, churn=1.0, s_min=0.1, s_max=50.0)
    grid = reference.karras_grid(5)[::-1]
    evaluated = np.array(denoiser.times)[[0, 2, 4, 6, 8]]
    raised = np.where((grid >= 0.1) & (grid <= 50), 1.2, 1.0)
    assert len(set(raised)) == 2
    np.testing.assert_allclose(evaluated / grid, raised, rtol=1e-6)


def test_churn_per_step_is_capped_at_root_two_minus_one():
    denoiser = MixtureEdm()
    ours(2, denoiser, churn=1000.0)
    assert denoiser.times[0] / 80 == pytest.approx(2**0.5, rel=1e-6)


def test_heun_without_churn_draws_no_noise():
    def refuse(step):
        raise AssertionError("noise drawn")

    heun(MixtureEdm(), tensor(Z), NO_CONDITION, None, Sampler(solver="heun", steps=3), refuse)


def gaussian(scale):
    """Exact denoiser of N(0, scale^2) pixels, whose probability-flow ODE has a closed solution."""

    class Gaussian(EdmDenoiser):
        def forward(self, x_t, t, cond):
            return x_t.double() * scale**2 / (scale**2 + t.double().reshape(-1, 1, 1, 1) ** 2)

    return Gaussian(torch.nn.Identity())


def gaussian_error(steps, scale=1.0):
    exact = 80 * Z * scale / (scale**2 + 80**2) ** 0.5
    return np.abs(ours(steps, gaussian(scale)) - exact).max()


def test_heun_converges_with_second_order_to_the_exact_solution():
    coarse, fine = gaussian_error(20), gaussian_error(40)
    assert fine < 0.02
    assert 3.2 < coarse / fine < 5.5


def test_heun_starts_from_80_times_the_unit_noise():
    class Probe(MixtureEdm):
        def forward(self, x_t, t, cond):
            self.first = getattr(self, "first", x_t)
            return super().forward(x_t, t, cond)

    probe = Probe()
    ours(3, probe)
    np.testing.assert_allclose(probe.first.numpy(), 80 * Z, rtol=1e-6)


def test_heun_samples_the_modes_of_the_mixture_in_their_proportions():
    z = arrays(7, 1, 1, 64, 64)
    x = ours(18, z=z)
    upper = x > 0
    assert upper.mean() == pytest.approx(0.7, abs=0.03)
    assert (x[upper].mean(), x[upper].std()) == pytest.approx((1.0, 0.3), abs=0.03)


def test_a_single_step_is_refused_or_starts_at_the_largest_sigma():
    denoiser = MixtureEdm()
    try:
        ours(1, denoiser)
    except ValueError:  # pydantic's: the grid of Karras et al. divides by steps - 1
        return
    assert denoiser.times == [80.0]


def test_teacher_sample_returns_float32_without_a_graph():
    denoiser = MixtureEdm()
    denoiser.scale = torch.nn.Parameter(torch.ones(()))
    out = teacher_sample(denoiser, tensor(Z), NO_CONDITION, None, Sampler(solver="heun", steps=2), step_noise)
    assert out.dtype == torch.float32
    assert not out.requires_grad
