"""FastGen's differences from the official recipe, each switch by itself: shared noise, exclusive turns, levels, labels, clip."""

import json

import pytest
import torch

from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import digest
from dmd2.method.objectives.gan import generator_gan_loss
from dmd2.method.step import critic_loss, student_loss, train_step
from dmd2.method.student_input import student_input
from dmd2.networks.schedules import KarrasSchedule, VPSchedule, add_noise
from dmd2.training.trainer import Training
from tests import tiny
from tests.draws import keeping
from tests.passes import kept_passes
from tests.unit.test_trainer import inputs, workspace  # noqa: F401

ONE_RANGE = {"dm__index_range": [2, 998], "critic__index_range": [2, 998], "gan__noise_range": [2, 998]}
SHARED = {"gan__shares_noise": True, **ONE_RANGE}
EXCLUSIVE = {"critic__shares_iteration": False}
NO_GAN = {"gan__lambda_g": 0.0, "gan__lambda_d": 0.0}
NO_DM = {"dm__weight": 0.0}
# Later than the recorded runs: at these values a config is what it was before they came.
LATER = {
    "generator.conditions": ("drawn", "real"), "critic.index_range": ([0, 999], [2, 998]),
    "critic.logit_normal": (None, [0.0, 1.0]), "dm.logit_normal": (None, [0.0, 1.0]), "gan.shares_noise": (False, True), "optim.clip_critic": (True, False),
}  # fmt: skip


def image(kind):
    return torch.randn(4, tiny.channels(kind), 8, 8, generator=torch.Generator().manual_seed(0))


def noised_inputs(kind, turn, **changes):
    """Noised images and times by who was given them in a turn: teacher and critic whole, and each pass for features."""
    cfg = tiny.config(kind, **changes)
    with kept_passes() as kept:
        given = tiny.GIVEN if turn is student_loss else tiny.GIVEN[1]
        turn(tiny.models(kind, cfg), given, image(kind), tiny.one_batch(kind, cfg), cfg, {})
    given = {one.network: (one.x_t, one.t) for one, _ in kept if not one.features}
    return {**given, "features": [(one.x_t, one.t) for one, _ in kept if one.features]}


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# Shared noise.
@pytest.mark.parametrize("source", ["critic", "teacher"])
@pytest.mark.parametrize("kind", ["edm", "eps-text"])
def test_students_gan_term_judges_the_very_sample_that_dm_noised(kind, source):
    given = noised_inputs(kind, student_loss, **SHARED, gan__features_from=source)
    (features,) = given["features"]
    assert same(features, given["teacher"])
    assert same(features, given["critic"])


@pytest.mark.parametrize("kind", ["edm", "eps-text"])
def test_discriminator_judges_the_student_images_that_the_critic_denoises_and_real_ones_apart(kind):
    given = noised_inputs(kind, critic_loss, **SHARED)
    fake, real = given["features"]
    assert same(fake, given["critic"])
    assert not torch.equal(real[1], fake[1])


@pytest.mark.parametrize("turn", [student_loss, critic_loss])
def test_without_the_switch_every_term_has_a_sample_of_its_own_even_on_one_range(turn):
    given = noised_inputs("edm", turn, **ONE_RANGE)
    times = [t.tolist() for _, t in [given["critic"], *given["features"]]]
    assert len({tuple(t) for t in times}) == len(times)


def test_shared_noise_draws_nothing_for_the_gan_but_the_real_images_noise():
    cfg = tiny.config("edm", **SHARED)
    batch = keeping(tiny.one_batch("edm", cfg))
    train_step(tiny.models("edm", cfg), [batch], 0, cfg)
    assert set(batch.draws.normals) == {"student/noise", "dm/noise", "critic/noise", "gan/real/noise"}
    assert set(batch.draws.levels) == {"dm/level", "critic/level", "gan/real/level"}


def image_gradient(**changes):
    cfg = tiny.config("edm", **{"gan__lambda_g": 0.5, **SHARED, **changes})
    m, x = tiny.models("edm", cfg), image("edm").requires_grad_()
    student_loss(m, tiny.GIVEN, x, tiny.one_batch("edm", cfg), cfg, {}).backward()
    return x.grad


