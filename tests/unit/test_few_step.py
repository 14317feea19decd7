"""The student's own sampler, and images from seeds."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from dmd2.core.errors import UserError
from dmd2.core.rng import sample_noise
from dmd2.method.samplers import few_step
from dmd2.networks.condition import Condition
from dmd2.networks.schedules import FlowSchedule
from dmd2.training.sampling import student_sample
from tests import reference, tiny
from tests.stubs import NO_CONDITION, MixtureEdm, MixtureEps, arrays, tensor

SHAPE, TIMES = (2, 1, 4, 4), [999, 749, 499, 249]
Z = arrays(0, *SHAPE)
NOISE = [arrays(10 + i, *SHAPE) for i in range(3)]
SDXL_SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}  # fmt: skip


def ours(times, student=None):
    student = student or MixtureEps()
    return few_step(student, tensor(Z), times, NO_CONDITION, lambda i: tensor(NOISE[i])).double().numpy()


def lcm(times, monkeypatch):
    """Diffusers' scheduler, fed with the same noise."""
    scheduler, noise = LCMScheduler(**SDXL_SCHEDULER), iter(NOISE)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: tensor(next(noise)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(timesteps=times)
    assert scheduler.init_noise_sigma == 1
    x = tensor(Z)
    for t in scheduler.timesteps:
        eps = torch.from_numpy(reference.mixture_eps(x.double().numpy(), int(t))).float()
        x, denoised = scheduler.step(eps, t, x, return_dict=False)
    return denoised.double().numpy()


@pytest.mark.parametrize("times", [TIMES, [999, 499], [999], [399]])
def test_few_step_equals_the_reference(times):
    np.testing.assert_allclose(ours(times), reference.few_step(reference.mixture_eps, Z, times, NOISE), atol=2e-5)


@pytest.mark.parametrize("times", [TIMES, [999, 499], [399]])
def test_few_step_equals_the_lcm_scheduler_with_shared_noise(times, monkeypatch):
    np.testing.assert_allclose(ours(times), lcm(times, monkeypatch), atol=1e-5)


def test_few_step_calls_the_student_once_at_each_time():
    student = MixtureEps()
    ours(TIMES, student)
    assert student.times == TIMES


def test_without_noise_few_step_is_eulers_sampler_of_diffusers_on_a_flow():
    student, cond = tiny.denoiser("flow-sd3"), tiny.condition("flow-sd3", 3)
    student.schedule = FlowSchedule(3.0)
    x = z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = (x - student(x, torch.full((3,), float(t) / 1000), cond)) / (t / 1000)
            x = scheduler.step(v, t, x).prev_sample
        ours = few_step(student, z, student.schedule.step_times(4, 1.0), cond, None)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_few_step_draws_no_noise_after_the_last_step():
    drawn = []
    few_step(MixtureEps(), tensor(Z), TIMES, NO_CONDITION, lambda i: drawn.append(i) or tensor(NOISE[i]))
    assert drawn == [0, 1, 2]


def test_few_step_on_karras_adds_sigma_times_noise():
    student, inputs = MixtureEdm(), []
    student.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double().numpy()))
    few_step(student, tensor(80 * Z), [80.0, 5.0], NO_CONDITION, lambda i: tensor(NOISE[i]))
    first = reference.mixture_mean(inputs[0], np.ones(1), 80.0)
    np.testing.assert_allclose(inputs[1], first + 5 * NOISE[0], atol=1e-5)


# One-step inference (6.1) and samples by seed.
def test_one_step_edm_sample_is_the_student_at_80_z():
    cfg, student, seeds = tiny.config("edm"), tiny.denoiser("edm"), [3, 6]
    z = sample_noise(seeds, (1, 8, 8), "noise")
    expected = student(80 * z, torch.full((2,), 80.0), Condition(labels=torch.tensor([3, 2]))).detach()
    torch.testing.assert_close(student_sample(student, cfg, seeds, torch.device("cpu")), expected, rtol=1e-5, atol=1e-5)


def test_one_step_eps_sample_is_x0_of_unit_noise_at_the_configured_time():
    cfg, student = tiny.config("eps-labels", generator__time=399.0), tiny.denoiser("eps-labels")
    z = sample_noise([0, 1], (4, 8, 8), "noise")
    expected = student(z, torch.full((2,), 399), Condition(labels=torch.tensor([0, 1]))).detach().float()
    got = student_sample(student, cfg, [0, 1], torch.device("cpu"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_image_belongs_to_its_seed_whatever_the_batch():
    cfg = tiny.config("edm", generator__input="backward_simulation", generator__steps=4)
    student, device = tiny.denoiser("edm"), torch.device("cpu")
    together = student_sample(student, cfg, [0, 1, 2, 3, 4], device)
    apart = torch.cat([student_sample(student, cfg, seeds, device) for seeds in ([0, 1], [2], [3, 4])])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_sampling_a_text_run_by_seed_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="prompt"):
        student_sample(tiny.denoiser("eps-text"), tiny.config("eps-text"), [0, 1], torch.device("cpu"))
