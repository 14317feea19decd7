"""What a batch is conditioned on. Free of diffusers, whose import takes seconds that light commands need not pay."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a batch is conditioned on; unused fields are None.

    labels: class indices, int64 ``(B,)``. text: encoder states ``(B, L, D)``, L = 77 of CLIP. pooled: ``(B, P)`` and
    time_ids ``(B, 6)``, SDXL only.
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def join(self, other: Condition) -> Condition:
        """Concatenate two conditions along the batch."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Condition(**{name: None if a is None else torch.cat([a, b]) for name, (a, b) in pairs.items()})

    def expand(self, count: int) -> Condition:
        """Repeat a condition of one sample `count` times."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{k: None if v is None else v.expand(count, *v.shape[1:]) for k, v in values.items()})

    def where(self, chosen: Tensor, other: Condition) -> Condition:
        """Samples that `chosen` ``(B,)`` names take the condition of one sample `other`, as far as it has fields."""
        values = {}
        for name, mine in ((f.name, getattr(self, f.name)) for f in fields(self)):
            theirs = getattr(other, name)
            mask = None if mine is None else chosen.reshape(-1, *[1] * (mine.ndim - 1))
            values[name] = mine if theirs is None or mask is None else torch.where(mask, theirs.to(mine.dtype), mine)
        return Condition(**values)

    def to(self, device: torch.device) -> Condition:
        """The same condition on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{k: None if v is None else v.to(device) for k, v in values.items()})

    def cast(self, dtype: torch.dtype) -> Condition:
        """The same condition with its embeddings in `dtype`."""
        cast = {name: None if (v := getattr(self, name)) is None else v.to(dtype) for name in ("text", "pooled")}
        return replace(self, **cast)
