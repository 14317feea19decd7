"""Tensor sets on disk: real images, teacher pairs and prompts, as safetensors shards behind a checksummed manifest."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import atomic, read_json, verified
from dmd2.core.upload import upload
from dmd2.networks.condition import Condition

SHARD_BYTES = 1 << 28
CONDITIONS = ("labels", "text", "pooled", "time_ids", "text_mask")
Rows = dict[str, Tensor]  # tensors of equal length by name


class TensorSet:
    """Tensors of equal length: ``images`` (uint8, or float latents), conditions, and ``noise`` for pairs; a set of
    prompts has conditions only.

    Args:
        shards: the same tensors by name, some of the rows in each, in order; never joined here, so that shards mapped
            from files stay on disk.
    """

    def __init__(self, *shards: Rows) -> None:
        self.shards = shards
        self.ends = torch.tensor([len(next(iter(shard.values()))) for shard in shards]).cumsum(0)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), self.ends[:-1]])
        self.length = int(self.ends[-1])

    def __len__(self) -> int:
        return self.length

    @property
    def tensors(self) -> Rows:
        """Whole tensors; those of several shards are copied into memory, so only for small sets."""
        if len(self.shards) == 1:
            return self.shards[0]
        return {name: torch.cat([shard[name] for shard in self.shards]) for name in self.shards[0]}

    def tensor(self, name: str, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Rows of one tensor on `device`, or where they are; `indices` are int64 ``(B,)`` from 0 to the length - 1."""
        found = self._tensor(name, indices)
        return found if device is None else upload(found, device)

    def _tensor(self, name: str, indices: Tensor) -> Tensor:
        if len(self.shards) == 1 or not len(indices):
            return self.shards[0][name][indices]
        shard = torch.bucketize(indices, self.ends, right=True)
        if indices.min() < 0 or shard.max() == len(self.shards):
            raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} are not all in a set of {len(self)}")
        rows = indices - self.starts[shard]
        # A row is a contiguous piece of one file; per-shard gathers would be ten times slower with sixty shards.
        found = zip(shard.tolist(), rows.tolist(), strict=True)
        return torch.stack([self.shards[number][name][row] for number, row in found])

    def rows(self, indices: Tensor, names: Iterable[str], device: torch.device | str | None = None) -> Rows:
        """Rows of those of the named tensors that the set has, as they are stored."""
        return {name: self.tensor(name, indices, device) for name in names if name in self.shards[0]}

    def images(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Images of `indices` as `images_of` returns them."""
        return images_of(self.rows(indices, ["images"], device))

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Condition]:
        """Images and conditions of the same rows."""
        return self.images(indices, device), self.condition(indices, device)

    def condition(self, indices: Tensor, device: torch.device | str = "cpu") -> Condition:
        """Conditions of the same rows."""
        return condition_of(self.rows(indices, CONDITIONS, device))


def images_of(rows: Rows) -> Tensor:
    """Images in [-1, 1] (or latents), float32 ``(B, C, H, W)``."""
    images = rows["images"]
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images.float()


def condition_of(rows: Rows) -> Condition:
    """What the rows say of their conditions, numbers as float32."""
    found = {name: rows[name] for name in CONDITIONS if name in rows}
    return Condition(**{name: row.float() if row.is_floating_point() else row for name, row in found.items()})


def save_shard(path: Path, tensors: Rows) -> None:
    """Write tensors as one safetensors file, atomically."""
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load_shard(path: Path) -> Rows:
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

    The system reads pages when they are used and may drop them again, so a set may be larger than memory.

    Raises:
        UserError: a shard is missing, changed, or of other tensors than the first.
    """
    listed = [entry for entry in read_json(manifest)["files"] if entry["path"].endswith(".safetensors")]
    paths = [verified(manifest.parent, entry) for entry in listed]
    shards = [load_shard(path) for path in paths]
    rows = [{name: (str(t.dtype), list(t.shape[1:])) for name, t in sorted(shard.items())} for shard in shards]
    for path, found in zip(paths, rows, strict=True):
        if found != rows[0]:
            raise UserError(f"{path} holds {found}, but {paths[0].name} {rows[0]}: make it again")
    return TensorSet(*shards)


class ShardWriter:
    """Gathers rows into files ``NAME-NNNNN.safetensors`` beside their manifest; holds about two files in memory.

    Args:
        manifest: that of an earlier set is removed before the first file is written, since it may list this file.
        row_bytes: so many are counted for a row, and files have equal numbers of rows, about `SHARD_BYTES` in each;
            by default a file is written after the block of rows that reaches `SHARD_BYTES`.
    """

    def __init__(self, manifest: Path, name: str, row_bytes: int | None = None) -> None:
        self.manifest, self.name = manifest, name
        self.rows = None if row_bytes is None else max(SHARD_BYTES // row_bytes, 1)
        self.paths: list[Path] = []
        self.waiting: list[Rows] = []
        self.count = 0

    def add(self, rows: Rows) -> None:
        """Take rows, and write a file when there are enough."""
        end = None if self.rows is None else self.rows - self.count % self.rows
        first, rest = ({name: tensor[part] for name, tensor in rows.items()} for part in (slice(end), slice(end, None)))
        self.waiting.append(first)
        self.count += _length(first)
        size = sum(tensor.nbytes for part in self.waiting for tensor in part.values())
        if size >= SHARD_BYTES if self.rows is None else self.count % self.rows == 0:
            self._write()
        if end is not None and _length(rest):
            self.add(rest)

    def finish(self) -> list[Path]:
        """Write what is waiting and remove other files of that name; returns the files."""
        if self.waiting:
            self._write()
        for stale in set(self.manifest.parent.glob(f"{self.name}-[0-9][0-9][0-9][0-9][0-9].safetensors")):
            if stale not in self.paths:
                stale.unlink()
        return self.paths

    def _write(self) -> None:
        self.manifest.unlink(missing_ok=True)
        self.paths.append(self.manifest.with_name(f"{self.name}-{len(self.paths):05d}.safetensors"))
        save_shard(self.paths[-1], {name: torch.cat([part[name] for part in self.waiting]) for name in self.waiting[0]})
        self.waiting = []


def _length(rows: Rows) -> int:
    return len(next(iter(rows.values())))