def test_gradient_of_the_shared_sample_is_that_of_the_gan_loss_at_the_noise_of_dm():
    cfg = tiny.config("edm", **SHARED)
    m, batch, x = tiny.models("edm", cfg), tiny.one_batch("edm", cfg), image("edm").requires_grad_()
    t = KarrasSchedule().time(batch.draws.integers("dm/level", 2, 998))
    x_t = add_noise(KarrasSchedule(), x, batch.draws.normal("dm/noise", (1, 8, 8)), t)
    generator_gan_loss(m.head(m.critic.features(x_t, t, batch.cond))).backward()
    torch.testing.assert_close(image_gradient(dm__weight=0.0), 0.5 * x.grad, rtol=1e-4, atol=1e-8)


def test_gradients_of_dm_and_gan_add_up_on_the_shared_sample():
    both, dm, gan = (image_gradient(**changes) for changes in ({}, NO_GAN, NO_DM))
    torch.testing.assert_close(both, dm + gan, rtol=1e-4, atol=1e-8)


# Exclusive turns, counted from 1.
def updated(iterations, ratio=5, **changes):
    """For each iteration, which of student, critic and head have other weights after it."""
    cfg = tiny.config("edm", critic__ratio=ratio, **changes)
    m, b, done = tiny.models("edm", cfg), tiny.batches("edm", cfg), []
    for it in range(iterations):
        before = {name: tiny.weights(getattr(m, name)) for name in ("student", "critic", "head")}
        train_step(m, b.at(it), it, cfg)
        done.append({name for name, state in before.items() if not tiny.same(state, getattr(m, name))})
    return done


def test_exclusive_turns_begin_with_the_critic_and_move_nobody_else():
    assert updated(6, 3, **EXCLUSIVE) == [{"critic", "head"}, {"critic", "head"}, {"student"}] * 2


def test_on_teacher_features_the_discriminator_moves_the_head_alone():
    changes = {"gan__features_from": "teacher", "critic__denoise_weight": 0.0, **EXCLUSIVE}
    assert updated(2, 2, **changes) == [{"head"}, {"student"}]


def test_student_runs_with_gradient_in_its_exclusive_turn_alone():
    cfg, grad = tiny.config("edm", critic__ratio=3, **EXCLUSIVE), []
    m = tiny.models("edm", cfg)
    m.student.register_forward_hook(lambda *_: grad.append(torch.is_grad_enabled()))
    for it in range(6):
        train_step(m, tiny.batches("edm", cfg).at(it), it, cfg)
    assert grad == [False, False, True] * 2


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("ratio", [2, 3, 5])
def test_count_of_student_updates_is_that_of_the_turns(ratio, shares):
    critic = tiny.config("edm", critic__ratio=ratio, critic__shares_iteration=shares).critic
    turns = [critic.turns(it) for it in range(12)]
    assert [critic.student_updates(n) for n in range(13)] == [sum(s for s, _ in turns[:n]) for n in range(13)]
    assert all(student != critic for student, critic in turns) or shares


def test_record_and_average_follow_the_exclusive_turns(inputs):  # noqa: F811
    every = {"train__snapshot_every": 5, "train__checkpoint_every": 5, "train__log_every": 1}
    cfg = tiny.config("edm", critic__ratio=3, train__steps=5, optim__ema=0.9, **every, **EXCLUSIVE)
    training, averaged = Training(RunId("tiny", "exclusive", 0), cfg, Hardware(), inputs), []
    original = training.iterate

    def iterate():
        before = tiny.weights(training.ema)
        original()
        averaged.append(not tiny.same(before, training.ema))

    training.iterate = iterate
    record = json.loads(training.run().read_text())
    assert averaged == [False, False, True, False, False]
    assert (record["steps"], record["student_updates"]) == (5, 1)


# One distribution of levels.
@pytest.mark.parametrize("index", [2, 998])
@pytest.mark.parametrize("kind", ["edm", "eps-text"])
def test_critic_denoises_within_its_inclusive_index_range(kind, index):
    given = noised_inputs(kind, critic_loss, critic__index_range=[index, index], **NO_GAN)
    schedule = KarrasSchedule() if kind == "edm" else VPSchedule()
    assert given["critic"][1].tolist() == [schedule.time(torch.tensor(index)).item()] * 4


# Conditions of the real batch.
@pytest.mark.parametrize(("kind", "field"), [("edm", "labels"), ("eps-text", "text")])
def test_student_is_conditioned_as_the_real_batch(kind, field):
    cfg = tiny.config(kind, optim__batch=16, generator__conditions="real")
    batch = tiny.one_batch(kind, cfg)
    assert torch.equal(getattr(batch.cond, field), getattr(batch.real[1], field))


