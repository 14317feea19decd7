"""Mean and variance of each image kept near those of the data: the least regulariser (arXiv 2511.22677, Eq. 7)."""

from torch import Tensor

from dmd2.method.passes import Objective, Turn


def moments(turn: Turn) -> Objective:
    """L_KL of the student's images; settings: ``dm.moments_kl`` and ``dm.moments``. It needs no network."""
    target = turn.cfg.dm.moments
    assert target is not None
    yield []
    return moments_divergence(turn.x, *target).mean(), {}


def moments_divergence(x: Tensor, mean: float, variance: float) -> Tensor:
    """KL divergence ``(B,)`` of the normal law with each image's mean and population variance from the one given."""
    m, s2 = x.mean(dim=(1, 2, 3)), x.var(dim=(1, 2, 3), correction=0)
    return ((s2 + (m - mean) ** 2) / variance - 1 - (s2 / variance).log()) / 2
