"""The diffusion GAN of DMD2 Eq. 4: non-saturating logistic losses of a head on the bottleneck of diffused images.

The head sees the critic's features (or the teacher's, ``gan.features_from``) of images at random noise levels, or of
clean images at the least level where ``gan.noise_range`` is null.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.method.passes import Objective, Pass, Turn
from dmd2.networks.condition import Condition

# Whose level and noise the GAN takes under gan.shares_noise: draws are addressed, so an equal name is an equal draw.
SHARED_NOISE = {"gan/generator": "dm", "gan/fake": "critic"}


def generator_gan(turn: Turn) -> Objective:
    """L_G of the student's images; settings: section ``gan``. It needs the features of its images with gradient."""
    assert turn.m.head is not None
    (features,) = yield [_features_of(turn, turn.x, turn.batch.cond, "gan/generator")]
    return generator_gan_loss(turn.m.head(features), turn.cfg.gan.loss, _weight(turn)), {}


def discriminator(turn: Turn) -> Objective:
    """L_D of student and real images; settings: section ``gan``. It needs the features of both with gradient.

    With ``gan.r1_weight`` it adds approximate R1 (FastGen): the logit of a real image should not change when the image
    is perturbed a little.
    """
    head, batch, cfg = turn.m.head, turn.batch, turn.cfg.gan
    assert head is not None and batch.real is not None
    real, cond = batch.real
    needs = [_features_of(turn, turn.x, batch.cond, "gan/fake"), _features_of(turn, real, cond, "gan/real")]
    if cfg.r1_weight > 0:
        perturbed = real + cfg.r1_alpha * batch.draws.normal("gan/r1", tuple(real.shape[1:]))
        needs.append(_features_of(turn, perturbed, cond, "gan/real"))
    fake_logits, real_logits, *perturbed_logits = [head(features) for features in (yield needs)]
    loss = discriminator_loss(fake_logits, real_logits, cfg.loss, _weight(turn))
    for logits in perturbed_logits:
        loss = loss + cfg.r1_weight * (logits - real_logits).square().mean()
    chance = {"gan/p_real": real_logits.detach().sigmoid().mean(), "gan/p_fake": fake_logits.detach().sigmoid().mean()}
    return loss, chance


def _features_of(turn: Turn, images: Tensor, cond: Condition, name: str) -> Pass:
    """Bottleneck of images diffused to a level drawn under `name`."""
    cfg = turn.cfg.gan
    if cfg.noise_range is None:
        least = torch.zeros(len(images), dtype=torch.long, device=images.device)
        images_tau, tau = images, turn.m.teacher.schedule.time(least)
    else:
        address = SHARED_NOISE.get(name, name) if cfg.shares_noise else name
        images_tau, tau = turn.noised(images, address, cfg.noise_range)
    return Pass(cfg.features_from, images_tau, tau, cond, features=True)


def _weight(turn: Turn) -> Tensor | None:
    """Weight of each sample ``(B, 1)`` by the level at which the student made it, if the run asks for that."""
    if not turn.cfg.gan.level_weight:
        return None
    return turn.m.teacher.schedule.alpha_sigma(turn.t, torch.float32)[0].square()[:, None]


def discriminator_loss(
    fake_logits: Tensor, real_logits: Tensor, kind: str = "logistic", weight: Tensor | None = None
) -> Tensor:
    """``mean(softplus(l_fake) + softplus(-l_real))``, 2 ln 2 when the head knows nothing; or the hinge loss.

    Args:
        fake_logits, real_logits: ``(B, logits)``. kind: ``logistic`` or ``hinge``, ``mean(max(0, 1 + l_fake) + max(0,
            1 - l_real))``. weight: of each sample, ``(B, 1)``.
    """
    if kind == "hinge":
        loss = F.relu(1 + fake_logits) + F.relu(1 - real_logits)
    else:
        loss = F.softplus(fake_logits) + F.softplus(-real_logits)
    return (loss if weight is None else weight * loss).mean()


def generator_gan_loss(fake_logits: Tensor, kind: str = "logistic", weight: Tensor | None = None) -> Tensor:
    """``mean(softplus(-l_fake))``, ln 2 when the head knows nothing; of the hinge loss ``-mean(l_fake)``."""
    loss = -fake_logits if kind == "hinge" else F.softplus(-fake_logits)
    return (loss if weight is None else weight * loss).mean()
