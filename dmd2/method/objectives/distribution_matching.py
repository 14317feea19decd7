"""Distribution matching: the student's images move from where the critic sees them to where the teacher does.

DMD2 Eq. 1 with the normaliser of DMD Eq. 8: ``g = (fake - real) / mean|x - real|`` at images noised to a random level,
where real and fake are the clean images that teacher and critic predict.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.method.objectives.divergence import divergence_weights
from dmd2.method.passes import Logs, Objective, Pass, Turn
from dmd2.networks.schedules import spread


def distribution_matching(turn: Turn) -> Objective:
    """L_DM of the student's images; settings: section ``dm``. It needs teacher (guided) and critic without gradient.

    With a ``dm.divergence`` it needs the features, too, by which the head weights the images.
    """
    x, cfg, head = turn.x.detach(), turn.cfg.dm, turn.m.head
    index = turn.level("dm", cfg.index_range)
    x_t, t = turn.noised_at(x, "dm", index)
    cond = turn.batch.cond
    needs = [
        Pass("teacher", x_t, t, cond, gradient=False, guidance=turn.guidance("dm")),
        Pass("critic", x_t, t, cond, gradient=False),
    ]
    if cfg.divergence != "rkl":
        needs.append(Pass(turn.cfg.gan.features_from, x_t, t, cond, gradient=False, features=True))
    real, fake, *features = yield needs
    factor = spread(turn.m.teacher.schedule.alpha_sigma(t, real.dtype)[0], x) if cfg.alpha_factor else None
    g = distribution_matching_gradient(x, real, fake, cfg.normaliser_eps, factor)
    signals = signals_of(g, real, fake)
    if cfg.divergence != "rkl":
        assert head is not None
        with torch.no_grad():
            weights = divergence_weights(head(*features), index, cfg.index_range, cfg.divergence)
        g = spread(weights, g) * g
        signals["dm/weight_std"] = weights.std(correction=0)
    return distribution_matching_loss(turn.x, g), signals


def signals_of(g: Tensor, real: Tensor, fake: Tensor) -> Logs:
    """What is logged of a gradient and of the two predictions behind it."""
    signals = {"dm/g_abs": g.abs().mean()}
    for name, value in (("g", g), ("real", real), ("fake", fake)):
        signals |= {f"dm/{name}_mean": value.mean(), f"dm/{name}_std": value.std()}
    return {name: value.float() for name, value in signals.items()}


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
