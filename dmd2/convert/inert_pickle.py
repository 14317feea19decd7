"""Read a pickle as data: nothing it names is imported or called, whatever opcodes it is written with.

`pickle.Unpickler` runs what a file asks for. This reader goes through the opcodes itself; what a name stands for is
said by `inert_objects`.
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from pickletools import genops
from typing import Any

from dmd2.convert.inert_objects import Refused, built, called, keyed, named, new
from dmd2.core.errors import UserError

PUSHED = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
          "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
          "BINBYTES8"}  # fmt: skip
MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
}  # fmt: skip
HINTS = {"FRAME"}
# What a malformed file makes of the stack, a key, an argument or a size.
DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError, MemoryError,
          RecursionError, RuntimeError, struct.error)  # fmt: skip


def read_pickle(path: Path) -> Any:
    """What a pickle holds: numbers, text, containers, tensors (on the CPU) and `Record` objects.

    Raises:
        UserError: it is missing, truncated, no pickle, or names something that is none of these.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] == b"PK\x03\x04":
                raise UserError(
                    f"{path} is a zip archive, as torch.save writes, and no pickle: name it .bin if it is one"
                )
            return _Machine().run(data)
    except Refused as refused:
        raise UserError(
            f"{path} {refused}: refused; a file of NVlabs holds only tensors and plain containers"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): download it again") from None
    except DAMAGE as error:
        detail = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} is truncated or no pickle ({detail}): download it again") from None


class _Machine:
    """The stack and the memo of pickle; an opcode is one of the sets above or a method named after it."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what lies under each mark
        self.memo: dict[int, Any] = {}

    def run(self, data: Any) -> Any:
        """The object that STOP leaves."""
        for opcode, arg, position in genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in PUSHED:
                self.stack.append(arg)
            elif opcode.name in MADE:
                self.stack.append(MADE[opcode.name]())
            elif (step := getattr(self, f"_op_{opcode.name.lower()}", None)) is not None:
                step(arg)
            elif opcode.name not in HINTS:
                raise Refused(f"uses pickle's {opcode.name} at byte {position}")
        raise EOFError("it has no end")

    def _marked(self) -> list[Any]:
        """What was pushed since the last mark, which is taken away."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("empty stack")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _extend(self, kind: Any, items: list[Any], keys: list[Any]) -> None:
        """Add to the container on top, which must be one that the pickle made."""
        target: Any = self.stack[-1]
        if not isinstance(target, kind):
            raise Refused(f"would add to a {type(target).__name__}")
        if kind is list:
            target.extend(items)
        else:
            target.update(keyed(kind, items, keys))

    def _op_proto(self, arg: int) -> None:
        if arg > 5:
            raise ValueError(f"protocol {arg}")

    def _op_mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def _op_get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    _op_binput = _op_long_binput = _op_put
    _op_binget = _op_long_binget = _op_get

    def _op_pop(self, _: None) -> None:
        self.stack.pop()

    def _op_tuple(self, _: None) -> None:
        items = tuple(self._marked())
        self.stack.append(items)

    def _op_tuple1(self, _: None) -> None:
        self._tuple(1)

    def _op_tuple2(self, _: None) -> None:
        self._tuple(2)

    def _op_tuple3(self, _: None) -> None:
        self._tuple(3)

    def _op_list(self, _: None) -> None:
        items = self._marked()
        self.stack.append(items)

    def _op_append(self, _: None) -> None:
        item = self.stack.pop()
        self._extend(list, [item], [])

    def _op_appends(self, _: None) -> None:
        self._extend(list, self._marked(), [])

    def _op_dict(self, _: None) -> None:
        items = self._marked()
        self.stack.append({})
        self._set_items(items)

    def _op_setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _op_setitems(self, _: None) -> None:
        self._set_items(self._marked())

    def _set_items(self, items: list[Any]) -> None:
        self._extend(dict, list(zip(items[::2], items[1::2], strict=True)), items[::2])

    def _op_additems(self, _: None) -> None:
        items = self._marked()
        self._extend(set, items, items)

    def _op_global(self, arg: str) -> None:
        self.stack.append(named(*arg.split(" ", 1)))

    def _op_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(named(module, name))

    def _op_inst(self, arg: str) -> None:
        raise Refused(f"would make a {named(*arg.split(' ', 1)).name} by pickle's INST")

    def _op_reduce(self, _: None) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(called(function, args))

    def _op_newobj(self, _: None) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        self.stack.append(new(kind, args))

    def _op_build(self, _: None) -> None:
        state = self.stack.pop()
        built(self.stack[-1], state)
