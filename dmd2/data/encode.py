"""Sets of images with captions, and of prompts alone, encoded once: latents and text states in shards.

A part holds a contiguous share of the source, so that jobs encode a large set side by side; `join` lists them all.
Pipelines run in IEEE float32 on every device.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from dmd2.core.distributed import Device, local_device
from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.core.precision import strict_float32
from dmd2.core.progress import Progress
from dmd2.core.provenance import recorded
from dmd2.core.rng import stream
from dmd2.data.captions import read_prompts, save_captions
from dmd2.data.pipelines import Pipeline, time_ids
from dmd2.data.readers import read_captioned
from dmd2.data.sets import SHARD_BYTES, save_shard
from dmd2.experiment.data_config import Data
from dmd2.experiment.run_inputs import prompt_settings
from dmd2.networks.condition import Condition

PIXELS = 1 << 22  # of the images that the autoencoder encodes at once: four of 1024 x 1024
PROMPTS = 256  # encoded at once

Rows = dict[str, Tensor]


class Shards:
    """Rows gathered into files of at most `SHARD_BYTES`, ``FOLDER/NAME-NNNNN.safetensors``."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.paths: list[Path] = []
        self.waiting: list[Rows] = []
        self.count = 0

    def add(self, rows: Rows) -> None:
        """Take rows of equal length, and write a file when there are enough."""
        self.waiting.append(rows)
        self.count += len(next(iter(rows.values())))
        if sum(tensor.nbytes for part in self.waiting for tensor in part.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self.waiting:
            self.paths.append(self.folder / f"{self.name}-{len(self.paths):05d}.safetensors")
            joined = {name: torch.cat([part[name] for part in self.waiting]) for name in self.waiting[0]}
            save_shard(self.paths[-1], joined)
            self.waiting = []


def text_rows(pipeline: Pipeline, prompts: list[str], pixels: int) -> Rows:
    """States of prompts as they are stored: float16, with SDXL's size condition where there is a pooled embedding."""
    parts = [pipeline.encode_prompts(prompts[start : start + PROMPTS]) for start in range(0, len(prompts), PROMPTS)]
    cond = Condition(
        text=torch.cat([part.text for part in parts if part.text is not None]),
        pooled=torch.cat([p.pooled for p in parts if p.pooled is not None]) if parts[0].pooled is not None else None,
    )
    assert cond.text is not None
    rows = {"text": cond.text.half().cpu()}
    if cond.pooled is not None:
        rows |= {"pooled": cond.pooled.half().cpu(), "time_ids": time_ids(pixels).expand(len(prompts), 6)}
    return rows


def image_size(data: Data, pipeline: Pipeline) -> int:
    """Pixels per side of the images behind a set's tensors."""
    return data.resolution * (pipeline.factor if data.latents else 1)


def encode_part(data: Data, manifest: Path, index: int, out: Path, device: torch.device) -> None:
    """Write part `index` of the real set: shards, captions and their manifest `out`.

    Raises:
        UserError: the source is missing or damaged, holds nothing for this part, or its images are of another size.
    """
    assert data.text is not None
    pipeline = Pipeline.load(manifest, device)
    pixels, shape = image_size(data, pipeline), (data.channels, data.resolution, data.resolution)
    shards, captions = Shards(out.parent, out.stem), list[str]()
    for images, texts in read_captioned(data, pixels, index, data.text.jobs):
        rows = text_rows(pipeline, texts, pixels)
        if data.latents and data.text.keep_images and images.dtype == np.uint8:
            rows["pixels"] = torch.from_numpy(images)
        noise = torch.randn((len(images), *shape), generator=stream(f"{data.name}/{index}/{shards.count}/posterior"))
        rows["images"] = _tensors(data, pipeline, torch.from_numpy(images), noise)
        if tuple(rows["images"].shape[1:]) != shape:
            found = tuple(rows["images"].shape[1:])
            raise UserError(f"data {data.name}: rows are {found}, but the config says {shape}")
        shards.add(rows)
        captions += texts
        print(f"real data {data.name}, part {index}  {shards.count} images", file=sys.stderr, flush=True)
    if not captions:
        raise UserError(f"data {data.name}: {data.source.path} has no image for part {index} of {data.text.jobs}")
    shards.flush()
    path = out.with_name(f"captions-{index:05d}.jsonl")
    save_captions(path, captions)
    write_json(out, {"kind": "real-part", "count": shards.count, "files": listing([*shards.paths, path], out.parent)})


def _tensors(data: Data, pipeline: Pipeline, images: Tensor, noise: Tensor) -> Tensor:
    """What is diffused: the images themselves, or their latents in float16; latents of an LMDB stay as they are."""
    if not data.latents or images.dtype != torch.uint8:
        return images
    size = max(1, PIXELS // images[0, 0].numel())
    parts = zip(images.split(size), noise.split(size), strict=True)
    return torch.cat([pipeline.encode_images(part, some).half().cpu() for part, some in parts])


def join_parts(data: Data, parts: list[Path], out: Path) -> None:
    """One manifest over all parts, after verifying each file."""
    entries = [entry for part in parts for entry in read_json(part)["files"]]
    for entry in entries:
        verified(out.parent, entry)
    write_json(out, {
        "kind": "real", "name": data.name, "count": sum(read_json(part)["count"] for part in parts),
        "shape": [data.channels, data.resolution, data.resolution], "classes": 0, "source": data.source.settings(),
        "latents": data.latents, "files": entries,
    })  # fmt: skip


def encode_prompts(data: Data, manifest: Path, source: Path, out: Path, device: torch.device) -> None:
    """Write the set of the prompts in the file `source`: shards without images, captions, and their manifest `out`."""
    pipeline, prompts = Pipeline.load(manifest, device), read_prompts(source)
    pixels = image_size(data, pipeline)
    shards, progress = Shards(out.parent, "prompts"), Progress(f"prompts {source.name}", len(prompts))
    for block in _blocks(prompts):
        shards.add(text_rows(pipeline, block, pixels))
        progress.update(shards.count, {})
    shards.flush()
    path = out.with_name("captions-00000.jsonl")
    save_captions(path, prompts)
    files = listing([*shards.paths, path], out.parent)
    write_json(out, {"kind": "prompts", "count": shards.count, "source": str(source), "files": files})


def _blocks(prompts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(prompts), PROMPTS):
        yield prompts[start : start + PROMPTS]


app = typer.Typer(help=__doc__)
Config = Annotated[str, typer.Option(help="JSON of the data section")]


@app.command()
def part(config: Config, pipeline: Path, index: int, out: Path, threads: int = 1, device: Device = "auto") -> None:
    """Encode one part of the real set."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # jobs download nothing unless the user's environment says 0
    torch.set_num_threads(threads)
    with readable_errors():
        data, place = Data.model_validate(json.loads(config)), local_device(device, "encode")
        with recorded(out, json.loads(config), [pipeline], sources=[data.source.path]), strict_float32(place):
            encode_part(data, pipeline, index, out, place)


@app.command()
def join(config: Config, out: Path, parts: list[Path]) -> None:
    """Write the manifest OUT of finished PARTS."""
    with readable_errors():
        data = Data.model_validate(json.loads(config))
        with recorded(out, json.loads(config), parts, sources=[data.source.path]):
            join_parts(data, parts, out)


@app.command()
def prompts(config: Config, pipeline: Path, source: Path, out: Path, threads: int = 1, device: Device = "auto") -> None:
    """Encode the prompts of a file."""
    torch.set_num_threads(threads)
    with readable_errors():
        data = Data.model_validate(json.loads(config))
        if not source.exists():
            raise UserError(f"data {data.name}: {source} is missing: put the prompts there, one a line")
        place = local_device(device, "encode")
        with recorded(out, prompt_settings(data), [pipeline, source]), strict_float32(place):
            encode_prompts(data, pipeline, source, out, place)


if __name__ == "__main__":
    app()
