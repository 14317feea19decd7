"""Read a pickle as data: nothing that it names is imported or called, whatever opcodes it is written with.

Python's own unpickler works through the file. What a file could reach through it is replaced: a name stands for a
`Name`, calls and new objects give containers, tensors, numbers and `Record` objects, and any other name is refused.

This takes the unpickler that is written in Python (`pickle._Unpickler`). The one written in C sets the attributes of
whatever a file asks it to, hashes keys that take for ever, and reserves memory by a number in the file: its memo is an
array as long as the largest index, so that nine bytes take 34 GB.
"""

import io
import pickle
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from mmap import mmap
from pickletools import opcodes
from typing import Any, ClassVar

import torch
from torch import Tensor

MODULE = re.compile(r"torch\.nn\.modules(\.[a-z]\w*)*\.[A-Z]\w*")
DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict", "builtins.dict")
OLD = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names, which protocols before 3 write
NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}  # numpy's names of types, and struct's
SCALAR = (str, bytes, int, float, bool, type(None))
UNUSED = ("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "FROZENSET", "BYTEARRAY8", "NEXT_BUFFER",
          "READONLY_BUFFER")  # opcodes: a bytearray is made as long as the file says before it is read  # fmt: skip
# What a malformed file makes of the stack, a key, an argument or a size.
DAMAGE = (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
          MemoryError, RecursionError, RuntimeError, struct.error)  # fmt: skip


class Refused(Exception):
    """A pickle is refused; the text is the rest of a sentence that begins with the name of the file."""


