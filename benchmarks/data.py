"""Random batches of 64 px images: our mapped safetensors shards against an LMDB of the official convention, row by row.

Both sets hold the same random images and each is read by a process of its own, in turns, so machine noise hits them
alike; everything lies in the page cache, as it does after our checksums. A batch is what a training step gets: float32
in [-1, 1] and labels; "bytes" are uint8, which ours hands to a GPU and converts there. Memory is the most that a
process held after a round beyond what it held before opening its set: anonymous is its own, mapped is pages of files,
which the system may drop. ``python -m benchmarks.data [IMAGES [ROUNDS]]``
"""

import multiprocessing
import re
import statistics
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import lmdb
import numpy as np
import torch
import typer
from torch import Tensor

import dmd2.data.sets
from dmd2.data.prepare import prepare_labelled
from dmd2.data.sets import TensorSet, load_set
from dmd2.experiment.config import Data

IMAGES, ROUNDS, BATCH, BATCHES, SHAPE, CLASSES = 20_000, 7, 280, 50, (3, 64, 64), 1000


def write_lmdb(path: Path, count: int) -> None:
    """`count` random images, in the convention that our reader and the official code share."""
    rng = np.random.default_rng(0)
    with lmdb.open(str(path), map_size=count * 20_000 + (1 << 24)) as environment:
        with environment.begin(write=True) as rows:
            for i in range(count):
                rows.put(f"images_{i}_data".encode(), rng.bytes(int(np.prod(SHAPE))))
                rows.put(f"labels_{i}_data".encode(), np.int64(rng.integers(CLASSES)).tobytes())
            rows.put(b"images_shape", " ".join(map(str, (count, *SHAPE))).encode())
            rows.put(b"labels_shape", str(count).encode())


class OfficialRows:
    """The convention read as its layout suggests: one key, one copy and one small tensor per image, then a stack."""

    def __init__(self, path: Path) -> None:
        self.environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self.environment.begin() as rows:
            image = np.frombuffer(rows.get(f"images_{index}_data".encode()), np.uint8).reshape(SHAPE)
            label = np.frombuffer(rows.get(f"labels_{index}_data".encode()), np.int64)
        return torch.tensor(image, dtype=torch.float32) / 255, int(label[0])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self[index] for index in indices.tolist()), strict=True)
        return torch.stack(images) * 2 - 1, torch.tensor(labels)


def our_batch(real: TensorSet, indices: Tensor) -> tuple[Tensor, Tensor]:
    labels = real.condition(indices).labels
    assert labels is not None
    return real.images(indices), labels


def our_bytes(real: TensorSet, indices: Tensor) -> tuple[Tensor, Tensor]:
    return real.tensor("images", indices), real.tensor("labels", indices)


def memory() -> tuple[float, float]:
    """MiB of this process: anonymous, and mapped from files."""
    status = Path("/proc/self/status").read_text()
    found = [re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "RssFile")]
    return tuple(int(match[1]) / 1024 for match in found if match)


@cache
def opened(way: str, folder: Path) -> tuple[object, float, tuple[float, float]]:
    """The set, seconds to open it, memory before."""
    torch.set_num_threads(1)
    before, started = memory(), time.perf_counter()
    found = OfficialRows(folder / "lmdb") if way == "lmdb" else load_set(folder / "shards/manifest.json")
    return found, time.perf_counter() - started, before


def measured(way: str, folder: Path, count: int, number: int) -> dict[str, float]:
    """One round: images per second, and a sum over all pixels and labels that must not depend on the way."""
    found, seconds, before = opened(way, folder)
    ours = our_bytes if way == "bytes" else our_batch
    drawn = torch.Generator().manual_seed(number)
    rows = [torch.randint(count, (BATCH,), generator=drawn) for _ in range(BATCHES)]
    started = time.perf_counter()
    for indices in rows:
        images, labels = ours(found, indices) if isinstance(found, TensorSet) else found.batch(indices)
    taken = time.perf_counter() - started
    total = float(images.double().sum() + labels.sum())
    (anonymous, mapped), (anonymous_before, mapped_before) = memory(), before
    return {"images": BATCH * BATCHES / taken, "open": seconds, "total": total,
            "anonymous": anonymous - anonymous_before, "mapped": mapped - mapped_before}  # fmt: skip


def main(count: Annotated[int, typer.Argument()] = IMAGES, rounds: Annotated[int, typer.Argument()] = ROUNDS) -> None:
    spawn = multiprocessing.get_context("spawn")
    source = Data(name="benchmark", source={"kind": "lmdb", "path": "lmdb"}, resolution=64, channels=3, classes=CLASSES)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_lmdb(folder / "lmdb", count)
        dmd2.data.sets.SHARD_BYTES = max(count // 60, 1) * int(np.prod(SHAPE))  # sixty shards, as ImageNet-64 has
        config = source.model_copy(update={"source": source.source.model_copy(update={"path": str(folder / "lmdb")})})
        prepare_labelled(config, folder / "shards")
        with spawn.Pool(1) as shards, spawn.Pool(1) as raw, spawn.Pool(1) as rows:
            pools = {"shards": shards, "bytes": raw, "lmdb": rows}
            found = {way: [] for way in pools}
            for number in range(rounds + 1):  # the first, which also opens the set, warms up
                for way, pool in pools.items():
                    found[way].append(pool.apply(measured, (way, folder, count, number)))
    print(f"{count} images of 64 px, batches of {BATCH}, {rounds} rounds of {BATCHES}, one thread")
    print(f"{'':<28}{'images/s':>10}{'open s':>9}{'anonymous MiB':>15}{'mapped MiB':>12}")
    titles = {"shards": "our shards", "bytes": "our shards, bytes", "lmdb": "LMDB row by row (official)"}
    for way, values in found.items():
        rate, most = statistics.median(value["images"] for value in values[1:]), max(v["anonymous"] for v in values)
        print(f"{titles[way]:<28}{rate:>10.0f}{values[0]['open']:>9.2f}{most:>15.0f}{values[-1]['mapped']:>12.0f}")
    same = all(abs(a["total"] - b["total"]) < 1e-2 * BATCH for a, b in zip(found["shards"], found["lmdb"], strict=True))
    print("the batches are equal" if same else "THE BATCHES DIFFER")


if __name__ == "__main__":
    typer.run(main)
