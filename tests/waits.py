"""Finds operations for which a GPU and the CPU wait for each other, on a pretended GPU and on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Their result is read on the CPU, or its size depends on values.
READ = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
MOVES = {aten.copy_, aten._to_copy}


class Waits(TorchDispatchMode):
    """Names of waiting operations on tensors of `device`, in `found`; uploads that do not wait are in `uploads`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kind, self.found, self.uploads = device.type, list[str](), list[tuple[int, ...]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        given = [value for value in args if isinstance(value, Tensor)]
        if packet in READ and any(value.device.type == self.kind for value in given):
            self.found.append(f"{function} of shape {tuple(given[0].shape)}")
        if packet in INDEXING and given[0].device.type == self.kind:
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or index.device != given[0].device):
                    self.found.append(f"{function} by {index.dtype} on {index.device}")
        if packet in MOVES:
            source, target = (args[1], args[0]) if packet is aten.copy_ else (args[0], result)
            if source.device != target.device:
                waits = target.device.type == "cpu" or not (kwargs.get("non_blocking") or True in args[2:])
                if waits:
                    self.found.append(f"{function} {source.device} -> {target.device} of {tuple(source.shape)}")
                else:
                    self.uploads.append(tuple(source.shape))
        return result


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[list[tuple[int, ...]]]:
    """Fails where the block makes `device` or the CPU wait; hands over the shapes of uploads that did not wait."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield []
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Waits(device) as waits:
        yield waits.uploads
    assert waits.found == [], waits.found
