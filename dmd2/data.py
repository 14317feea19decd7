"""Tensor sets on disk: real images and teacher pairs, as safetensors shards behind a checksummed manifest."""

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd2.condition import Condition
from dmd2.config import Data
from dmd2.errors import UserError, readable_errors
from dmd2.files import atomic, listing, read_json, verified, write_json
from dmd2.made import recorded

CONDITIONS = ("labels", "text", "pooled", "time_ids")


@dataclass(frozen=True)
class TensorSet:
    """Tensors of equal length: ``images`` (uint8, or float latents), conditions, and ``noise`` for pairs."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors["images"])

    def tensor(self, name: str, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Rows of one tensor on `device`."""
        return self.tensors[name][indices].to(device)

    def images(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Images in [-1, 1] (or latents), float32 ``(B, C, H, W)``."""
        images = self.tensor("images", indices, device)
        return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()

    def condition(self, indices: Tensor, device: torch.device | str = "cpu") -> Condition:
        """Conditions of the same rows."""
        present = [name for name in CONDITIONS if name in self.tensors]
        return Condition(**{name: self.tensor(name, indices, device) for name in present})


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as one safetensors file, atomically."""
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load_shard(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}): delete it and run Snakemake again"
        ) from None


def load_set(manifest: Path) -> TensorSet:
    """Load every shard a manifest lists, each verified against its checksum."""
    shards = [load_shard(verified(manifest.parent, entry)) for entry in read_json(manifest)["files"]]
    return TensorSet({name: torch.cat([shard[name] for shard in shards]) for name in shards[0]})


def prepare(data: Data, folder: Path) -> Path:
    """Bring a source of real images into ``folder/manifest.json`` and its shard.

    Raises:
        UserError: the source is missing, truncated, or of a kind this version cannot read itself.
    """
    readers = {"sklearn-digits": _digits, "idx": _idx}
    if data.source.kind not in readers:
        raise UserError(
            f"data {data.name}: no reader for source {data.source.kind} in this version; put safetensors shards with "
            f"images and labels and their manifest.json under {folder} (see README, 'Your own data')"
        )
    images, labels = readers[data.source.kind](data)
    expected = (data.channels, data.resolution, data.resolution)
    if tuple(images.shape[1:]) != expected:
        raise UserError(f"data {data.name}: images are {tuple(images.shape[1:])} but the config says {expected}")
    shard = folder / "shard-00000.safetensors"
    save_shard(shard, {"images": images, "labels": labels})
    manifest = {
        "kind": "real", "name": data.name, "count": len(images), "shape": list(expected), "classes": data.classes,
        "source": data.source.model_dump(), "files": listing([shard], folder),
    }  # fmt: skip
    write_json(folder / "manifest.json", manifest)
    return folder / "manifest.json"


def _digits(data: Data) -> tuple[Tensor, Tensor]:
    """UCI handwritten digits, 1,797 images of 8x8 with 17 grey levels, from the scikit-learn wheel."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8)
    return torch.from_numpy(grey), torch.from_numpy(labels.astype(np.int64))


def _idx(data: Data) -> tuple[Tensor, Tensor]:
    """MNIST-style idx files (train set), padded with zeros to the resolution."""
    folder = Path(data.source.path or "")
    images = read_idx(folder / "train-images-idx3-ubyte.gz", data.name)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", data.name)
    if len(images) != len(labels):
        raise UserError(f"data {data.name}: {len(images)} images but {len(labels)} labels in {folder}")
    margin = (data.resolution - images.shape[-1]) // 2
    if margin < 0:
        raise UserError(f"data {data.name}: images are {images.shape[1:]}, larger than resolution {data.resolution}")
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))[:, None]
    return torch.from_numpy(padded), torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path, name: str) -> np.ndarray:
    """Array of a gzipped idx file (uint8).

    Raises:
        UserError: missing, truncated or not idx.
    """
    if not path.exists():
        raise UserError(f"data {name}: {path} is missing (Debian: apt-get install dataset-fashion-mnist)")
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"data {name}: {path} is truncated or not gzip ({error}); fetch it again") from None
    dims = raw[3] if len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw, ">i4", dims, 4).tolist()) if len(raw) >= 4 + 4 * dims and dims else ()
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * dims + int(np.prod(shape)):
        raise UserError(f"data {name}: {path} is not a whole idx file of bytes; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def main(config: Annotated[str, typer.Option(help="JSON of the data section")], out: Path) -> None:
    """Prepare real data: write OUT (a manifest.json) and its shards."""
    with readable_errors():
        with recorded(out, json.loads(config)):
            prepare(Data.model_validate(json.loads(config)), out.parent)


if __name__ == "__main__":
    typer.run(main)
