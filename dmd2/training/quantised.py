"""AdamW whose moments are 8-bit codes with one scale for 256 of them (Dettmers et al. 2022), by torchao."""

from typing import Any

import torch
from torch import Tensor, nn

from dmd2.core.errors import UserError

CODES_PER_SCALE = 256
FEWEST = 4096  # values of a quantised tensor; smaller ones stay float32
SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # whether the moment can be negative

Moments = dict[int, dict[str, Any]]


def adamw(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """AdamW with 8-bit states.

    Raises:
        UserError: torchao is missing.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("optim.states 8bit needs torchao: install this package with [quantised], or torchao") from None
    return AdamW8bit(parameters, block_size=CODES_PER_SCALE, **options)


def quantises(shape: torch.Size) -> bool:
    """Whether moments of that shape are kept in 8 bits."""
    return shape.numel() >= FEWEST and shape.numel() % CODES_PER_SCALE == 0


def packed(moments: Moments) -> Moments:
    """The same state as plain tensors: ``{codes, scale}`` for each quantised moment."""
    return {
        number: {name: _packed(value) if name in SIGNED else value for name, value in state.items()}
        for number, state in moments.items()
    }


def _packed(moment: Tensor) -> Any:
    return {"codes": moment.codes, "scale": moment.scale} if hasattr(moment, "codes") else moment  # type: ignore[attr-defined]


def empty(name: str, parameter: Tensor) -> Tensor:
    """Memory for the moment `name` of a parameter, of the kind that `adamw` keeps it in."""
    from torchao.optim.subclass_8bit import OptimState8bit

    if not quantises(parameter.shape):
        return torch.empty_like(parameter)
    return OptimState8bit.zeros(parameter.shape, SIGNED[name], CODES_PER_SCALE, parameter.device, parameter.dtype)


def fill(moment: Tensor, saved: Any) -> None:
    """Copy what `packed` made of a moment into it; float32 rows (of other processes) are quantised again."""
    if isinstance(saved, dict):
        moment.codes.copy_(saved["codes"])  # type: ignore[attr-defined]
        moment.scale.copy_(saved["scale"])  # type: ignore[attr-defined]
        return
    whole = torch.cat(saved) if isinstance(saved, tuple) else saved
    moment.copy_(whole.to(moment.device))


def floats(codes: Tensor, scale: Tensor, name: str) -> Tensor:
    """The moment `name` that the codes stand for, float32."""
    from torchao.optim.subclass_8bit import OptimState8bit

    table = OptimState8bit.zeros((CODES_PER_SCALE,), SIGNED[name], CODES_PER_SCALE).qmap
    return OptimState8bit(codes, scale, table, SIGNED[name], torch.float32).dequantize()
