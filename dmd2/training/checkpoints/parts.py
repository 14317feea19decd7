"""Checkpoints in parts: every process writes the rows that it owns, and any number of processes read theirs back.

A part is a safetensors file whose header says which rows of which tensors it holds. torch.distributed.checkpoint has a
pickled index instead, and reading a pickle can run code.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmd2.core.files import atomic
from dmd2.training import quantised

Spans = Mapping[str, tuple[int, int]]  # this process's rows, by the path of a tensor or of the dict that holds it
Rows = Tensor | tuple[Tensor, ...]  # a tensor, or pieces of its rows in order, each mapped from its file
CODES, SCALE = "/codes", "/scale"


class _Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of a tensor in an open file; without rows the whole tensor."""

    file: Any
    start: int
    stop: int


def flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts by path, ``a/b/c``."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def nested(leaves: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of `flat`, without empty dicts. Keys of digits become numbers, as in an optimiser's state."""
    tree: dict[Any, Any] = {}
    for path, value in leaves.items():
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return tree


def write_part(path: Path, state: Mapping[str, Any], spans: Spans, whole: bool) -> None:
    """Write this process's rows of the tensors in `state`, atomically; tensors without a span only if `whole`."""
    tensors: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, value in flat(state):
        found = _span(name, value, spans)
        if isinstance(value, Tensor) and (whole or found is not None):
            tensors[name] = value.contiguous()
            if found is not None:
                rows[name] = found
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"rows": json.dumps(rows)})


def read_parts(paths: list[Path], spans: Spans | None = None, only: str = "") -> dict[str, Rows | dict[str, Tensor]]:
    """Tensors by path, mapped from the parts: whole ones, or the rows that `spans` asks for; see `fill`.

    Tensors whose path does not begin with `only` are left out. A quantised moment is ``{codes, scale}`` if one part
    holds exactly the wanted rows, and float32 otherwise.
    """
    with ExitStack() as stack:
        pieces: dict[str, list[_Piece]] = {}
        found: dict[str, Rows | dict[str, Tensor]] = {}
        for path in paths:
            file = stack.enter_context(safe_open(path, framework="pt"))
            rows = json.loads(file.metadata()["rows"])
            for name in file.keys():  # noqa: SIM118, it is no dict
                if not name.startswith(only):
                    continue
                if name not in rows:
                    found[name] = file.get_tensor(name)
                elif not name.endswith(SCALE):
                    pieces.setdefault(name.removesuffix(CODES), []).append(_Piece(file, *rows[name]))
        for name, parts in pieces.items():
            asked = None if spans is None else _span(name, None, spans)
            found[name] = _joined(name, parts, asked or (0, max(piece.stop for piece in parts)))
    return found


def fill(live: Tensor, saved: Rows) -> None:
    """Copy saved rows into a live tensor, in place and without a second copy on its device.

    Raises:
        RuntimeError: the shapes differ.
    """
    pieces = saved if isinstance(saved, tuple) else (saved,)
    places = live.split([len(piece) for piece in pieces]) if isinstance(saved, tuple) else (live,)
    for place, piece in zip(places, pieces, strict=True):
        if place.shape != piece.shape:
            raise RuntimeError(f"a saved tensor of {tuple(piece.shape)} does not fit one of {tuple(place.shape)}")
        place.copy_(piece)


def cut(state: Mapping[str, Any], spans: Spans) -> dict[str, Any]:
    """The rows of a whole `state` that `spans` asks for, as views; quantised moments become float32 copies."""
    whole: dict[str, Any] = {}
    for name, value in flat(state):
        found = _span(name.removesuffix(CODES), value, spans)
        if name.endswith(CODES):
            name = name.removesuffix(CODES)
            scale = dict(flat(state))[name + SCALE]
            value = quantised.floats(value, scale, name.rpartition("/")[2])
            value = value if found is None else value[slice(*found)].clone()
            found = None
        elif name.endswith(SCALE):
            continue
        whole[name] = value if found is None else value[slice(*found)]
    return nested(whole)


def _span(name: str, value: Any, spans: Spans) -> tuple[int, int] | None:
    """Rows of the tensor at a path: `spans` names it or its dict of moments; None for a count of steps."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return None
    parent = name.rpartition("/")[0]
    return next((spans[path] for path in (name, parent, parent.rpartition("/")[0]) if path in spans), None)


def _joined(name: str, pieces: list[_Piece], asked: tuple[int, int]) -> Rows | dict[str, Tensor]:
    for piece in pieces:
        if (piece.start, piece.stop) == asked and name + CODES in piece.file.keys():  # noqa: SIM118
            return {"codes": piece.file.get_tensor(name + CODES), "scale": piece.file.get_tensor(name + SCALE)}
    rows = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        first, last = max(asked[0], piece.start), min(asked[1], piece.stop)
        if first < last or (piece.start == asked[0] and asked[0] == asked[1]):
            rows.append(_rows(name, piece, first - piece.start, last - piece.start))
    return _rows(name, pieces[0], 0, 0) if not rows else rows[0] if len(rows) == 1 else tuple(rows)


def _rows(name: str, piece: _Piece, first: int, last: int) -> Tensor:
    if name in piece.file.keys():  # noqa: SIM118
        return piece.file.get_slice(name)[first:last]
    codes, scale = (piece.file.get_tensor(name + end) for end in (CODES, SCALE))
    return quantised.floats(codes, scale, name.rpartition("/")[2])[first:last]
