"""The flow schedule, conversions and solvers beside numbers that were computed in float64 NumPy."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dmd2.experiment.eval_config import Sampler
from dmd2.method.objectives.denoising import denoising_loss
from dmd2.method.objectives.distribution_matching import distribution_matching_gradient, distribution_matching_loss
from dmd2.method.samplers import few_step, heun
from dmd2.networks.denoisers import guidance
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.schedules import (
    FlowSchedule,
    VPSchedule,
    add_noise,
    index_of_fraction,
    logit_normal,
    loss_weight,
    shift_of_tokens,
    shifted,
)
from tests.stubs import NO_CONDITION

FLUX, SMALL_FLUX = shift_of_tokens(4096), shift_of_tokens(256)
GRID = {  # shift: sigma of indices 0, 20, 249, 499, 749, 980, 998
    1.0: (0.001, 0.021, 0.25, 0.5, 0.75, 0.981, 0.999),
    3.0: (0.002994011976, 0.06046065259, 0.5, 0.75, 0.9, 0.9935854153, 0.9996664443),
    6.0: (0.005970149254, 0.1140271493, 0.6666666667, 0.8571428571, 0.9473684211, 0.9967823878, 0.9998331943),
    FLUX: (0.003151391599, 0.06344652448, 0.5128441015, 0.7595109169, 0.9045307667, 0.9939047614, 0.9996831467),
    SMALL_FLUX: (0.001647652404, 0.03415780983, 0.3546612444, 0.6224593312, 0.831824344, 0.9883891155, 0.9993932306),
}
STUDENTS = {
    (1.0, 4): (1, 0.75, 0.5, 0.25), (3.0, 4): (1, 0.9, 0.75, 0.5), (3.0, 2): (1, 0.75),
    (3.0, 3): (1, 2.001 / 2.334, 1.002 / 1.668),  # of indices 999, 666, 333: thirds but for a thousandth
    (3.0, 8): (1, 0.9545454545, 0.9, 0.8333333333, 0.75, 0.6428571429, 0.5, 0.3),
    (5.0, 4): (1, 0.9375, 0.8333333333, 0.625), (6.0, 4): (1, 0.9473684211, 0.8571428571, 0.6666666667),
    (12.0, 4): (1, 0.972972973, 0.9230769231, 0.8),
    (SMALL_FLUX, 4): (1, 0.831824344, 0.6224593312, 0.3546612444),
    (shift_of_tokens(1024), 4): (1, 0.8492348307, 0.6524894622, 0.3849447488),
    (FLUX, 4): (1, 0.904530764, 0.759510934, 0.512844145),
}  # fmt: skip
N = torch.arange(24, dtype=torch.float64)
X, R, F, U, E = (v.reshape(2, 3, 2, 2) for v in (N.sin(), N.cos(), (2 * N).sin(), (N / 2).cos(), (N + 0.5).sin()))
SIGMA = torch.tensor([0.9, 0.25], dtype=torch.float64)


def first(values, count=3):
    return values.flatten()[:count].tolist()


@pytest.mark.parametrize("shift", GRID)
def test_the_grid_has_the_listed_sigmas(shift):
    index = torch.tensor([0, 20, 249, 499, 749, 980, 998, 999])
    found = FlowSchedule(shift).time(index)
    assert found.dtype == torch.float32 and found[-1] == 1
    assert found[:-1].tolist() == pytest.approx(GRID[shift], rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_grid_is_that_of_diffusers(shift):
    expected = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)
    assert FlowSchedule(shift).sigmas.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("shift", "low", "high", "mean"),
    [
        (1.0, 0.499, 0.1, 0.5005),
        (3.0, 0.249, 0.25, 0.676541),
        (6.0, 0.142, 0.4, 0.770477),
        (FLUX, 0.24, 0.26, 0.684099),
    ],
)
def test_shares_of_levels(shift, low, high, mean):
    sigmas = FlowSchedule(shift).sigmas
    assert (sigmas < 0.5).double().mean().item() == pytest.approx(low, abs=1e-9)
    assert (sigmas > 0.9 + 1e-12).double().mean().item() == pytest.approx(high, abs=1e-9)
    assert sigmas.mean().item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("shift", "steps"), STUDENTS)
def test_times_of_students(shift, steps):
    assert FlowSchedule(shift).step_times(steps, 1.0) == pytest.approx(STUDENTS[shift, steps], rel=1e-6)


def test_two_shifts_multiply_and_flux_has_a_line_of_mu():
    half = torch.tensor(0.5, dtype=torch.float64)
    assert shifted(shifted(half, 3.0), 3.0).item() == pytest.approx(shifted(half, 9.0).item()) == pytest.approx(0.9)
    assert [math.log(shift_of_tokens(n)) for n in (256, 1024, 4096)] == pytest.approx([0.5, 0.63, 1.15])


QUANTILES = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)


@pytest.mark.parametrize(
    ("moments", "levels"),
    [
        ((0.0, 1.0), (0.0889642226, 0.2172862285, 0.3374922407, 0.5, 0.6625077593, 0.7827137715, 0.9110357774)),
        (
            (math.log(2), 1.6),
            (0.0461323972, 0.2046737232, 0.4046718150, 0.6666666667, 0.8547472870, 0.9395525686, 0.9880535623),
        ),
    ],
)
def test_logit_normal_levels(moments, levels):
    found = logit_normal(torch.special.ndtri(QUANTILES), moments)
    assert found.tolist() == pytest.approx(levels)
    assert index_of_fraction(torch.tensor([0.0, 0.0019, 0.5, 0.9999, 1.0])).tolist() == [0, 1, 500, 999, 999]


def test_pure_noise_is_the_noise():
    one, z = torch.ones(1), torch.randn(1, 3, 2, 2)
    alpha, sigma = FlowSchedule().alpha_sigma(one, torch.float32)
    assert (float(alpha), float(sigma)) == (0, 1) and torch.equal(FlowSchedule().pure_noise(z, one), z)


class Velocity(FlowDenoiser):
    """A denoiser whose network says what it is told to."""

    def __init__(self, v, shift=1.0):
        torch.nn.Module.__init__(self)
        self.v, self.schedule = v, FlowSchedule(shift)

    def body(self, x_t, t, cond):
        return self.v(x_t, t)


def test_conversions():
    x_t = add_noise(FlowSchedule(), X, E, SIGMA)
    assert first(x_t) == pytest.approx([0.4314829847, 0.9818925864, 0.6295546724])
    assert first(x_t[1]) == pytest.approx([-0.4190101628, 0.5160713843, 0.9766792807])
    x0 = Velocity(lambda *_: F.float())(x_t, SIGMA, NO_CONDITION)
    assert x0.dtype == torch.float32
    assert first(x0) == pytest.approx([0.4314829847, 0.1635249023, 1.3106769182], rel=1e-5)
    assert first(x0[1]) == pytest.approx([-0.1926155723, 0.3254317716, 0.9089528336], rel=1e-5)
    exact = x_t - SIGMA[:, None, None, None] * F
    noise, score = noise_and_score(x_t, exact, SIGMA)
    assert first(noise) == pytest.approx([0.4314829847, 1.0728223291, 0.5538744228])
    assert first(noise[1]) == pytest.approx([-1.0981939343, 1.0879902221, 1.1798586219])
    assert first(score) == pytest.approx([-0.4794255386, -1.1920248101, -0.6154160254])
    assert first(score[1]) == pytest.approx([4.3927757374, -4.3519608885, -4.7194344875])
    kinds = ("v", "x0", "eps")
    weighed = [denoising_loss(exact, X, loss_weight(FlowSchedule(), SIGMA, kind)).item() for kind in kinds]
    errors = [(one - other).square().mean().item() for one, other in ((F, E - X), (exact, X), (noise, E))]
    assert weighed == pytest.approx(errors) and errors == pytest.approx([0.5888970926, 0.2350179590, 0.1847501736])


def noise_and_score(x_t, x0, sigma):
    """What a clean image at a level stands for, by the schedule's own scales."""
    alpha, scale = (v.reshape(-1, 1, 1, 1) for v in FlowSchedule().alpha_sigma(sigma, torch.float64))
    noise = (x_t - alpha * x0) / scale
    return noise, -noise / scale


