"""A CUDA device that is only pretended, on a machine without one, so that tensors of mixed devices are found.

Tensors on it hold real numbers on the CPU and say that they are on ``cuda:0``. Every operation runs on the CPU after
the rules of PyTorch were applied: what mixes devices is refused as a GPU would refuse it. Unlike PyTorch's own fake
tensors these have values, so code may branch on them. Only the backward pass needs a driver: see `_reach`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ON_GPU = 1 << 60
MOVES = {aten.copy_, aten._to_copy, aten.set_}  # values between devices
# Here indices may come from the host where what they index is on the device.
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Pretended(Tensor):
    """A tensor that says it is on the GPU; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CUDA, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner})"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Generator(torch.Generator):
    """A generator of either device; numbers are the CPU's, and a bit of the seed says whose it is."""

    def __new__(cls, device: torch.device | str = "cpu"):
        made = super().__new__(cls)
        made.mark = ON_GPU if torch.device(device).type == "cuda" else 0
        return made

    def manual_seed(self, seed: int) -> "Generator":
        super().manual_seed(seed | self.mark)
        return self


def run(function: Any, args: tuple, kwargs: dict) -> Any:
    """An operation, refused where a GPU refuses it."""
    tensors = [leaf for leaf in _leaves([*args, *kwargs.values()]) if isinstance(leaf, Tensor)]
    inside = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    asked = kwargs.get("device")
    target = asked.type == "cuda" if asked is not None else bool(inside)
    if not inside and not target:
        return function(*args, **kwargs)
    generator = kwargs.get("generator")
    if generator is not None and bool(generator.initial_seed() & ON_GPU) != target:
        raise RuntimeError(f"{function}: expected a generator on {'cuda' if target else 'cpu'}")
    if inside and len(inside) < len(tensors) and function.overloadpacket not in MOVES:
        _refuse_mixed(function, args, [tensor for tensor in tensors if not isinstance(tensor, Pretended)])
    if function is aten._fused_sdp_choice.default:
        return 0  # the CPU's own choice has no counterpart on a GPU: attention by plain products
    plain_args, plain_kwargs = _mapped(_plain, args), {key: _mapped(_plain, value) for key, value in kwargs.items()}
    if function is aten.cudnn_batch_norm.default:  # the one operation that PyTorch chooses by the device beforehand
        result = (*aten.native_batch_norm(*plain_args), torch.empty(0, dtype=torch.uint8))
    else:
        result = function(*plain_args, **plain_kwargs)
    if not target:
        return result
    known = {id(tensor.inner): tensor for tensor in inside}  # operations in place return what they were given
    return _mapped(lambda leaf: _wrapped(leaf, known), result)


def _leaves(tree: Iterable) -> Iterator[Any]:
    for leaf in tree:
        if isinstance(leaf, tuple | list):
            yield from _leaves(leaf)
        else:
            yield leaf


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    return type(tree)(_mapped(change, leaf) for leaf in tree) if isinstance(tree, tuple | list) else change(tree)


def _plain(value: Any) -> Any:
    if isinstance(value, Pretended):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _wrapped(value: Any, known: dict[int, Pretended]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else Pretended(value)


def _refuse_mixed(function: Any, args: tuple, outside: list[Tensor]) -> None:
    """PyTorch's rule: beside tensors on the GPU only single values, and indices into them, may be on the CPU."""
    outside = [tensor for tensor in outside if tensor.ndim]
    if function.overloadpacket in INDEXED and isinstance(args[0], Pretended):
        outside = [tensor for tensor in outside if any(tensor is value for value in args[2:3])]
    if outside:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in outside)
        raise RuntimeError(f"{function}: tensors on cuda:0 and on the CPU (of shape {shapes}) in one operation")


def _reach(loss: Tensor) -> None:
    """In the place of `Tensor.backward`, which asks the driver: each parameter behind a loss gets a gradient of ones."""
    if loss.ndim or loss.grad_fn is None:
        raise RuntimeError("grad can be implicitly created only for scalar outputs that require it")
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            leaf.grad = torch.ones_like(leaf) if leaf.grad is None else leaf.grad + 1


def _data(tensor: Tensor, *, real: Any = Tensor.data) -> Tensor:
    return tensor.detach() if isinstance(tensor, Pretended) else real.__get__(tensor)


def _set_data(tensor: Tensor, value: Tensor, *, real: Any = Tensor.data) -> None:
    """A tensor that is given the data of one on the GPU is one itself from then on, and a parameter if it was."""
    parameter = isinstance(tensor, torch.nn.Parameter)
    real.__set__(tensor, value)
    if isinstance(value, Pretended):
        tensor.__class__, tensor.inner, tensor._is_param = Pretended, value.inner, parameter


def _moved(tree: Any, change: Callable[[Any], Any]) -> Any:
    return {key: _moved(leaf, change) for key, leaf in tree.items()} if isinstance(tree, dict) else change(tree)


def _load(file: Any, map_location: Any = None, *, real: Any = torch.load, **options: Any) -> Any:
    on_gpu = map_location is not None and torch.device(map_location).type == "cuda"
    found = real(file, map_location=CPU, **options)
    return _moved(found, lambda leaf: _wrapped(leaf, {}) if on_gpu else leaf)


def _save_file(tensors: dict, *args: Any, real: Any = safetensors.torch.save_file, **options: Any) -> None:
    real(_moved(tensors, _plain), *args, **options)


def _save(tree: Any, file: Any, *, real: Any = torch.save, **options: Any) -> None:
    real(_moved(tree, _plain), file, **options)


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """Inside, ``cuda:0`` is a device; it is handed over."""
    torch._C._ensureCUDADeviceGuardSet()
    overwrite, lift = torch.__future__.get_overwrite_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device) makes its values on the CPU first
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda._lazy_init", lambda: None))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_: True))
        stack.enter_context(mock.patch("torch.Generator", Generator))
        stack.enter_context(mock.patch("huggingface_hub.serialization._torch._get_unique_id", id))  # there is no memory
        stack.enter_context(mock.patch("safetensors.torch.save_file", _save_file))
        stack.enter_context(mock.patch("torch.load", _load))
        stack.enter_context(mock.patch("torch.save", _save))
        stack.enter_context(mock.patch.object(Tensor, "data", property(_data, _set_data)))
        stack.enter_context(mock.patch.object(Tensor, "backward", _reach))
        stack.enter_context(_Mode())
        try:
            yield CUDA
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
            torch._C._set_only_lift_cpu_tensors(lift)
