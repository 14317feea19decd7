"""Intra-segment guidance: one step of the student ends where teacher and student together end (SenseFlow, 2506.00523).

The student steps from its level i to its next level p, in the last step to the least noise. A level between them is
drawn; the teacher leads to it and the student from there to p, without gradient. The loss is Charbonnier's distance, as
in its authors' runs, where the paper writes the squared error.
"""

from torch import Tensor

from dmd2.method.passes import Objective, Pass, Turn
from dmd2.networks.schedules import LEVELS, move, step_index

SMOOTHING = 1e-3  # below such differences Charbonnier's distance is quadratic


def intra_segment(turn: Turn) -> Objective:
    """L_ISG; settings: ``generator.isg``. It needs the teacher (guided), then the student, both without gradient."""
    x_i, t_i, cond, cfg, schedule = turn.x_t, turn.t, turn.batch.cond, turn.cfg.generator, turn.m.teacher.schedule
    assert x_i is not None
    start = schedule.index_of_time(t_i)
    following = (LEVELS - 1 - start) // (LEVELS // cfg.steps) + 1  # its first step may begin below the grid's top
    end = step_index(following, cfg.steps).masked_fill(following >= cfg.steps, 0)
    margin = ((start - end) // 2).clamp(max=cfg.isg_margin)
    middle = turn.batch.draws.between("isg/level", end + margin, start - margin)
    t_mid, t_p = schedule.time(middle), schedule.time(end)
    (real,) = yield [Pass("teacher", x_i, t_i, cond, gradient=False, guidance=turn.guidance("isg"))]
    x_mid = move(schedule, x_i, real, t_i, t_mid)
    (mine,) = yield [Pass("student", x_mid, t_mid, cond, gradient=False)]
    target = move(schedule, x_mid, mine, t_mid, t_p)
    return charbonnier(move(schedule, x_i, turn.x, t_i, t_p), target), {}


def charbonnier(x: Tensor, target: Tensor) -> Tensor:
    """``mean(sqrt((x - target)^2 + 1e-6) - 1e-3)``: near the absolute difference, and 0 at none."""
    return (((x - target.detach()) ** 2 + SMOOTHING**2).sqrt() - SMOOTHING).mean()
