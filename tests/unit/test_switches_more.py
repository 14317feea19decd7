"""Switches that FastGen or the DMD paper use: alpha factor, normaliser floor, exclusive turns, R1, weightings, critic lr."""

import numpy as np
import pytest
import torch

from dmd2.experiment.config import RunConfig
from dmd2.method.step import critic_loss, student_loss, train_step
from dmd2.networks.schedules import add_noise
from tests import reference, tiny
from tests.draws import keeping


def image(kind):
    return torch.randn(4, tiny.channels(kind), 8, 8, generator=torch.Generator().manual_seed(0))


def dm_gradient(kind, **changes):
    """Gradient of L_DM in the image, and the reference g of the same predictions, both times N."""
    cfg = tiny.config(kind, gan__lambda_g=0.0, gan__lambda_d=0.0, **changes)
    m, batch, out, x = tiny.models(kind, cfg), keeping(tiny.one_batch(kind, cfg)), {}, image(kind).requires_grad_()
    for name in ("teacher", "critic"):
        getattr(m, name).register_forward_hook(
            lambda module, args, y, name=name: out.update({name: y.double().numpy()})
        )
    student_loss(m, tiny.GIVEN, x, batch, cfg, {}).backward()
    t = batch.draws.levels["dm/level"][2].numpy()
    return x.grad.numpy() * x.numel(), x.detach().double().numpy(), out["teacher"], out["critic"], t


def test_alpha_factor_multiplies_g_by_alpha_t():
    got, x, real, fake, t = dm_gradient("eps-text", dm__alpha_factor=True)
    alpha = np.sqrt(reference.column(reference.ABAR[t]))
    np.testing.assert_allclose(got, alpha * reference.dm_gradient(x, real, fake), rtol=1e-3, atol=1e-5)


def test_alpha_factor_does_nothing_on_karras():
    with_factor, without = (dm_gradient("edm", dm__alpha_factor=on)[0] for on in (True, False))
    np.testing.assert_array_equal(with_factor, without)


@pytest.mark.parametrize("kind", ["edm", "eps-text"])
def test_normaliser_eps_is_added_to_the_normaliser(kind):
    got, x, real, fake, _ = dm_gradient(kind, dm__normaliser_eps=0.5)
    expected = (fake - real) / (reference.column(reference.dm_weight(x, real)) + 0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "scale"), [("edm", 1.0), ("flow-sd3", 1.0), ("flow-sd3", 3.0)])
def test_before_the_critic_has_learnt_only_guidance_moves_an_image(kind, scale):
    cfg = tiny.config(kind, gan__lambda_g=0.0, gan__lambda_d=0.0, teacher__guidance=scale)
    m, batch, x = tiny.models(kind, cfg), keeping(tiny.one_batch(kind, cfg)), image(kind).requires_grad_()
    m.critic.load_state_dict(m.teacher.state_dict())
    student_loss(m, tiny.GIVEN, x, batch, cfg, {}).backward()
    t = m.teacher.schedule.time(batch.draws.levels["dm/level"][2])
    x_t = add_noise(m.teacher.schedule, x.detach(), batch.draws.normals["dm/noise"], t)
    with torch.no_grad():
        with_class, without = (m.teacher(x_t, t, cond) for cond in (batch.cond, tiny.null(kind).expand(4)))
    guided = without + scale * (with_class - without)
    normaliser = (x.detach() - guided).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = -(scale - 1) * (with_class - without) / normaliser
    torch.testing.assert_close(x.grad * x.numel(), expected, rtol=1e-3, atol=1e-6 if scale > 1 else 0)


