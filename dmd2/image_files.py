"""Sets of encoded images as pixels and labels: folders and zips of image files, and Hugging Face sets."""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dmd2.config import Data
from dmd2.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BLOCK = 500  # images decoded at a time
BROKEN = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
Encoded = tuple[str, bytes, int]  # name, content and label of an image


def image_folder(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of a folder or zip sorted by path: uint8 ``(n, C, H, W)``, labels int64 ``(n,)``.

    Labels are those of dataset.json (the layout of EDM's dataset tool) or, without one, the place of an image's first
    folder among all of them, sorted (torchvision's ImageFolder).

    Raises:
        UserError: nothing there, an image without label, unreadable, or of other size or channels than configured.
    """
    place = Path(data.source.path or "")
    if not place.exists():
        raise UserError(f"data {data.name}: {place} does not exist: put a folder or zip of images there")
    with ExitStack() as stack:
        if place.is_dir():
            names, read = _files(place), lambda name: (place / name).read_bytes()
        else:
            try:
                archive = stack.enter_context(zipfile.ZipFile(place))
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"data {data.name}: {place} is not a whole zip ({error}); make it again") from None
            names, read = archive.namelist(), archive.read
        labels = _labels(data, place, names, read)
        yield from decoded(
            data, ((f"{place}/{name}", _content(data, place, name, read), labels[name]) for name in labels)
        )


def _files(place: Path) -> list[str]:
    found = ((Path(folder), names) for folder, _, names in os.walk(place, followlinks=True))
    return [(folder / name).relative_to(place).as_posix() for folder, names in found for name in names]


def _content(data: Data, place: Path, name: str, read: Callable[[str], bytes]) -> bytes:
    try:
        return read(name)
    except BROKEN as error:
        raise UserError(f"data {data.name}: {place}/{name} cannot be read ({error}); make it again") from None


def _labels(data: Data, place: Path, names: list[str], read: Callable[[str], bytes]) -> dict[str, int]:
    """Label of every image, in sorted order."""
    images = sorted(
        name for name in names
        if name.lower().endswith(SUFFIXES) and not any(part[0] == "." or part == "__MACOSX" for part in name.split("/"))
    )  # fmt: skip
    if not images:
        raise UserError(f"data {data.name}: {place} holds no images ({', '.join(SUFFIXES)})")
    if "dataset.json" not in names:
        return _by_folder(data, place, images)
    try:
        pairs = json.loads(_content(data, place, "dataset.json", read))["labels"]
        labels = {str(name).replace("\\", "/"): int(label) for name, label in pairs}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'data {data.name}: {place}/dataset.json is not {{"labels": [["00000/img00000000.png", 6], ...]}}: '
            "make the set again with labels"
        ) from None
    if missing := sorted(set(images) - labels.keys()):
        raise UserError(f"data {data.name}: {place}/{missing[0]} has no label in dataset.json ({len(missing)} such)")
    if absent := sorted(labels.keys() - set(images)):
        raise UserError(f"data {data.name}: dataset.json lists {absent[0]}, which {place} lacks ({len(absent)} such)")
    return {name: labels[name] for name in images}


def _by_folder(data: Data, place: Path, images: list[str]) -> dict[str, int]:
    if loose := [name for name in images if "/" not in name]:
        raise UserError(
            f"data {data.name}: {place}/{loose[0]} has no label: add a dataset.json or put images in a folder per class"
        )
    classes = sorted({name.split("/")[0] for name in images})
    if len(classes) != data.classes:
        raise UserError(
            f"data {data.name}: {place} has no dataset.json but {len(classes)} folders of images, and data.classes is "
            f"{data.classes}: correct one of them"
        )
    number = {name: label for label, name in enumerate(classes)}
    return {name: number[name.split("/")[0]] for name in images}


def hub(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of a Hugging Face set in its order: uint8 ``(n, C, H, W)``, labels int64 ``(n,)``.

    The path is a folder (of save_to_disk, or of parquet, arrow or image files as on the hub), a parquet or arrow file,
    or the name of a set on the hub.

    Raises:
        UserError: it cannot be opened, lacks a column, or holds what is no image or label.
    """
    import datasets  # four seconds

    source, place = data.source, Path(data.source.path or "")
    image, label = source.image or "image", source.label or "label"
    try:
        rows = _opened(datasets, place, source.split or "train")
        columns: Any = rows.features or next(iter(rows), {})
        if lacking := {image, label} - set(columns):
            raise UserError(
                f"data {data.name}: {place} has no column {min(lacking)}, only {', '.join(columns)}: name them with "
                "data.source.image and data.source.label"
            )
        rows = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        yield from decoded(data, _rows(data, rows, image, label))
    except (OSError, ValueError, KeyError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data {data.name}: the hub set {place} cannot be read ({reason}); {_advice(place)}") from None


def _advice(place: Path) -> str:
    if place.exists():
        return "check data.source, or fetch it again"
    return (
        "nothing is downloaded unless asked: download it to a folder that you name as path, or prepare it with "
        "HF_HUB_OFFLINE=0 in the environment"
    )


def _opened(datasets: Any, place: Path, split: str) -> Any:
    """The rows; those of local files are streamed, without a copy in the cache."""
    if (place / "dataset_dict.json").exists():
        parts = datasets.load_from_disk(str(place))
        if split not in parts:
            raise ValueError(f"it has no split {split}, only {', '.join(parts)}")
        return parts[split]
    if (place / "state.json").exists():
        return datasets.load_from_disk(str(place))
    if place.is_file():
        if place.suffix not in (".parquet", ".arrow"):
            raise ValueError("a file has to be .parquet or .arrow")
        return datasets.load_dataset(place.suffix[1:], data_files=str(place), split="train", streaming=True)
    return datasets.load_dataset(str(place), split=split, streaming=place.is_dir())


def _rows(data: Data, rows: Any, image: str, label: str) -> Iterator[Encoded]:
    for number, row in enumerate(rows):
        name = f"{data.source.path}, row {number}"
        if row[image] is None or not isinstance(row[label], int):
            raise UserError(f"data {data.name}: {name} has no image or no whole-number label: {row[label]!r}")
        content = row[image]["bytes"]
        yield name, Path(row[image]["path"]).read_bytes() if content is None else content, row[label]


def decoded(data: Data, images: Iterable[Encoded]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of pixels and labels, decoded by as many threads as torch uses (Pillow lets them run side by side)."""
    images = iter(images)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while block := list(islice(images, BLOCK)):
            names, contents, labels = zip(*block, strict=True)
            yield np.stack(list(pool.map(decode, contents, names, [data] * len(block)))), np.array(labels, np.int64)


def decode(content: bytes, name: str, data: Data) -> np.ndarray:
    """Pixels uint8 ``(C, H, W)`` of one image; palettes become RGB, grey becomes RGB in a set of 3 channels.

    Raises:
        UserError: unreadable, more than 8 bits, transparent, or of other size or channels than configured.
    """
    try:
        image = _without_alpha(_eight_bits(Image.open(io.BytesIO(content)), content))
        if data.channels == 1 and image.mode not in ("L", "1"):
            raise UserError(f"is {image.mode}, but data.channels is 1: convert it to grey or set data.channels: 3")
        image = image.convert("L" if data.channels == 1 else "RGB")
        return _sized(image, data).transpose(2, 0, 1)
    except UserError as error:
        raise UserError(f"data {data.name}: {name} {error}") from None
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise UserError(f"data {data.name}: {name} is not a readable image ({error}); make it again") from None


def _eight_bits(image: Image.Image, content: bytes) -> Image.Image:
    # Pillow opens 16-bit colour PNG as RGB and drops the low bytes; only the header tells (byte 24 is the bit depth).
    if image.mode[0] in "FI" or (image.format == "PNG" and content[24] == 16):
        raise UserError("has more than 8 bits per channel: quantise it to 8 bits first")
    return image


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    if np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
        raise UserError("is transparent: composite it on a background first")
    return image.convert("L" if image.mode == "LA" else "RGB")


def _sized(image: Image.Image, data: Data) -> np.ndarray:
    """Pixels uint8 ``(H, W, C)``."""
    size = data.resolution
    if data.source.resize == "center-crop":
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    if image.size != (size, size):
        raise UserError(
            f"is {image.width}x{image.height}, but data.resolution is {size}: set data.source.resize: center-crop, or "
            "make a set of that size (EDM's dataset_tool.py --resolution)"
        )
    return np.asarray(image).reshape(size, size, data.channels)
