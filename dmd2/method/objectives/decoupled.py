"""Decoupled distribution matching: the guided gradient in its two parts, at noise levels of their own (2511.22677).

``g = (f - r_c)(tau_DM) - (s - 1)(r_c - r_u)(tau_CA)`` over its normaliser, in units of x0: distribution matching (DM)
without guidance, and what guidance adds (CA). Both at the same noised image are the gradient of DMD2. In units of the
score the two would be weighted by their levels.
"""

from torch import Tensor

from dmd2.method.objectives.distribution_matching import (
    distribution_matching_gradient,
    distribution_matching_loss,
    signals_of,
)
from dmd2.method.passes import Objective, Pass, Turn


def decoupled(turn: Turn) -> Objective:
    """L_DM of two parts; settings: section ``dm``. It needs teacher and critic without gradient."""
    x, cfg, m, cond = turn.x.detach(), turn.cfg.dm, turn.m, turn.batch.cond
    assert m.null is not None
    matched, augmented = levels(turn)
    shared, at_dm = cfg.renoise == "shared", turn.noised_at(x, "dm", matched)
    at_ca = at_dm if shared else turn.noised_at(x, "ca", augmented)
    needs = [
        Pass("teacher", *at_dm, cond, gradient=False),
        Pass("critic", *at_dm, cond, gradient=False),
        Pass("teacher", *at_ca, m.null.expand(len(x)), gradient=False),
    ]
    if not shared:
        needs.append(Pass("teacher", *at_ca, cond, gradient=False))
    conditional, fake, without, *apart = yield needs
    excess = (turn.guidance("dm") - 1) * ((apart or [conditional])[0] - without)
    g = decoupled_gradient(x, conditional, fake, excess, cfg.matching, cfg.augmentation, cfg.normaliser_eps)
    return distribution_matching_loss(turn.x, g), signals_of(g, conditional, fake)


def levels(turn: Turn) -> tuple[Tensor, Tensor]:
    """Grid indices ``(B,)`` of both parts. A constrained one is at most the level at which the student began."""
    cfg = turn.cfg.dm
    (low, high), own = cfg.index_range, turn.m.teacher.schedule.index_of_time(turn.t)
    bound = own.clamp(low, high)

    def constrained(name: str) -> Tensor:
        return turn.batch.draws.between(f"{name}/level", bound.new_full(bound.shape, low), bound)

    matched = constrained("dm") if cfg.renoise == "constrained" else turn.level("dm", cfg.index_range)
    if cfg.renoise == "shared":
        return matched, matched
    free = cfg.renoise == "full"
    return matched, turn.level("ca", cfg.index_range) if free else constrained("ca")


def decoupled_gradient(
    x: Tensor,
    conditional: Tensor,
    fake: Tensor,
    excess: Tensor,
    matching: float = 1.0,
    augmentation: float = 1.0,
    normaliser_eps: float = 0.0,
) -> Tensor:
    """``(matching (f - r_c) - augmentation e) / (mean|x - (r_c + e)| + eps)``, detached, ``(B, C, H, W)``.

    Args:
        x, conditional, fake: student output, and the predictions r_c of the teacher and f of the critic for it.
        excess: ``e = (s - 1)(r_c - r_u)`` of the teacher at the level of the augmentation.
    """
    mixed = conditional + excess
    if not matching == augmentation == 1:  # what a critic would have to say for plain matching to give the weighted sum
        fake = mixed - (matching * (conditional - fake) + augmentation * excess)
    return distribution_matching_gradient(x, mixed, fake, normaliser_eps)
