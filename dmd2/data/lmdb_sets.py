"""LMDBs in the convention of the official DMD2 code: a key for every row of every array, and one for its shape."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.core.distributed import part as share
from dmd2.core.errors import UserError
from dmd2.experiment.data_config import Data

BLOCK, BLOCK_BYTES = 1000, 1 << 26  # at most so many rows, and bytes of them, are read at a time
SLACK = 1 << 20  # bytes that LMDB may have given to pages at the end of its file without ever writing them


def labelled_lmdb(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `images` (uint8 CHW) and `labels` (int64) in the order of their numbers.

    Raises:
        UserError: missing, truncated, or not of the configured shape.
    """
    with _rows(data) as rows:
        wanted = (data.channels, data.resolution, data.resolution)
        count = rows.count("images", "labels", wanted)
        for block in _blocks(range(count), math.prod(wanted)):
            images = b"".join(rows.row("images", i, math.prod(wanted), "uint8 images") for i in block)
            labels = b"".join(rows.row("labels", i, 8, "int64 labels") for i in block)
            yield np.frombuffer(images, np.uint8).reshape(-1, *wanted), np.frombuffer(labels, np.int64)


def captioned_lmdb(data: Data, part: int, parts: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Rows of `latents`, float16 ``(n, C, R, R)`` times their scaling factor, and of `prompts` (UTF-8), in their order.

    Raises:
        UserError: missing, truncated, not of the configured shape, or the run does not diffuse latents.
    """
    if not data.latents:
        raise UserError(f"data {data.name}: an LMDB with prompts holds latents: set data.text.latents: true")
    with _rows(data) as rows:
        wanted = (data.channels, data.resolution, data.resolution)
        count = rows.count("latents", "prompts", wanted)
        size = 2 * math.prod(wanted)
        for block in _blocks(share(count, parts, part), size):
            latents = bytearray().join(rows.row("latents", i, size, "float16 latents") for i in block)
            yield np.frombuffer(latents, np.float16).reshape(-1, *wanted), [rows.text("prompts", i) for i in block]


def _blocks(rows: range, size: int) -> Iterator[range]:
    step = max(1, min(BLOCK, BLOCK_BYTES // size))
    return (rows[start : start + step] for start in range(0, len(rows), step))


@contextmanager
def _rows(data: Data) -> Iterator["_Rows"]:
    import lmdb

    place = Path(data.source.path or "")
    if not place.exists():
        raise UserError(
            f"data {data.name}: {place} does not exist: put the LMDB there, name another source in data.source (see "
            f"README, 'Your own data'), or put safetensors shards with their manifest.json under data/real/{data.name}"
        )
    try:
        with lmdb.open(
            str(place), subdir=place.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
        ) as environment:
            _check_whole(data, place, environment)
            with environment.begin(buffers=True) as transaction:
                yield _Rows(data, place, transaction)
    except lmdb.Error as error:
        raise UserError(f"data {data.name}: {place} is not a readable LMDB ({error}); copy it again") from None


def _check_whole(data: Data, place: Path, environment: Any) -> None:
    """Refuse a file that is shorter than its pages: to read beyond its end would kill the process."""
    file = place / "data.mdb" if place.is_dir() else place
    size, needed = file.stat().st_size, environment.stat()["psize"] * (environment.info()["last_pgno"] + 1)
    if size + SLACK < needed:
        raise UserError(f"data {data.name}: {file} has {size} bytes of {needed}: it is truncated; copy it again")


class _Rows:
    """Rows of one LMDB; every complaint names file and key."""

    def __init__(self, data: Data, place: Path, transaction: Any) -> None:
        self.data, self.place, self.transaction = data, place, transaction

    def count(self, array: str, conditions: str, wanted: tuple[int, ...]) -> int:
        """Number of rows, which have the shape `wanted` of the config and one condition each."""
        count, *single = self.shape(conditions)
        found, *shape = self.shape(array)
        if tuple(shape) != wanted:
            raise self.wrong(
                f"{array}_shape says rows of {tuple(shape)}, but the config says {wanted}: set data.resolution and "
                "data.channels, or correct the key (the official builder takes it from the last folder it read)"
            )
        if count != found:
            raise self.wrong(f"{array}_shape says {found} rows but {conditions}_shape {count}: build it again")
        if self.transaction.get(f"{array}_{count}_data".encode()) is not None:
            raise self.wrong(
                f"there is a key {array}_{count}_data although {array}_shape says {count} rows: correct it"
            )
        if single not in ([], [1]):
            raise self.wrong(f"{conditions}_shape says rows of {tuple(single)}: there is one of them a row")
        return count

    def shape(self, array: str) -> list[int]:
        """Numbers of ``<array>_shape``: rows first."""
        value = self.transaction.get(f"{array}_shape".encode())
        if value is None:
            raise self.wrong(f"there is no key {array}_shape: it is not a set of the official convention")
        text = bytes(value).decode("ascii", "replace")
        if not text.split() or not all(number.isdecimal() for number in text.split()):
            raise self.wrong(f"{array}_shape is {text!r} instead of numbers with blanks between them")
        return [int(number) for number in text.split()]

    def row(self, array: str, index: int, size: int, kind: str) -> Any:
        """The `size` bytes of ``<array>_<index>_data``."""
        value = self._value(array, index)
        if len(value) != size:
            raise self.wrong(f"{array}_{index}_data has {len(value)} bytes instead of {size}, a row of {kind}")
        return value

    def text(self, array: str, index: int) -> str:
        """``<array>_<index>_data`` as UTF-8."""
        try:
            return bytes(self._value(array, index)).decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"{array}_{index}_data is not UTF-8 ({error}): build it again") from None

    def _value(self, array: str, index: int) -> Any:
        value = self.transaction.get(f"{array}_{index}_data".encode())
        if value is None:
            raise self.wrong(f"there is no key {array}_{index}_data although {array}_shape counts it: build it again")
        return value

    def wrong(self, what: str) -> UserError:
        """A complaint about this file."""
        return UserError(f"data {self.data.name}: {self.place}: {what}")
