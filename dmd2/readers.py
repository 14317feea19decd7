"""Readers of real images by kind of source: blocks of images uint8 ``(n, C, H, W)`` and labels int64 ``(n,)``.

A reader holds one block in memory, not the set, and gives the same images in the same order every time.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.cifar import cifar10
from dmd2.config import Data
from dmd2.errors import UserError
from dmd2.image_files import hub, image_folder

IDX_FOLDERS = ("", "raw", "FashionMNIST/raw", "MNIST/raw")  # as unpacked, and as torchvision unpacks
BLOCK = 1000  # LMDB rows read at a time
SLACK = 1 << 20  # bytes that LMDB may have given to pages at the end of its file without ever writing them


def read(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of the source that `data` names.

    Raises:
        UserError: the source is missing or damaged, or of a kind this version cannot read itself.
    """
    readers = {
        "sklearn-digits": _digits, "idx": _idx, "lmdb": _lmdb, "image-folder": image_folder, "cifar10": cifar10,
        "hub": hub,
    }  # fmt: skip
    if data.source.kind not in readers:
        raise UserError(
            f"data {data.name}: no reader for source {data.source.kind} in this version; put safetensors shards with "
            f"images and labels and their manifest.json under data/real/{data.name} (see README, 'Your own data')"
        )
    return readers[data.source.kind](data)


def _digits(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """UCI handwritten digits, 1,797 images of 8x8 with 17 grey levels, from the scikit-learn wheel."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    yield np.rint(images.reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8), labels.astype(np.int64)


def _idx(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """MNIST-style idx files (train set), padded with zeros to the resolution."""
    place = Path(data.source.path or "")
    folders = [place / name for name in IDX_FOLDERS if any((place / name).glob("train-*-ubyte*"))] or [place]
    images, labels = (
        read_idx(_plain_or_gzip(folders[0] / name), data.name)
        for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    )
    if len(images) != len(labels):
        raise UserError(f"data {data.name}: {len(images)} images but {len(labels)} labels in {folders[0]}")
    margin = (data.resolution - images.shape[-1]) // 2
    if margin < 0:
        raise UserError(f"data {data.name}: images are {images.shape[1:]}, larger than resolution {data.resolution}")
    yield np.pad(images, ((0, 0), (margin, margin), (margin, margin)))[:, None], labels.astype(np.int64)


def _plain_or_gzip(path: Path) -> Path:
    return path.with_suffix("") if path.with_suffix("").exists() and not path.exists() else path


def read_idx(path: Path, name: str) -> np.ndarray:
    """Array of an idx file (uint8), gzipped if its name ends in .gz.

    Raises:
        UserError: missing, truncated or not idx.
    """
    if not path.exists():
        raise UserError(f"data {name}: {path} is missing (Debian: apt-get install dataset-fashion-mnist)")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"data {name}: {path} is truncated or not gzip ({error}); fetch it again") from None
    dims = raw[3] if len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw, ">i4", dims, 4).tolist()) if len(raw) >= 4 + 4 * dims and dims else ()
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * dims + int(np.prod(shape)):
        raise UserError(f"data {name}: {path} is not a whole idx file of bytes; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def _lmdb(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The convention of the official DMD2 code: a key for every row of `images` (uint8 CHW) and `labels` (int64)."""
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
                yield from _LmdbRows(data, place, transaction).blocks()
    except lmdb.Error as error:
        raise UserError(f"data {data.name}: {place} is not a readable LMDB ({error}); copy it again") from None


def _check_whole(data: Data, place: Path, environment: Any) -> None:
    """Refuse a file that is shorter than its pages: to read beyond its end would kill the process."""
    file = place / "data.mdb" if place.is_dir() else place
    size, needed = file.stat().st_size, environment.stat()["psize"] * (environment.info()["last_pgno"] + 1)
    if size + SLACK < needed:
        raise UserError(f"data {data.name}: {file} has {size} bytes of {needed}: it is truncated; copy it again")


class _LmdbRows:
    """Rows of one LMDB; every complaint names file and key."""

    def __init__(self, data: Data, place: Path, transaction: Any) -> None:
        self.data, self.place, self.transaction = data, place, transaction

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images and labels in the order of their numbers."""
        wanted = (self.data.channels, self.data.resolution, self.data.resolution)
        count, *shape = self.shape("images")
        labels, *rest = self.shape("labels")
        if tuple(shape) != wanted:
            raise self.wrong(
                f"images_shape says rows of {tuple(shape)}, but the config says {wanted}: set data.resolution and "
                "data.channels, or correct the key (the official builder takes it from the last folder it read)"
            )
        if rest not in ([], [1]):
            raise self.wrong(f"labels_shape says rows of {tuple(rest)}: labels are one number a row")
        if labels != count:
            raise self.wrong(f"images_shape says {count} rows but labels_shape {labels}: build it again")
        if self.transaction.get(f"images_{count}_data".encode()) is not None:
            raise self.wrong(f"there is a key images_{count}_data although images_shape says {count} rows: correct it")
        for start in range(0, count, BLOCK):
            rows = range(start, min(start + BLOCK, count))
            images = np.frombuffer(b"".join(self.row("images", i, int(np.prod(wanted))) for i in rows), np.uint8)
            numbers = np.frombuffer(b"".join(self.row("labels", i, 8) for i in rows), np.int64)
            yield images.reshape(-1, *wanted), numbers

    def shape(self, array: str) -> list[int]:
        """Numbers of ``<array>_shape``: rows first."""
        value = self.transaction.get(f"{array}_shape".encode())
        if value is None:
            raise self.wrong(f"there is no key {array}_shape: it is not a set of the official convention")
        text = bytes(value).decode("ascii", "replace")
        if not text.split() or not all(number.isdecimal() for number in text.split()):
            raise self.wrong(f"{array}_shape is {text!r} instead of numbers with blanks between them")
        return [int(number) for number in text.split()]

    def row(self, array: str, index: int, size: int) -> Any:
        """Bytes of ``<array>_<index>_data``."""
        value = self.transaction.get(f"{array}_{index}_data".encode())
        if value is None:
            raise self.wrong(f"there is no key {array}_{index}_data although {array}_shape counts it: build it again")
        if len(value) != size:
            kind = "uint8 images" if array == "images" else "int64 labels"
            raise self.wrong(f"{array}_{index}_data has {len(value)} bytes instead of {size}, a row of {kind}")
        return value

    def wrong(self, what: str) -> UserError:
        """A complaint about this file."""
        return UserError(f"data {self.data.name}: {self.place}: {what}")
