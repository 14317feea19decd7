"""Low-rank students: factors on convolutions and projections, and the plain weights that follow.

Hu et al. (2021): ``W + (alpha / rank) up down``. A state of factors names them ``PATH.lora_down.weight``
``(r, C_in[, k, k])``, ``PATH.lora_up.weight`` ``(C_out, r[, 1, 1])`` and ``PATH.alpha``, PATH being the module's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dmd2.core.precision import float32_products
from dmd2.networks.transformers.family import FAMILIES, family_of

State = dict[str, Tensor]

TARGETS = (  # the ends of the names of the modules that get factors: those of DMD2's SDXL run
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
ADAPTER, IN_SNAPSHOT = "default", "lora."
FACTOR_DOWN, FACTOR_UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_lora(network: Any, rank: int, alpha: float) -> None:
    """Put factors on the `targets_of` a network of diffusers, in place; afterwards only they require a gradient.

    ``down`` is drawn by Kaiming's rule from torch's global generator of the CPU, ``up`` is zero: nothing changes yet.
    """
    from peft import LoraConfig  # its import takes seconds that runs without factors need not pay

    scaled: Any = alpha  # peft declares whole numbers, and takes others
    config = LoraConfig(r=rank, lora_alpha=scaled, lora_dropout=0.0, target_modules=targets_of(network))
    network.add_adapter(config, ADAPTER)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_is_factor(name))


def targets_of(network: nn.Module) -> list[str]:
    """Modules of a network that get factors: by the ends of their names, those of a transformer's blocks in full."""
    kind = type(network).__name__
    if kind not in FAMILIES:
        return list(TARGETS)
    family = family_of(kind)
    return [path for path, m in network.named_modules() if isinstance(m, nn.Linear) and family.has_factors(path)]


def lora_state(network: nn.Module, weights: State | None = None) -> State:
    """The factors and their alpha, on the CPU; empty for a network without.

    `weights` is its state dict where that is not at hand in `network` itself, which may be sharded.
    """
    weights, state = weights or network.state_dict(), State()
    for path, module in _modules(network):
        state[path + DOWN] = weights[path + FACTOR_DOWN].detach().cpu()
        state[path + UP] = weights[path + FACTOR_UP].detach().cpu()
        state[path + ALPHA] = torch.tensor(float(module.lora_alpha[ADAPTER]))
    return state


def merged_state(network: nn.Module, weights: State | None = None) -> State:
    """Weights of the plain network that computes the same, on the CPU; `network` and `weights` stay as they are."""
    plain = _plain(network, weights or network.state_dict())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in plain}


def plain_parameters(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the plain network that computes the same, one by one; of sharded ones the rows of this process.

    A merged row of weights takes its own row of ``up`` and all of ``down``.
    """
    rows = {n: _whole(p) if n.endswith(FACTOR_DOWN) else own(p) for n, p in network.named_parameters()}
    return _plain(network, rows)


def own(p: Any) -> Tensor:
    """The rows of a parameter that this process holds: all, unless it is sharded."""
    return p.to_local() if hasattr(p, "to_local") else p


def _whole(p: Any) -> Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def _plain(network: nn.Module, weights: State) -> Iterator[tuple[str, Tensor]]:
    modules = dict(_modules(network))
    for name, tensor in weights.items():
        path, _, kind = name.rpartition(".")
        path = path.removesuffix(".base_layer")
        if _is_factor(name):
            continue
        if path in modules and kind == "weight":
            down, up = weights[path + FACTOR_DOWN].detach(), weights[path + FACTOR_UP].detach()
            tensor = merged(tensor, down, up, modules[path].scaling[ADAPTER])
        yield f"{path}.{kind}" if path else kind, tensor


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``W + scale up down`` of a linear ``(C_out, C_in)`` or convolution ``(C_out, C_in, k, k)``, in W's dtype."""
    with float32_products("fp32"):  # a training may allow products in TF32
        product = up.float().flatten(1) @ down.float().flatten(1)
    return (weight.float() + scale * product.view_as(weight)).to(weight.dtype)


def snapshot_state(network: nn.Module, weights: State | None = None) -> State:
    """What a snapshot of a student holds: its plain weights and, under ``lora.``, the factors merged into them."""
    factors = {IN_SNAPSHOT + name: value for name, value in lora_state(network, weights).items()}
    return merged_state(network, weights) | factors


def split(snapshot: State) -> tuple[State, State]:
    """Plain weights and factors of what `snapshot_state` returned."""
    factors = {name.removeprefix(IN_SNAPSHOT): v for name, v in snapshot.items() if name.startswith(IN_SNAPSHOT)}
    return {name: v for name, v in snapshot.items() if not name.startswith(IN_SNAPSHOT)}, factors


def adapter_state(factors: State) -> State:
    """Factors as diffusers' loaders read them for a transformer: ``transformer.PATH.lora_A.weight`` and ``lora_B``.

    ``alpha / rank`` is in ``lora_B``, since some of the loaders take an alpha for a sign of another format.
    """
    state = State()
    for path in (name.removesuffix(DOWN) for name in factors if name.endswith(DOWN)):
        down, up, alpha = (factors[path + part] for part in (DOWN, UP, ALPHA))
        state[f"transformer.{path}.lora_A.weight"] = down
        state[f"transformer.{path}.lora_B.weight"] = up * (float(alpha) / len(down))
    return state


def _modules(network: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, m) for name, m in network.named_modules() if ADAPTER in getattr(m, "lora_A", ()))


def _is_factor(name: str) -> bool:
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
