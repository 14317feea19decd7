"""CIFAR-10 as its authors publish it, in the binary or the Python version, unpacked or as downloaded."""

import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dmd2.core.errors import UserError
from dmd2.data.inert_pickle import Refused, read_inert
from dmd2.experiment.data_config import Data

FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
SHAPE = (3, 32, 32)
ROW = 1 + 3 * 32 * 32  # bytes of an image in the binary version: its label, then its channels


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
        batch = read_inert(io.BytesIO(content))
        labels = np.array([int(label) for label in batch["labels"]], np.int64)
        shape, kind, by_columns, pixels = batch["data"].state["array"]
        whole = kind.state["name"] == "u1" and tuple(shape) == (len(labels), ROW - 1)
        pixels = pixels.encode("latin1") if isinstance(pixels, str) else pixels  # Python 2 wrote text for bytes
        images = np.frombuffer(pixels, np.uint8).reshape(shape, order="F" if by_columns else "C")
    except Refused as refused:
        raise UserError(f"it {refused}, which no batch of CIFAR-10 needs: do not trust this file") from None
    except Exception:  # a damaged pickle may raise anything
        raise broken from None
    if not whole:
        raise broken
    return images, labels
