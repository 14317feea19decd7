"""The methods after DMD2 inside an iteration, beside float64 NumPy written from their formulas."""

import numpy as np
import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.core.rng import Draws
from dmd2.experiment.cluster import Hardware
from dmd2.method.objectives.divergence import divergence_weights
from dmd2.method.step import student_loss, train_step
from dmd2.networks.lora import add_lora, merged_state
from dmd2.networks.schedules import FlowSchedule, KarrasSchedule, VPSchedule, move
from dmd2.training.execution import refuse
from tests import reference, tiny
from tests.passes import kept_passes

NO_GAN = {"gan__lambda_g": 0.0, "gan__lambda_d": 0.0}
GUIDED = {"eps-text": 3.0, "flow-sd3": 2.0}
KINDS = ["eps-text", "flow-sd3"]


def kept_turn(kind, at=0.5, **changes):
    """The student's turn: its images with their gradient, the loss, the log, and NumPy arrays of all passes."""
    cfg = tiny.config(kind, **{**NO_GAN, **changes})
    m, batch = tiny.models(kind, cfg), tiny.one_batch(kind, cfg)
    torch.manual_seed(0)
    shape = (4, tiny.channels(kind), 8, 8)
    x, t = torch.randn(shape).requires_grad_(), m.student.schedule.time(torch.full((4,), int(999 * at)))
    given, logs = (torch.randn(shape), t), {}
    with kept_passes() as kept:
        loss = student_loss(m, given, x, batch, cfg, logs)
    loss.backward()
    passes = [(one, result.detach().double().numpy()) for one, result in kept]
    return m, given, x, loss, logs, passes


def arrays(*values):
    return [value.detach().double().numpy() for value in values]


def level(one, schedule):
    alpha, sigma = schedule.alpha_sigma(one.t, torch.float64)
    return reference.column(alpha.numpy()), reference.column(sigma.numpy())


