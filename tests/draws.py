"""Draws with a chosen simulation step, and draws that keep what they gave."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from dmd2.core.rng import Draws
from dmd2.method.batches import Batch


@dataclass(frozen=True)
class ChosenStep(Draws):
    """Every shared integer is `k`."""

    k: int = 0

    def shared_integer(self, name: str, low: int, high: int) -> int:
        assert low <= self.k <= high
        return self.k


@dataclass(frozen=True)
class Kept(Draws):
    """Keeps each draw under its name."""

    normals: dict[str, Tensor] = field(default_factory=dict)
    levels: dict[str, tuple[int, int, Tensor]] = field(default_factory=dict)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.normals[name] = super().normal(name, shape)
        return self.normals[name]

    def integers(self, name: str, low: int, high: int) -> Tensor:
        drawn = super().integers(name, low, high)
        self.levels[name] = (low, high, drawn)
        return drawn


def _fields(draws: Draws) -> dict:
    return {name: getattr(draws, name) for name in ("seed", "iteration", "total", "start", "stop", "device")}


def with_step(batch: Batch, k: int) -> Batch:
    """The same batch, whose shared step is `k`."""
    return replace(batch, draws=ChosenStep(**_fields(batch.draws), k=k))


def keeping(batch: Batch) -> Batch:
    """The same batch, whose draws are kept in ``batch.draws.normals`` and ``.levels``."""
    return replace(batch, draws=Kept(**_fields(batch.draws)))
