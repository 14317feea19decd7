"""Low-rank factors in kohya's format, the one that tools for Stable Diffusion read: both ways, and merged onto a UNet.

A file names them ``lora_unet_PATH.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, PATH being a module of
diffusers' UNet with underscores for dots: so does the LoRA that DMD2's authors released. Files with the block names of
Stability's own code (``input_blocks_4_1_...``) are refused. diffusers' `convert_state_dict_to_kohya` is not used, since
it writes the rank for every alpha.
"""

from pathlib import Path

import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.data.sets import save_shard
from dmd2.networks.lora import ALPHA, DOWN, UP, State, merged

PREFIX = "lora_unet_"
STABILITY = ("input_blocks_", "middle_block_", "output_blocks_")


def is_kohya(state: State) -> bool:
    """Whether a file's tensors are factors in kohya's format, of whatever network."""
    return any(name.endswith((DOWN, UP)) for name in state)


def kohya_name(name: str) -> str:
    """What a tensor of `dmd2.networks.lora` is called in kohya's format."""
    kind = next(kind for kind in (DOWN, UP, ALPHA) if name.endswith(kind))
    return PREFIX + name.removesuffix(kind).replace(".", "_") + kind


def write_kohya(file: Path, factors: State, dtype: torch.dtype = torch.float16) -> None:
    """Write the factors of a UNet (see `dmd2.networks.lora`) as a safetensors file in kohya's format, atomically."""
    save_shard(file, {kohya_name(name): tensor.to(dtype) for name, tensor in factors.items()})


def from_kohya(state: State, weights: State, source: Path) -> State:
    """The factors of a file in our names (`dmd2.networks.lora`), each with an alpha: the rank, if not given.

    Args:
        state: the file's tensors. weights: those of the plain UNet it is for. source: the file, for messages.

    Raises:
        UserError: a tensor is foreign, missing, or does not fit the UNet.
    """
    paths = {name.removesuffix(".weight"): tensor for name, tensor in weights.items() if name.endswith(".weight")}
    modules = {PREFIX + path.replace(".", "_"): path for path, tensor in paths.items() if tensor.ndim in (2, 4)}
    factors: State = {}
    for name, tensor in state.items():
        module, dot, kind = name.partition(".")
        if module not in modules or dot + kind not in (DOWN, UP, ALPHA):
            raise UserError(f"{source}: {name} {_why_foreign(name, module in modules)}")
        factors[f"{modules[module]}{dot}{kind}"] = tensor
    for path in dict.fromkeys(name.partition(".lora_")[0].removesuffix(ALPHA) for name in factors):
        if missing := [part for part in (DOWN, UP) if path + part not in factors]:
            raise UserError(f"{source}: {kohya_name(path + missing[0])} is missing: the file is not whole")
        down, up = factors[path + DOWN], factors[path + UP]
        _check_shapes(down, up, paths[path], f"{source}: {PREFIX}{path.replace('.', '_')}")
        if factors.setdefault(path + ALPHA, torch.tensor(float(len(down)))).numel() != 1:
            raise UserError(f"{source}: {kohya_name(path + ALPHA)} is no single number")
    return factors


def merge(weights: State, factors: State, scale: float = 1.0) -> State:
    """Weights with the factors added, ``W + scale alpha / rank up down``; the arguments stay as they are."""
    state = dict(weights)
    for path in (name.removesuffix(DOWN) for name in factors if name.endswith(DOWN)):
        down, up, alpha = (factors[path + part] for part in (DOWN, UP, ALPHA))
        name = f"{path}.weight"
        state[name] = merged(weights[name], down, up, scale * float(alpha) / len(down))
    return state


def _why_foreign(name: str, known: bool) -> str:
    if known:
        return "is no part of a plain LoRA, which has lora_down, lora_up and alpha: LoHa, LoKr and DoRA are not read"
    if name.startswith(tuple(PREFIX + block for block in STABILITY)):
        return "has the block names of Stability's code: only those of diffusers (down_blocks_0_...) are read"
    if not name.startswith(PREFIX):
        return f"is no factor of a UNet in kohya's format ({PREFIX}...): factors of text encoders are not read"
    return "belongs to no linear layer or convolution of the UNet: the file is of another network"


def _check_shapes(down: Tensor, up: Tensor, weight: Tensor, where: str) -> None:
    rank = len(down) if down.ndim else 0
    ends = (*weight.shape[:1], rank, *(1 for _ in weight.shape[2:]))
    if rank == 0 or down.shape[1:] != weight.shape[1:] or up.shape != ends:
        found = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise UserError(f"{where}: factors of shapes {found} do not fit a weight of {tuple(weight.shape)}")
