"""Regression on teacher pairs: distance of G(z) to the teacher's image of the same z (DMD Eq. 9, Sec. 4.2)."""

import torch

from dmd2.method.passes import Objective, Pass, Turn


def regression(turn: Turn) -> Objective:
    """L_reg; settings: section ``regression``. It needs the student with gradient, on a batch of its own."""
    assert turn.batch.pairs is not None and turn.m.distance is not None
    noise, image, cond = turn.batch.pairs
    t = torch.full((len(noise),), turn.cfg.generator.time, device=noise.device)
    (x,) = yield [Pass("student", turn.m.student.schedule.pure_noise(noise, t), t, cond)]
    return turn.m.distance(x.float(), image), {}
