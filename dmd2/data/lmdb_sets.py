"""LMDBs in the convention of the official DMD2 code: a key for every row of every array, and one for its shape.

``images`` (uint8 CHW) go with ``labels`` (int64); ``latents`` (float16 CHW, times their scaling factor) go with
``prompts`` (UTF-8). Row 3 of images is under ``images_3_data``; ``images_shape`` says ``5 3 64 64``.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.core.distributed import rows_of_part
from dmd2.core.errors import UserError
from dmd2.data.decode import Block
from dmd2.experiment.data_config import Data

BLOCK_ROWS, BLOCK_BYTES = 1000, 1 << 26  # at most so many rows, and bytes of them, are read at a time
SLACK = 1 << 20  # bytes that LMDB may have given to pages at the end of its file without ever writing them
DTYPES = {"images": "uint8", "labels": "int64", "latents": "float16"}
Get = Callable[[bytes], Any]  # content of a key, None if it is not there


def lmdb_rows(data: Data, part: int, parts: int) -> Iterator[Block]:
    """Part `part` of `parts` of the rows, in the order of their numbers: images with labels, or latents with prompts.

    Raises:
        UserError: missing, truncated, not of the configured shape, or latents for a run in pixels.
    """
    import lmdb

    place = Path(data.source.path or "")
    if data.text is not None and not data.latents:
        raise UserError("an LMDB with prompts holds latents: set data.text.latents: true")
    if not place.exists():
        raise UserError(
            f"{place} does not exist: put the LMDB there, name another source in data.source, or put safetensors "
            f"shards with their manifest.json under data/real/{data.name}"
        )
    try:
        with lmdb.open(
            str(place), subdir=place.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
        ) as environment:
            _check_whole(place / "data.mdb" if place.is_dir() else place, environment)
            with environment.begin(buffers=True) as transaction:
                yield from _blocks(transaction.get, data, part, parts)
    except lmdb.Error as error:
        raise UserError(f"{place} is not a readable LMDB ({error}); copy it again") from None
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _check_whole(file: Path, environment: Any) -> None:
    """Refuse a file that is shorter than its pages: to read beyond its end would kill the process."""
    size, needed = file.stat().st_size, environment.stat()["psize"] * (environment.info()["last_pgno"] + 1)
    if size + SLACK < needed:
        raise UserError(f"{file.name} has {size} bytes of {needed}: it is truncated; copy it again")


def _blocks(get: Get, data: Data, part: int, parts: int) -> Iterator[Block]:
    array, conditions = ("images", "labels") if data.text is None else ("latents", "prompts")
    size = math.prod(data.shape) * np.dtype(DTYPES[array]).itemsize
    mine, step = rows_of_part(_count(get, array, conditions, data.shape), parts, part), max(1, BLOCK_BYTES // size)
    for start in range(mine.start, mine.stop, min(BLOCK_ROWS, step)):
        block = range(start, min(start + min(BLOCK_ROWS, step), mine.stop))
        rows = bytearray().join(_row(get, array, i, size) for i in block)
        read = _label if conditions == "labels" else _prompt
        yield np.frombuffer(rows, DTYPES[array]).reshape(-1, *data.shape), [read(get, i) for i in block]


def _count(get: Get, array: str, conditions: str, wanted: tuple[int, ...]) -> int:
    """Number of rows, which have the shape `wanted` of the config and one condition each."""
    count, *single = _shape(get, conditions)
    found, *shape = _shape(get, array)
    if tuple(shape) != wanted:
        raise UserError(
            f"{array}_shape says rows of {tuple(shape)}, but the config says {wanted}: set data.resolution and "
            "data.channels, or correct the key (the official builder takes it from the last folder it read)"
        )
    if count != found:
        raise UserError(f"{array}_shape says {found} rows but {conditions}_shape {count}: build it again")
    if get(f"{array}_{count}_data".encode()) is not None:
        raise UserError(f"there is a key {array}_{count}_data although {array}_shape says {count} rows: correct it")
    if single not in ([], [1]):
        raise UserError(f"{conditions}_shape says rows of {tuple(single)}: there is one of them a row")
    return count


def _shape(get: Get, array: str) -> list[int]:
    """Numbers of ``<array>_shape``: rows first."""
    value = get(f"{array}_shape".encode())
    if value is None:
        raise UserError(f"there is no key {array}_shape: it is not a set of the official convention")
    text = bytes(value).decode("ascii", "replace")
    if not text.split() or not all(number.isdecimal() for number in text.split()):
        raise UserError(f"{array}_shape is {text!r} instead of numbers with blanks between them")
    return [int(number) for number in text.split()]


def _row(get: Get, array: str, index: int, size: int | None = None) -> Any:
    key = f"{array}_{index}_data"
    value = get(key.encode())
    if value is None:
        raise UserError(f"there is no key {key} although {array}_shape counts it: build it again")
    if size is not None and len(value) != size:
        raise UserError(f"{key} has {len(value)} bytes instead of {size}, a row of {DTYPES[array]} {array}")
    return value


def _label(get: Get, index: int) -> int:
    return int.from_bytes(_row(get, "labels", index, 8), "little", signed=True)


def _prompt(get: Get, index: int) -> str:
    try:
        return bytes(_row(get, "prompts", index)).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"prompts_{index}_data is not UTF-8 ({error}): build it again") from None
