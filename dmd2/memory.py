"""Memory and arithmetic of a training iteration, counted on PyTorch's meta device: shapes run, no weights exist.

`Counted` runs the real `train_step` on networks without data; a dispatch mode adds up what is alive and what is computed.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dmd2.batches import Batch, Batches
from dmd2.build import build_head
from dmd2.condition import Condition
from dmd2.config import TrainConfig
from dmd2.data import TensorSet
from dmd2.denoisers import Denoiser, EdmDenoiser
from dmd2.distributed import _buckets
from dmd2.errors import UserError
from dmd2.files import read_json
from dmd2.inputs import TEACHERS
from dmd2.lpips import LAYERS, Lpips
from dmd2.optimiser import Optimiser
from dmd2.rng import Draws
from dmd2.samplers import few_step
from dmd2.step import Models, image_shape, train_step
from dmd2.teachers import NETWORKS, build_network, wrap
from dmd2.trainer import PROBE_SEEDS

META = torch.device("meta")
BLOCK = 512  # bytes; the CUDA allocator rounds every tensor up to it
TOKENS, SIZES = 77, 6  # of a caption, and numbers in SDXL's time_ids
LPIPS_CHANNELS = (64, 128, 256, 512, 512)  # of VGG16 at the five layers that LPIPS compares

# What CUDA's autocast runs in the lower precision and in float32, of the functions that diffusers' UNets call
# (ATen/autocast_mode.h); all others take what they get.
LOWERED = {
    "conv1d", "conv2d", "linear", "matmul", "__matmul__", "einsum", "bmm", "baddbmm", "addmm", "mm",
    "scaled_dot_product_attention",
}  # fmt: skip
RAISED = {"group_norm", "layer_norm", "rms_norm", "softmax", "interpolate", "exp", "log", "pow", "rsqrt", "reciprocal"}


class Ledger(TorchDispatchMode):
    """Bytes alive (every storage once, rounded as CUDA's allocator does), their peak, and floating-point operations."""

    def __init__(self, standing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live, self.peak, self.flops = 0, 0, 0
        self._known: set[int] = set()
        for tensor in standing:
            self._enter(tensor)
        self.standing = self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = _run(func, args, kwargs or {})
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._enter(value)
        self.peak = max(self.peak, self.live)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self._known:
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Value(NamedTuple):
    kind: type  # since 1, 1.0 and True are equal
    value: Any


_outputs: dict[Any, Any] = {}  # form of what an operation returned, by it and the form of its arguments


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on meta tensors, or repeat what it returned for tensors like these: most are Python, and slow."""
    if func.namespace != "aten":  # of the profiler
        return func(*args, **kwargs)
    key = (func, _form(args), _form(tuple(kwargs.items())))
    if (known := _outputs.get(key)) is not None:
        return _like(known)
    out = func(*args, **kwargs)
    if _storages((args, kwargs)).isdisjoint(_storages(out)):  # a view, or an update in place, is of its argument
        _outputs[key] = _form(out)
    return out


def _storages(values: Any) -> set[int]:
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, Tensor)}


def _form(value: Any) -> Any:
    """All that the forms of an operation's results depend on, hashable."""
    if isinstance(value, Tensor):
        return _Form(value.shape, value.stride(), value.dtype, value.device)
    return tuple(map(_form, value)) if isinstance(value, tuple | list) else _Value(type(value), value)


def _like(form: Any) -> Any:
    """New values of a form."""
    if isinstance(form, _Form):
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=form.device)
    return form.value if isinstance(form, _Value) else tuple(map(_like, form))


class GpuFunctions(TorchFunctionMode):
    """A GPU's fused attention and bfloat16 autocast, which the meta device lacks.

    Fused attention keeps its inputs, its output and one number per query, never the matrix of weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowered = False
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.lowered and (name := getattr(func, "__name__", "")) in LOWERED | RAISED:
            to = self._lower if name in LOWERED else _raise
            args = tuple(to(value) for value in args)
            kwargs = {key: to(value) for key, value in kwargs.items()}
        if func is torch.nn.functional.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            query, key, value = (*args[:3], *(kwargs[k] for k in ("query", "key", "value") if k in kwargs))
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **kwargs)

    @contextmanager
    def autocast(self, enabled: bool) -> Iterator[None]:
        """Bfloat16 inside, if enabled; copies of trained weights are kept to the end, as CUDA's autocast does."""
        self.lowered = enabled
        try:
            yield
        finally:
            self.lowered = False
            self._copies.clear()

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(torch.bfloat16)
        return self._copies[id(value)]


def _raise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


@dataclass(frozen=True)
class ShapeDraws(Draws):
    """Draws without numbers; a step shared by the batch is the last one, which costs most."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Draws.normal`."""
        return torch.empty((self.total, *shape), device=META)[self.start : self.stop]

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """See `Draws.integers`."""
        return torch.empty((self.total,), dtype=torch.long, device=META)[self.start : self.stop]

    def shared_integer(self, name: str, low: int, high: int) -> int:
        """See `Draws.shared_integer`."""
        return high

    def shuffled(self, name: str, size: int) -> Tensor:
        """See `Draws.shuffled`."""
        return torch.empty((self.stop - self.start,), dtype=torch.long, device=META)


class ShapeBatches(Batches):
    """Equal micro-batches of one process, out of `ShapeDraws`."""

    def some(self, count: int) -> Iterator[Batch]:
        """The first `count` micro-batches of an iteration."""
        total = max(self.cfg.optim.batch, count * self.micro_batch)
        for i in range(count):
            yield self._slice(ShapeDraws(0, 0, total, i * self.micro_batch, (i + 1) * self.micro_batch, META))


class ShapeOptimiser(Optimiser):
    """AdamW as it lies in memory. Its fused update needs nothing more, the sum over processes one bucket."""

    processes = 1

    def __init__(self, modules: Iterable[nn.Module | None], cfg: Any, lr: float) -> None:
        super().__init__(modules, cfg, lr)
        self.moments = [torch.empty_like(p) for p in self.parameters for _ in range(2)]

    def step(self, it: int) -> Tensor:
        """Clear the gradients, as after an update."""
        if self.processes > 1:
            for bucket in _buckets([p.grad for p in self.parameters if p.grad is not None]):
                torch.cat([gradient.flatten() for gradient in bucket])
        self.adamw.zero_grad(set_to_none=True)
        return torch.empty((), device=META)


@dataclass(frozen=True)
class Iteration:
    """One iteration of one process: bytes alive at its worst moment, and floating-point operations."""

    peak: int
    flops: int


class Counted:
    """Models of a run on the meta device, and what its iterations take."""

    def __init__(self, cfg: TrainConfig, processes: int = 1) -> None:
        self.cfg = cfg
        spec = architecture(cfg)
        self.functions = GpuFunctions()
        self.models = self._models(spec, processes)
        self.ema = deepcopy(self.models.student) if cfg.optim.ema else None

    def _models(self, spec: dict[str, Any], processes: int) -> Models:
        cfg = self.cfg
        with META:
            network = build_network(spec, 0).requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        teacher = self._on_gpu(wrap(network, cfg.teacher.parameterisation, cfg.train.precision))
        student, critic = (self._on_gpu(deepcopy(teacher).train().requires_grad_(True)) for _ in range(2))
        if cfg.train.precision == "bf16" and cfg.teacher.parameterisation == "eps":
            teacher.network.to(torch.bfloat16)
        with META:
            head = build_head(critic, cfg, 0, META) if cfg.gan.on else None
        made = [ShapeOptimiser(modules, cfg.optim, 1.0) for modules in ([student], [critic, head])]
        for optimiser in made:
            optimiser.processes = processes
        null = self.condition(teacher, 1) if cfg.teacher.guidance > 1 else None
        return Models(student, teacher, critic, head, made[0], made[1], null, _distance(cfg))

    def _on_gpu(self, denoiser: Denoiser) -> Denoiser:
        """Give it the autocast that `Denoiser.autocast` is on a GPU."""
        always = isinstance(denoiser, EdmDenoiser)

        def autocast(x_t: Tensor) -> Any:
            return self.functions.autocast(denoiser.precision == "bf16" and (always or torch.is_grad_enabled()))

        denoiser.autocast = autocast  # type: ignore[method-assign]
        return denoiser

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks that a training holds, by name."""
        m = self.models
        found = {"student": m.student, "teacher": m.teacher, "critic": m.critic, "head": m.head, "EMA": self.ema}
        distance = m.distance if isinstance(m.distance, nn.Module) else None
        return {name: module for name, module in {**found, "LPIPS": distance}.items() if module is not None}

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by network."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.modules.items()}

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of parameters and buffers by network."""
        return {name: _size([*m.parameters(), *m.buffers()]) for name, m in self.modules.items()}

    @property
    def moments(self) -> int:
        """Bytes of both AdamW states."""
        return _size(self._moments())

    @property
    def gradients(self) -> int:
        """Bytes of the larger of the two sets of gradients; they are never alive together."""
        optimisers = (self.models.student_optimiser, self.models.critic_optimiser)
        return max(_size(optimiser.parameters) for optimiser in optimisers)

    def iteration(self, micro_batch: int, update_student: bool = True, micro_batches: int = 1) -> Iteration:
        """What one iteration of one process takes, with AdamW's states in place.

        Args:
            micro_batch: images per forward pass. micro_batches: forward passes before an update, 2 standing for more.
        """
        it = 0 if update_student else 1
        cfg = self.cfg
        if not update_student and cfg.critic.ratio == 1:
            return Iteration(0, 0)
        rows = self._rows(micro_batch)
        batches = ShapeBatches(cfg, 0, META, micro_batch, rows, rows)
        with Ledger(self._standing()) as ledger, self.functions:
            train_step(self.models, batches.some(micro_batches), it, cfg)
        return Iteration(ledger.peak, ledger.flops)

    def probe(self) -> Iteration:
        """Images from fixed noise that the trainer makes for every line of its log, all at once."""
        student, count = self.ema or self.models.student, len(PROBE_SEEDS)
        times = student.schedule.step_times(self.cfg.generator.steps, self.cfg.generator.time)
        with Ledger(self._standing()) as ledger, self.functions, torch.no_grad():
            z = torch.empty(count, *image_shape(self.cfg), device=META)
            few_step(student, z, times, self.condition(student, count), lambda _: torch.empty_like(z))
        return Iteration(ledger.peak, ledger.flops)

    def forward_flops(self) -> int:
        """Of one call of the network with one image."""
        with Ledger() as ledger, self.functions, torch.no_grad():
            z = torch.empty(1, *image_shape(self.cfg), device=META)
            self.models.teacher(z, torch.empty(1, device=META), self.condition(self.models.teacher, 1))
        return ledger.flops

    def condition(self, denoiser: Denoiser, count: int) -> Condition:
        """A condition of `count` samples, of the sizes that the network's config names."""
        config: Mapping[str, Any] = denoiser.network.config
        if self.cfg.data.classes > 0:
            return Condition(labels=torch.empty(count, dtype=torch.long, device=META))
        text = torch.empty(count, TOKENS, config["cross_attention_dim"], device=META)
        if config.get("addition_embed_type") != "text_time":
            return Condition(text=text)
        pooled = config["projection_class_embeddings_input_dim"] - SIZES * config["addition_time_embed_dim"]
        sizes = (torch.empty(count, width, device=META) for width in (pooled, SIZES))
        return Condition(None, text, *sizes)

    def _rows(self, count: int) -> TensorSet:
        """A real set and a pair set, which stay in host memory."""
        shape = (count, *image_shape(self.cfg))
        kind = torch.float32 if self.cfg.data.classes == 0 else torch.uint8
        cond = self.condition(self.models.teacher, count)
        tensors = {name: value for name, value in vars(cond).items() if value is not None}
        noise = torch.empty(shape, device=META)
        return TensorSet({**tensors, "images": torch.empty(shape, dtype=kind, device=META), "noise": noise})

    def _moments(self) -> list[Tensor]:
        made = (self.models.student_optimiser, self.models.critic_optimiser)
        return [moment for optimiser in made for moment in cast(ShapeOptimiser, optimiser).moments]

    def _standing(self) -> list[Tensor]:
        """What lies in memory from the first iteration to the last."""
        return [t for m in self.modules.values() for t in (*m.parameters(), *m.buffers())] + self._moments()


def architecture(cfg: TrainConfig) -> dict[str, Any]:
    """The diffusers config of a run's networks: of its base, else of the teacher that lies in data/teachers.

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
    if (kind := spec.get("_class_name", "UNet2DModel")) not in NETWORKS:
        raise UserError(f"teacher {teacher.name}: there is no network class {kind}: {' or '.join(NETWORKS)}")
    return spec


def _distance(cfg: TrainConfig) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The regression's distance; LPIPS with VGG16 on the meta device, for which no weights need to be there."""
    if not cfg.needs_pairs or cfg.regression.distance == "l2":
        return nn.functional.mse_loss if cfg.needs_pairs else None
    from piq.perceptual import ContentLoss
    from torchvision.models import vgg16

    distance = Lpips.__new__(Lpips)
    nn.Module.__init__(distance)
    with META:
        weights = [torch.empty(1, channels, 1, 1) for channels in LPIPS_CHANNELS]
        vgg = vgg16(weights=None).features
        loss = ContentLoss(vgg, layers=LAYERS, weights=weights, replace_pooling=True, normalize_features=True)
    distance.loss = loss.requires_grad_(False)
    return distance


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(-(-prod(t.shape) * t.element_size() // BLOCK) * BLOCK for t in tensors)
