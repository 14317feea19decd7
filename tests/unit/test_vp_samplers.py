"""DDIM, PNDM and Euler against NumPy formulas, with the exact noise prediction of a mixture."""

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from pydantic import ValidationError

from dmd2.experiment.eval_config import Sampler
from dmd2.method.samplers import vp_solver
from tests import reference
from tests.stubs import NO_CONDITION, MixtureEps, arrays, tensor

SHAPE = (2, 1, 4, 4)
Z = arrays(0, *SHAPE)


def step_noise(i):
    return arrays(100 + i, *SHAPE)


def ours(solver, steps, denoiser=None, **options):
    spec = Sampler(solver=solver, steps=steps, **options)
    denoiser = denoiser or MixtureEps()
    return vp_solver(denoiser, tensor(Z), NO_CONDITION, None, spec, lambda i: tensor(step_noise(i))).double().numpy()


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_ddim_equals_the_reference(steps):
    np.testing.assert_allclose(ours("ddim", steps), reference.ddim(reference.mixture_eps, Z, steps), atol=1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_equals_the_reference(eta):
    noise = [step_noise(i) for i in range(10)]
    expected = reference.ddim(reference.mixture_eps, Z, 10, eta, noise)
    np.testing.assert_allclose(ours("ddim", 10, eta=eta), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_pndm_equals_the_reference(steps):
    np.testing.assert_allclose(ours("pndm", steps), reference.pndm(reference.mixture_eps, Z, steps), atol=2e-4)


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_euler_equals_the_reference(steps):
    np.testing.assert_allclose(ours("euler", steps), reference.euler(reference.mixture_eps, Z, steps), atol=2e-4)


def test_pndm_is_closer_than_ddim_to_a_fine_solution():
    fine = reference.ddim(reference.mixture_eps, Z, 500)
    error = {solver: np.abs(ours(solver, 50) - fine).mean() for solver in ("pndm", "ddim")}
    assert error["pndm"] < error["ddim"] / 2


def test_ddim_visits_leading_times_offset_by_one():
    denoiser = MixtureEps()
    ours("ddim", 50, denoiser)
    assert denoiser.times == list(range(981, 0, -20))


def test_pndm_visits_its_second_time_twice():
    denoiser = MixtureEps()
    ours("pndm", 50, denoiser)
    assert denoiser.times == [981, 961, *range(961, 0, -20)]


def test_euler_visits_trailing_times():
    denoiser = MixtureEps()
    ours("euler", 50, denoiser)
    assert denoiser.times == list(range(999, 0, -20))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_number_of_steps_that_is_allowed_has_as_many_times_of_the_grid(spacing):
    """For some numbers diffusers' trailing times have one more, -1, by rounding."""
    refused, scheduler = [], EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=1)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps
        try:
            Sampler(solver="euler", steps=steps, spacing=spacing)
            assert len(times) == steps and times.min() >= 0 and times.max() <= 999
        except ValidationError:
            refused.append(steps)
    assert len(refused) == {"leading": 1, "trailing": 63}[spacing]


def test_each_solver_starts_from_unit_noise_at_its_first_time():
    class Probe(MixtureEps):
        def body(self, x_t, t, cond):
            self.first = getattr(self, "first", x_t)
            return super().body(x_t, t, cond)

    for solver, scale in (("ddim", 1.0), ("pndm", 1.0), ("euler", (1 - reference.ABAR[999]) ** 0.5)):
        probe = Probe()
        ours(solver, 10, probe)
        np.testing.assert_allclose(probe.first.numpy(), scale * Z, rtol=1e-5)


def test_deterministic_solvers_draw_no_noise():
    def refuse(step):
        raise AssertionError("noise drawn")

    for solver in ("ddim", "pndm", "euler"):
        vp_solver(MixtureEps(), tensor(Z), NO_CONDITION, None, Sampler(solver=solver, steps=5), refuse)
