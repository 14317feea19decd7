"""Tensor sets on disk: real images and teacher pairs, as safetensors shards behind a checksummed manifest."""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import atomic, listing, read_json, verified, write_json
from dmd2.core.provenance import recorded
from dmd2.data.readers import read
from dmd2.experiment.config import Data
from dmd2.networks.condition import Condition

SHARD_BYTES = 1 << 28  # of images: what preparing a set holds in memory
CONDITIONS = ("labels", "text", "pooled", "time_ids")


class TensorSet:
    """Tensors of equal length: ``images`` (uint8, or float latents), conditions, and ``noise`` for pairs; a set of
    prompts has conditions only.

    Args:
        shards: the same tensors by name, one part of the rows after the other; never joined here, so that shards
            mapped from files stay on disk.
    """

    def __init__(self, *shards: dict[str, Tensor]) -> None:
        self.shards = shards
        self.ends = torch.tensor([len(next(iter(shard.values()))) for shard in shards]).cumsum(0)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), self.ends[:-1]])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Whole tensors; those of several shards are copied into memory, so only for small sets."""
        if len(self.shards) == 1:
            return self.shards[0]
        return {name: torch.cat([shard[name] for shard in self.shards]) for name in self.shards[0]}

    def tensor(self, name: str, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Rows of one tensor on `device`; `indices` are int64 ``(B,)`` from 0 to the length - 1."""
        if len(self.shards) == 1 or not len(indices):
            return self.shards[0][name][indices].to(device)
        shard = torch.bucketize(indices, self.ends, right=True)
        if indices.min() < 0 or shard.max() == len(self.shards):
            raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} are not all in a set of {len(self)}")
        rows = indices - self.starts[shard]
        # A row is a contiguous piece of one file; per-shard gathers would be ten times slower with sixty shards.
        found = zip(shard.tolist(), rows.tolist(), strict=True)
        return torch.stack([self.shards[number][name][row] for number, row in found]).to(device)

    def images(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Images in [-1, 1] (or latents), float32 ``(B, C, H, W)``."""
        images = self.tensor("images", indices, device)
        return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images.float()

    def condition(self, indices: Tensor, device: torch.device | str = "cpu") -> Condition:
        """Conditions of the same rows."""
        rows = {name: self.tensor(name, indices, device) for name in CONDITIONS if name in self.shards[0]}
        return Condition(**{name: row.float() if row.is_floating_point() else row for name, row in rows.items()})


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
    """Map every safetensors shard a manifest lists into memory, each verified against its checksum.

    Pages are read when used and are the system's to drop again: a set may be larger than memory.

    Raises:
        UserError: a shard is missing, changed, or of other tensors than the first.
    """
    listed = [entry for entry in read_json(manifest)["files"] if entry["path"].endswith(".safetensors")]
    paths = [verified(manifest.parent, entry) for entry in listed]
    shards = [load_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if _rows_of(shard) != _rows_of(shards[0]):
            raise UserError(f"{path} holds {_rows_of(shard)}, but {paths[0].name} {_rows_of(shards[0])}: make it again")
    return TensorSet(*shards)


def _rows_of(shard: dict[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    return {name: (str(tensor.dtype), list(tensor.shape[1:])) for name, tensor in sorted(shard.items())}


def prepare(data: Data, folder: Path) -> Path:
    """Bring a source of real images into shards and, last of all, ``folder/manifest.json``.

    The same source gives the same bytes. Memory: one shard and one block of the reader, whatever the set's size.

    Raises:
        UserError: the source is missing or damaged, of a kind this version cannot read, or not what the config says.
    """
    manifest = folder / "manifest.json"
    counts = np.zeros(data.classes, np.int64)
    shards: list[Path] = []
    for images, labels in _filled(read(data), data):
        counts += np.bincount(labels, minlength=data.classes)
        manifest.unlink(missing_ok=True)  # that of an earlier set, whose shards are replaced from here on
        shards.append(folder / f"shard-{len(shards):05d}.safetensors")
        save_shard(shards[-1], {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)})
        print(f"real data {data.name}  {counts.sum()} images in {len(shards)} shards", file=sys.stderr, flush=True)
    if not shards:
        raise UserError(f"data {data.name}: {data.source.path} holds no images")
    for stale in set(folder.glob("shard-[0-9][0-9][0-9][0-9][0-9].safetensors")) - set(shards):
        stale.unlink()
    write_json(manifest, {
        "kind": "real", "name": data.name, "count": int(counts.sum()),
        "shape": [data.channels, data.resolution, data.resolution], "classes": data.classes,
        "class_counts": counts.tolist(), "source": data.source.settings(), "files": listing(shards, folder),
    })  # fmt: skip
    return manifest


def _filled(blocks: Iterator[tuple[np.ndarray, np.ndarray]], data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of a reader, checked, as full shards; a shard is valid until the next one is asked for."""
    shape = (data.channels, data.resolution, data.resolution)
    rows = max(SHARD_BYTES // math.prod(shape), 1)
    images, labels, filled, done = np.empty((rows, *shape), np.uint8), np.empty(rows, np.int64), 0, 0
    for some_images, some_labels in blocks:
        if some_images.shape[1:] != shape:
            raise UserError(f"data {data.name}: images are {some_images.shape[1:]} but the config says {shape}")
        if len(wrong := np.flatnonzero((some_labels < 0) | (some_labels >= data.classes))):
            raise UserError(
                f"data {data.name}: image {done + wrong[0]} has label {some_labels[wrong[0]]}, but data.classes is "
                f"{data.classes} (labels 0 to {data.classes - 1}): correct one of them"
            )
        start, done = 0, done + len(some_images)
        while start < len(some_images):
            part = slice(start, start + rows - filled)
            stop = filled + len(some_images[part])
            images[filled:stop], labels[filled:stop] = some_images[part], some_labels[part]
            start, filled = part.stop, stop
            if filled == rows:
                yield images, labels
                filled = 0
    if filled:
        yield images[:filled], labels[:filled]


def main(config: Annotated[str, typer.Option(help="JSON of the data section")], out: Path) -> None:
    """Prepare real data: write OUT (a manifest.json) and its shards."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # jobs download nothing unless the user's environment says 0
    with readable_errors():
        data = Data.model_validate(json.loads(config))
        with recorded(out, json.loads(config), sources=[data.source.path]):
            prepare(data, out.parent)


if __name__ == "__main__":
    typer.run(main)
