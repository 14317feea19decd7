"""Distribution matching: the student's images move from where the critic sees them to where the teacher does.

DMD2 Eq. 1 with the normaliser of DMD Eq. 8: ``g = (fake - real) / mean|x - real|`` at images noised to a random level,
where real and fake are the clean images that teacher and critic predict.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.method.passes import Objective, Pass, Turn
from dmd2.networks.schedules import spread


def distribution_matching(turn: Turn) -> Objective:
    """L_DM of the student's images; settings: section ``dm``. It needs teacher (guided) and critic without gradient."""
    x, cfg = turn.x.detach(), turn.cfg.dm
    x_t, t = turn.noised(x, "dm", cfg.index_range)
    cond = turn.batch.cond
    real, fake = yield [
        Pass("teacher", x_t, t, cond, gradient=False, guided=True),
        Pass("critic", x_t, t, cond, gradient=False),
    ]
    factor = spread(turn.m.teacher.schedule.alpha_sigma(t, real.dtype)[0], x) if cfg.alpha_factor else None
    g = distribution_matching_gradient(x, real, fake, cfg.normaliser_eps, factor)
    signals = {"dm/g_abs": g.abs().mean()}
    for name, value in (("g", g), ("real", real), ("fake", fake)):
        signals |= {f"dm/{name}_mean": value.mean(), f"dm/{name}_std": value.std()}
    return distribution_matching_loss(turn.x, g), {name: value.float() for name, value in signals.items()}


def distribution_matching_gradient(
    x: Tensor, real: Tensor, fake: Tensor, normaliser_eps: float = 0.0, factor: Tensor | None = None
) -> Tensor:
    """Direction ``g`` by which the student output ``x`` should move, detached, in the widest dtype given.

    Args:
        x: student output ``(B, C, H, W)``. real, fake: teacher's and critic's x0 predictions of the noised ``x``.
        normaliser_eps: floor added to the per-sample normaliser. factor: optional per-sample factor (alpha_t in DMD).
    """
    x, real, fake = x.detach(), real.detach(), fake.detach()
    normaliser = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True) + normaliser_eps
    g = (fake - real) / normaliser
    if factor is not None:
        g = factor * g
    return torch.nan_to_num(g)


def distribution_matching_loss(x: Tensor, g: Tensor) -> Tensor:
    """``1/2 mean((x - sg(x - g))^2)``: its value is mean(g^2)/2 and its gradient in ``x`` exactly g / numel."""
    return 0.5 * F.mse_loss(x, (x.detach() - g).to(x.dtype))
