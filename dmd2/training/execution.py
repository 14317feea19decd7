"""How passes are executed, beside the method: compiled, or recorded once as CUDA graphs and replayed."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dmd2.core import distributed
from dmd2.core.errors import UserError
from dmd2.core.rng import Draws
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import TrainConfig
from dmd2.method.batches import Batch
from dmd2.method.interfaces import Models
from dmd2.method.step import Logs, train_step
from dmd2.networks.denoisers import Denoiser
from dmd2.networks.flow import FlowDenoiser
from dmd2.training.sharding import UNITS, equal_passes

# Of one function that PyTorch compiles before it runs it as it is: all residual blocks are one function, in as many
# variants as widths, networks, turns, frozen or not; EDM's ImageNet network has about 112.
VARIANTS = 512

Step = Callable[[Models, Iterable[Batch], int, TrainConfig], Logs]
Recording = Callable[[Callable[[], Logs]], Callable[[], Logs]]


def refuse(run: object, cfg: TrainConfig, hardware: Hardware) -> None:
    """Check that this process can train the run in this way.

    Raises:
        UserError: it cannot; the sentence names the key of the cluster file.
    """
    processes, size = distributed.world_size(), hardware.micro_batch or cfg.optim.batch
    if processes > cfg.optim.batch:
        raise UserError(f"{run}: {processes} processes cannot share a batch of {cfg.optim.batch}")
    if hardware.shard and processes > 1 and not equal_passes(cfg.optim.batch, size):
        raise UserError(
            f"{run}: training.shard needs equally many passes in every process, which training.micro_batch "
            f"{hardware.micro_batch} does not give {processes} processes of a batch of {cfg.optim.batch}: change it"
        )
    if cfg.dm.divergence != "rkl" and len(distributed.rows(cfg.optim.batch)) > size:
        told = f"dm.divergence {cfg.dm.divergence} takes means over the batch, which training.micro_batch {size} parts"
        raise UserError(f"{run}: {told}: leave it out of the cluster file, or take more processes")
    if hardware.compiled == "network" and cfg.teacher.parameterisation == "flow":
        raise UserError(f"{run}: training.compiled: a transformer's passes are compiled block by block, write blocks")
    if hardware.graphs:
        device = torch.device(hardware.device).type
        if device != "cuda" or processes > 1:
            told = f"needs one process on a GPU, and there are {processes} on a {device} device"
            raise UserError(f"{run}: training.graphs {told}: leave it out of the cluster file")
        if cfg.optim.states == "8bit":
            raise UserError(f"{run}: training.graphs cannot record the update of optim.states 8bit: leave out one")


def executed(models: Models, hardware: Hardware) -> Step | None:
    """Prepare the networks as `hardware` says; returns what runs in the place of `train_step`, if anything does.

    Raises:
        UserError: these networks cannot be executed so.
    """
    if hardware.graphs and _lengths_vary(models.teacher):
        kind = type(models.teacher.network).__name__
        told = f"of {kind} depend on the lengths of captions: leave it out of the cluster file"
        raise UserError(f"training.graphs records passes of one shape, and those {told}")
    if hardware.compiled != "none":
        compile_passes(models, hardware.compiled, hardware.compile_cache)
    return ReplayedStep(models) if hardware.graphs else None


def compile_passes(models: Models, what: Literal["blocks", "network"], cache: str, backend: str = "inductor") -> None:
    """Let PyTorch compile what student, teacher and critic run, for the shapes that training has.

    Args:
        what: each block by itself, or the whole network, encoder and decoder apart where a pass needs it.
        cache: folder of the compiled code, which later runs of the same networks take from there.
        backend: of ``torch.compile``.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache).resolve()))
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), VARIANTS))
    for denoiser in (models.student, models.teacher, models.critic):
        if what == "network":
            denoiser.compile_passes(backend=backend, dynamic=False, fullgraph=True)
        else:
            for block in blocks_of(denoiser):
                block.compile(backend=backend, dynamic=None if _lengths_vary(denoiser) else False)


def _lengths_vary(denoiser: Denoiser) -> bool:
    return isinstance(denoiser, FlowDenoiser) and denoiser.family.lengths_vary


def blocks_of(denoiser: Denoiser) -> list[nn.Module]:
    """Residual, attention and transformer blocks that are in no other of them, of the network that passes run."""
    if isinstance(denoiser, FlowDenoiser):
        return denoiser.family.blocks(denoiser.running)
    return list(_blocks_in(denoiser.running))


def _blocks_in(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (*UNITS, Attention)):
            yield child
        else:
            yield from _blocks_in(child)