# Decoupled distribution matching.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renoise", ["shared", "full", "constrained", "hybrid"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_decoupled_gradient(kind, renoise, weights):
    scale = GUIDED[kind]
    parts = {"dm__matching": weights[0], "dm__augmentation": weights[1], "dm__renoise": renoise}
    m, _, x, loss, _, passes = kept_turn(kind, teacher__guidance=scale, dm__objective="decoupled", **parts)
    (at_dm, cond), (critic, fake), (at_ca, uncond), *apart = passes
    (at_cond, with_cond) = apart[0] if apart else (at_dm, cond)
    assert (at_dm.network, critic.network, at_ca.network) == ("teacher", "critic", "teacher")
    assert torch.equal(at_dm.x_t, critic.x_t) and torch.equal(at_ca.x_t, at_cond.x_t)
    assert torch.equal(at_dm.t, at_ca.t) == (renoise == "shared")
    excess = (scale - 1) * (with_cond - uncond)
    (images,) = arrays(x)
    normaliser = reference.column(np.abs(images - cond - excess).mean(axis=(1, 2, 3)))
    g = (weights[0] * (fake - cond) - weights[1] * excess) / normaliser
    assert loss.item() == pytest.approx(0.5 * (g**2).mean(), rel=1e-4)
    np.testing.assert_allclose(x.grad.numpy(), g / images.size, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_decoupled_at_shared_levels_is_the_guided_gradient(kind):
    found = [
        kept_turn(kind, teacher__guidance=GUIDED[kind], dm__objective=objective)[2].grad
        for objective in ("dmd", "decoupled")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("renoise", "matched", "augmented"), [("constrained", True, True), ("hybrid", False, True)])
def test_constrained_levels_are_at_most_the_students_own(renoise, matched, augmented):
    changes = {"teacher__guidance": 2.0, "dm__objective": "decoupled", "dm__renoise": renoise}
    _, (_, t), *_, passes = kept_turn("flow-sd3", at=0.1, **changes)
    at_dm, at_ca = passes[0][0], passes[2][0]
    assert bool((at_dm.t <= t).all()) == matched and bool((at_ca.t <= t).all()) == augmented
    *_, free = kept_turn("flow-sd3", at=0.1, **{**changes, "dm__renoise": "full"})
    assert not (free[0][0].t <= t).all() and not (free[2][0].t <= t).all()


# Intra-segment guidance.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0.75, 0.25])
def test_intra_segment_loss(kind, at):
    steps = {"input": "backward_simulation", "steps": 4, "time": 999.0 if kind == "eps-text" else 1.0, "isg": 1.0}
    changes = {"dm__weight": 0.0, "teacher__guidance": GUIDED[kind]}
    m, (x_i, t_i), x, loss, logs, passes = kept_turn(kind, at, generator=steps, **changes)
    (teacher, real), (student, mine) = [one for one in passes if one[0].network == "teacher" or not one[0].gradient]
    assert teacher.guidance == GUIDED[kind] and student.network == "student" and torch.equal(teacher.x_t, x_i)
    schedule, end = m.teacher.schedule, max(int(999 * at) - 250, 0)
    index = schedule.index_of_time(student.t)
    assert ((index >= end + 50) & (index <= int(999 * at) - 50)).all()
    a_i, s_i = level(teacher, schedule)
    a_mid, s_mid = level(student, schedule)
    a_p, s_p = (v.double().numpy() for v in schedule.alpha_sigma(schedule.time(torch.tensor([end])), torch.float64))
    start, images = arrays(x_i, x)
    x_mid = a_mid * real + s_mid * (start - a_i * real) / s_i
    np.testing.assert_allclose(student.x_t.numpy(), x_mid, atol=1e-4)
    target = a_p * mine + s_p * (x_mid - a_mid * mine) / s_mid
    made = a_p * images + s_p * (start - a_i * images) / s_i
    expected = (np.sqrt((made - target) ** 2 + 1e-6) - 1e-3).mean()
    assert logs["student/isg"].item() == pytest.approx(expected, rel=1e-4)
    assert not any(p.grad is not None for p in m.student.parameters())  # its own later pass is a target


def test_intra_segment_guidance_has_scales_of_its_own():
    steps = {"input": "backward_simulation", "steps": 4, "time": 1.0, "isg": 1.0, "isg_guidance": [2.0, 4.0]}
    *_, passes = kept_turn("flow-sd3", 0.75, generator=steps, teacher__guidance=5.0)
    distribution, within = (one.guidance for one, _ in passes if one.guided)
    assert distribution == 5.0 and within.shape == (4, 1, 1, 1)
    assert ((within >= 2) & (within <= 4)).all() and within.unique().numel() == 4


@pytest.mark.parametrize(
    ("kind", "time", "following"), [("edm", 40.0, 749), ("eps-text", 800.0, 749), ("edm", 80.0, 749)]
)
def test_a_first_step_may_begin_below_the_top_of_the_grid(kind, time, following):
    """The level that ends it is the student's own next one."""
    steps = {"input": "noised_real", "steps": 4, "time": time, "isg": 1.0}
    cfg = tiny.config(kind, **NO_GAN, generator=steps)
    m, batch = tiny.models(kind, cfg), tiny.one_batch(kind, cfg)
    schedule = m.student.schedule
    x, t = torch.randn(4, tiny.channels(kind), 8, 8), torch.full((4,), time)
    with kept_passes() as kept:
        student_loss(m, (x, t), x.clone().requires_grad_(), batch, cfg, {})
    (middle,) = [schedule.index_of_time(one.t) for one, _ in kept if one.network == "student"]
    start, next_time = int(schedule.index_of_time(t)[0]), schedule.step_times(4, time)[1]
    assert int(schedule.index_of_time(torch.tensor([next_time]))) == following
    margin = min(50, (start - following) // 2)
    assert ((middle >= following + margin) & (middle <= start - margin)).all()


def test_a_straight_field_needs_no_guidance_within_a_step():
    """On a constant velocity every way from a level to another ends alike."""
    schedule = FlowSchedule(3.0)
    x, v = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    times = [torch.full((2,), t) for t in (0.9, 0.6, 0.1)]

    def step(x, t, to):
        return move(schedule, x, x - t[0] * v, t, to)

    torch.testing.assert_close(step(step(x, *times[:2]), *times[1:]), step(x, times[0], times[2]))


@pytest.mark.parametrize("schedule", [KarrasSchedule(), VPSchedule(), FlowSchedule(3.0)])
def test_an_index_is_found_by_its_time(schedule):
    index = torch.tensor([0, 20, 249, 998, 999])
    assert torch.equal(schedule.index_of_time(schedule.time(index)), index)


# Weights of a divergence.
@pytest.mark.parametrize("kind", ["edm", *KINDS])
def test_divergence_weights_the_gradient_of_each_image(kind):
    gan = {"gan__lambda_g": 1e-9, "gan__lambda_d": 1e-2}
    plain = kept_turn(kind, **gan)[2].grad
    m, _, x, _, logs, passes = kept_turn(kind, **gan, dm__divergence="kl")
    (judged,) = [(one, result) for one, result in passes if one.features and not one.gradient]
    matched = next(one for one, _ in passes if one.network == "teacher")
    assert torch.equal(judged[0].x_t, matched.x_t)  # the very sample of L_DM
    logits = m.head(torch.tensor(judged[1]).float()).detach().double().numpy().reshape(4, -1).mean(axis=1)
    r = np.clip(np.exp(np.clip(logits, -10, 10)), 0.1, 20)
    bins = (m.teacher.schedule.index_of_time(matched.t).numpy() - 20) * 10 // 961
    r = r / np.array([r[bins == b].mean() for b in bins])
    weights = reference.column(r / r.mean())
    np.testing.assert_allclose(x.grad.numpy(), weights * plain.numpy(), rtol=1e-3, atol=1e-6)
    assert logs["dm/weight_std"].item() == pytest.approx(weights.std(), abs=1e-5)


def test_weights_are_one_for_a_head_that_knows_nothing_and_have_mean_one():
    index = torch.arange(20, 980, 60)
    for kind in ("kl", "js", "sf", "sh", "jf", "neyman"):
        same = divergence_weights(torch.full((16, 1), 0.7), index, (20, 980), kind)
        torch.testing.assert_close(same, torch.ones(16))
        drawn = divergence_weights(
            torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), index, (20, 980), kind
        )
        assert drawn.mean().item() == pytest.approx(1, rel=1e-5) and drawn.std() > 0.01
    assert divergence_weights(torch.full((16, 1), 99.0), index, (20, 980), "kl").isfinite().all()


def test_means_of_weights_are_of_the_whole_batch():
    cfg = tiny.config("edm", dm__divergence="js")
    with pytest.raises(UserError, match="takes means over the batch, which training.micro_batch 2 parts"):
        refuse("tiny", cfg, Hardware(micro_batch=2))
    refuse("tiny", cfg, Hardware(micro_batch=4))


# Score identity distillation.
@pytest.mark.parametrize("kind", ["edm", *KINDS])
@pytest.mark.parametrize("a", [1.0, 1.2])
def test_score_identity_loss_and_where_its_gradient_flows(kind, a):
    weight = "normaliser" if kind == "edm" else "alpha"
    settings = {"dm__sid_alpha": a, "dm__sid_weight": weight, "dm__normaliser_eps": 0.1}
    m, _, x, loss, _, passes = kept_turn(kind, dm__objective="sid", **settings)
    (teacher, real), (critic, fake) = passes
    (images,) = arrays(x)
    w = level(teacher, m.teacher.schedule)[0]
    if kind == "edm":
        w = 1 / (reference.column(np.abs(images - real).mean(axis=(1, 2, 3))) + 0.1)
    expected = (w * (real - fake) * ((real - images) - a * (real - fake))).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert teacher.gradient and critic.gradient
    direct = -(w * (real - fake)) / images.size  # of x alone, were both predictions constants
    assert not np.allclose(x.grad.numpy(), direct, rtol=1e-2, atol=1e-6)
    assert not any(p.grad is not None for p in [*m.critic.parameters(), *m.teacher.parameters()])


# The mean and variance of images.
def test_moments_loss():
    changes = {"dm__weight": 0.0, "dm__moments_kl": 1.0, "dm__moments": [0.1, 0.5]}
    *_, x, _, logs, _ = kept_turn("edm", **changes)
    (images,) = arrays(x)
    m, s2 = images.mean(axis=(1, 2, 3)), images.var(axis=(1, 2, 3))
    expected = 0.5 * ((s2 + (m - 0.1) ** 2) / 0.5 - 1 - np.log(s2 / 0.5))
    assert logs["student/moments"].item() == pytest.approx(expected.mean(), rel=1e-5)


# Implicit distribution alignment.
@pytest.mark.parametrize("kind", ["edm", *KINDS])
@pytest.mark.parametrize("kept", [0.0, 0.9])
def test_the_critic_takes_over_a_share_of_the_updated_student(kind, kept):
    cfg = tiny.config(kind, critic__ida=kept, critic__ratio=2, critic__shares_iteration=False)
    m = tiny.models(kind, cfg)
    before, head = (
        [p.detach().clone() for p in m.critic.parameters()],
        [p.detach().clone() for p in m.head.parameters()],
    )
    train_step(m, tiny.batches(kind, cfg).at(1), 1, cfg)  # the student's turn alone
    for old, new, student in zip(before, m.critic.parameters(), m.student.parameters(), strict=True):
        torch.testing.assert_close(new, kept * old + (1 - kept) * student, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(head, m.head.parameters(), strict=True))
    train_step(m, tiny.batches(kind, cfg).at(0), 0, cfg)  # the critic's turn aligns nothing


@pytest.mark.parametrize("kind", ["eps-sdxl", *KINDS])
def test_the_critic_of_a_low_rank_student_takes_over_what_its_factors_make_of_the_weights(kind):
    cfg = tiny.config(kind, critic__ida=0.75)
    m = tiny.models(kind, cfg)
    before = {name: p.detach().clone() for name, p in m.critic.network.named_parameters()}
    add_lora(m.student.network, rank=2, alpha=4.0)
    factors = [p for p in m.student.network.parameters() if p.requires_grad]
    for p in factors:
        torch.nn.init.normal_(p, std=0.2)
    m.critic.approach(m.student, 1 - cfg.critic.ida)
    target = merged_state(m.student.network)
    assert before.keys() <= target.keys() and any(not torch.equal(before[name], target[name]) for name in before)
    for name, new in m.critic.network.named_parameters():
        torch.testing.assert_close(new, 0.75 * before[name] + 0.25 * target[name], rtol=1e-5, atol=1e-6)


def test_alignment_reaches_the_weights_that_passes_run_in():
    cfg = tiny.config("edm", critic__ida=0.0, critic__ratio=2, critic__shares_iteration=False)
    m = tiny.models("edm", cfg)
    for denoiser in (m.student, m.critic):
        denoiser.hold_lowered()
    train_step(m, tiny.batches("edm", cfg).at(1), 1, cfg)
    pairs = zip(m.critic.running.parameters(), m.student.network.parameters(), strict=True)
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in pairs)


