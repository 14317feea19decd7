"""AdamW with clipping and warm-up keyed to the iteration (algorithm: paper App. F, its code's schedule)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.config import Optim
from dmd2.distributed import sum_gradients


class Optimiser:
    """Updates the parameters of some modules; decay applies to all of them, as in the paper's runs.

    The learning rate at iteration `it` is ``lr * min(1, it * ticks / warmup)``: exactly 0 at iteration 0, and counted
    in iterations even for the student, which is not updated in each.
    """

    def __init__(self, modules: Iterable[nn.Module | None], cfg: Optim, lr: float, clips: bool = True) -> None:
        self.parameters = [
            p for module in modules if module is not None for p in module.parameters() if p.requires_grad
        ]
        self.cfg, self.lr, self.clips = cfg, lr, clips
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=lr, betas=cfg.betas, weight_decay=cfg.weight_decay, eps=1e-8, fused=True
        )

    def lr_at(self, it: int) -> float:
        """Learning rate of iteration `it`."""
        return self.lr * min(1.0, it * self.cfg.ticks_per_iteration / self.cfg.warmup) if self.cfg.warmup else self.lr

    def step(self, it: int) -> Tensor:
        """Sum gradients over processes, clip their joint norm, update, clear; returns the norm before clipping."""
        sum_gradients(self.parameters)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clips:
            nn.utils.clip_grads_with_norm_(self.parameters, self.cfg.clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr_at(it)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """State of AdamW."""
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.adamw.load_state_dict(state)
