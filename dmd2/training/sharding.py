"""Networks too large for one GPU: parameters split over the processes (FSDP2), activations recomputed in backward.

Every process owns rows of dimension 0 of each parameter, of its gradient, its moments and its EMA, and gathers a
block's whole weights only while it runs that block. Zhao et al. 2023 (PyTorch FSDP), Chen et al. 2016 (checkpointing).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from dmd2.core.distributed import rank, rows_of_part, world_size
from dmd2.core.errors import UserError
from dmd2.networks import song_unet
from dmd2.networks.transformers.family import FAMILIES, REFINERS, family_of
from dmd2.training.checkpoints.parts import Rows, fill

UNITS = (BasicTransformerBlock, ResnetBlock2D, song_unet.Block)  # gathered one at a time; SDXL's largest has 46 M


def sharing(module: nn.Module) -> Any:
    """A copy of a module that shares its tensors' memory until `materialise` or `shard_module` gives the copy its own.

    Copies of a network whose weights are mapped from a file thus take no host memory.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in module.parameters()}
    return deepcopy(module, memo | {id(buffer): buffer.detach() for buffer in module.buffers()})


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None, own: bool = True) -> None:
    """Put the tensors of a module on `device`, one after the other; parameters of floating point become `dtype`.

    Buffers keep theirs: the frequencies of a Fourier embedding do not fit into bfloat16. With `own` each gets memory of
    its own. Without, one of the right device and dtype stays where it is, which is enough for weights that nothing
    changes.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            lowered = dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            kind = dtype if lowered else tensor.dtype
            tensor.data = tensor.data.to(device, kind, copy=own)


def shard_module(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None = None, gathered_as: torch.dtype | None = None
) -> None:
    """Split the parameters of a `Denoiser` or head over all processes, in place, and put them on `device` as `dtype`.

    With `gathered_as` passes run in whole weights of that dtype. Gradients are summed over the processes, in float32,
    not averaged, since each weights its losses by its share of the batch.
    """
    # The head's logits are a view, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=gathered_as, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*units(module), module):
        materialise(unit, device, dtype)
        _wrap(unit, mesh, policy)
    # FSDP gathers the root's parameters for `forward` only; these are other entries.
    for method in ("features", "joined"):
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def units(module: nn.Module) -> list[nn.Module]:
    """Parts that are gathered by themselves, innermost first; `module` holds what is in none of them."""
    network = getattr(module, "network", module)
    blocks = [*getattr(network, "down_blocks", ()), *getattr(network, "up_blocks", ())]
    blocks += [block for block in [getattr(network, "mid_block", None)] if block is not None]
    kind = type(network).__name__
    lists = (*family_of(kind).lists, *REFINERS) if kind in FAMILIES else ()
    blocks += [block for name in lists for block in getattr(network, name, ())]
    inner = [unit for unit in network.modules() if isinstance(unit, UNITS)]
    return [*inner, *blocks]


def _wrap(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    wrapped = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    wrapped.set_gradient_divide_factor(1.0)
    wrapped.set_force_sum_reduction_for_comms(True)
    # Autocast keeps its bfloat16 copies to the end of the pass: of a sharded network they would be all of its weights.
    module.register_forward_hook(lambda *_: torch.clear_autocast_cache())


def local(tensor: Tensor) -> Tensor:
    """The rows of `tensor` that this process owns (all unless it is sharded), sharing its memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def span(tensor: Tensor) -> tuple[int, int] | None:
    """Range ``(first, stop)`` of the rows that this process owns; None for a tensor that is whole in every process."""
    if not isinstance(tensor, DTensor):
        return None
    size = -(-tensor.shape[0] // world_size())
    start = min(rank() * size, tensor.shape[0])
    return start, min(start + size, tensor.shape[0])


def local_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict, with only the rows of this process where a parameter is sharded."""
    return {name: local(value) for name, value in module.state_dict().items()}


def load_local(module: nn.Module, state: Mapping[str, Rows]) -> None:
    """Copy what `local_state` returned into the module's tensors, in place.

    Raises:
        RuntimeError: names or shapes differ.
    """
    own = module.state_dict()
    if odd := sorted(own.keys() ^ state.keys()):
        raise RuntimeError(f"{odd[0]} is in one of the module and its saved state only")
    for name, value in own.items():
        fill(local(value), state[name])


def spans_of(module: nn.Module, name: str) -> dict[str, tuple[int, int]]:
    """Rows that this process owns of the module's sharded tensors, by their path in the state of a training."""
    found = {f"{name}/{path}": span(value) for path, value in module.state_dict().items()}
    return {path: rows for path, rows in found.items() if rows is not None}


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of a state dict, in process 0's host memory; empty in the others, which must call it too."""
    whole = {}
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            whole[name] = full.contiguous() if full is value else full.cpu()
    return whole


def equal_passes(batch: int, micro_batch: int) -> bool:
    """Whether all processes need as many passes for their rows: gathering a block takes all of them."""
    sizes = [len(rows_of_part(batch, world_size(), index)) for index in range(world_size())]
    return len({-(-size // micro_batch) for size in sizes}) == 1


def recompute_activations(network: Any, again: Callable[[], Any] = nullcontext) -> None:
    """Keep only the inputs of a UNet's blocks for backward, which computes the blocks a second time.

    Args:
        again: called in the first pass, makes the context in which the second one runs.

    Raises:
        UserError: the network's class has no such blocks.
    """
    if not getattr(network, "_supports_gradient_checkpointing", False):
        kind = type(network).__name__
        raise UserError(f"training.checkpointing: the class {kind} does not support it; leave it out")
    network.enable_gradient_checkpointing(partial(_recomputed, again))


def _recomputed(again: Callable[[], Any], module: nn.Module, *args: Any) -> Any:
    """``module(*args)``, computed again in backward with the same parameters frozen as in the first pass.

    The critic is frozen only while the student's loss is computed. Computed again unfrozen, it would keep activations
    for gradients that nobody asks for.
    """
    trained, around = [p.requires_grad for p in module.parameters()], again()

    @contextmanager
    def as_before() -> Iterator[None]:
        parameters = list(module.parameters())
        now = [p.requires_grad for p in parameters]
        _set(parameters, trained)
        try:
            with around:
                yield
        finally:
            _set(parameters, now)

    # No block has dropout, so there is no generator state to keep.
    contexts: Any = lambda: (nullcontext(), as_before())  # noqa: E731 - of the first pass and of the second
    return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _set(parameters: list[nn.Parameter], trained: list[bool]) -> None:
    for parameter, flag in zip(parameters, trained, strict=True):
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)
