"""CIFAR-10 as its authors publish it, in the binary or the Python version, unpacked or as downloaded."""

import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dmd2.core.errors import UserError
from dmd2.data.decode import Block
from dmd2.data.inert_pickle import Refused, read_inert
from dmd2.experiment.data_config import Data

FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
ROW = 1 + 3 * 32 * 32  # bytes of an image in the binary version: its label, then its channels


def cifar10(data: Data) -> Iterator[Block]:
    """The 50,000 training images in published order, uint8 ``(n, 3, 32, 32)``, with their labels.

    Raises:
        UserError: nothing there, or a batch that is missing, truncated or holds something else.
    """
    for name, content in _batches(Path(data.source.path or "")):
        try:
            images, labels = (_binary if name.endswith(".bin") else _pickled)(content)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        yield images.reshape(-1, 3, 32, 32), labels


def _batches(place: Path) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each training batch; the path of a binary one ends in .bin."""
    for folder in (place, *(place / name for name in FOLDERS)):
        if names := _version({path.name for path in folder.glob("data_batch_*")}):
            for path in (folder / name for name in names):
                if not path.exists():
                    raise UserError(f"{path} is missing beside the other batches")
                yield str(path), path.read_bytes()
            return
    archive = next((path for path in (place, *(place / name for name in ARCHIVES)) if path.is_file()), None)
    if archive is None:
        raise UserError(f"there is no CIFAR-10 at {place}: put {' or '.join(ARCHIVES)} there, packed or unpacked")
    try:
        with tarfile.open(archive) as tar:
            members = {Path(member.name).name: member for member in tar.getmembers()}
            for name in _version(set(members)) or BATCHES:
                file = tar.extractfile(members[name]) if name in members else None
                if file is None:
                    raise UserError(f"{archive} has no {name}: it is not CIFAR-10")
                yield f"{archive}/{members[name].name}", file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{archive} is truncated or no tar archive ({error}); fetch it again") from None


def _version(present: set[str]) -> list[str]:
    """Names of the five batches of the version that `present` files are of; empty where there is none."""
    versions = ([f"{name}.bin" for name in BATCHES], BATCHES)
    return next((names for names in versions if present.intersection(names)), [])


def _binary(content: bytes) -> tuple[np.ndarray, list[int]]:
    if not content or len(content) % ROW:
        raise UserError(f"{len(content)} bytes are not rows of {ROW}; fetch it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, ROW)
    return rows[:, 1:], rows[:, 0].tolist()


def _pickled(content: bytes) -> tuple[np.ndarray, list[int]]:
    try:
        batch = read_inert(io.BytesIO(content))
        labels = [int(label) for label in batch["labels"]]
        shape, kind, by_columns, pixels = batch["data"].state["array"]
        if kind.state["name"] != "u1" or tuple(shape) != (len(labels), ROW - 1):
            raise ValueError
        pixels = pixels.encode("latin1") if isinstance(pixels, str) else pixels  # Python 2 wrote text for bytes
        return np.frombuffer(pixels, np.uint8).reshape(shape, order="F" if by_columns else "C"), labels
    except Refused as refused:
        raise UserError(f"it {refused}, which no batch of CIFAR-10 needs: do not trust this file") from None
    except Exception:  # a damaged pickle may raise anything
        raise UserError("it is no whole batch of data (uint8, N x 3072) and labels (N); fetch it again") from None
