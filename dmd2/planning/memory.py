"""Memory and arithmetic of a training iteration, counted on PyTorch's meta device: shapes run, no weights exist.

`Counted` runs the real `train_step` on networks without data; `dmd2.planning.ledger` adds up memory and arithmetic.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmd2.core.errors import UserError
from dmd2.core.files import read_json
from dmd2.data.sets import TensorSet
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import TEACHERS
from dmd2.method.step import Models, train_step
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Denoiser, reached
from dmd2.networks.lora import add_lora
from dmd2.networks.lpips import Lpips
from dmd2.planning.iteration_shapes import META, ShapeBatches, ShapeOptimiser, condition_of
from dmd2.planning.ledger import GpuFunctions, Ledger, rounded
from dmd2.training.build import build_head, hold_lowered, in_bfloat16, tap_blocks
from dmd2.training.sharding import recompute_activations, units
from dmd2.training.teachers import build_network, wrap

FLOAT = 4  # bytes
SAMPLED_AT = (1, 8, 64)  # micro-batches whose memory is counted; between and beyond them it is linear


class Iteration(NamedTuple):
    """One iteration of one process: bytes alive at its worst moment, and floating-point operations."""

    peak: int
    flops: int


@dataclass(frozen=True)
class Memory:
    """Bytes in the memory of one GPU, and how they grow with the images of one forward pass.

    standing: weights by network and AdamW's moments. gradients: of the larger of the two updates. points: micro-batch
    and counted peak, linear between and beyond.
    """

    standing: dict[str, int]
    gradients: int
    points: tuple[tuple[int, int], ...]

    def at(self, micro_batch: int, accumulated: bool = False) -> int:
        """Peak with so many images per forward pass; accumulated gradients stay."""
        pairs = list(pairwise(self.points))
        (x0, y0), (x1, y1) = next((pair for pair in pairs if micro_batch <= pair[1][0]), pairs[-1])
        peak = y0 + (y1 - y0) * (micro_batch - x0) / (x1 - x0)
        return round(peak) + accumulated * self.gradients

    @property
    def per_image(self) -> float:
        """Bytes that one more image takes, at large micro-batches."""
        (x0, y0), (x1, y1) = self.points[-2:]
        return (y1 - y0) / (x1 - x0)

    def largest(self, available: float, share: int) -> int:
        """Images per forward pass that fit, at most the GPU's share of a batch; less than the share is accumulated."""
        if self.at(share) <= available:
            return share
        return next((count for count in range(share - 1, 0, -1) if self.at(count, True) <= available), 0)


class Setup(NamedTuple):
    """How a GPU trains: over how many networks are split (1: not at all), and whether activations are recomputed."""

    parts: int = 1
    checkpointing: bool = False


WHOLE = Setup()


