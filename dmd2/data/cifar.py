"""CIFAR-10 as its authors publish it, in the binary or the Python version, unpacked or as downloaded."""

import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import Unpickler
from typing import Any

import numpy as np

from dmd2.core.errors import UserError
from dmd2.experiment.config import Data

FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
SHAPE = (3, 32, 32)
ROW = 1 + 3 * 32 * 32  # bytes of an image in the binary version: its label, then its channels


class _Array:
    """The parts of a pickled array: the pickle itself reaches no code of numpy."""

    shape: Any = None
    type: Any = None
    fortran: Any = False
    content: Any = b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.type, self.fortran, self.content = state


class _Type:
    """The name of a pickled array's type."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which a type of one byte does not have."""


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes into pickles for Python 2


class _Batch(Unpickler):
    """Reads dicts, lists, numbers, strings and arrays, and refuses everything else by its name."""

    known = {
        "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
        "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
        "numpy.ndarray": _Array,
        "numpy.dtype": _Type,
        "_codecs.encode": _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the pickle."""
        if f"{module}.{name}" not in self.known:
            raise UserError(f"it asks for {module}.{name}, which no batch of CIFAR-10 needs: do not trust this file")
        return self.known[f"{module}.{name}"]


def cifar10(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The 50,000 training images in published order: images uint8 ``(n, 3, 32, 32)``, labels int64 ``(n,)``.

    Raises:
        UserError: nothing there, or a batch that is missing, truncated or holds something else.
    """
    for name, content in _batches(data):
        read = _binary if name.endswith(".bin") else _pickled
        try:
            images, labels = read(content)
        except UserError as error:
            raise UserError(f"data {data.name}: {name}: {error}") from None
        yield images.reshape(-1, *SHAPE), labels


def _batches(data: Data) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each training batch; the name of a binary one ends in .bin."""
    place = Path(data.source.path or "")
    for folder in (place, *(place / name for name in FOLDERS)):
        for suffix in (".bin", ""):
            paths = [folder / (name + suffix) for name in BATCHES]
            if any(path.exists() for path in paths):
                for path in paths:
                    if not path.exists():
                        raise UserError(f"data {data.name}: {path} is missing beside the other batches")
                    yield str(path), path.read_bytes()
                return
    for archive in (place, *(place / name for name in ARCHIVES)):
        if archive.is_file():
            yield from _archived(data, archive)
            return
    raise UserError(
        f"data {data.name}: there is no CIFAR-10 at {place}: put {' or '.join(ARCHIVES)} there, packed or unpacked"
    )


def _archived(data: Data, archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(archive) as tar:
            members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            for name in BATCHES:
                member = members.get(f"{name}.bin") or members.get(name)
                if member is None:
                    raise UserError(f"data {data.name}: {archive} has no {name}: it is not CIFAR-10")
                file = tar.extractfile(member)
                assert file is not None  # isfile above
                yield f"{archive}/{member.name}", file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"data {data.name}: {archive} is truncated or no tar archive ({error}); fetch it again"
        ) from None


def _binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % ROW:
        raise UserError(f"{len(content)} bytes are not rows of {ROW}; fetch it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, ROW)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


def _pickled(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    broken = UserError("it is no whole batch of data (uint8, N x 3072) and labels (N); fetch it again")
    try:
        batch = _Batch(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        data, labels = batch["data"], np.array([int(label) for label in batch["labels"]], np.int64)
        whole = data.type.name in ("u1", b"u1") and tuple(data.shape) == (len(labels), ROW - 1)
        images = np.frombuffer(data.content, np.uint8).reshape(data.shape, order="F" if data.fortran else "C")
    except UserError:
        raise
    except Exception:  # a damaged pickle may raise anything
        raise broken from None
    if not whole:
        raise broken
    return images, labels
