"""What a batch is conditioned on. Free of diffusers, whose import takes seconds that light commands need not pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmd2.core.upload import upload


@dataclass(frozen=True)
class Condition:
    """What a batch is conditioned on; unused fields are None.

    labels: class indices, int64 ``(B,)``. text: encoder states ``(B, L, D)``, L = 77 of CLIP. pooled: ``(B, P)``.
    time_ids: ``(B, 6)``, SDXL only. text_mask: which states are no padding, bool ``(B, L)``; None: all.
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    text_mask: Tensor | None = None

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> Condition:
        """The same condition with its tensors changed, by name."""
        return Condition(**{name: None if value is None else change(name, value) for name, value in vars(self).items()})

    def _masked(self, other: Condition) -> Condition:
        """The same condition, with a mask of its text if `other` has one."""
        if self.text is None or self.text_mask is not None or other.text_mask is None:
            return self
        return replace(self, text_mask=self.text.new_ones(self.text.shape[:2], dtype=torch.bool))

    def join(self, other: Condition) -> Condition:
        """Concatenate two conditions along the batch.

        A field that only one of them has is left out: an unconditional network reads no labels, and its real images
        have none. Any other network then fails for want of it. A missing `text_mask` hides nothing.
        """
        one, other = self._masked(other), other._masked(self)
        both = Condition(**{name: value for name, value in vars(one).items() if getattr(other, name) is not None})
        return both._each(lambda name, value: torch.cat([value, getattr(other, name)]))

    def parts(self, count: int) -> tuple[Condition, Condition]:
        """The condition of the first `count` samples, and that of the others."""
        return self._each(lambda _, value: value[:count]), self._each(lambda _, value: value[count:])

    def expand(self, count: int) -> Condition:
        """Repeat a condition of one sample `count` times."""
        return self._each(lambda _, value: value.expand(count, *value.shape[1:]))

    def where(self, chosen: Tensor, other: Condition) -> Condition:
        """Samples that `chosen` ``(B,)`` names take the condition of one sample `other`, as far as it has fields."""

        def choose(name: str, mine: Tensor) -> Tensor:
            theirs = getattr(other, name)
            mask = chosen.reshape(-1, *[1] * (mine.ndim - 1))
            return mine if theirs is None else torch.where(mask, theirs.to(mine.dtype), mine)

        return self._each(choose)

    def to(self, device: torch.device) -> Condition:
        """The same condition on `device`."""
        return self._each(lambda _, value: upload(value, device))

    def cast(self, dtype: torch.dtype) -> Condition:
        """The same condition with its embeddings in `dtype`."""
        return self._each(lambda name, value: value.to(dtype) if name in ("text", "pooled") else value)
