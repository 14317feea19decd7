"""A second queue of a GPU, so that networks look at images while the sampler makes the next ones."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from dmd2.core.upload import pinned

Stream = torch.cuda.Stream | None


@cache
def second(device: torch.device) -> Stream:
    """Another queue of a GPU, always the same, since PyTorch keeps memory for each queue; None elsewhere."""
    return torch.cuda.Stream(device) if pinned(device) else None


def into(stream: Stream) -> AbstractContextManager[object]:
    """What a GPU is asked for inside is put into `stream`."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@contextmanager
def after_current(stream: Stream, given: Iterable[Tensor]) -> Iterator[None]:
    """The same, to be done after what the current queue holds so far, which made `given`."""
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        for tensor in given:
            if tensor.is_cuda:
                tensor.record_stream(stream)  # its memory is not used again before this queue has done with it
    with into(stream):
        yield
