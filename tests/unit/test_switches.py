"""Each switch of a run does what config.py says, and a weight of zero costs nothing."""

from itertools import combinations

import numpy as np
import pytest
import torch

from dmd2.method.step import critic_loss, student_loss, train_step
from dmd2.networks.schedules import KarrasSchedule
from tests import reference, tiny
from tests.draws import keeping
from tests.passes import kept_passes


def image(kind, seed=0):
    shape = (4, tiny.channels(kind), 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calls(m):
    """How often each network's first convolution, the head's and the student run from now on."""
    counts = dict.fromkeys(("student", "teacher", "critic", "head"), 0)

    def count(name):
        counts[name] += 1

    firsts = {name: getattr(m, name).network.conv_in for name in ("student", "teacher", "critic")}
    for name, module in (firsts | ({"head": m.head[0]} if m.head is not None else {})).items():
        module.register_forward_hook(lambda *_, name=name: count(name))
    return counts


def counted(it, **changes):
    cfg = tiny.config("edm", **changes)
    m = tiny.models("edm", cfg)
    counts = calls(m)
    logs = train_step(m, tiny.batches("edm", cfg).at(it), it, cfg)
    return counts, logs


NO_GAN = {"gan__lambda_g": 0.0, "gan__lambda_d": 0.0}


# Zero is off.
def test_full_method_evaluates_each_term_once():
    # critic: DM; generator's GAN; denoising with the discriminator's fake and real. head: generator, fake, real
    assert counted(0)[0] == {"student": 1, "teacher": 1, "critic": 3, "head": 3}


def test_critic_only_iteration_does_not_run_teacher_or_generator_terms():
    assert counted(1)[0] == {"student": 1, "teacher": 0, "critic": 1, "head": 2}


def test_without_dm_the_teacher_is_never_called():
    counts, logs = counted(0, dm__weight=0.0)
    assert (counts["teacher"], counts["critic"]) == (0, 2)
    assert "student/dm" not in logs


def test_without_gan_the_head_is_never_called():
    counts, logs = counted(0, **NO_GAN)
    assert counts == {"student": 1, "teacher": 1, "critic": 2, "head": 0}
    assert not {"student/gan", "critic/gan"} & set(logs)


def test_without_gan_a_present_head_stays_untouched():
    cfg, with_head = tiny.config("edm", **NO_GAN), tiny.models("edm", tiny.config("edm"))
    before = tiny.weights(with_head.head)
    train_step(with_head, tiny.batches("edm", cfg).at(0), 0, cfg)
    assert tiny.same(before, with_head.head)


def test_without_generator_gan_the_discriminator_still_trains():
    counts, logs = counted(0, gan__lambda_g=0.0)
    assert counts["head"] == 2
    assert "critic/gan" in logs


def test_without_denoising_the_critic_runs_for_the_discriminator_alone():
    counts, logs = counted(1, critic__denoise_weight=0.0)
    assert counts["critic"] == 1
    assert "critic/denoise" not in logs


def test_without_regression_no_second_student_pass():
    assert counted(0)[0]["student"] == 1
    assert counted(0, regression__weight=0.25)[0]["student"] == 2


# Weights.
def loss_of(**changes):
    cfg = tiny.config("edm", **{"regression__weight": 1.0, **changes})
    m, logs = tiny.models("edm", cfg), {}
    x = image("edm").requires_grad_()
    total = student_loss(m, tiny.GIVEN, x, tiny.one_batch("edm", cfg), cfg, logs)
    return total.item(), {name: value.item() for name, value in logs.items()}


def test_student_loss_is_the_weighted_sum_of_its_terms():
    total, logs = loss_of(dm__weight=2.0, gan__lambda_g=0.5, regression__weight=0.25)
    expected = 2 * logs["student/dm"] + 0.5 * logs["student/gan"] + 0.25 * logs["student/regression"]
    assert total == pytest.approx(expected, rel=1e-5)


def test_critic_loss_is_the_weighted_sum_of_its_terms():
    cfg = tiny.config("edm", critic__denoise_weight=3.0, gan__lambda_d=0.5)
    m, logs = tiny.models("edm", cfg), {}
    total = critic_loss(m, tiny.GIVEN[1], image("edm"), tiny.one_batch("edm", cfg), cfg, logs)
    assert total.item() == pytest.approx(3 * logs["critic/denoise"].item() + 0.5 * logs["critic/gan"].item(), rel=1e-5)


# Regression.
def test_regression_compares_the_students_image_of_a_pairs_noise_with_the_pairs_image():
    cfg = tiny.config("edm", regression__weight=1.0)
    m, batch = tiny.models("edm", cfg), tiny.one_batch("edm", cfg)
    noise, target, cond = batch.pairs
    expected = (m.student(80 * noise, torch.full((4,), 80.0), cond) - target).square().mean().item()
    assert loss_of()[1]["student/regression"] == pytest.approx(expected, rel=1e-5)


def test_regression_is_independent_of_the_dm_batch():
    cfg = tiny.config("edm", regression__weight=1.0)
    b = tiny.one_batch("edm", cfg)
    assert not torch.equal(b.pairs[0], keeping(b).draws.normal("student/noise", (1, 8, 8)))


# Noise levels and noise (2.1 to 2.3).
def kept_draws(kind="edm", it=0, **changes):
    cfg = tiny.config(kind, **changes)
    batch = keeping(tiny.one_batch(kind, cfg, it))
    train_step(tiny.models(kind, cfg), [batch], it, cfg)
    return batch.draws


def test_each_term_draws_levels_from_its_own_range():
    levels = {name: (low, high) for name, (low, high, _) in kept_draws().levels.items()}
    assert levels == {
        "dm/level": (20, 980), "critic/level": (0, 999), "gan/generator/level": (0, 999), "gan/fake/level": (0, 999),
        "gan/real/level": (0, 999),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["edm", "eps-text"])
def test_terms_draw_their_noise_independently(kind):
    draws = kept_draws(kind, optim__batch=64)
    assert len(draws.normals) == 6  # student, dm, critic, generator's GAN, fake, real
    for a, b in combinations(draws.normals.values(), 2):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 0.05


def test_terms_draw_their_levels_independently():
    levels = [drawn.tolist() for _, _, drawn in kept_draws(optim__batch=64).levels.values()]
    assert all(a != b for a, b in combinations(levels, 2))


@pytest.mark.parametrize("index", [20, 980])
def test_dm_index_range_is_inclusive(index):
    cfg = tiny.config("edm", dm__index_range=[index, index])
    m, times = tiny.models("edm", cfg), []
    m.teacher.register_forward_hook(lambda module, args, out: times.extend(args[1].tolist()))
    train_step(m, tiny.batches("edm", cfg).at(0), 0, cfg)
    assert times == [float(KarrasSchedule().sigmas[index])] * 4


def features_called(kind, **changes):
    """Image and time that the head's network was given in the generator's turn, with the student image."""
    cfg = tiny.config(kind, dm__weight=0.0, **changes)
    x = image(kind)
    with kept_passes() as kept:
        student_loss(tiny.models(kind, cfg), tiny.GIVEN, x, tiny.one_batch(kind, cfg), cfg, {})
    ((one, _),) = kept
    assert one.features
    return x, one.x_t, one.t


@pytest.mark.parametrize(("kind", "time"), [("edm", float(KarrasSchedule().sigmas[0])), ("eps-text", 0)])
def test_noise_range_null_classifies_clean_images_at_time_index_0(kind, time):
    x, x_t, t = features_called(kind, gan__noise_range=None)
    assert torch.equal(x, x_t)
    assert t.tolist() == [time] * 4


def test_noise_range_bounds_the_levels_the_head_sees():
    _, _, t = features_called("eps-text", gan__noise_range=[7, 7])
    assert t.tolist() == [7] * 4


def test_gan_images_are_diffused_by_the_forward_process():
    x, x_t, t = features_called("eps-text")
    alpha = np.sqrt(reference.column(reference.ABAR[t.numpy()]))
    noise = (x_t.numpy() - alpha * x.numpy()) / np.sqrt(1 - alpha**2)
    assert noise.std() == pytest.approx(1, abs=0.15)
    assert len(set(t.tolist())) > 1


# Where the features come from.
def test_features_from_teacher_leaves_the_critic_out_of_the_gan():
    counts, _ = counted(1, gan__features_from="teacher")
    assert (counts["teacher"], counts["critic"], counts["head"]) == (1, 1, 2)


def test_features_from_teacher_trains_the_head_and_moves_the_image():
    cfg = tiny.config("edm", gan__features_from="teacher", critic__denoise_weight=0.0, dm__weight=0.0)
    m, batch, x = tiny.models("edm", cfg), tiny.one_batch("edm", cfg), image("edm").requires_grad_()
    critic_loss(m, tiny.GIVEN[1], x.detach(), batch, cfg, {}).backward()
    assert list(tiny.gradients(m.head))
    assert not list(tiny.gradients(m.critic, m.teacher))
    student_loss(m, tiny.GIVEN, x, batch, cfg, {}).backward()
    assert x.grad.abs().max() > 0


# The discriminator's two sides.
def clean_discriminator(**changes):
    """Discriminator loss on clean images, with the logit of each image by what the image is."""
    cfg = tiny.config("edm", gan__noise_range=None, critic__denoise_weight=0.0, **changes)
    m, batch, fake, logits, logs = tiny.models("edm", cfg), tiny.one_batch("edm", cfg), image("edm"), {}, {}
    with kept_passes() as kept:
        critic_loss(m, tiny.GIVEN[1], fake, batch, cfg, logs)
    for one, features in kept:
        side = next(name for name, x in (("fake", fake), ("real", batch.real[0])) if torch.equal(x, one.x_t))
        labels = {"fake": batch.cond.labels, "real": batch.real[1].labels}[side]
        assert torch.equal(one.cond.labels, labels)
        logits[side] = m.head(features).detach().double().numpy()
    return logits, logs


def test_discriminator_wants_high_logits_of_real_and_low_ones_of_student_images():
    logits, logs = clean_discriminator()
    expected = reference.discriminator_loss(logits["fake"], logits["real"])
    assert logs["critic/gan"].item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(reference.discriminator_loss(logits["real"], logits["fake"]), rel=1e-3)


def test_logged_probabilities_are_those_of_real_and_student_images():
    logits, logs = clean_discriminator()
    for side in ("real", "fake"):
        assert logs[f"gan/p_{side}"].item() == pytest.approx((1 / (1 + np.exp(-logits[side]))).mean(), rel=1e-5)


def test_training_the_discriminator_alone_tells_real_from_student_images():
    cfg = tiny.config("edm", critic__ratio=1000, gan__lambda_d=1.0, gan__noise_range=[0, 400], optim__batch=16)
    m, b = tiny.models("edm", cfg), tiny.batches("edm", cfg)
    for it in range(1, 40):
        logs = train_step(m, b.at(it), it, cfg)
    assert logs["gan/p_real"] > 0.6 > 0.4 > logs["gan/p_fake"]
