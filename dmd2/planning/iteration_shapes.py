"""Batches of a training iteration and AdamW's states as shapes on PyTorch's meta device, without numbers or memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.core.rng import Draws
from dmd2.experiment.config import Optim
from dmd2.method.batches import Batch, Batches
from dmd2.training.optimiser import Optimiser
from dmd2.training.quantised import CODES_PER_SCALE, quantises

META = torch.device("meta")


@dataclass(frozen=True)
class ShapeDraws(Draws):
    """Draws without numbers; a step shared by the batch is the last one, which costs most."""

    def _stream(self, name: str) -> Any:
        return None  # the meta device has no generators

    def shared_integer(self, name: str, low: int, high: int) -> int:
        """See `Draws.shared_integer`."""
        return high

    def shuffled(self, name: str, size: int) -> Tensor:
        """See `Draws.shuffled`."""
        return torch.empty((self.stop - self.start,), dtype=torch.long, device=META)


class ShapeBatches(Batches):
    """Equal micro-batches of one process, out of `ShapeDraws`."""

    def some(self, iteration: int, count: int) -> Iterator[Batch]:
        """The first `count` micro-batches of an iteration."""
        total = max(self.cfg.optim.batch, count * self.micro_batch)
        for i in range(count):
            start = i * self.micro_batch
            yield self.slice_of(ShapeDraws(0, iteration, total, start, start + self.micro_batch, META))


class ShapeOptimiser(Optimiser):
    """AdamW's memory: two moments per parameter. Its fused update needs nothing more."""

    def __init__(self, modules: Iterable[nn.Module | None], cfg: Optim, lr: float) -> None:
        super().__init__(modules, cfg.model_copy(update={"states": "fp32"}), lr)  # 8-bit states need no package here
        self.moments = [moment for p in self.parameters for _ in range(2) for moment in _moment(p, cfg.states)]

    def step(self, it: int) -> Tensor:
        """Clear the gradients, as after an update."""
        self.adamw.zero_grad(set_to_none=True)
        return torch.empty((), device=META)


def _moment(parameter: Tensor, states: str) -> list[Tensor]:
    """A moment as AdamW keeps it: float32, or codes and a scale for every block of them."""
    if states == "fp32" or not quantises(parameter.shape):
        return [torch.empty_like(parameter)]
    codes = torch.empty_like(parameter, dtype=torch.uint8)
    return [codes, torch.empty(parameter.numel() // CODES_PER_SCALE, device=META)]
