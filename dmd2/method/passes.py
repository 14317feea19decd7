"""What objectives need of the networks, and how the needs of all objectives become few, large passes.

An objective is a generator function of a `Turn`. It yields the passes that it needs, is sent their results in the same
order, and returns its loss with what is logged of it:

    def my_objective(turn):
        x_t, t = turn.noised(turn.x, "mine", (20, 980))
        (prediction,) = yield [Pass("teacher", x_t, t, turn.batch.cond)]
        return F.mse_loss(turn.x, prediction), {}

`evaluate` runs all objectives of a turn side by side. What they need at the same time of the same network, with or
without gradient, is one pass: samples of which the prediction is needed come first, and the decoder runs on them alone.
Networks act on every sample by itself, so joining changes results by rounding only. Where activations are recomputed
in backward (``training.checkpointing``) passes stay apart: a block recomputed for all of them would need the memory
that recomputing saves.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dmd2.experiment.config import TrainConfig
from dmd2.method.batches import Batch
from dmd2.method.interfaces import Models
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Inputs, guidance, with_unconditional
from dmd2.networks.schedules import add_noise, index_of_fraction, logit_normal, spread

Logs = dict[str, Tensor]
Given = tuple[Tensor, Tensor]  # noisy images (B, C, H, W) and their times (B,)


@dataclass(frozen=True, eq=False)
class Pass:
    """One network at noisy images ``(B, C, H, W)`` and times ``(B,)``.

    The result is the prediction ``(B, C, H, W)`` of the clean images, or with `features` the bottleneck ``(B, c, h,
    w)``, float32. gradient: whether one flows through the pass; without, the result is detached. guidance: scale s of
    classifier-free guidance, ``u + s (c - u)``, 1 is none; or a tensor ``(B, 1, 1, 1)`` of them.
    """

    network: Literal["student", "teacher", "critic"]
    x_t: Tensor
    t: Tensor
    cond: Condition
    gradient: bool = True
    features: bool = False
    guidance: float | Tensor = 1.0

    @property
    def guided(self) -> bool:
        """Whether the network runs without the condition, too."""
        return isinstance(self.guidance, Tensor) or self.guidance > 1


Objective: TypeAlias = Generator[Sequence[Pass], list[Tensor], tuple[Tensor, Logs]]


@dataclass(frozen=True)
class Turn:
    """The student's or the critic's turn on one micro-batch.

    x: images of the student, ``(B, C, H, W)``; in the critic's turn without gradient.
    t: times ``(B,)`` at which it made them. x_t: what it made them of, like `x`; in the student's turn alone.
    """

    m: Models
    x: Tensor
    batch: Batch
    cfg: TrainConfig
    t: Tensor
    x_t: Tensor | None = None

    def level(self, name: str, index_range: tuple[int, int]) -> Tensor:
        """Grid indices ``(B,)``, drawn per sample from an inclusive range.

        Levels and noise are addressed by `name`: equal names give equal draws. Those of sections ``dm`` and ``critic``
        may be logit-normal, what is beyond the range at its end; all others are uniform. Real images have levels like
        those of the images that the head tells them from.
        """
        draws, of_dm, of_critic = self.batch.draws, self.cfg.dm.logit_normal, self.cfg.critic.logit_normal
        like_critic = {"gan/real": of_critic} if self.cfg.gan.shares_noise else {}
        moments = {"dm": of_dm, "ca": of_dm, "critic": of_critic, **like_critic}.get(name)
        if moments is None:
            return draws.integers(f"{name}/level", *index_range)
        return index_of_fraction(logit_normal(draws.normal(f"{name}/level", ()), moments)).clamp(*index_range)

    def guidance(self, name: str = "") -> float | Tensor:
        """The guidance scale of the term `name`: the run's, or drawn per sample, ``(B, 1, 1, 1)``, in its range."""
        cfg = self.cfg
        scales = {"dm": cfg.dm.guidance, "isg": cfg.generator.isg_guidance}.get(name)
        if scales is None:
            return cfg.teacher.guidance
        low, high = scales
        return spread(low + (high - low) * self.batch.draws.uniform(f"{name}/guidance").float(), self.x)

    def noised(self, images: Tensor, name: str, index_range: tuple[int, int]) -> Given:
        """Images at levels that are drawn for `name`, and the times of these levels."""
        return self.noised_at(images, name, self.level(name, index_range))

    def noised_at(self, images: Tensor, name: str, index: Tensor) -> Given:
        """Images at levels with the noise of `name`, and the times of these levels."""
        schedule, draws = self.m.teacher.schedule, self.batch.draws
        t = schedule.time(index)
        return add_noise(schedule, images, draws.normal(f"{name}/noise", tuple(images.shape[1:])), t), t


