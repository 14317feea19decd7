"""Real images by kind of source, in blocks with labels or with captions.

A reader holds one block in memory, not the set, and gives the same images in the same order every time.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dmd2.core.errors import UserError
from dmd2.data.cifar import cifar10
from dmd2.data.decode import Block, Encoded, decoded
from dmd2.data.emoji import emoji
from dmd2.data.hub_sets import hub
from dmd2.data.image_files import image_files
from dmd2.data.lmdb_sets import lmdb_rows
from dmd2.data.tar_sets import webdataset
from dmd2.experiment.data_config import Data

IDX_FOLDERS = ("", "raw", "FashionMNIST/raw", "MNIST/raw")  # as unpacked, and as torchvision unpacks
ENCODED: dict[str, Callable[[Data, int, int], Iterator[Encoded]]] = {
    "image-folder": image_files, "hub": hub, "webdataset": webdataset, "emoji": emoji
}  # fmt: skip


def read(data: Data, pixels: int | None = None, part: int = 0, parts: int = 1) -> Iterator[Block]:
    """Blocks of part `part` (from 0) of `parts` of the source that `data` names, with labels or, of text, captions.

    Args:
        pixels: sides of the images, uint8 ``(n, C, pixels, pixels)``, by default `data.resolution`. A captioned LMDB
            holds latents, float16 ``(n, C, R, R)`` by data.channels and data.resolution, which are given as they are.

    Raises:
        UserError: the source is missing or damaged, cannot be shared so, or is of a kind without captions.
    """
    kind = data.source.kind
    try:
        if kind in ENCODED:
            yield from decoded(ENCODED[kind](data, part, parts), data, pixels or data.resolution)
        elif kind == "lmdb":
            yield from lmdb_rows(data, part, parts)
        elif data.text is not None:
            raise UserError(
                f"source {kind} has no captions: use webdataset, image-folder, hub or lmdb, or put safetensors shards "
                f"and captions-00000.jsonl with their manifest.json under data/real/{data.name}"
            )
        elif kind == "latents":
            raise UserError(
                "there is no reader for source latents: put safetensors shards with images and labels and their "
                f"manifest.json under data/real/{data.name}"
            )
        else:
            yield from {"sklearn-digits": _digits, "idx": _idx, "cifar10": cifar10}[kind](data)
    except UserError as error:
        raise UserError(f"data {data.name}: {error}") from None


def _digits(_: Data) -> Iterator[Block]:
    """UCI handwritten digits, 1,797 images of 8x8 with 17 grey levels, from the scikit-learn wheel."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    yield np.rint(images.reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8), labels.tolist()


def _idx(data: Data) -> Iterator[Block]:
    """MNIST-style idx files (train set), padded with zeros to the resolution."""
    place = Path(data.source.path or "")
    folder = next((place / name for name in IDX_FOLDERS if any((place / name).glob("train-*-ubyte*"))), place)
    images, labels = (read_idx(folder / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    if len(images) != len(labels):
        raise UserError(f"{len(images)} images but {len(labels)} labels in {folder}")
    margin = (data.resolution - images.shape[-1]) // 2
    if margin < 0:
        raise UserError(f"images are {images.shape[1:]}, larger than resolution {data.resolution}")
    yield np.pad(images, ((0, 0), (margin, margin), (margin, margin)))[:, None], labels.tolist()


def read_idx(path: Path) -> np.ndarray:
    """Array of an idx file (uint8) at `path`, whose name ends in .gz, or of the one unpacked beside it.

    Raises:
        UserError: missing, truncated or not idx.
    """
    path = next((place for place in (path, path.with_suffix("")) if place.exists()), path)
    if not path.exists():
        raise UserError(f"{path} is missing (Debian: apt-get install dataset-fashion-mnist)")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is truncated or not gzip ({error}); fetch it again") from None
    dims = raw[3] if len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw, ">i4", dims, 4).tolist()) if len(raw) >= 4 + 4 * dims and dims else ()
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * dims + int(np.prod(shape)):
        raise UserError(f"{path} is not a whole idx file of bytes; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()
