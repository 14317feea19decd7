"""Checkpoints written by a thread from a copy of the state, while the training goes on."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dmd2.training.checkpoints.checkpoint import Checkpoints
from dmd2.training.checkpoints.parts import flat

LARGEST = 32 << 30  # bytes of a state that is copied


class CheckpointThread:
    """Writes one checkpoint at a time; leave its context to be sure that the last one is whole.

    A write that fails is raised by the next call of `check`, `wait` or `save`; where the context is left by another
    error, it is printed.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.pool = ThreadPoolExecutor(1, "checkpoints")
        self.writing: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state after `step` iterations and have it written; waits for the checkpoint before it.

        A state of more than `LARGEST` bytes is written here and now, tensor by tensor: a copy of it might not fit into
        the memory of the host. That of SDXL trained whole on one GPU takes 62 GB.

        Raises:
            UserError: the checkpoint before it could not be written, or this one if it is written here.
        """
        self.wait()
        if sum(value.nbytes for _, value in flat(state) if isinstance(value, Tensor)) > LARGEST:
            return self.checkpoints.save(step, state)
        copied = host_copy(state)
        arrived = _arrival(any(isinstance(value, Tensor) and value.is_cuda for _, value in flat(state)))

        def write() -> None:
            arrived()
            self.checkpoints.save(step, copied)

        self.writing = self.pool.submit(write)
        return None

    def check(self) -> None:
        """Raise what went wrong in a write that has ended; return at once from one that has not."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raise what went wrong."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "CheckpointThread":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            print(failure, file=sys.stderr, flush=True)


def host_copy(value: Any) -> Any:
    """Nested dicts with their tensors copied to the host and their lists copied.

    From a GPU the copies go into pinned memory, in the order of the stream: what is computed afterwards cannot change
    them, and they are whole when the stream has come so far. PyTorch keeps pinned memory for the next copy.
    """
    if isinstance(value, Mapping):
        return {key: host_copy(one) for key, one in value.items()}
    if not isinstance(value, Tensor):
        return copy(value)
    if value.device.type == "cpu":
        return value.detach().clone()
    place = torch.empty_like(value, device="cpu", pin_memory=torch.cuda.is_available())
    place.copy_(value.detach(), non_blocking=True)
    return place


def _arrival(from_gpu: bool) -> Callable[[], None]:
    """A function that returns when all copies to the host that were begun have arrived."""
    if not (from_gpu and torch.cuda.is_available()):  # a GPU may be pretended
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