def evaluate(turn: Turn, objectives: Mapping[str, Objective]) -> dict[str, tuple[Tensor, Logs]]:
    """Loss and logs of each objective, with the passes that they need joined."""
    needs = {name: next(objective) for name, objective in objectives.items()}
    finished: dict[str, tuple[Tensor, Logs]] = {}
    while needs:
        results = iter(run_passes(turn, [one for passes in needs.values() for one in passes]))
        given = {name: [next(results) for _ in passes] for name, passes in needs.items()}
        needs = {}
        for name, found in given.items():
            try:
                needs[name] = objectives[name].send(found)
            except StopIteration as end:
                finished[name] = end.value
    return {name: finished[name] for name in objectives}


def run_passes(turn: Turn, passes: Sequence[Pass]) -> list[Tensor]:
    """The result of each pass; those of the same network, all with or all without gradient, run as one."""
    groups: dict[tuple[str, bool], list[Pass]] = {}
    for one in passes:
        groups.setdefault((one.network, one.gradient), []).append(one)
    results: dict[Pass, Tensor] = {}
    for (network, gradient), group in groups.items():
        # Asking is a walk through the network, 0.3 ms, which a single pass need not pay.
        apart = gradient and len(group) > 1 and getattr(turn.m, network).network.is_gradient_checkpointing
        with torch.set_grad_enabled(gradient):
            for part in [[one] for one in group] if apart else [sorted(group, key=lambda one: one.features)]:
                results |= _joined(turn, part)
    return [results[one] for one in passes]


def _joined(turn: Turn, group: list[Pass]) -> dict[Pass, Tensor]:
    """Results of passes of one network; predictions come before features."""
    network = getattr(turn.m, group[0].network)
    rows = [_rows(turn, one) for one in group]
    x_t, t, cond = rows[0]
    if len(rows) > 1:
        x_t, t = torch.cat([x for x, _, _ in rows]), torch.cat([t for _, t, _ in rows])
        cond = reduce(Condition.join, (cond for _, _, cond in rows))
    sizes = [len(x) for x, _, _ in rows]
    predictions = sum(not one.features for one in group)
    if predictions == len(group):
        parts = network(x_t, t, cond).split(sizes)
    elif predictions == 0:
        parts = network.features(x_t, t, cond).split(sizes)
    else:
        predicted, features = network.joined(x_t, t, cond, sum(sizes[:predictions]))
        parts = (*predicted.split(sizes[:predictions]), *features.split(sizes[predictions:]))
    doubled = [len(part) > len(one.t) for one, part in zip(group, parts, strict=True)]
    return {
        one: guidance(part, one.guidance, one.x_t, network.rescale) if twice else part
        for one, part, twice in zip(group, parts, doubled, strict=True)
    }


def _rows(turn: Turn, one: Pass) -> Inputs:
    """What the network is given for a pass: a guided one twice, without its condition and with it."""
    if one.guided and turn.m.null is not None:
        return with_unconditional(one.x_t, one.t, one.cond, turn.m.null.expand(len(one.t)))
    return one.x_t, one.t, one.cond
