"""What one iteration consumes: conditions, real images and pairs, all addressed by (seed, iteration, name).

Only what the losses of the iteration's turns need is read. For a GPU a thread gathers the rows of the next iteration
into pinned memory while this one runs, and they are uploaded without waiting. On the CPU rows are gathered when they
are needed: that takes about a thousandth of an iteration there, and the thread would take a core from the iteration.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dmd2.core.distributed import rows
from dmd2.core.rng import Draws
from dmd2.core.upload import pinned, upload
from dmd2.data.sets import CONDITIONS, Rows, TensorSet, condition_of, images_of
from dmd2.experiment.config import TrainConfig
from dmd2.networks.condition import Condition

Gathered = tuple[Draws, dict[str, Rows]]  # rows on the host by the name under which they were drawn


@dataclass(frozen=True)
class Batch:
    """A slice of one iteration's global batch.

    cond: what the student generates for. real: real images with their condition, where the discriminator is updated.
    source: real images that ``noised_real`` starts from (their condition is `cond`). pairs: (noise, image, condition)
    of the regression, where the student is updated. share: this slice's part of the global batch, so that shares of all
    slices sum to 1.
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
    _begun: dict[int, Future[list[Gathered]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def passes(self) -> int:
        """Micro-batches of this process in an iteration."""
        return -(-len(rows(self.cfg.optim.batch)) // self.micro_batch)

    def at(self, iteration: int) -> Iterator[Batch]:
        """Micro-batches that together, over all processes, are the global batch of `iteration`."""
        parts = self.ahead(iteration) if self.device.type == "cuda" else self._gathered(iteration)
        for draws, found in parts:
            yield self._batch(draws, found)

    def ahead(self, iteration: int) -> list[Gathered]:
        """Rows of `iteration`, while a thread begins with those of the next one; any iteration may be asked for.

        What goes wrong in the thread is raised here, when its iteration is asked for.
        """
        begun = self._begun.pop(iteration, None)
        self._begun.clear()
        found = list(self._gathered(iteration)) if begun is None else begun.result()
        if iteration + 1 < self.cfg.train.steps:
            self._begun[iteration + 1] = self._thread.submit(lambda: list(self._gathered(iteration + 1)))
        return found

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        if not pinned(self.device):
            return ThreadPoolExecutor(1, "inputs")
        return ThreadPoolExecutor(1, "inputs", torch.cuda.set_device, (torch.cuda.current_device(),))

    @property
    def _conditions(self) -> str | None:
        """Name under which the rows are drawn whose conditions the student gets; None where labels are drawn."""
        cfg = self.cfg
        if cfg.generator.conditions == "real":
            return "gan/real"
        if self.prompts is not None:
            return "student/prompts"
        # Multi-step runs, and text-conditioned ones without prompts, take their conditions from the real set.
        from_real = cfg.generator.input != "noise" or cfg.data.text is not None
        return "source" if from_real and self.real is not None else None

    def reads(self, iteration: int) -> dict[str, set[str]]:
        """Tensors that an iteration reads, by the name under which their rows are drawn."""
        cfg, (student, critic) = self.cfg, self.cfg.critic.turns(iteration)
        found: dict[str, set[str]] = {}
        if critic and cfg.gan.lambda_d > 0:
            found["gan/real"] = {"images", *CONDITIONS}
        if self._conditions is not None:
            noised = {"images"} if cfg.generator.input == "noised_real" else set()
            found[self._conditions] = found.get(self._conditions, set()) | {*CONDITIONS} | noised
        if student and cfg.needs_pairs and self.pairs is not None:
            found["regression/pairs"] = {"noise", "images", *CONDITIONS}
        return found

    def slice_of(self, draws: Draws) -> Batch:
        """The rows of a global batch that `draws` is for."""
        return self._batch(draws, self._rows(draws))

    def _gathered(self, iteration: int) -> Iterator[Gathered]:
        total = self.cfg.optim.batch
        mine = rows(total)
        for start in range(mine.start, mine.stop, self.micro_batch):
            stop = min(start + self.micro_batch, mine.stop)
            draws = Draws(self.seed, iteration, total, start, stop, self.device)
            yield draws, self._rows(draws)

    def _rows(self, draws: Draws) -> dict[str, Rows]:
        sets = {"student/prompts": self.prompts, "regression/pairs": self.pairs}
        found, pins = dict[str, Rows](), pinned(self.device)
        for name, tensors in self.reads(draws.iteration).items():
            one = sets.get(name, self.real)
            assert one is not None
            gathered = one.rows(draws.shuffled(name, len(one)), sorted(tensors))
            found[name] = {key: row.pin_memory() for key, row in gathered.items()} if pins else gathered
        return found

    def _batch(self, draws: Draws, found: dict[str, Rows]) -> Batch:
        cfg, critic = self.cfg, self.cfg.critic.turns(draws.iteration)[1]
        there = {name: {key: upload(row, self.device) for key, row in one.items()} for name, one in found.items()}
        real, source, pairs = None, None, None
        if critic and cfg.gan.lambda_d > 0:
            real = images_of(there["gan/real"]), condition_of(there["gan/real"])
        if self._conditions is None:
            labels = draws.integers("student/labels", 0, cfg.data.classes - 1) if cfg.data.labelled else None
            cond = Condition(labels=labels)
        else:
            cond = condition_of(there[self._conditions])
            source = images_of(there[self._conditions]) if cfg.generator.input == "noised_real" else None
        if (one := there.get("regression/pairs")) is not None:
            pairs = one["noise"].float(), images_of(one), condition_of(one)
        return Batch(draws, (draws.stop - draws.start) / draws.total, cond, real, source, pairs)
