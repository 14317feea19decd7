"""Addressed randomness: every draw is a function of what it is for, never of what was drawn before.

So resuming needs no generator state, ablation arms share the noise of the terms they share, and numbers do not depend
on the number of processes, the micro-batch or the evaluation batch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dmd2.core.upload import pinned, upload

OFFICIAL_BATCH = 128  # of each process of the official ImageNet evaluator


def stream(address: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator seeded by a hash of `address`, for example ``"0/1200/critic/noise"`` (seed / iteration / name)."""
    key = hashlib.blake2b(address.encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "big"))


@lru_cache(maxsize=4)  # the sets that one training reads
def orders(seed: int, name: str, size: int) -> Callable[[int], Tensor]:
    """The order of a set of `size` items in an epoch, int32 ``(size,)`` where that is enough.

    It is computed once an epoch, and the last two epochs are held: 80 MB for a set of ten million.
    """

    @lru_cache(maxsize=2)
    def order(epoch: int) -> Tensor:
        drawn = torch.randperm(size, generator=stream(f"{seed}/epoch{epoch}/{name}"))
        return drawn.int() if size < 1 << 31 else drawn

    return order


@dataclass(frozen=True)
class Draws:
    """Draws of one iteration for rows `start:stop` of a global batch of `total` samples.

    Every draw is made for the whole global batch and sliced, so a sample's numbers are the same whichever rank or
    micro-batch it lands in.
    """

    seed: int
    iteration: int
    total: int
    start: int
    stop: int
    device: torch.device | str = "cpu"

    def _stream(self, name: str) -> torch.Generator:
        return stream(f"{self.seed}/{self.iteration}/{name}", self.device)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, float32, shape ``(stop - start, *shape)``."""
        draw = torch.randn((self.total, *shape), generator=self._stream(name), device=self.device)
        return draw[self.start : self.stop]

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Uniform integers in ``low..high``, both inclusive, int64, shape ``(stop - start,)``."""
        draw = torch.randint(low, high + 1, (self.total,), generator=self._stream(name), device=self.device)
        return draw[self.start : self.stop]

    def uniform(self, name: str) -> Tensor:
        """Uniform in [0, 1), float64, shape ``(stop - start,)``."""
        draw = torch.rand(self.total, generator=self._stream(name), device=self.device, dtype=torch.float64)
        return draw[self.start : self.stop]

    def between(self, name: str, low: Tensor, high: Tensor) -> Tensor:
        """Uniform integers in the sample's own range ``low..high`` ``(stop - start,)``, both inclusive, int64."""
        return low + (self.uniform(name) * (high - low + 1)).long()

    def shared_integer(self, name: str, low: int, high: int) -> int:
        """One integer in ``low..high`` (inclusive) for the whole global batch.

        Drawn on the CPU on every device, since reading it back from a GPU would stop the step there.
        """
        return int(torch.randint(low, high + 1, (1,), generator=stream(f"{self.seed}/{self.iteration}/{name}")))

    def shuffled(self, name: str, size: int) -> Tensor:
        """Indices into a set of `size` items, without replacement within an epoch, int64 ``(stop - start,)``, CPU."""
        order, first = orders(self.seed, name, size), self.iteration * self.total
        start, stop = first + self.start, first + self.stop
        epochs = range(start // size, (stop - 1) // size + 1)
        parts = [order(epoch)[max(start - epoch * size, 0) : stop - epoch * size] for epoch in epochs]
        return torch.cat(parts).long()


def sample_noise(seeds: list[int], shape: tuple[int, ...], name: str, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise that belongs to each sample's seed, float32, shape ``(len(seeds), *shape)``.

    Drawn on the CPU, so an image is the same on one GPU or eight, in a batch of 7 or 256. A GPU works meanwhile on what
    it was asked for before.
    """
    noise = torch.empty((len(seeds), *shape), pin_memory=pinned(device))
    for row, seed in zip(noise, seeds, strict=True):
        torch.randn(shape, generator=stream(f"sample/{seed}/{name}"), out=row)
    return upload(noise, device)


def sample_labels(seeds: list[int], classes: int, rule: str) -> Tensor:
    """Class of each sample seed: ``cyclic`` (seed mod classes) or ``random`` (uniform, addressed by the seed).

    ``cyclic-on-P-ranks`` repeats the official evaluator on P processes: each walks the same list of labels in batches
    of 128 that are then gathered, so that classes are not balanced.
    """
    if rule == "random":
        return torch.cat([torch.randint(classes, (1,), generator=stream(f"sample/{seed}/label")) for seed in seeds])
    ranks = int(rule.split("-")[2]) if rule != "cyclic" else 1
    batch = OFFICIAL_BATCH
    return torch.tensor([(seed // (ranks * batch) * batch + seed % batch) % classes for seed in seeds])
