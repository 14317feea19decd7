"""What the student is fed (2.5): pure noise, noised real images, or its own earlier steps."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dmd2.core.rng import Draws
from dmd2.method.batches import Batch
from dmd2.method.student_input import student_input
from dmd2.networks.schedules import FlowSchedule
from tests import reference, tiny
from tests.draws import keeping, with_step
from tests.stubs import NO_CONDITION, MixtureEps, arrays, tensor

TIMES = [999, 749, 499, 249]
SHAPE = (2, 8, 8)


def generator(mode, steps=4, time=999.0):
    return tiny.config("eps-labels", generator={"input": mode, "steps": steps, "time": time}).generator


def batch(total=64, iteration=0, start=0, stop=None, source=None):
    draws = Draws(0, iteration, total, start, stop or total)
    return Batch(draws, 1.0, NO_CONDITION, source=source)


def batch_noise(b):
    """The iteration's noise z: what one-step VP training is fed."""
    x_t, _ = student_input(MixtureEps(), b, generator("noise", steps=1), SHAPE)
    return x_t


class Trace(MixtureEps):
    """Keeps time, input, output and gradient mode of each call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, cond):
        x = super().forward(x_t, t, cond)
        self.calls.append((int(t[0]), x_t.double().numpy(), x.float().double().numpy(), torch.is_grad_enabled()))
        return x


def simulate(k, total=64):
    """One training pass with step `k`: the trace of all calls, the last of which is the trained one."""
    student, b = Trace(), with_step(batch(total), k)
    x_t, t = student_input(student, b, generator("backward_simulation"), SHAPE)
    student(x_t, t, b.cond)
    return student.calls, batch_noise(b).double().numpy()


# One step.
def test_one_step_eps_input_is_unit_noise_at_the_configured_time():
    x_t, t = student_input(MixtureEps(), batch(), generator("noise", steps=1, time=399.0), SHAPE)
    assert set(t.tolist()) == {399}
    assert x_t.std().item() == pytest.approx(1, abs=0.03)


def test_one_step_edm_input_is_80_times_the_batch_noise():
    cfg, student = tiny.config("edm"), tiny.denoiser("edm")
    x_t, t = student_input(student, batch(), cfg.generator, SHAPE)
    assert set(t.tolist()) == {80.0}
    torch.testing.assert_close(x_t, 80 * batch_noise(batch()))


def test_noised_real_images_of_a_shifted_flow_have_the_students_levels():
    student = tiny.denoiser("flow-sd3")
    student.schedule = FlowSchedule(3.0)
    source = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    b = keeping(batch(source=source))
    x_t, t = student_input(student, b, generator("noised_real", time=1.0), (1, 8, 8))
    assert sorted(set(t.tolist())) == pytest.approx([0.5, 0.75, 0.9, 1.0])
    level, noise = t.reshape(-1, 1, 1, 1), b.draws.normals["student/noise"]
    torch.testing.assert_close(x_t, (1 - level) * source + level * noise)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_flow_is_simulated_by_the_sampler_that_draws_its_images(k):
    student = tiny.denoiser("flow-sd3")
    student.schedule = FlowSchedule(3.0)
    cfg = tiny.config("flow-sd3")
    settings, levels = {"input": "backward_simulation", "steps": 4, "time": 1.0}, [1.0, 0.9, 0.75, 0.5][: k + 1]
    b = with_step(tiny.one_batch("flow-sd3", cfg), k)
    for sampler in ("renoise", "euler"):
        generator = tiny.config("flow-sd3", generator={**settings, "sampler": sampler}).generator
        x_t, t = student_input(student, b, generator, (1, 8, 8))
        names = [*["simulation/start", *(f"simulation/{i}" for i in range(k - 1))][:k], "student/noise"]
        start, *fresh = (b.draws.normal(name, (1, 8, 8)) for name in names)
        x = start if sampler == "renoise" else b.draws.normal("student/noise", (1, 8, 8))
        for i, (level, to) in enumerate(pairwise(levels)):
            with torch.no_grad():
                x0 = student(x, torch.full((len(x),), level), b.cond)
            x = (1 - to) * x0 + to * fresh[i] if sampler == "renoise" else x + (to - level) * (x - x0) / level
        assert t.unique().tolist() == pytest.approx(levels[-1:])
        torch.testing.assert_close(x_t, x, rtol=1e-4, atol=1e-5)


# Backward simulation.
def test_step_2_calls_999_and_749_without_gradient_then_499_with_it():
    calls, _ = simulate(2)
    assert [(time, grad) for time, _, _, grad in calls] == [(999, False), (749, False), (499, True)]


def test_step_0_is_a_single_call_at_999_on_the_batch_noise():
    ((time, x_t, _, grad),), z = simulate(0)
    assert (time, grad) == (999, True)
    np.testing.assert_array_equal(x_t, z)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_simulation_stops_at_the_drawn_step(k):
    assert [time for time, *_ in simulate(k)[0]] == TIMES[: k + 1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_trained_input_is_the_simulated_image_noised_with_the_batch_noise(k):
    calls, z = simulate(k)
    expected = reference.vp_noised(calls[k - 1][2], z, np.full(len(z), TIMES[k]))
    np.testing.assert_allclose(calls[k][1], expected, atol=1e-5)


def test_noises_of_start_steps_and_batch_are_independent():
    calls, z = simulate(3, total=256)
    noises = [z, calls[0][1]]
    for (_, _, image, _), (time, x_t, _, _) in zip(calls[:2], calls[1:3], strict=True):
        alpha, sigma = np.sqrt(reference.ABAR[time]), np.sqrt(1 - reference.ABAR[time])
        noises.append((x_t - alpha * image) / sigma)
    correlation = np.corrcoef([n.flatten() for n in noises])
    np.testing.assert_allclose(correlation, np.eye(4), atol=0.03)


def test_each_iteration_draws_its_step_uniformly():
    cfg, counts = generator("backward_simulation"), dict.fromkeys(TIMES, 0)
    for it in range(400):
        _, t = student_input(MixtureEps(), batch(1, it), cfg, (1, 1, 1))
        counts[int(t[0])] += 1
    assert all(60 < count < 140 for count in counts.values()), counts


def test_micro_batches_share_the_step_of_their_iteration():
    cfg = generator("backward_simulation")
    for it in range(10):
        times = {
            float(v) for start in (0, 2, 4) for v in
            student_input(MixtureEps(), batch(6, it, start, start + 2), cfg, (1, 1, 1))[1]
        }  # fmt: skip
        assert len(times) == 1


def test_simulation_is_the_students_own_sampler_at_every_slice():
    cfg, b = generator("backward_simulation"), with_step(batch(6), 3)
    whole, _ = student_input(MixtureEps(), b, cfg, (1, 2, 2))
    parts = [student_input(MixtureEps(), with_step(batch(6, 0, s, s + 3), 3), cfg, (1, 2, 2))[0] for s in (0, 3)]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_simulated_input_carries_no_gradient_to_the_student():
    kind = "eps-text"
    cfg = tiny.config(kind, generator={"input": "backward_simulation", "steps": 4, "time": 999.0})
    b = with_step(tiny.one_batch(kind, cfg), 2)
    x_t, _ = student_input(tiny.denoiser(kind), b, cfg.generator, (4, 8, 8))
    assert not x_t.requires_grad


def test_simulation_on_karras_goes_down_the_grid_from_80():
    cfg = tiny.config("edm", generator={"input": "backward_simulation", "steps": 4, "time": 80.0})
    student, times = tiny.denoiser("edm"), []
    student.register_forward_pre_hook(lambda module, args: times.append(args[1][0].item()))
    _, t = student_input(student, with_step(tiny.one_batch("edm", cfg), 3), cfg.generator, (1, 8, 8))
    sigmas = reference.karras_grid()
    assert [*times, t[0].item()] == pytest.approx([80, sigmas[749], sigmas[499], sigmas[249]], rel=1e-5)


# Noised real images (the ablation without backward simulation).
def noised_real(total=200):
    source = tensor(arrays(5, total, *SHAPE))
    student = Trace()
    x_t, t = student_input(student, batch(total, source=source), generator("noised_real"), SHAPE)
    return (
        x_t.double().numpy(),
        t.long().numpy(),
        source.double().numpy(),
        batch_noise(batch(total)).double().numpy(),
        student,
    )


def test_noised_real_draws_a_step_per_sample():
    _, t, *_ = noised_real()
    assert set(t.tolist()) == set(TIMES)
    assert all(30 < (t == time).sum() < 70 for time in TIMES)


def test_noised_real_noises_the_real_image_to_its_step():
    x_t, t, source, z, _ = noised_real()
    later = t < 999
    np.testing.assert_allclose(x_t[later], reference.vp_noised(source, z, t)[later], atol=1e-6)


def test_noised_real_is_pure_noise_at_the_first_step():
    x_t, t, _, z, _ = noised_real()
    np.testing.assert_array_equal(x_t[t == 999], z[t == 999])


def test_noised_real_does_not_run_the_student():
    assert not noised_real()[-1].calls
