"""Sets of images with captions, and of prompts alone, encoded once: latents and text states in shards.

Jobs encode contiguous parts of the source side by side; `join` lists the shards of all parts in one manifest. Pipelines
run in IEEE float32 on every device.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from dmd2.core.distributed import Device, local_device
from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import listing, read_json, verified, write_json
from dmd2.core.precision import strict_float32
from dmd2.core.progress import Progress
from dmd2.core.provenance import recorded
from dmd2.core.rng import stream
from dmd2.data.captions import read_prompts, save_captions
from dmd2.data.pipelines import Pipeline, time_ids
from dmd2.data.readers import read
from dmd2.data.sets import Rows, ShardWriter
from dmd2.experiment.data_config import Data
from dmd2.experiment.run_inputs import prompt_settings

PIXELS = 1 << 22  # of the images that the autoencoder encodes at once: four of 1024 x 1024
PROMPTS = 256  # encoded at once


def text_rows(pipeline: Pipeline, prompts: list[str], pixels: int) -> Rows:
    """States of prompts as they are stored: float16, with SDXL's size condition where there is a pooled embedding."""
    parts = [pipeline.encode_prompts(prompts[start : start + PROMPTS]) for start in range(0, len(prompts), PROMPTS)]
    rows = {}
    for name in ("text", "pooled"):
        if states := [getattr(part, name) for part in parts if getattr(part, name) is not None]:
            rows[name] = torch.cat(states).half().cpu()
    if "pooled" in rows:
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
        print(f"real data {data.name}, part {index}  {shards.count} images", file=sys.stderr, flush=True)
    if not captions:
        raise UserError(f"data {data.name}: {data.source.path} has no image for part {index} of {data.text.jobs}")
    _write_manifest(out, {"kind": "real-part"}, shards, captions, index)


def _write_manifest(out: Path, record: dict[str, str], shards: ShardWriter, captions: list[str], index: int) -> None:
    path = out.with_name(f"captions-{index:05d}.jsonl")
    save_captions(path, captions)
    write_json(out, {**record, "count": shards.count, "files": listing([*shards.finish(), path], out.parent)})


def join_parts(data: Data, parts: list[Path], out: Path) -> None:
    """One manifest over all parts, after verifying each file."""
    entries = [entry for part in parts for entry in read_json(part)["files"]]
    for entry in entries:
        verified(out.parent, entry)
    write_json(out, {
        "kind": "real", "name": data.name, "count": sum(read_json(part)["count"] for part in parts),
        "shape": list(data.shape), "classes": 0, "source": data.source.settings(), "latents": data.latents,
        "files": entries,
    })  # fmt: skip


def encode_prompts(data: Data, manifest: Path, source: Path, out: Path, device: torch.device) -> None:
    """Write the set of the prompts in the file `source`: shards without images, captions, and their manifest `out`."""
    pipeline, prompts = Pipeline.load(manifest, device), read_prompts(source)
    shards, progress = ShardWriter(out, "prompts"), Progress(f"prompts {source.name}", len(prompts))
    for start in range(0, len(prompts), PROMPTS):
        shards.add(text_rows(pipeline, prompts[start : start + PROMPTS], pipeline.image_size(data)))
        progress.update(shards.count, {})
    _write_manifest(out, {"kind": "prompts", "source": str(source)}, shards, prompts, 0)


app = typer.Typer(help=__doc__)
Config = Annotated[str, typer.Option(help="JSON of the data section")]


@app.command()
def part(config: Config, pipeline: Path, index: int, out: Path, threads: int = 1, device: Device = "auto") -> None:
    """Encode one part of the real set."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # jobs download nothing unless the user's environment says 0
    torch.set_num_threads(threads)
    with readable_errors():
        data, place = Data.model_validate_json(config), local_device(device, "encode")
        with recorded(out, json.loads(config), [pipeline], sources=[data.source.path]), strict_float32(place):
            encode_part(data, pipeline, index, out, place)


@app.command()
def join(config: Config, out: Path, parts: list[Path]) -> None:
    """Write the manifest OUT of finished PARTS."""
    with readable_errors():
        data = Data.model_validate_json(config)
        with recorded(out, json.loads(config), parts, sources=[data.source.path]):
            join_parts(data, parts, out)


@app.command()
def prompts(config: Config, pipeline: Path, source: Path, out: Path, threads: int = 1, device: Device = "auto") -> None:
    """Encode the prompts of a file."""
    torch.set_num_threads(threads)
    with readable_errors():
        data = Data.model_validate_json(config)
        if not source.exists():
            raise UserError(f"data {data.name}: {source} is missing: put the prompts there, one a line")
        place = local_device(device, "encode")
        with recorded(out, prompt_settings(data), [pipeline, source]), strict_float32(place):
            encode_prompts(data, pipeline, source, out, place)


if __name__ == "__main__":
    app()