def test_levels_of_other_schedules():
    """A flow is EDM's process, or VP's, of images that are scaled: the clean image behind them is the same."""
    alpha, sigma = FlowSchedule().alpha_sigma(torch.tensor([0.02, 0.5, 0.9, 0.98, 80 / 81]), torch.float64)
    assert (sigma / alpha).tolist() == pytest.approx([0.0204081633, 1, 9, 49, 80], rel=1e-4)
    vp = VPSchedule()
    a, s = vp.alpha_sigma(torch.tensor([0, 500, 999]), torch.float64)
    level = s / (a + s)
    scale = torch.hypot(*FlowSchedule().alpha_sigma(level, torch.float64))
    torch.testing.assert_close(
        torch.stack(FlowSchedule().alpha_sigma(level, torch.float64)) / scale, torch.stack([a, s])
    )


@pytest.mark.parametrize(("kind", "at"), [("v", (273.6, 4, 1)), ("x0", (1, 1, 1)), ("eps", (241.5, 1, 0))])
def test_weights_of_a_level(kind, at):
    levels = torch.tensor([0.06046065259, 0.5, 1], dtype=torch.float64)
    assert loss_weight(FlowSchedule(), levels, kind).tolist() == pytest.approx(at, rel=2e-4)


@pytest.mark.parametrize(("shift", "largest"), [(1.0, 1e6), (3.0, 111_556)])
def test_the_largest_weight_of_the_velocity_loss(shift, largest):
    schedule = FlowSchedule(shift)
    assert loss_weight(schedule, schedule.sigmas[:1], "v").item() == pytest.approx(largest, rel=1e-6)


