"""Readers of real images by kind of source: blocks of images uint8 ``(n, C, H, W)`` with labels or with captions.

A reader holds one block in memory, not the set, and gives the same images in the same order every time.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dmd2.core.errors import UserError
from dmd2.data.cifar import cifar10
from dmd2.data.decode import Encoded, Pixels, decoded
from dmd2.data.emoji import emoji
from dmd2.data.hub_sets import hub
from dmd2.data.image_files import image_files
from dmd2.data.lmdb_sets import captioned_lmdb, labelled_lmdb
from dmd2.data.tar_sets import webdataset
from dmd2.experiment.data_config import Data

IDX_FOLDERS = ("", "raw", "FashionMNIST/raw", "MNIST/raw")  # as unpacked, and as torchvision unpacks
# Encoded images with labels or captions, of one share of several.
LABELLED: dict[str, Callable[[Data, int, int], Iterator[Encoded]]] = {"image-folder": image_files, "hub": hub}
CAPTIONED = {**LABELLED, "webdataset": webdataset}


def read(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of the source that `data` names: images uint8 ``(n, C, H, W)``, labels int64 ``(n,)``.

    Raises:
        UserError: the source is missing or damaged, or of a kind this version cannot read itself.
    """
    arrays = {"sklearn-digits": _digits, "idx": _idx, "lmdb": labelled_lmdb, "cifar10": cifar10}
    if data.source.kind in arrays:
        return arrays[data.source.kind](data)
    if data.source.kind not in LABELLED:
        raise UserError(
            f"data {data.name}: no reader for source {data.source.kind} in this version; put safetensors shards with "
            f"images and labels and their manifest.json under data/real/{data.name} (see README, 'Your own data')"
        )
    blocks = decoded(LABELLED[data.source.kind](data, 0, 1), Pixels.labelled(data))
    return ((images, np.array(labels, np.int64)) for images, labels in blocks)


def read_captioned(data: Data, pixels: int, part: int, parts: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Blocks of share `part` (from 0) of `parts` of the source that `data` names, and the captions of their rows.

    Args:
        pixels: sides of the images, uint8 ``(n, 3, pixels, pixels)``. Those of an LMDB are latents, float16
            ``(n, C, R, R)`` by data.channels and data.resolution, as they are.

    Raises:
        UserError: the source is missing or damaged, cannot be shared so, or is of a kind without captions.
    """
    if data.source.kind in CAPTIONED:
        return decoded(CAPTIONED[data.source.kind](data, part, parts), Pixels.captioned(data, pixels))
    if data.source.kind == "lmdb":
        return captioned_lmdb(data, part, parts)
    if data.source.kind == "emoji":
        return emoji(data, pixels, part, parts)
    raise UserError(
        f"data {data.name}: source {data.source.kind} has no captions: use webdataset, image-folder, hub or lmdb, or "
        f"put safetensors shards and captions-00000.jsonl with their manifest.json under data/real/{data.name}"
    )


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
