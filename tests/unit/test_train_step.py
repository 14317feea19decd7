"""One iteration of the algorithm on tiny real networks: who is updated, when, on which images, with which gradient."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dmd2.method.step
from dmd2.method.objectives import distribution_matching
from dmd2.method.step import critic_loss, student_loss, train_step
from tests import reference, tiny
from tests.draws import keeping
from tests.passes import kept_passes

KINDS = ["edm", "edm-attention", "eps-labels", "eps-text", "eps-sdxl", "flow-sd3"]


def train(kind, iterations, cfg=None, m=None):
    cfg = cfg or tiny.config(kind)
    m, b = m or tiny.models(kind, cfg), tiny.batches(kind, cfg)
    for it in range(iterations):
        train_step(m, b.at(it), it, cfg)
    return m


def count_steps(optimiser):
    """Learning rates of the AdamW steps an optimiser makes from now on."""
    rates = []
    optimiser.adamw.register_step_pre_hook(lambda adamw, *_: rates.append(adamw.param_groups[0]["lr"]))
    return rates


def dm_pass(kind, **changes):
    """Student loss of a leaf image, with what teacher and critic returned inside."""
    cfg = tiny.config(kind, gan__lambda_g=0.0, gan__lambda_d=0.0, **changes)
    m, batch = tiny.models(kind, cfg), keeping(tiny.one_batch(kind, cfg))
    seen = SimpleNamespace(m=m, cfg=cfg, draws=batch.draws)
    for name in ("teacher", "critic"):
        getattr(m, name).register_forward_hook(lambda module, args, out, name=name: setattr(seen, name, (args, out)))
    seen.x = torch.randn(4, tiny.channels(kind), 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen.loss = student_loss(m, tiny.GIVEN, seen.x, batch, cfg, {})
    seen.loss.backward()
    return seen


# Distribution matching inside an iteration (2.1).
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_dm_loss_is_g_over_n(kind):
    seen = dm_pass(kind)
    x, real, fake = (v.detach().double().numpy() for v in (seen.x, seen.teacher[1], seen.critic[1]))
    expected = reference.dm_gradient(x, real, fake) / x.size
    np.testing.assert_allclose(seen.x.grad.numpy(), expected, rtol=1e-3, atol=1e-7)
    assert seen.loss.item() == pytest.approx(reference.dm_loss(x, real, fake), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_and_critic_judge_the_same_noised_image_at_the_same_time(kind):
    seen = dm_pass(kind)
    (x_t, t, cond), (critic_x_t, critic_t, critic_cond) = seen.teacher[0], seen.critic[0]
    assert torch.equal(x_t, critic_x_t)
    assert torch.equal(t, critic_t)
    assert cond is critic_cond


def test_dm_noises_the_image_by_the_forward_process():
    seen = dm_pass("eps-text")
    _, _, t = seen.draws.levels["dm/level"]
    noise, x = seen.draws.normals["dm/noise"].double().numpy(), seen.x.detach().double().numpy()
    np.testing.assert_allclose(seen.teacher[0][0].numpy(), reference.vp_noised(x, noise, t.numpy()), atol=1e-6)


@pytest.mark.parametrize("kind", ["eps-text", "eps-sdxl"])
def test_vp_predictions_are_compared_in_float64(kind, monkeypatch):
    dtypes, original = [], distribution_matching.distribution_matching_gradient

    def spy(x, real, fake, *rest):
        dtypes.extend((real.dtype, fake.dtype))
        return original(x, real, fake, *rest)

    monkeypatch.setattr(distribution_matching, "distribution_matching_gradient", spy)
    dm_pass(kind)
    assert set(dtypes) == {torch.float64}


@pytest.mark.parametrize("kind", ["eps-text", "eps-sdxl", "eps-labels"])
def test_only_the_teacher_is_guided(kind):
    seen = dm_pass(kind, teacher__guidance=8.0)
    assert len(seen.teacher[0][0]) == 8
    assert len(seen.critic[0][0]) == 4
    x, both, fake = (v.detach().double().numpy() for v in (seen.x, seen.teacher[1], seen.critic[1]))
    real = both[:4] + 8 * (both[4:] - both[:4])
    np.testing.assert_allclose(seen.x.grad.numpy(), reference.dm_gradient(x, real, fake) / x.size, rtol=1e-3, atol=1e-7)


# Gradient routing (2.3.4).
@pytest.mark.parametrize("kind", KINDS)
def test_generator_turn_stores_no_gradient_on_critic_head_or_teacher(kind):
    cfg = tiny.config(kind, regression__weight=0.5)
    m, batch = tiny.models(kind, cfg), tiny.one_batch(kind, cfg)
    x = m.student(torch.randn(4, tiny.channels(kind), 8, 8), torch.full((4,), cfg.generator.time), batch.cond).float()
    student_loss(m, tiny.GIVEN, x, batch, cfg, {}).backward()
    assert not list(tiny.gradients(m.critic, m.head, m.teacher))
    assert list(tiny.gradients(m.student))


@pytest.mark.parametrize("kind", KINDS)
def test_generator_turn_leaves_critic_and_head_trainable(kind):
    cfg = tiny.config(kind)
    m = train(kind, 1, cfg)
    assert all(p.requires_grad for module in (m.critic, m.head) for p in module.parameters())
    assert not any(p.requires_grad for p in m.teacher.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_critic_turn_stores_no_gradient_on_the_student_or_teacher(kind):
    cfg = tiny.config(kind)
    m, batch = tiny.models(kind, cfg), tiny.one_batch(kind, cfg)
    x = m.student(torch.randn(4, tiny.channels(kind), 8, 8), torch.full((4,), cfg.generator.time), batch.cond).float()
    critic_loss(m, tiny.GIVEN[1], x.detach(), batch, cfg, {}).backward()
    assert not list(tiny.gradients(m.student, m.teacher))
    assert list(tiny.gradients(m.head))


def test_gan_gradient_reaches_the_image_through_head_and_critic_encoder():
    cfg = tiny.config("edm", dm__weight=0.0)
    m, batch = tiny.models("edm", cfg), tiny.one_batch("edm", cfg)
    x = torch.zeros(4, 1, 8, 8, requires_grad=True)
    student_loss(m, tiny.GIVEN, x, batch, cfg, {}).backward()
    assert (x.grad != 0).flatten(1).any(dim=1).all()


def test_discriminator_trains_the_critics_encoder_but_not_its_decoder():
    cfg = tiny.config("edm", critic__denoise_weight=0.0)
    m, batch = tiny.models("edm", cfg), tiny.one_batch("edm", cfg)
    critic_loss(m, tiny.GIVEN[1], torch.zeros(4, 1, 8, 8), batch, cfg, {}).backward()
    assert list(tiny.gradients(m.critic.network.down_blocks))
    assert not list(tiny.gradients(m.critic.network.up_blocks))


# Turns and counts (3.1).
@pytest.mark.parametrize("kind", KINDS)
def test_ratio_5_and_20_iterations_are_4_student_and_20_critic_steps(kind):
    cfg = tiny.config(kind, optim__warmup=10)
    m = tiny.models(kind, cfg)
    student, critic = count_steps(m.student_optimiser), count_steps(m.critic_optimiser)
    train(kind, 20, cfg, m)
    assert (len(student), len(critic)) == (4, 20)
    assert student[0] == critic[0] == 0.0


def test_students_warm_up_counts_iterations_and_not_its_own_updates():
    cfg = tiny.config("edm", optim__warmup=10, optim__lr=1.0e-3)
    m = tiny.models("edm", cfg)
    rates = count_steps(m.student_optimiser)
    train("edm", 16, cfg, m)
    assert rates == pytest.approx([0.0, 0.5e-3, 1e-3, 1e-3])


def test_student_is_updated_in_iterations_divisible_by_the_ratio():
    cfg = tiny.config("edm", critic__ratio=3)
    m, b, changed = tiny.models("edm", cfg), tiny.batches("edm", cfg), []
    for it in range(7):
        before = tiny.weights(m.student)
        train_step(m, b.at(it), it, cfg)
        changed.append(not tiny.same(before, m.student))
    assert changed == [True, False, False, True, False, False, True]


def test_student_runs_without_gradient_when_it_is_not_updated():
    cfg, grad = tiny.config("edm"), []
    m = tiny.models("edm", cfg)
    m.student.register_forward_hook(lambda *_: grad.append(torch.is_grad_enabled()))
    train("edm", 6, cfg, m)
    assert grad == [True, False, False, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_is_bit_identical_after_training(kind):
    m = tiny.models(kind, tiny.config(kind))
    before = tiny.weights(m.teacher)
    train(kind, 6, m=m)
    assert tiny.same(before, m.teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_student_critic_and_head_are_all_trained(kind):
    m = tiny.models(kind, tiny.config(kind))
    before = {name: tiny.weights(getattr(m, name)) for name in ("student", "critic", "head")}
    train(kind, 2, m=m)
    assert not any(tiny.same(state, getattr(m, name)) for name, state in before.items())


def test_no_gradient_is_left_after_an_iteration():
    m = train("edm", 2)
    assert not list(tiny.gradients(m.student, m.critic, m.head, m.teacher))


# One forward, shared by both turns.
def images_seen(kind, cfg, it, monkeypatch):
    """Student outputs of an iteration, and the images that critic denoising and discriminator were given."""
    m, made, given = tiny.models(kind, cfg), [], []
    m.student.register_forward_hook(lambda module, args, out: made.append(out.detach().float()))
    original = dmd2.method.step.critic_loss

    def spy(m, start, x, batch, cfg, logs):
        given.append(x)
        return original(m, start, x, batch, cfg, logs)

    monkeypatch.setattr(dmd2.method.step, "critic_loss", spy)
    train_step(m, tiny.batches(kind, cfg, 2).at(it), it, cfg)
    return made, given


@pytest.mark.parametrize("it", [0, 1])
@pytest.mark.parametrize("kind", ["edm", "eps-sdxl"])
def test_critic_sees_exactly_the_tensor_the_student_made_in_this_iteration(kind, it, monkeypatch):
    made, given = images_seen(kind, tiny.config(kind), it, monkeypatch)
    assert len(made) == len(given) == 2
    assert all(torch.equal(x, y) for x, y in zip(made, given, strict=True))
    assert not any(x.requires_grad for x in given)


def test_critic_is_conditioned_as_the_student_was():
    cfg = tiny.config("eps-text")
    m, made_for = tiny.models("eps-text", cfg), []
    m.student.register_forward_hook(lambda module, args, out: made_for.append(args[2].text))
    with kept_passes() as kept:
        train_step(m, tiny.batches("eps-text", cfg).at(0), 0, cfg)
    conditions = [one.cond.text for one, _ in kept if not one.features]
    assert len(conditions) == 3 and all(torch.equal(made_for[0], text) for text in conditions)
