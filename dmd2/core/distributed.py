"""Data-parallel training in plain torch.distributed: every process computes its rows of the global batch.

Gradients are summed, not averaged, because each process weights its losses by its share of the global batch. The update
thus equals that of one process up to the order of the sum. Without a process group all functions are the identity.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from fcntl import LOCK_EX, LOCK_NB, flock
from itertools import count
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmd2.core.errors import UserError
from dmd2.core.files import held, trust

BUCKET = 1 << 24  # elements of gradients summed in one message
TIMEOUT = timedelta(minutes=30)  # of a collective
LEAVING = timedelta(minutes=1)  # for which process 0 waits for the others at the end
PATIENCE = timedelta(days=1)  # of the processes that wait while process 0 verifies files
_taken: list[tuple[int, Any]] = []  # the GPU of this process, with the open file whose lock says so
_agreed: list[tuple[Any, Iterator[int]]] = []  # while there is a group: its store for `agreed`, and numbers of calls


def rank() -> int:
    """Number of this process; 0 writes all files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device, verify: Callable[[], None] | None = None) -> Iterator[None]:
    """Join the processes that the environment names (torchrun's variables); nothing to join when there is one.

    Args:
        device: of this process.
        verify: process 0 calls it before the first collective, which could time out; the others wait for up to a day
            and then trust the files that it verified (see `dmd2.core.files.held`).

    Raises:
        UserError: from `verify`, in process 0; the others raise one that says that process 0 ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, me, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if verify is not None:
        verify_first(store, me, verify)
    store.set_timeout(TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("training", store), rank=me, world_size=size, timeout=TIMEOUT
    )
    _agreed.append((dist.PrefixStore("agreed", store), count()))
    try:
        yield
        _leave(store, me, size)
    except BaseException:
        if backend == "nccl":  # the others may be in a sum, for which a destruction would wait, and swallow the error
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        _agreed.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def _leave(store: Any, me: int, size: int) -> None:
    """Process 0 ends last, since the others may still ask the store that ends with it; not if one of them has died."""
    store.set(f"left/{me}", "")
    if me == 0:
        with suppress(RuntimeError):
            store.wait([f"left/{other}" for other in range(size)], LEAVING)


def verify_first(store: Any, me: int, verify: Callable[[], None]) -> None:
    """Run `verify` in process 0 while the others wait on the store, then tell them which files it verified."""
    if me == 0:
        try:
            verify()
        except BaseException:
            store.set("verified", "null")
            raise
        store.set("verified", json.dumps(held()))
        return
    try:
        store.wait(["verified"], PATIENCE)
        files = json.loads(store.get("verified"))
    except RuntimeError:  # the store ended with process 0
        files = None
    if files is None:
        raise UserError("process 0 of this training ended before it began; its message says why")
    trust(files)


def rows_of_part(total: int, parts: int, index: int) -> range:
    """Rows of part `index` of `total`: contiguous, each in exactly one part, sizes differing by at most one."""
    return range(total * index // parts, total * (index + 1) // parts)


def rows(total: int) -> range:
    """Rows of a global batch of `total` that this process computes."""
    return rows_of_part(total, world_size(), rank())


class GradientSums:
    """Replaces the gradients of `parameters` by their sums over the processes, while others are still computed.

    Torch's DistributedDataParallel does it for one forward pass before one backward pass and for averages. Here a
    backward pass follows several passes of a network, some of which skip its decoder.

    Buckets are filled in the order in which the first update of process 0 completed gradients. Every process sends them
    in this one order, each as soon as it and those before it are complete; `finish` sends what is left, for example
    where a parameter has no gradient. A sum thus never depends on which process was faster, nor on a resume.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.passes = 0
        self.buckets: list[list[int]] = []  # numbers of parameters; laid out by the first `finish`
        self._begin()

    def overlap(self, passes: int, reached: Sequence[nn.Parameter] | None = None) -> None:
        """Send buckets while the last of `passes` backward passes of an update runs, not all of them in `finish`.

        `reached` are what backward reaches in the place of `parameters`: their copies in another dtype.
        """
        self.passes = passes
        if world_size() > 1:
            for number, p in enumerate(reached or self.parameters):
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
        assert self.parameters[number].grad is not None  # of a copy in another dtype it must be handed over before
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


def sum_values(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum scalars over the processes, in one message; every process must name the same ones."""
    if world_size() == 1 or not values:
        return values
    names = sorted(values)
    total = torch.stack([values[name].float() for name in names])
    dist.all_reduce(total)
    return dict(zip(names, total, strict=True))


def sum_over(value: Tensor) -> Tensor:
    """Sum of a tensor over the processes."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def collected_lines(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON objects of all processes, in their order, on every process. All processes wait for each other here."""
    if world_size() == 1:
        return [value]
    found: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(found, value)
    return found


def agreed(value: int) -> int:
    """Process 0's value, on every process, without a wait for what GPUs still compute.

    Every process must ask equally often. A value is forgotten a thousand calls later.
    """
    if world_size() == 1:
        return value
    ((store, calls),) = _agreed
    number = next(calls)
    if rank() != 0:
        return int(store.get(str(number)))
    store.set(str(number), str(value))
    store.delete_key(str(number - 1000))
    return value


def local_device(kind: str, job: str) -> torch.device:
    """Device of this process for ``cpu``, ``cuda`` or ``auto``; each process of a node takes its own GPU.

    So do jobs of one process that run side by side on this machine, without a scheduler to give them theirs.

    Raises:
        UserError: a GPU is asked for and there is none; it names the key of the cluster file, jobs.`job`.device.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"jobs.{job}.device is cuda, but this process sees no GPU: check jobs.{job}.gpu or gres in the cluster "
            "file, or set device: auto"
        )
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if kind == "cuda" and "SLURM_JOB_ID" not in os.environ and torch.cuda.device_count() > 1:
        gpu = torch.device("cuda", _free_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(gpu)
        return gpu
    return torch.device(kind)


def _free_gpu(count: int) -> int:
    """A GPU of this machine that no other job of this user has taken, kept until this process ends; else any."""
    if not _taken:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == count else [str(index) for index in range(count)]
        for index, name in enumerate(names):
            file = open(Path(gettempdir()) / f"dmd2-{os.getuid()}-gpu-{name}.lock", "a")  # noqa: SIM115 - kept
            try:
                flock(file, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _taken.append((index, file))
            break
        else:
            return os.getpid() % count
    return _taken[0][0]
