"""PyTorch's meta device as a model of a GPU: a ledger of memory and arithmetic, autocast, fused attention."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATION = 512  # bytes; the CUDA allocator rounds every tensor up to a multiple of it

# What CUDA's autocast runs in the lower precision and in float32, of the functions that diffusers' UNets call
# (ATen/autocast_mode.h); all others take what they get.
LOWERED = {
    "conv1d", "conv2d", "linear", "matmul", "__matmul__", "einsum", "bmm", "baddbmm", "addmm", "mm",
    "scaled_dot_product_attention",
}  # fmt: skip
RAISED = {"group_norm", "layer_norm", "rms_norm", "softmax", "interpolate", "exp", "log", "pow", "rsqrt", "reciprocal"}


def rounded(size: int) -> int:
    """Bytes that the CUDA allocator takes for `size` bytes."""
    return -(-size // ALLOCATION) * ALLOCATION


class Ledger(TorchDispatchMode):
    """Bytes alive (every storage once, rounded as CUDA's allocator does), their peak, and floating-point operations.

    A GPU holds one of `parts` equal parts of the tensors in `standing` and of those handed to `shrink`.
    """

    def __init__(self, standing: Iterable[Tensor] = (), parts: int = 1) -> None:
        super().__init__()
        self.live, self.peak, self.flops, self.parts = 0, 0, 0, parts
        self._known: dict[int, int] = {}
        for tensor in standing:
            self._enter(tensor)
            self.shrink(tensor)
        self.standing = self.peak = self.live

    def shrink(self, tensor: Tensor) -> None:
        """Count only one GPU's part of that tensor from now on, as after gradients are summed and scattered."""
        storage = tensor.untyped_storage()
        size = rounded(-(-storage.nbytes() // self.parts))
        self.live += size - self._known[storage._cdata]
        self._known[storage._cdata] = size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = _run(func, args, kwargs or {})
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._enter(value)
        self.peak = max(self.peak, self.live)
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            self.flops += _backward_of_convolution(*args, out=out)
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, rounded(storage.nbytes())
        if key not in self._known:
            self._known[key] = size
            self.live += size
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _backward_of_convolution(
    grad: Tensor, x: Tensor, weight: Tensor, *options: Any, out: Sequence[Tensor | None]
) -> int:
    """Operations of the gradients of input and weight, each as many as forward.

    PyTorch's own formula takes the gradient of a grouped convolution's weight for that of a dense one.
    """
    transposed = options[4]
    forward = 2 * (x if transposed else grad).numel() * weight[0].numel()
    return forward * sum(one is not None for one in out[:2])


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
    """Run an operation on meta tensors, or repeat what it returned for such tensors: most are Python, and slow."""
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
    """A hashable key of everything that the forms of an operation's results depend on."""
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
        before, self.lowered = self.lowered, enabled
        try:
            yield
        finally:
            self.lowered = before
            if not before:
                self.clear()

    @contextmanager
    def again(self, lowered: bool) -> Iterator[None]:
        """Modes for a part of the forward pass that backward runs again, where no mode is active."""
        with self, self.autocast(lowered):
            yield

    def clear(self) -> None:
        """Forget the copies, as ``torch.clear_autocast_cache`` does."""
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