class Counted:
    """Models of a run on the meta device, and what its iterations take."""

    def __init__(self, cfg: TrainConfig, setup: Setup = WHOLE) -> None:
        self.cfg, self.setup = cfg, setup
        self.functions = GpuFunctions()
        self.models = self._models(architecture(cfg))
        self.ema = deepcopy(self.models.student) if cfg.optim.ema else None

    def _models(self, spec: dict[str, Any]) -> Models:
        cfg = self.cfg
        with META:
            network = build_network(spec, 0).requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        precision, form = cfg.train.precision, cfg.teacher.parameterisation
        teacher = self._on_gpu(wrap(network, form, precision, **cfg.teacher.flow))
        tap_blocks(teacher, cfg)
        # A schedule is copied to the device when it is first used: before the teacher is copied and a ledger counts.
        schedule, level = teacher.schedule, torch.zeros(1, dtype=torch.long, device=META)
        schedule.alpha_sigma(schedule.time(level), torch.float32)
        student, critic = (self._on_gpu(deepcopy(teacher).train().requires_grad_(True)) for _ in range(2))
        if (lora := cfg.generator.lora) is not None:
            with META:
                add_lora(student.network, lora.rank, lora.alpha)
        if self.setup.checkpointing:
            for trained in (student, critic):
                recompute_activations(trained.network, lambda: self.functions.again(self.functions.lowered))
        if "teacher" in in_bfloat16(cfg):
            nn.Module.to(teacher.network, torch.bfloat16)  # diffusers' own `to` prints a needless warning
        hold_lowered(cfg, student, critic)
        with META:
            head = build_head(critic, cfg, 0, META) if cfg.gan.on else None
        made = [ShapeOptimiser(modules, cfg.optim, 1.0) for modules in ([student], [critic, head])]
        self.states = [moment for optimiser in made for moment in optimiser.moments]
        if self.setup.parts > 1:
            for module in (student, teacher, critic):
                for unit in units(module):
                    unit.register_forward_hook(lambda *_: self.functions.clear())
        null = self.condition(teacher, 1) if cfg.guided else None
        return Models(student, teacher, critic, head, made[0], made[1], null, _distance(cfg))

    def _on_gpu(self, denoiser: Denoiser) -> Denoiser:
        """Let a denoiser use the modelled autocast of a GPU."""
        autocast: Any = lambda _: self.functions.autocast(denoiser.lowered)  # noqa: E731
        denoiser.autocast = autocast  # type: ignore[method-assign]
        return denoiser

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks that a training holds, by name."""
        m = self.models
        found = {"student": m.student, "teacher": m.teacher, "critic": m.critic, "head": m.head, "EMA": self.ema}
        return {
            name: module for name, module in {**found, "LPIPS": m.distance}.items() if isinstance(module, nn.Module)
        }

    @property
    def copies(self) -> dict[str, nn.Module]:
        """Bfloat16 copies in which passes run; FSDP gathers them block by block instead."""
        denoisers = {"student": self.models.student, "critic": self.models.critic} if self.setup.parts == 1 else {}
        return {f"{name} in bf16": d.running for name, d in denoisers.items() if d.running is not d.network}

    @property
    def transient(self) -> int:
        """Most bytes of whole weights and gradients that FSDP holds at once; 0 unless networks are split.

        Twice the largest part (one runs, the next is gathered), each also as the flat buffer of its message, and one's
        gradients in such a buffer, float32; what is in no part of student and critic is whole while they run.
        """
        if self.setup.parts == 1:
            return 0
        sizes, roots = [0], 0
        for module in (self.models.student, self.models.critic, self.models.teacher):
            taken: set[int] = set()
            for unit in units(module.running):
                own = [p for p in unit.parameters() if id(p) not in taken]
                taken |= {id(p) for p in own}
                sizes.append(4 * _size(own) + FLOAT * sum(p.numel() for p in own))
            if module is not self.models.teacher:
                roots += _size(p for p in module.running.parameters() if id(p) not in taken)
        return max(sizes) + roots

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by network."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.modules.items()}

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of parameters and buffers by network."""
        return {name: _size([*m.parameters(), *m.buffers()]) for name, m in self.modules.items()}

    @property
    def trained(self) -> dict[str, int]:
        """Parameters that are trained, by network."""
        return {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in self.modules.items()}

    @property
    def moments(self) -> int:
        """Bytes of the states of both AdamW."""
        return _size(self.states)

    @property
    def gradients(self) -> int:
        """Bytes of the larger of the two sets of gradients; they are never alive together."""
        return max(_size(made.parameters) for made in (self.models.student_optimiser, self.models.critic_optimiser))

    def iteration(self, micro_batch: int, update_student: bool = True, micro_batches: int = 1) -> Iteration:
        """What one iteration of one process takes, with AdamW's states in place.

        Args:
            micro_batch: images per forward pass. micro_batches: forward passes before an update, 2 standing for more.
        """
        cfg = self.cfg
        it = next((i for i in range(cfg.critic.ratio) if cfg.critic.turns(i)[0] == update_student), None)
        if it is None:
            return Iteration(0, 0)  # at ratio 1 the student is always updated
        rows = self.rows(micro_batch)
        batches = ShapeBatches(cfg, 0, META, micro_batch, rows, rows)
        parts = self.setup.parts
        holders = [*self.modules.values(), *self.copies.values()]
        standing = [t for m in holders for t in (*m.parameters(), *m.buffers())] + self.states
        with Ledger(standing, parts) as ledger, self.functions:
            early = (self.models.student, self.models.critic) if parts > 1 or micro_batches > 1 else ()
            hooks = [hook for denoiser in early for hook in denoiser.hand_over_early()]
            hooks += [
                p.register_post_accumulate_grad_hook(lambda _, own=own: ledger.shrink(own.grad))
                for module in self.modules.values()
                for p, own in zip(reached(module).parameters(), module.parameters(), strict=True)
                if parts > 1 and p.requires_grad
            ]
            train_step(self.models, batches.some(it, micro_batches), it, cfg)
            for hook in hooks:
                hook.remove()
        return Iteration(ledger.peak + self.transient, ledger.flops)

    def memory(self) -> Memory:
        """Memory of one process at any micro-batch."""
        turns = (True,) if self.cfg.critic.shares_iteration else (True, False)
        points = tuple((n, max(self.iteration(n, student).peak for student in turns)) for n in SAMPLED_AT)
        parts = self.setup.parts
        copies = {name: _size(copy.parameters()) for name, copy in self.copies.items()}
        standing = {**self.weights, **copies, "AdamW": self.moments}
        standing = {name: -(-size // parts) for name, size in standing.items()}
        return Memory(standing, -(-self.gradients // parts), points)

    @cached_property
    def image_flops(self) -> float:
        """Operations of one image in an iteration, averaged over those with and without a student update."""
        ratio, generator = self.cfg.critic.ratio, self.cfg.generator
        flops = (self.iteration(1).flops + (ratio - 1) * self.iteration(1, update_student=False).flops) / ratio
        simulated = generator.steps - 1 if generator.input == "backward_simulation" else 0
        return flops - simulated / 2 * self.forward_flops  # the longest simulation is counted, half of it is the mean

    @cached_property
    def forward_flops(self) -> int:
        """Operations of one call of the network with one image."""
        with Ledger() as ledger, self.functions, torch.no_grad():
            z = torch.empty(1, *self.cfg.data.shape, device=META)
            self.models.teacher(z, torch.empty(1, device=META), self.condition(self.models.teacher, 1))
        return ledger.flops

    @property
    def passes(self) -> float:
        """Forward passes of the network with the arithmetic of one iteration, the head's and the distance's included.

        A backward pass to weights and input has the arithmetic of two.
        """
        return self.image_flops / self.forward_flops

    def condition(self, denoiser: Denoiser, count: int) -> Condition:
        """A condition of `count` samples, of the sizes that the network's config names."""
        return condition_of(self.cfg.data, denoiser.network, count)

    def rows(self, count: int) -> TensorSet:
        """A real set and a pair set, which stay in host memory."""
        shape = (count, *self.cfg.data.shape)
        kind = torch.float32 if self.cfg.data.latents else torch.uint8
        cond = self.condition(self.models.teacher, count)
        tensors = {name: value for name, value in vars(cond).items() if value is not None}
        noise = torch.empty(shape, device=META)
        return TensorSet({**tensors, "images": torch.empty(shape, dtype=kind, device=META), "noise": noise})


def architecture(cfg: TrainConfig) -> dict[str, Any]:
    """The diffusers config of a run's networks: that of its base, else that of the teacher in data/teachers.

    Raises:
        UserError: neither says what the network is, or it is of a class that cannot be built.
    """
    teacher = cfg.teacher
    manifest = TEACHERS / teacher.name / "manifest.json"
    if teacher.network is not None:
        spec = teacher.network
    elif manifest.exists():
        spec = read_json(manifest.parent / read_json(manifest)["folder"] / "config.json")
    else:
        raise UserError(
            f"teacher {teacher.name}: its base has no teacher.network and {manifest} does not exist, so its size is "
            "unknown: write the UNet's config there, or put the teacher in place"
        )
    return spec


def _distance(cfg: TrainConfig) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The regression's distance, without the weights of LPIPS."""
    if not cfg.needs_pairs or cfg.regression.distance == "l2":
        return nn.functional.mse_loss if cfg.needs_pairs else None
    with META:
        return Lpips(None)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(rounded(tensor.nbytes) for tensor in tensors)
