"""Parameterisations, guidance, conditions and precision of the denoisers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import SAMPLING, EdmDenoiser, EpsDenoiser, guide
from tests import reference, tiny
from tests.stubs import NO_CONDITION, LinearEdm, LinearEps, arrays, tensor


def inputs(kind, count=3):
    x_t = torch.randn(count, tiny.channels(kind), 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.02, 1.0, 70.0][:count]) if kind.startswith("edm") else torch.tensor([3, 500, 999][:count])
    return x_t, t, tiny.condition(kind, count)


def coefficients(t, name):
    return reference.column([reference.edm_coefficients(float(v))[name] for v in t])


@pytest.mark.parametrize("kind", ["edm", "edm-attention"])
def test_edm_denoiser_combines_its_network_by_the_four_coefficients(kind):
    x_t, t, cond = inputs(kind)
    denoiser = tiny.denoiser(kind)
    scaled = tensor(coefficients(t, "in") * x_t.double().numpy())
    raw = denoiser.network(scaled, t.log() / 4, class_labels=cond.labels).sample.detach().double().numpy()
    expected = coefficients(t, "skip") * x_t.double().numpy() + coefficients(t, "out") * raw
    np.testing.assert_allclose(denoiser(x_t, t, cond).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_one_step_student_output_is_about_half_its_raw_network():
    z = tensor(arrays(0, 2, 1, 8, 8))
    out = LinearEdm(output=1.0)(80 * z, torch.tensor([80.0, 80.0]), NO_CONDITION)
    assert out.mean().item() == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("kind", ["eps-labels", "eps-text", "eps-sdxl"])
def test_eps_denoiser_is_x0_of_its_network(kind):
    x_t, t, cond = inputs(kind)
    denoiser = tiny.denoiser(kind)
    eps = denoiser.body(x_t, t, cond).detach().double().numpy()
    expected = reference.vp_x0(x_t.double().numpy(), eps, t.numpy())
    np.testing.assert_allclose(denoiser(x_t, t, cond).detach().numpy(), expected, rtol=1e-12)


def test_x0_is_combined_in_float64():
    x_t, t = torch.full((1, 1, 1, 1), 0.3), torch.tensor([999])
    near, far = (LinearEps(output=v)(x_t, t, NO_CONDITION) for v in (1.0, 1.0 + 2**-23))
    assert near.dtype == torch.float64
    assert (near - far).item() == pytest.approx(reference.ABAR[999] ** -0.5 * (1 - reference.ABAR[999]) ** 0.5 * 2**-23)


def test_eps_gradient_is_scaled_by_minus_sigma_over_alpha():
    eps = torch.zeros(3, 1, 1, 1, requires_grad=True)
    LinearEps(output=eps)(torch.zeros(3, 1, 1, 1), torch.tensor([999, 399, 249]), NO_CONDITION).sum().backward()
    assert eps.grad.flatten().tolist() == pytest.approx([-14.61464123, -1.16057832, -0.69320490], rel=1e-6)


def test_eps_network_is_called_with_the_sample_unscaled_and_the_integer_step():
    x_t, t, _ = inputs("eps-text")
    sample, time = tiny.denoiser("eps-text").network_input(x_t, t)
    assert torch.equal(sample, x_t)
    assert torch.equal(time, t)


# Guidance.
class Recording(LinearEps):
    """Predicts the label of each sample as noise, and keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def body(self, x_t, t, cond):
        self.calls.append((x_t, t, cond.labels))
        return torch.zeros_like(x_t) + cond.labels.reshape(-1, 1, 1, 1)


def guided(scale):
    denoiser, x_t, t = Recording(), tensor(arrays(1, 2, 1, 2, 2)), torch.tensor([999, 399])
    cond, null = Condition(labels=torch.tensor([1, 3])), Condition(labels=torch.tensor([5, 5]))
    return denoiser, guide(denoiser, x_t, t, cond, null, scale), x_t, t


@pytest.mark.parametrize("scale", [1.0001, 1.75, 8.0])
def test_guidance_equals_u_plus_s_times_c_minus_u_of_the_noise(scale):
    _, x0, x_t, t = guided(scale)
    conditional, unconditional = reference.column([1, 3]), reference.column([5, 5])
    eps = reference.guided_eps(conditional, unconditional, scale) + np.zeros((2, 1, 2, 2))
    np.testing.assert_allclose(x0.numpy(), reference.vp_x0(x_t.double().numpy(), eps, t.numpy()), rtol=1e-12)