def test_a_larger_velocity_of_the_teacher_moves_images_against_it():
    """``f - r = sigma (v_R - v_K)``: with the other sign the student flees from the teacher, and nothing else is told."""
    x_t = add_noise(FlowSchedule(), X, E, SIGMA)
    real, fake = (Velocity(lambda *_, v=v: v.float())(x_t, SIGMA, NO_CONDITION) for v in (R, U))
    apart = SIGMA.reshape(2, 1, 1, 1) * (R - U)
    torch.testing.assert_close((fake - real).double(), apart, rtol=1e-5, atol=1e-6)
    normaliser = (X.float() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    g = distribution_matching_gradient(X.float(), real, fake)
    torch.testing.assert_close(g.double(), apart / normaliser, rtol=1e-5, atol=1e-6)


def test_distribution_matching_with_and_without_guidance():
    g = distribution_matching_gradient(X, R, F)
    assert first(g, 4) == pytest.approx([-1.1767537507, 0.4342163926, -0.4008678241, 0.8361741480])
    assert ((F - R) / g)[:, 0, 0, 0].tolist() == pytest.approx([0.8497954644, 0.9109515985])
    assert distribution_matching_loss(X, g).item() == pytest.approx(0.6214892101)
    guided = guidance(torch.cat([U, R]), 3.0)
    assert first(guided) == pytest.approx([1, -0.1342582062, -2.3290451214])
    coupled = distribution_matching_gradient(X, guided, F)
    assert ((F - guided) / coupled)[:, 0, 0, 0].tolist() == pytest.approx([2.2212750134, 2.3702820158])
    assert first(coupled, 4) == pytest.approx([-0.4501918916, 0.4698002844, 0.7078108819, 1.2749598217])
    assert distribution_matching_loss(X, coupled).item() == pytest.approx(0.6948412870)


def gaussian(x, sigma):
    """Velocity of data N(0.3, 0.5^2)."""
    s = sigma.double()[:, None, None, None]
    x = x.double()
    gain = (1 - s) * 0.25 / ((1 - s) ** 2 * 0.25 + s**2)
    return ((x - (0.3 + gain * (x - (1 - s) * 0.3))) / s).float()


GAUSSIAN = {  # level: clean image, noise, velocity and score of 1
    0.05: (1.0443835616, 0.1567123288, -0.8876712329, -3.1342465753), 0.6: (0.52, 1.32, 0.8, -2.2),
    0.95: (0.3136332180, 1.0361245675, 0.7224913495, -1.0906574394), 1.0: (0.3, 1, 0.7, -1),
}  # fmt: skip


@pytest.mark.parametrize("level", GAUSSIAN)
def test_the_gaussian_teacher_of_one(level):
    one, sigma = torch.ones(1, 1, 1, 1), torch.tensor([level])
    x0 = Velocity(gaussian)(one, sigma, NO_CONDITION)
    found = (x0, *noise_and_score(one, x0, sigma), gaussian(one, sigma))
    assert [found[i].item() for i in (0, 1, 3, 2)] == pytest.approx(GAUSSIAN[level], rel=1e-5)


SOLVED = {
    ("euler", 4, 1.0): (0.6405405405, 0.1297297297), ("euler", 4, 3.0): (0.5121081081, 0.1939459459),
    ("euler", 25, 1.0): (0.7712013783, 0.0643993108), ("euler", 25, 3.0): (0.7445973408, 0.0777013296),
    ("euler", 50, 1.0): (0.7853967383, 0.0573016309), ("euler", 50, 3.0): (0.7715873072, 0.0642063464),
    ("heun", 4, 1.0): (0.7327154533, 0.0836422733), ("heun", 25, 1.0): (0.7986731008, 0.0506634496),
    ("heun", 25, 3.0): (0.7857084916, 0.0571457542), ("heun", 50, 1.0): (0.7996809050, 0.0501595475),
    ("heun", 50, 3.0): (0.7963491046, 0.0518254477),
}  # fmt: skip


@pytest.mark.parametrize(("solver", "steps", "shift"), SOLVED)
def test_solvers_on_a_gaussian_teacher(solver, steps, shift):
    z = torch.tensor([1.0, -0.5]).reshape(2, 1, 1, 1)
    spec = Sampler(solver=solver, steps=steps)
    found = heun(Velocity(gaussian, shift), z, NO_CONDITION, None, spec, lambda i: z)
    assert found.flatten().tolist() == pytest.approx(SOLVED[solver, steps, shift], rel=2e-5)


def test_the_few_step_sampler_is_the_stochastic_one_of_diffusers():
    def v(x, t):
        return (x * 0.7).sin() + t[:, None, None, None]

    z, ours, theirs = torch.randn(2, 3, 4, 4), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    times = FlowSchedule(3.0).step_times(4, 1.0)
    found = few_step(Velocity(v, 3.0), z, times, NO_CONDITION, lambda _: torch.randn(z.shape, generator=ours))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = z
    for t in scheduler.timesteps:
        x = scheduler.step(v(x, torch.full((2,), float(t) / 1000)), t, x, generator=theirs).prev_sample
    assert torch.allclose(x, found, atol=1e-6)


UNSHIFTED = [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("given", "sigmas"),
    [
        ({"num_inference_steps": 4}, [1, 0.857692301, 0.602150559, 0.008928572]),  # shifted a second time
        ({"num_inference_steps": 2}, [1, 0.008928572]),
        ({"sigmas": UNSHIFTED}, [1, 0.9, 0.75, 0.5]),
        ({"sigmas": [1.0, 0.9, 0.75, 0.5]}, [1, 0.964285671, 0.9, 0.75]),
        ({"sigmas": UNSHIFTED, "mu": 1.15}, [1, 0.904530764, 0.759510934, 0.512844145]),
    ],
)
def test_what_the_scheduler_of_diffusers_makes_of_a_list(given, sigmas):
    """As docs/explanation/flow.md says: only unshifted sigmas give the student's levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting="mu" in given)
    scheduler.set_timesteps(**given)
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0], rel=1e-6)
    students = FlowSchedule(FLUX if "mu" in given else 3.0).step_times(4, 1.0)
    assert (scheduler.sigmas[:-1].tolist() == pytest.approx(students, rel=1e-6)) == (given.get("sigmas") == UNSHIFTED)
