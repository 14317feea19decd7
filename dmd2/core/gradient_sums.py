"""Gradients summed over the processes in buckets, while the backward pass still computes other gradients.

Torch's DistributedDataParallel does it for one forward pass before one backward pass. Here a backward pass follows
several passes of a network, some of which skip its decoder, and gradients are summed, not averaged, since each process
weights its losses by its share of the batch.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from dmd2.core.distributed import world_size

BUCKET = 1 << 24  # elements summed in one message


class GradientSums:
    """Replaces the gradients of `parameters` by their sums over the processes.

    Buckets are filled in the order in which the first update of process 0 completed gradients. Every process sends them
    in this one order, each as soon as it and those before it are complete; `finish` sends what is left, for example
    where a parameter has no gradient. A sum thus never depends on which process was faster, nor on a resume.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.passes = 0
        self.buckets: list[list[int]] = []  # numbers of parameters; laid out by the first `finish`
        self._begin()

    def overlap(self, passes: int) -> None:
        """Send buckets while the last of `passes` backward passes of an update runs, not all of them in `finish`."""
        self.passes = passes
        if world_size() > 1:
            for number, p in enumerate(self.parameters):
                p.register_post_accumulate_grad_hook(lambda _, number=number: self._accumulated(number))

    def finish(self) -> None:
        """Return when every gradient is the sum; a GPU's stream waits for it, the host does not."""
        if world_size() == 1:
            return
        if not self.buckets:
            self._lay_out()
        while self.sent < len(self.buckets):
            self._send()
        for work in self.works:
            work.wait()
        self._begin()

    def _begin(self) -> None:
        self.counts = [0] * len(self.parameters)  # backward passes that have reached each parameter
        self.completed: list[int] = []
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent, self.works = 0, list[dist.Work]()

    def _accumulated(self, number: int) -> None:
        self.counts[number] += 1
        if self.counts[number] > self.passes:
            raise RuntimeError(f"a gradient was summed after {self.passes} backward passes, and another pass came")
        if self.counts[number] < self.passes:
            return
        self.completed.append(number)
        if self.buckets:
            self.missing[self.place[number]] -= 1
            while self.sent < len(self.buckets) and self.missing[self.sent] == 0:
                self._send()

    def _lay_out(self) -> None:
        """Fill buckets in the order of process 0; parameters that its update did not reach come last."""
        rest = sorted(set(range(len(self.parameters))) - set(self.completed))
        order = torch.tensor([*self.completed, *rest], device=self.parameters[0].device)
        dist.broadcast(order, 0)
        size = BUCKET + 1
        for number in order.tolist():
            if size + self.parameters[number].numel() > BUCKET:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(number)
            size += self.parameters[number].numel()
        self.place = {number: place for place, bucket in enumerate(self.buckets) for number in bucket}

    def _send(self) -> None:
        """Begin to sum the next bucket; gradients become views of its memory, so that none is there twice."""
        bucket = [self.parameters[number] for number in self.buckets[self.sent]]
        self.sent += 1
        parameters, gradients = [], []
        for p in bucket:
            if p.grad is not None:
                parameters.append(p)
                gradients.append(p.grad)
        if not gradients:
            return
        flat = torch.empty(sum(p.numel() for p in parameters), dtype=gradients[0].dtype, device=gradients[0].device)
        parts = flat.split([p.numel() for p in parameters])
        views = [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, parameters, strict=True)]
        torch._foreach_copy_(views, gradients)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.works.append(work)
        for p, view in zip(parameters, views, strict=True):
            p.grad = view