def test_guidance_doubles_the_batch_as_unconditional_then_conditional():
    denoiser, _, x_t, t = guided(2.0)
    ((sample, time, labels),) = denoiser.calls
    assert labels.tolist() == [5, 5, 1, 3]
    assert torch.equal(sample, torch.cat([x_t, x_t]))
    assert torch.equal(time, torch.cat([t, t]))


def test_guidance_of_exactly_1_runs_the_conditional_branch_alone():
    denoiser, x0, x_t, t = guided(1.0)
    assert [labels.tolist() for _, _, labels in denoiser.calls] == [[1, 3]]
    eps = reference.column([1, 3]) + np.zeros((2, 1, 2, 2))
    np.testing.assert_allclose(x0.numpy(), reference.vp_x0(x_t.double().numpy(), eps, t.numpy()), rtol=1e-12)


@pytest.mark.parametrize("kind", ["eps-labels", "eps-text", "eps-sdxl", "edm"])
def test_guidance_through_a_real_network_equals_two_separate_calls(kind):
    x_t, t, cond = inputs(kind)
    denoiser, null = tiny.denoiser(kind), tiny.null(kind).expand(3)
    u, c = denoiser(x_t, t, null).detach(), denoiser(x_t, t, cond).detach()
    got = guide(denoiser, x_t, t, cond, null, 3.0).detach()
    torch.testing.assert_close(got, u + 3 * (c - u), rtol=1e-4, atol=1e-4)


# Conditions.
def test_conditions_join_along_the_batch_and_leave_absent_fields_absent():
    both = tiny.condition("eps-sdxl", 2).join(tiny.condition("eps-sdxl", 3))
    assert (len(both.text), len(both.pooled), len(both.time_ids), both.labels) == (5, 5, 5, None)


def test_a_condition_of_one_sample_expands_to_a_batch():
    null = tiny.null("eps-sdxl").expand(3)
    assert (null.text.shape, null.pooled.shape, null.time_ids.shape) == ((3, 5, 8), (3, 6), (3, 6))


def test_casting_changes_embeddings_but_neither_labels_nor_sizes():
    cond = Condition(torch.tensor([1]), torch.ones(1, 2, 3), torch.ones(1, 2), torch.ones(1, 6)).cast(torch.bfloat16)
    assert (cond.text.dtype, cond.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (cond.labels.dtype, cond.time_ids.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("kind", ["edm", "eps-text", "eps-sdxl", "eps-labels"])
def test_the_condition_matters(kind):
    x_t, t, cond = inputs(kind)
    denoiser = tiny.denoiser(kind)
    assert not torch.allclose(denoiser(x_t, t, cond), denoiser(x_t, t, tiny.null(kind).expand(3)))


# Precision (2.1): which passes run under bfloat16 autocast.
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("kind", "precision", "with_gradient", "without"),
    [
        (EdmDenoiser, "bf16", True, True),
        (EpsDenoiser, "bf16", True, False),
        (EpsDenoiser, "bf16-all", True, True),
        (EdmDenoiser, "tf32", False, False),
        (EpsDenoiser, "fp32", False, False),
        (EdmDenoiser, SAMPLING["bf16"], True, True),  # a denoiser that only samples is bf16 in every pass
        (EpsDenoiser, SAMPLING["bf16"], True, True),
    ],
)
def test_which_passes_are_bf16_on_every_device(monkeypatch, kind, precision, with_gradient, without, device):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled: asked.append((*args, enabled)))
    denoiser, x_t = kind(torch.nn.Identity(), precision), SimpleNamespace(device=torch.device(device))
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            denoiser.autocast(x_t)
    assert asked == [(device, torch.bfloat16, with_gradient), (device, torch.bfloat16, without)]


def test_a_bf16_teacher_is_fed_bf16_and_returns_float64():
    x_t, t, cond = inputs("eps-text")
    teacher = tiny.denoiser("eps-text").eval()
    full = teacher(x_t, t, cond).detach()
    teacher.network.to(torch.bfloat16)
    assert teacher.network_input(x_t, t)[0].dtype == torch.bfloat16
    half = teacher(x_t, t, cond).detach()
    assert half.dtype == torch.float64
    assert 0 < (half - full)[0].abs().max() < 0.05
