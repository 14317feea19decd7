"""Score identity distillation on a noised student image (SiD; for transformers arXiv 2509.25127).

``L = mean(w (y_R - y_K)((y_R - x) - a (y_R - y_K)))`` with the clean images y that teacher R and critic K predict. The
gradient runs through both networks into x. The value is no objective: it may be negative.
"""

import torch
from torch import Tensor

from dmd2.method.passes import Objective, Pass, Turn
from dmd2.networks.schedules import spread


def score_identity(turn: Turn) -> Objective:
    """L_SiD of the student's images; settings: section ``dm``. It needs teacher (guided) and critic with gradient."""
    x, cfg = turn.x, turn.cfg.dm
    x_t, t = turn.noised(x, "dm", cfg.index_range)
    cond = turn.batch.cond
    scale = turn.guidance("dm")
    real, fake = yield [Pass("teacher", x_t, t, cond, guidance=scale), Pass("critic", x_t, t, cond)]
    if cfg.sid_weight == "alpha":
        weight = spread(turn.m.teacher.schedule.alpha_sigma(t, torch.float32)[0], x)
    else:
        weight = 1 / ((x - real).detach().abs().mean(dim=(1, 2, 3), keepdim=True) + cfg.normaliser_eps)
    return score_identity_loss(x, real, fake, weight, cfg.sid_alpha), {}


def score_identity_loss(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, a: float) -> Tensor:
    """The loss; all are ``(B, C, H, W)`` but `weight`, which spreads over them. a: 1 is ``(y_R - y_K)(y_K - x)``."""
    difference = real - fake
    return (weight * difference * ((real - x) - a * difference)).mean().float()