def test_the_real_batch_is_the_one_that_drawn_conditions_leave_it():
    drawn, real = (tiny.one_batch("edm", tiny.config("edm", generator__conditions=c)) for c in ("drawn", "real"))
    assert torch.equal(drawn.real[0], real.real[0])
    assert not torch.equal(drawn.cond.labels, real.cond.labels)


def test_several_steps_start_from_the_real_images_that_the_gan_sees():
    cfg = tiny.config("edm", generator={"input": "noised_real", "steps": 4, "time": 80.0, "conditions": "real"})
    batch = tiny.one_batch("edm", cfg)
    assert torch.equal(batch.source, batch.real[0])


def test_conditions_of_real_images_need_the_real_set_without_a_gan_too():
    cfg = tiny.config("edm", generator__conditions="real", **NO_GAN)
    assert cfg.needs_real
    batch, labels = tiny.one_batch("edm", cfg), tiny.tensors("edm", 32, seed=9)["labels"]
    assert torch.equal(batch.cond.labels, labels[batch.draws.shuffled("gan/real", 32)]) and batch.real is None


@pytest.mark.parametrize("micro_batch", [5, 16])
def test_micro_batches_have_the_labels_of_their_own_real_images(micro_batch):
    cfg = tiny.config("edm", optim__batch=16, generator__conditions="real")
    parts = list(tiny.batches("edm", cfg, micro_batch).at(3))
    assert torch.equal(torch.cat([p.cond.labels for p in parts]), tiny.one_batch("edm", cfg, 3).real[1].labels)


@pytest.mark.parametrize(("kind", "time"), [("edm", 80.0), ("eps-labels", 999.0), ("flow-sd3", 1.0)])
def test_one_step_from_noised_real_images_is_one_from_noise(kind, time):
    made = []
    for mode in ("noise", "noised_real"):
        cfg = tiny.config(kind, generator={"input": mode, "steps": 1, "time": time})
        made.append(
            student_input(tiny.denoiser(kind), tiny.one_batch(kind, cfg), cfg.generator, (tiny.channels(kind), 8, 8))
        )
    assert same(*made)


# Clipping of the student alone.
def first_moments(clip, clip_critic):
    """Norm of AdamW's first moments after one iteration, a tenth of the gradient's that it was given, and the logs."""
    cfg = tiny.config("edm", optim__clip=clip, optim__clip_critic=clip_critic)
    m = tiny.models("edm", cfg)
    logs = train_step(m, tiny.batches("edm", cfg).at(0), 0, cfg)
    norms = {}
    for name in ("student", "critic"):
        state = getattr(m, f"{name}_optimiser").adamw.state
        norms[name] = torch.cat([s["exp_avg"].flatten() for s in state.values()]).norm().item()
    return norms, logs


def test_clip_critic_false_clips_the_student_alone():
    clipped, _ = first_moments(1e-3, clip_critic=True)
    student_only, logs = first_moments(1e-3, clip_critic=False)
    assert clipped == pytest.approx({"student": 1e-4, "critic": 1e-4}, rel=1e-2)
    assert student_only["student"] == clipped["student"]
    assert student_only["critic"] == pytest.approx(logs["critic/grad_norm"].item() / 10, rel=1e-4)


# Nothing recorded changes.
def with_key(key, value):
    ranges = ONE_RANGE if key == "gan.shares_noise" else {}  # which that switch needs
    return tiny.config("edm", **ranges | {key.replace(".", "__"): value}), tiny.config("edm", **ranges)


@pytest.mark.parametrize("key", LATER)
def test_a_later_switch_at_the_official_value_is_left_out_of_digests(key):
    official, _ = LATER[key]
    section, name = key.split(".")
    named, plain = with_key(key, official)
    assert named == plain
    assert digest(named) == digest(plain)
    assert tiny.config("edm").model_dump(mode="json")[section][name] == official


@pytest.mark.parametrize("key", LATER)
def test_a_later_switch_that_is_used_changes_the_digest_and_the_record(key):
    section, name = key.split(".")
    used, plain = with_key(key, LATER[key][1])
    assert digest(used) != digest(plain)
    assert used.model_dump(mode="json")[section][name] == LATER[key][1]
