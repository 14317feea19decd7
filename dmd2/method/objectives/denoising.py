"""Critic denoising: the critic learns to denoise the student's images, DMD2 Eq. 3 / EDM Eq. 8: mean(w (D - x)^2)."""

from torch import Tensor

from dmd2.method.passes import Objective, Pass, Turn
from dmd2.networks.schedules import loss_weight


def critic_denoising(turn: Turn) -> Objective:
    """L_K on the student's images; settings: section ``critic``. It needs the critic with gradient."""
    cfg = turn.cfg.critic
    x_t, t = turn.noised(turn.x, "critic", cfg.index_range)
    (prediction,) = yield [Pass("critic", x_t, t, turn.batch.cond)]
    return denoising_loss(prediction, turn.x, loss_weight(turn.m.critic.schedule, t, cfg.weighting)), {}


def denoising_loss(prediction: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared x0 error; ``weight`` is ``(B,)`` (see `schedules.loss_weight`)."""
    squared = (prediction - x).double() ** 2
    return (weight.reshape(-1, 1, 1, 1).double() * squared).mean().float()