# Draws.
def test_a_range_of_each_sample_is_drawn_with_both_ends():
    low, high = torch.tensor([0, 5, 7]).repeat(500), torch.tensor([2, 5, 999]).repeat(500)
    index = Draws(0, 0, 1500, 0, 1500).between("ca/level", low, high).reshape(500, 3)
    assert index[:, 0].unique().tolist() == [0, 1, 2] and index[:, 1].unique().tolist() == [5]
    assert index[:, 2].min() >= 7 and index[:, 2].max() > 950


@pytest.mark.parametrize(
    "method",
    [
        {"dm__moments_kl": 0.1, "dm__moments": [0.0, 1.0]},
        {"generator__isg": 0.5},
        {"critic__ida": 0.9},
        {"dm__divergence": "js"},
        {"dm__objective": "sid"},
    ],
)
def test_a_method_changes_no_draw_of_another_term(method):
    gan = {"gan__lambda_g": 3e-3, "gan__lambda_d": 1e-2}
    drawn = []
    for changes in ({}, method):
        *_, passes = kept_turn("flow-sd3", **gan, **changes)
        drawn.append(next(one for one, _ in passes if one.features and one.gradient))
    assert torch.equal(drawn[0].t, drawn[1].t) and torch.equal(drawn[0].x_t, drawn[1].x_t)