@dataclass(frozen=True)
class HeldDraws(Draws):
    """Draws that keep each tensor which they make, by its address, and give it again when asked again."""

    made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    shared: dict[tuple[str, int, int], int] = field(default_factory=dict)

    @staticmethod
    def of(draws: Draws, made: dict[tuple[Any, ...], Tensor] | None = None) -> "HeldDraws":
        """Held draws for the rows of `draws`."""
        return HeldDraws(**{f.name: getattr(draws, f.name) for f in fields(Draws)}, made={} if made is None else made)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Draws.normal`."""
        return self._held(super().normal, "normal", name, shape)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """See `Draws.integers`."""
        return self._held(super().integers, "integers", name, low, high)

    def uniform(self, name: str) -> Tensor:
        """See `Draws.uniform`."""
        return self._held(super().uniform, "uniform", name)

    def shared_integer(self, name: str, low: int, high: int) -> int:
        """See `Draws.shared_integer`."""
        self.shared[name, low, high] = super().shared_integer(name, low, high)
        return self.shared[name, low, high]

    def _held(self, draw: Callable[..., Tensor], *address: Any) -> Tensor:
        if address not in self.made:
            self.made[address] = draw(*address[1:]).clone()  # not a view, which would hold the draw of all processes
        return self.made[address]

    def refill(self, draws: Draws) -> None:
        """Overwrite each tensor with what `draws` gives for its address."""
        for (kind, *address), tensor in self.made.items():
            tensor.copy_(getattr(draws, kind)(*address))


class ReplayedStep:
    """`train_step` with its kernels recorded once for each kind of iteration, and replayed as one CUDA graph.

    A kind is who is updated, with the integers that all samples share, such as the step of backward simulation. The
    first iteration of a kind runs as usual and tells which tensors are drawn; the second is recorded. Afterwards batch
    and draws are copied into the recorded tensors, and only a replay is launched. So the numbers are those of
    `train_step`, up to what kernels do differently in other memory.

    Args:
        record: makes of a function that launches kernels one that launches them again and returns the logs.
    """

    def __init__(self, models: Models, record: Recording | None = None) -> None:
        self.record = record or _cuda_graph(torch.cuda.graph_pool_handle())
        self.asked: dict[tuple[bool, bool], list[tuple[str, int, int]]] = {}  # shared integers, by turns
        self.addresses: dict[Any, list[dict[tuple[Any, ...], Tensor]]] = {}
        self.replays: dict[Any, tuple[list[Batch], Callable[[], Logs]]] = {}
        for optimiser in (models.student_optimiser, models.critic_optimiser):
            optimiser.hold_rate_on_device()

    def __call__(self, m: Models, micro_batches: Iterable[Batch], it: int, cfg: TrainConfig) -> Logs:
        """One iteration; see `train_step`."""
        batches, turns = list(micro_batches), cfg.critic.turns(it)
        for optimiser in (m.student_optimiser, m.critic_optimiser):
            optimiser.set_rate(it)
        shared = self.asked.get(turns)
        kind = None if shared is None else (turns, *(batches[0].draws.shared_integer(*asked) for asked in shared))
        if kind not in self.addresses:
            return self._first(m, batches, it, cfg)
        if kind not in self.replays:
            held = [
                replace(_copied(batch), draws=HeldDraws.of(batch.draws, made))
                for batch, made in zip(batches, self.addresses[kind], strict=True)
            ]
            self.replays[kind] = held, self.record(lambda: train_step(m, held, it, cfg))
        held, replay = self.replays[kind]
        for mine, batch in zip(held, batches, strict=True):
            assert isinstance(mine.draws, HeldDraws)
            mine.draws.refill(batch.draws)
            for tensor, value in zip(_tensors(mine), _tensors(batch), strict=True):
                tensor.copy_(value)
        return replay()

    def _first(self, m: Models, batches: list[Batch], it: int, cfg: TrainConfig) -> Logs:
        held = [replace(batch, draws=HeldDraws.of(batch.draws)) for batch in batches]
        logs, turns = train_step(m, held, it, cfg), cfg.critic.turns(it)
        draws = [batch.draws for batch in held if isinstance(batch.draws, HeldDraws)]
        self.asked[turns] = list(draws[0].shared)
        self.addresses[turns, *draws[0].shared.values()] = [one.made for one in draws]
        return logs


def _cuda_graph(pool: Any) -> Recording:
    def record(launch: Callable[[], Logs]) -> Callable[[], Logs]:
        graph = torch.cuda.CUDAGraph()
        # Threads pin the next rows and wait for copies of a checkpoint meanwhile, which "global" would not let them do.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logs = launch()
            values = torch.stack([value.float() for value in logs.values()])

        def replay() -> Logs:
            graph.replay()
            return dict(zip(logs, values.clone().unbind(), strict=True))

        return replay

    return record


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in dataclasses and tuples, in order; those of draws are none of a batch."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, Draws):
        for one in fields(value):
            yield from _tensors(getattr(value, one.name))


def _copied(value: Any) -> Any:
    """The same with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    if is_dataclass(value) and not isinstance(value, Draws | type):
        return replace(value, **{one.name: _copied(getattr(value, one.name)) for one in fields(value)})
    return value
