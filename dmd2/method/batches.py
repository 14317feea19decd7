"""What one iteration consumes: conditions, real images and pairs, all addressed by (seed, iteration, name)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd2.core.distributed import rows
from dmd2.core.rng import Draws
from dmd2.data.sets import TensorSet
from dmd2.experiment.config import TrainConfig
from dmd2.networks.condition import Condition


@dataclass(frozen=True)
class Batch:
    """A slice of one iteration's global batch.

    cond: what the student generates for. real: real images of the GAN with their condition. source: real images that
    ``noised_real`` starts from (their condition is `cond`). pairs: (noise, image, condition) of the regression.
    share: this slice's part of the global batch, so that shares of all slices sum to 1.
    """

    draws: Draws
    share: float
    cond: Condition
    real: tuple[Tensor, Condition] | None = None
    source: Tensor | None = None
    pairs: tuple[Tensor, Tensor, Condition] | None = None


@dataclass(frozen=True)
class Batches:
    """Makes the batches of an iteration, in micro-batches of at most `micro_batch` samples."""

    cfg: TrainConfig
    seed: int
    device: torch.device
    micro_batch: int
    real: TensorSet | None = None
    pairs: TensorSet | None = None
    prompts: TensorSet | None = None

    def at(self, iteration: int) -> Iterator[Batch]:
        """Micro-batches that together, over all processes, are the global batch of `iteration`."""
        total = self.cfg.optim.batch
        mine = rows(total)
        for start in range(mine.start, mine.stop, self.micro_batch):
            stop = min(start + self.micro_batch, mine.stop)
            yield self._slice(Draws(self.seed, iteration, total, start, stop, self.device))

    def _slice(self, draws: Draws) -> Batch:
        cfg, real, source, pairs = self.cfg, None, None, None
        assert self.real is not None or not cfg.needs_real
        if self.real is not None and (cfg.gan.on or cfg.generator.conditions == "real"):
            real = self.real.batch(draws.shuffled("gan/real", len(self.real)), self.device)
        if real is not None and cfg.generator.conditions == "real":
            source, cond = real
        elif self.prompts is not None:
            cond = self.prompts.condition(draws.shuffled("student/prompts", len(self.prompts)), self.device)
        elif self.real is not None and (cfg.generator.input != "noise" or cfg.data.text is not None):
            # Multi-step runs, and text-conditioned ones without prompts, take their conditions from the real set.
            source, cond = self.real.batch(draws.shuffled("source", len(self.real)), self.device)
        else:
            cond = Condition(labels=draws.integers("student/labels", 0, cfg.data.classes - 1))
        if self.pairs is not None and cfg.needs_pairs:
            indices = draws.shuffled("regression/pairs", len(self.pairs))
            noise = self.pairs.tensor("noise", indices, self.device).float()
            pairs = (noise, *self.pairs.batch(indices, self.device))
        return Batch(draws, (draws.stop - draws.start) / draws.total, cond, real, source, pairs)