@dataclass
class Record:
    """An object that the pickle would have made: the name of its class, and its attributes."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    name: str

    def __call__(self, *args: Any) -> Any:
        """Return as data what the named function would return."""
        if self.name not in FUNCTIONS:
            raise Refused(f"would call {self.name}")
        return FUNCTIONS[self.name](*args)


@dataclass(frozen=True)
class Storage:
    """Bytes and element type of tensors."""

    data: torch.UntypedStorage
    dtype: torch.dtype


def read_inert(file: io.BytesIO | mmap) -> Any:
    """What a pickle holds: numbers, text, containers, tensors (on the CPU) and `Record` objects.

    Args:
        file: whose ``read`` reserves no more memory than there are bytes; that of a plain file does.

    Raises:
        Refused: it names or does something that is none of these.
        ValueError: it is truncated or no pickle.
    """
    try:
        return _Unpickler(file, encoding="latin1").load()
    except DAMAGE as error:
        raise ValueError((str(error) or type(error).__name__).splitlines()[0][:200]) from None


def _refusal(opcode: str) -> Callable[[Any], None]:
    def load(_: Any) -> None:
        raise Refused(f"uses pickle's {opcode}")

    return load


class _Unpickler(pickle._Unpickler):
    """Python's unpickler but for the opcodes `UNUSED`; those that change or make an object are replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}
    stack: list[Any]  # of the base class, whose types say nothing of these three
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Name:
        """The class or function that a pickle asks for, if it is on the list."""
        full = f"{OLD.get(module, module)}.{name}"
        if full in FUNCTIONS or full in DICTS or full in OTHERS or MODULE.fullmatch(full):
            return Name(full)
        raise Refused(f"would run {shown(full)}")

    def _instantiate(self, kind: Any, _: Any) -> None:
        raise Refused(f"would make a {shown(getattr(kind, 'name', kind))} by pickle's INST or OBJ")

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        self.append(_new(kind, args))

    def load_build(self) -> None:
        state = self.stack.pop()
        _set_state(self.stack[-1], state)

    def load_additems(self) -> None:
        self._extend(set, self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._extend(dict, [key, value])

    def load_setitems(self) -> None:
        self._extend(dict, self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._extend(dict, items)

    def _extend(self, kind: Any, items: list[Any]) -> None:
        """Add to the set or dict on top, which must be one that the pickle made; others than lists have no append."""
        target: Any = self.stack[-1]
        if not isinstance(target, kind):
            raise Refused(f"would add to a {type(target).__name__}")
        target.update(_set(items) if kind is set else _dict(zip(items[::2], items[1::2], strict=True)))


for _opcode in opcodes:
    _code, _name, _unused = ord(_opcode.code), _opcode.name, _opcode.name in UNUSED or _opcode.proto > 5
    _load = getattr(_Unpickler, f"load_{_name.lower()}", pickle._Unpickler.dispatch[_code])
    _Unpickler.dispatch[_code] = _refusal(_name) if _unused else _load


def shown(text: Any) -> str:
    """A value of a file for a one-line message; for a container, whose text may have no end, its type."""
    return repr(str(text)[:100])[1:-1] if isinstance(text, SCALAR) else type(text).__name__


def foreign(error: Exception) -> str | None:
    """The name that made torch.load with weights_only give up, if its message has one."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return match[1] if match else None


def _dict(items: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """A dict, whatever kind of dict the file wants."""
    pairs = [(key, value) for key, value in items]
    _set(key for key, _ in pairs)
    return dict(pairs)


def _set(items: Iterable[Any] = ()) -> set[Any]:
    """A set, not of containers, since hashing nested tuples can take for ever."""
    items = list(items)
    if not all(isinstance(item, SCALAR) for item in items):
        raise Refused("has a container as key")
    return set(items)


def _text_bytes(text: str, encoding: str) -> bytes:
    """Bytes of the protocols before 3, which had none."""
    if encoding != "latin1":
        raise Refused(f"would encode text as {shown(encoding)}")
    return text.encode("latin1")


def _persistent(meta: dict[str, Any]) -> Record:
    """An object of NVlabs' persistence: class name and state are kept, the source text beside them is not looked at."""
    name, state = meta["class_name"], meta["state"]
    if meta["type"] != "class" or not isinstance(name, str) or not name.isidentifier() or type(state) is not dict:
        raise Refused("has a persistent object that is no class with a state")
    return Record(name, state)


def _storage(data: bytes) -> Storage:
    """Elements of a tensor, a file of torch.save inside the pickle."""
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


def _tensor(storage: Any, offset: int, size: Any, stride: Any, _gradient: Any = False, *hooks: Any) -> Tensor:
    """A view of a storage, inside of it; requires_grad is not kept, and hooks are refused."""
    counts = (offset, *size, *stride)
    if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < 1 << 48 for n in counts):
        raise Refused("has a tensor of impossible shape")
    if any(hooks):
        raise Refused("has a tensor with hooks")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = storage.data.nbytes() // storage.dtype.itemsize
    if prod(size) and (last >= elements or prod(size) > elements):
        raise Refused("has a tensor that reaches outside of its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, size, stride)


def _parameter(tensor: Any, _gradient: Any, hooks: Any, *_: Any) -> Tensor:
    """The tensor of a parameter; hooks are refused."""
    if not isinstance(tensor, Tensor) or hooks:
        raise Refused("has a parameter with hooks, or of no tensor")
    return tensor


def _number(kind: Record, data: bytes) -> Any:
    """A number of numpy as one of Python."""
    if not isinstance(name := kind.state["name"], str) or name not in NUMBERS:
        raise Refused(f"has a number of numpy's type {shown(name)}")
    return struct.unpack(NUMBERS[name], data)[0]


def _reconstructed(kind: Name, base: Name, state: Any) -> Any:
    """An object of the protocols before 2: a class, its base and the base's state."""
    if base.name == "builtins.dict" and type(state) is dict and kind.name in DICTS:
        return dict(state)
    return _new(kind, () if base.name == "builtins.object" and state is None else state)


def _new(kind: Any, args: Any) -> Any:
    """A new object of a class without arguments: a dict, or a record to be filled."""
    if args != () or not isinstance(kind, Name) or not (kind.name in DICTS or MODULE.fullmatch(kind.name)):
        raise Refused(f"would make a {shown(getattr(kind, 'name', kind))} in a way we do not know")
    return {} if kind.name in DICTS else Record(kind.name.rpartition(".")[2])


def _set_state(made: Any, state: Any) -> None:
    """Give an object its state; that of a dict (attributes of an OrderedDict) is dropped."""
    if isinstance(made, Record) and made.kind == "numpy.dtype":
        if state[1] not in ("<", "|", "="):
            raise Refused("has numbers of the other byte order")
    elif isinstance(made, Record) and made.kind == "numpy.ndarray":
        _, *made.state["array"] = state
    elif isinstance(made, Record) and type(state) is dict:
        made.state.update(state)
    elif not isinstance(made, dict):
        raise Refused(f"would set the state of a {type(made).__name__}")


OTHERS = ("builtins.object", "numpy.ndarray")  # names that only stand as arguments
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "builtins.set": _set,
    "builtins.bytes": lambda: b"",
    "_codecs.encode": _text_bytes,
    "copyreg._reconstructor": _reconstructed,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "numpy.dtype": lambda name, *_: Record("numpy.dtype", {"name": name}),
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _number),
    # An array's shape, type, order and bytes follow as its state.
    **dict.fromkeys(
        ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        lambda *_: Record("numpy.ndarray", {}),
    ),
}