@pytest.mark.parametrize("kind", ["eps-text", "flow-sd3"])
@pytest.mark.parametrize("objective", ["dmd", "decoupled", "sid"])
def test_a_scale_drawn_for_each_image_acts_on_it_alone(kind, objective):
    """Each image moves as in a run that guides all by its scale; a range of one scale is that of the teacher."""
    changes = {"gan__lambda_g": 0.0, "gan__lambda_d": 0.0, "dm__objective": objective}

    def gradient(**guidance):
        cfg = tiny.config(kind, **changes, **guidance)
        m, batch, x = tiny.models(kind, cfg), tiny.one_batch(kind, cfg), image(kind).requires_grad_()
        student_loss(m, tiny.GIVEN, x, batch, cfg, {}).backward()
        return x.grad, batch.draws.uniform("dm/guidance")

    found, drawn = gradient(dm__guidance=[2.0, 8.0])
    scales = (2 + 6 * drawn).tolist()
    assert len({round(scale, 1) for scale in scales}) == len(scales) == 4
    expected = torch.stack([gradient(teacher__guidance=scale)[0][i] for i, scale in enumerate(scales)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(gradient(dm__guidance=[3.0, 3.0], teacher__guidance=1.0)[0], gradient(teacher__guidance=3.0)[0])


# Exclusive turns (FastGen).
def turns(shares, ratio=5, iterations=10):
    cfg = tiny.config("edm", critic__shares_iteration=shares, critic__ratio=ratio)
    m, b, done = tiny.models("edm", cfg), tiny.batches("edm", cfg), []
    for optimiser, name in ((m.student_optimiser, "G"), (m.critic_optimiser, "K")):
        optimiser.adamw.register_step_pre_hook(lambda *_, name=name: done.append(name))
    for it in range(iterations):
        train_step(m, b.at(it), it, cfg)
    return "".join(done)


def test_shared_iterations_update_the_critic_every_time():
    assert turns(True) == "GKKKKK" * 2


def test_exclusive_iterations_give_4_critic_updates_per_student_update():
    assert turns(False) == "KKKKG" * 2


def test_exclusive_turns_with_ratio_1_are_refused_since_the_critic_would_never_train():
    with pytest.raises(ValueError, match="ratio"):
        tiny.config("edm", critic__shares_iteration=False, critic__ratio=1)


def test_a_critic_without_any_term_is_refused_or_harmless():
    changes = {"critic__denoise_weight": 0.0, "gan__lambda_g": 0.0, "gan__lambda_d": 0.0}
    try:
        cfg = tiny.config("edm", **changes)
    except ValueError:
        return
    train_step(tiny.models("edm", cfg), tiny.batches("edm", cfg).at(0), 0, cfg)


# R1 (FastGen's approximation: the logit of a perturbed real image should not change).
def discriminator_term(r1_weight, r1_alpha=0.1):
    cfg = tiny.config("edm", gan__r1_weight=r1_weight, gan__r1_alpha=r1_alpha, critic__denoise_weight=0.0)
    m, logs, batch, logits = tiny.models("edm", cfg), {}, tiny.one_batch("edm", cfg), []
    m.head.register_forward_hook(lambda module, args, out: logits.append(out.detach()))
    critic_loss(m, tiny.GIVEN[1], image("edm"), batch, cfg, logs)
    return logs["critic/gan"].item(), logits


def test_r1_adds_the_squared_change_of_the_real_logits():
    plain, two = discriminator_term(0.0)
    regularised, (fake, real, perturbed) = discriminator_term(100.0)
    assert len(two) == 2
    expected = plain + 100 * (perturbed - real).square().mean().item()
    assert regularised == pytest.approx(expected, rel=1e-5)
    assert regularised > plain


def test_r1_alpha_scales_the_perturbation():
    _, (_, real, perturbed) = discriminator_term(1.0, r1_alpha=0.0)
    assert torch.equal(real, perturbed)


# Critic.
@pytest.mark.parametrize(
    ("kind", "weighting"),
    [("edm", "edm"), ("edm", "x0"), ("eps-text", "eps"), ("eps-text", "x0"), ("flow-sd3", "v"), ("flow-sd3", "x0")],
)
def test_critic_weighting(kind, weighting):
    cfg = tiny.config(kind, critic__weighting=weighting, gan__lambda_g=0.0, gan__lambda_d=0.0)
    m, logs, batch, seen, x = tiny.models(kind, cfg), {}, keeping(tiny.one_batch(kind, cfg)), [], image(kind)
    m.critic.register_forward_hook(lambda module, args, out: seen.append((args, out.detach().double().numpy())))
    critic_loss(m, tiny.GIVEN[1], x, batch, cfg, logs)
    (((x_t, t, _), predicted),) = seen
    clean, noise = x.double().numpy(), batch.draws.normals["critic/noise"].double().numpy()
    if weighting == "edm":
        expected = reference.critic_loss_edm(predicted, clean, t.double().numpy())
    elif weighting == "eps":
        a = reference.column(reference.ABAR[t.numpy()])
        eps = (x_t.double().numpy() - np.sqrt(a) * predicted) / np.sqrt(1 - a)
        expected = reference.critic_loss_eps(eps, noise)
    elif weighting == "v":
        velocity = (x_t.double().numpy() - predicted) / reference.column(t.double().numpy())
        expected = ((velocity - (noise - clean)) ** 2).mean()
    else:
        expected = ((predicted - clean) ** 2).mean()
    assert logs["critic/denoise"].item() == pytest.approx(expected, rel=1e-4)


def test_lr_multiplier_belongs_to_the_critic():
    cfg = tiny.config("edm", critic__lr_multiplier=5.0)
    m, rates = tiny.models("edm", cfg), {}
    for name in ("student", "critic"):
        adamw = getattr(m, f"{name}_optimiser").adamw
        adamw.register_step_pre_hook(lambda a, *_, name=name: rates.update({name: a.param_groups[0]["lr"]}))
    train_step(m, tiny.batches("edm", cfg).at(0), 0, cfg)
    assert rates["critic"] == pytest.approx(5 * rates["student"])


def test_switches_are_off_as_in_the_official_preset_unless_named():
    values = tiny.values("edm")
    for section, key in (("dm", "normaliser_eps"), ("dm", "alpha_factor"), ("critic", "shares_iteration"),
                         ("gan", "r1_weight"), ("gan", "r1_alpha")):  # fmt: skip
        del values[section][key]
    cfg = RunConfig.model_validate(values)
    assert (cfg.dm.normaliser_eps, cfg.dm.alpha_factor, cfg.critic.shares_iteration, cfg.gan.r1_weight) == (
        0,
        False,
        True,
        0,
    )
