"""AdamW with clipping and warm-up keyed to the iteration (algorithm: paper App. F, its code's schedule)."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.core import distributed
from dmd2.core.distributed import GradientSums, sum_over
from dmd2.experiment.config import Optim
from dmd2.networks.denoisers import Denoiser, reached
from dmd2.training import quantised
from dmd2.training.checkpoints.parts import fill
from dmd2.training.sharding import local, span


class Optimiser:
    """Updates the parameters of some modules; decay applies to all of them, as in the paper's runs.

    Of sharded parameters a process updates only the rows that it owns, as plain tensors that share their memory. The
    learning rate at iteration `it` is ``lr * min(1, it * ticks / warmup)``: 0 at iteration 0. Iterations count for the
    student, too, which is not updated in each of them.

    Raises:
        UserError: 8-bit states are asked for, and their package is missing.
    """

    def __init__(self, modules: Iterable[nn.Module | None], cfg: Optim, lr: float, clips: bool = True) -> None:
        self.modules = [module for module in modules if module is not None]
        self.denoisers = [module for module in self.modules if isinstance(module, Denoiser)]
        self.parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self.cfg, self.lr, self.clips, self.rate_is_held = cfg, lr, clips, False
        self.sharded = any(span(p) is not None for p in self.parameters)
        self.sums = GradientSums(self.parameters)
        self.owned = [nn.Parameter(local(p)) for p in self.parameters] if self.sharded else self.parameters
        options: dict[str, Any] = {"lr": lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay, "eps": 1e-8}
        self.adamw: torch.optim.Optimizer
        if cfg.states == "8bit":
            self.adamw = quantised.adamw(self.owned, **options)
        else:
            self.adamw = torch.optim.AdamW(self.owned, **options, fused=True)

    def overlap(self, passes: int) -> None:
        """Prepare for `passes` backward passes before an update, and sum gradients over processes in the last one.

        Gradients of bfloat16 weights are handed over one by one then, since sums are made of the float32 ones. FSDP
        does both by itself.
        """
        if not self.sharded:
            for denoiser in self.denoisers if passes > 1 or distributed.world_size() > 1 else []:
                denoiser.hand_over_early()  # before the sums' own hooks
            parameters = [p for module in self.modules for p in reached(module).parameters() if p.requires_grad]
            self.sums.overlap(passes, parameters)

    def lr_at(self, it: int) -> float:
        """Learning rate of iteration `it`."""
        return self.lr * min(1.0, it * self.cfg.ticks_per_iteration / self.cfg.warmup) if self.cfg.warmup else self.lr

    def set_rate(self, it: int) -> None:
        """Set the learning rate of iteration `it`."""
        for group in self.adamw.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr_at(it))
            else:
                group["lr"] = self.lr_at(it)

    def hold_rate_on_device(self) -> None:
        """Keep the learning rate in a float32 tensor that `step` leaves alone: a replayed update reads it there."""
        self.rate_is_held = True
        for group in self.adamw.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=self.owned[0].device)
            group["capturable"] = self.owned[0].is_cuda

    def step(self, it: int) -> Tensor:
        """Sum gradients over processes, clip their joint norm, update, clear; returns the norm before clipping."""
        for denoiser in self.denoisers:
            denoiser.hand_over()
        norm = self._joint_norm()
        if self.clips:
            nn.utils.clip_grads_with_norm_(self.owned, self.cfg.clip, norm)
        if not self.rate_is_held:
            self.set_rate(it)
        # For a CPU it takes longer to compile the 8-bit update for each shape of parameter than to run it.
        eager = self.cfg.states == "8bit" and not norm.is_cuda
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        for p in self.parameters:
            p.grad = None
        for denoiser in self.denoisers:
            denoiser.refresh()
        return norm

    def _joint_norm(self) -> Tensor:
        """Norm of the gradients summed over all processes; every process then holds the sum, or its rows of it."""
        if not self.sharded:
            self.sums.finish()
            return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        for p, own in zip(self.parameters, self.owned, strict=True):
            own.grad = None if p.grad is None else local(p.grad)
        mine = nn.utils.get_total_norm([own.grad for own in self.owned if own.grad is not None])
        return sum_over(mine.square()).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's moments; of sharded parameters, those of the rows that this process owns."""
        moments = self.adamw.state_dict()["state"]
        return {"state": quantised.packed(moments) if self.cfg.states == "8bit" else moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy what `state_dict` returned into the moments, in place.

        An optimiser that has not stepped yet has no moments: they are made first, on the device of their parameters.
        """
        eight = self.cfg.states == "8bit"
        for number, parameter in enumerate(self.owned):
            saved, live = state["state"].get(number), self.adamw.state[parameter]
            if saved is None:
                live.clear()
                continue
            for name, value in saved.items():
                if name not in live:
                    live[name] = self._empty(name, parameter)
                (quantised.fill if eight and name in quantised.SIGNED else fill)(live[name], value)

    def _empty(self, name: str, parameter: Tensor) -> Tensor:
        """Memory for one entry of AdamW's state, of the device and kind that its own update would choose."""
        if name in quantised.SIGNED:
            return quantised.empty(name, parameter) if self.cfg.states == "8bit" else torch.empty_like(parameter)
        return torch.zeros((), device="cpu" if self.cfg.states == "8bit" else parameter.device)

    def spans(self) -> dict[str, tuple[int, int]]:
        """Rows that this process owns of each sharded parameter, by its number."""
        found = {str(i): span(p) for i, p in enumerate(self.parameters)}
        return {name: rows for name, rows in found.items() if rows is not None}
