"""Real sets in shards: images with labels as they are; images with captions, and prompts, encoded once.

Jobs encode contiguous parts of the source side by side; `join_parts` lists the shards of all parts in one manifest.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmd2.core.errors import UserError, show
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.core.progress import Progress
from dmd2.core.rng import stream
from dmd2.data.captions import read_prompts, save_captions
from dmd2.data.pipelines import Pipeline, time_ids
from dmd2.data.readers import read
from dmd2.data.sets import Rows, ShardWriter
from dmd2.experiment.data_config import Data

PIXELS = 1 << 22  # of the images that the autoencoder encodes at once: four of 1024 x 1024
PROMPTS, LONG_PROMPTS = 256, 16  # encoded at once: 77 tokens of CLIP, or up to 512 of a language model


def prepare_labelled(data: Data, folder: Path) -> Path:
    """Bring a source of real images into shards and, last of all, ``folder/manifest.json``; no labels with classes 0.

    The same source gives the same bytes. Memory: two shards and one block of the reader, whatever the set's size.

    Raises:
        UserError: the source is missing or damaged, of a kind this version cannot read, or not what the config says.
    """
    manifest = folder / "manifest.json"
    counts = np.zeros(data.classes, np.int64)
    shards = ShardWriter(manifest, "shard", math.prod(data.shape))
    for images, numbers in read(data):
        labels = np.array(numbers, np.int64)
        if images.shape[1:] != data.shape:
            raise UserError(f"data {data.name}: images are {images.shape[1:]} but the config says {data.shape}")
        if data.labelled and len(wrong := np.flatnonzero((labels < 0) | (labels >= data.classes))):
            raise UserError(
                f"data {data.name}: image {shards.count + wrong[0]} has label {labels[wrong[0]]}, but data.classes is "
                f"{data.classes} (labels 0 to {data.classes - 1}): correct one of them"
            )
        before, rows = len(shards.paths), {"images": torch.from_numpy(images)}
        if data.labelled:
            counts += np.bincount(labels, minlength=data.classes)
            rows["labels"] = torch.from_numpy(labels)
        shards.add(rows)
        if len(shards.paths) > before:
            show(f"real data {data.name}  {shards.count} images", kept=False)
    if not shards.count:
        raise UserError(f"data {data.name}: {data.source.path} holds no images")
    _write_real(manifest, data, shards.count, listing(shards.finish(), folder), class_counts=counts.tolist())
    return manifest


def _write_real(manifest: Path, data: Data, count: int, files: list[dict[str, Any]], **more: Any) -> None:
    record = {"kind": "real", "name": data.name, "count": count, "shape": list(data.shape), "classes": data.classes}
    write_json(manifest, {**record, **more, "source": data.source.settings(), "files": files})


def text_rows(pipeline: Pipeline, prompts: list[str], pixels: int) -> Rows:
    """States of prompts as they are stored, with SDXL's size condition."""
    size = LONG_PROMPTS if pipeline.transformer else PROMPTS
    some = (prompts[start : start + size] for start in range(0, len(prompts), size))
    parts = [pipeline.stored(pipeline.encode_prompts(part)) for part in some]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if pipeline.sized:
        rows["time_ids"] = time_ids(pixels).expand(len(prompts), 6)
    return rows


def encode_part(data: Data, manifest: Path, index: int, out: Path, device: torch.device) -> None:
    """Write part `index` of the real set: shards, captions and their manifest `out`.

    Raises:
        UserError: the source is missing or damaged, holds nothing for this part, or its images are of another size.
    """
    assert data.text is not None
    pipeline = Pipeline.load(manifest, device)
    pixels = pipeline.image_size(data)
    shards, captions = ShardWriter(out, out.stem), list[str]()
    for images, texts in read(data, pixels, index, data.text.jobs):
        rows, encoded = text_rows(pipeline, texts, pixels), torch.from_numpy(images)
        if data.latents and images.dtype == np.uint8:  # an LMDB holds latents
            if data.text.keep_images:
                rows["pixels"] = encoded
            place = f"{data.name}/{index}/{shards.count}/posterior"
            noise = torch.randn((len(images), *data.shape), generator=stream(place))
            size = max(1, PIXELS // pixels**2)
            parts = zip(encoded.split(size), noise.split(size), strict=True)
            encoded = torch.cat([pipeline.encode_images(part, some).half().cpu() for part, some in parts])
        if encoded.shape[1:] != data.shape:
            raise UserError(f"data {data.name}: rows are {tuple(encoded.shape[1:])}, but the config says {data.shape}")
        shards.add({**rows, "images": encoded})
        captions += texts
        show(f"real data {data.name}, part {index}  {shards.count} images", kept=False)
    if not captions:
        raise UserError(f"data {data.name}: {data.source.path} has no image for part {index} of {data.text.jobs}")
    _write_manifest(out, {"kind": "real-part"}, shards, captions, index)


def _write_manifest(out: Path, record: dict[str, str], shards: ShardWriter, captions: list[str], index: int) -> None:
    path = out.with_name(f"captions-{index:05d}.jsonl")
    save_captions(path, captions)
    write_json(out, {**record, "count": shards.count, "files": listing([*shards.finish(), path], out.parent)})


def join_parts(data: Data, parts: list[Path], out: Path) -> None:
    """One manifest over all parts, after verifying each file."""
    records = [read_json(part) for part in parts]
    files = [entry for record in records for entry in record["files"]]
    for entry in files:
        verified(out.parent, entry)
    _write_real(out, data, sum(record["count"] for record in records), files, latents=data.latents)


def encode_prompts(data: Data, manifest: Path, source: Path, out: Path, device: torch.device) -> None:
    """Write the set of the prompts in the file `source`: shards without images, captions, and their manifest `out`."""
    pipeline, prompts = Pipeline.load(manifest, device), read_prompts(source)
    shards, progress = ShardWriter(out, "prompts"), Progress(f"prompts {source.name}", len(prompts))
    for start in range(0, len(prompts), PROMPTS):
        shards.add(text_rows(pipeline, prompts[start : start + PROMPTS], pipeline.image_size(data)))
        progress.update(shards.count, {})
    _write_manifest(out, {"kind": "prompts", "source": str(source)}, shards, prompts, 0)
