"""What the names in NVlabs' pickles stand for when nothing is imported and nothing of the file is called.

Containers, tensors, numbers of numpy, and objects with a state, which become a `Record`. Any other name is refused.
"""

import io
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

MODULE = re.compile(r"torch\.nn\.modules(\.[a-z]\w*)*\.[A-Z]\w*")
NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}  # numpy's names of types, and struct's
SCALAR = (str, bytes, int, float, bool, type(None))


class Refused(Exception):
    """Why a pickle is not read, as the predicate of a sentence whose subject is the file."""


@dataclass
class Record:
    """An object that the pickle would have made: the name of its class, and its attributes."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Bytes and element type of tensors."""

    data: torch.UntypedStorage
    dtype: torch.dtype


def shown(text: Any) -> str:
    """Text from a file for a one-line message."""
    return repr(str(text)[:100])[1:-1]


def foreign(error: Exception) -> str | None:
    """The name that made torch.load with weights_only give up, if its message has one."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return match[1] if match else None


def keyed(kind: Callable[..., Any], items: Iterable[Any], keys: Iterable[Any]) -> Any:
    """A dict or set; a container as key is refused, since hashing nested tuples can take for ever."""
    if not all(isinstance(key, SCALAR) for key in keys):
        raise Refused("has a container as key")
    return kind(items)


def _pairs(args: tuple[Any, ...]) -> dict[Any, Any]:
    """An OrderedDict as a plain one."""
    pairs = [(key, value) for key, value in (args[0] if args else [])]
    return keyed(dict, pairs, (key for key, _ in pairs))


def _set(args: tuple[Any, ...]) -> set[Any]:
    items = list(args[0]) if args else []
    return keyed(set, items, items)


def _text_bytes(args: tuple[Any, ...]) -> bytes:
    """Bytes of the protocols before 3, which had none."""
    text, encoding = args
    if encoding != "latin1":
        raise Refused(f"would encode text as {encoding}")
    return text.encode("latin1")


def _persistent(args: tuple[Any, ...]) -> Record:
    """An object of NVlabs' persistence: class name and state are kept, the source text beside them is not looked at."""
    (meta,) = args
    if meta["type"] != "class" or not str(meta["class_name"]).isidentifier() or type(meta["state"]) is not dict:
        raise Refused("has a persistent object that is no class with a state")
    return Record(meta["class_name"], meta["state"])


def _storage(args: tuple[Any, ...]) -> Storage:
    """Elements of a tensor, a file of torch.save inside the pickle."""
    (data,) = args
    if not isinstance(data, bytes) or data[:2] == b"PK":
        raise Refused("has a storage of an unknown form")
    try:
        stream = io.BytesIO(data)
        made = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader's own exceptions are of many types
        if name := foreign(error):
            raise Refused(f"would run {name} inside a tensor") from None
        raise ValueError(f"a tensor's bytes: {error}") from None
    if not isinstance(made, torch.storage.TypedStorage):
        raise Refused("has a storage that is none")
    return Storage(made._untyped_storage, made.dtype)


def _tensor(args: tuple[Any, ...]) -> Tensor:
    """A view of a storage, inside of it; requires_grad is not kept, and hooks are refused."""
    storage, offset, size, stride, *rest = args
    counts = (offset, *size, *stride)
    if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < 1 << 48 for n in counts):
        raise Refused("has a tensor of impossible shape")
    if any(rest[1:]):
        raise Refused("has a tensor with hooks")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = storage.data.nbytes() // storage.dtype.itemsize
    if prod(size) and (last >= elements or prod(size) > elements):
        raise Refused("has a tensor that reaches outside of its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, size, stride)


def _parameter(args: tuple[Any, ...]) -> Tensor:
    """The tensor of a parameter; hooks are refused."""
    if not isinstance(args[0], Tensor) or args[2]:
        raise Refused("has a parameter with hooks, or of no tensor")
    return args[0]


def _number_type(args: tuple[Any, ...]) -> Record:
    if args[0] not in NUMBERS:
        raise Refused(f"has a number of numpy's type {args[0]}")
    return Record("numpy.dtype", {"format": NUMBERS[args[0]]})


def _number(args: tuple[Any, ...]) -> Any:
    """A number of numpy as one of Python."""
    kind, data = args
    return struct.unpack(kind.state["format"], data)[0]


def _reconstructed(args: tuple[Any, ...]) -> Any:
    """An object of the protocols before 2: a class, its base and the base's state."""
    kind, base, state = args
    if base.name == "builtins.dict" and type(state) is dict:
        return new(kind, ()) | state if kind.name in DICTS else _unmade(kind)
    return new(kind, ()) if base.name == "builtins.object" and state is None else _unmade(kind)


def new(kind: Name, args: tuple[Any, ...]) -> Any:
    """A new object of a class: a dict, or a record to be filled."""
    if args or not isinstance(kind, Name) or not (kind.name in DICTS or MODULE.fullmatch(kind.name)):
        return _unmade(kind)
    return {} if kind.name in DICTS else Record(kind.name.rpartition(".")[2])


def _unmade(kind: Any) -> Any:
    raise Refused(f"would make a {getattr(kind, 'name', kind)} in a way we do not know")


DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict", "builtins.dict")
FUNCTIONS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _pairs,
    "builtins.set": _set,
    "builtins.bytes": lambda args: b"".join(args[:0]),
    "_codecs.encode": _text_bytes,
    "copyreg._reconstructor": _reconstructed,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "numpy.dtype": _number_type,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}
OLD = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names, which protocols before 3 write


def named(module: Any, name: Any) -> Name:
    """The class or function that a pickle asks for, if it is on the list.

    Raises:
        Refused: it is not.
    """
    if not isinstance(module, str) or not isinstance(name, str):
        raise Refused("would run something without a name")
    full = f"{OLD.get(module, module)}.{name}"
    if full in FUNCTIONS or full in DICTS or full == "builtins.object" or MODULE.fullmatch(full):
        return Name(full)
    raise Refused(f"would run {shown(full)}")


def called(function: Any, args: Any) -> Any:
    """What calling a listed function would have given, as data."""
    if not isinstance(function, Name) or function.name not in FUNCTIONS or type(args) is not tuple:
        raise Refused(f"would call {getattr(function, 'name', type(function).__name__)}")
    return FUNCTIONS[function.name](args)


def built(made: Any, state: Any) -> None:
    """Give an object its state; that of a dict (attributes of an OrderedDict) is dropped."""
    if isinstance(made, Record) and made.kind == "numpy.dtype" and state[1] not in ("<", "|", "="):
        raise Refused("has numbers of the other byte order")
    if isinstance(made, Record) and type(state) is dict:
        made.state.update(state)
    elif not isinstance(made, dict) and not (isinstance(made, Record) and made.kind == "numpy.dtype"):
        raise Refused(f"would set the state of a {type(made).__name__}")
