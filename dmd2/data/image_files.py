"""Folders and zips of image files, with labels or with captions."""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dmd2.core.distributed import part as share
from dmd2.core.errors import UserError
from dmd2.data.captions import TABLES, texts
from dmd2.data.decode import BROKEN, SUFFIXES, Encoded
from dmd2.experiment.data_config import Data

METADATA, FILE = ("metadata.jsonl", "metadata.csv", "metadata.parquet"), "file_name"  # tables and their column


class _Files:
    """Files of a folder or zip by their path in it; every complaint names set and file."""

    def __init__(self, data: Data, place: Path, names: list[str], read: Callable[[str], bytes]) -> None:
        self.data, self.place, self.names, self._read = data, place, names, read

    @classmethod
    @contextmanager
    def open(cls, data: Data) -> Iterator["_Files"]:
        """Those of `data.source.path`."""
        place = Path(data.source.path or "")
        if not place.exists():
            raise UserError(f"data {data.name}: {place} does not exist: put a folder or zip of images there")
        if place.is_dir():
            found = ((Path(folder), names) for folder, _, names in os.walk(place, followlinks=True))
            names = [(folder / name).relative_to(place).as_posix() for folder, names in found for name in names]
            yield cls(data, place, names, lambda name: (place / name).read_bytes())
            return
        try:
            archive = zipfile.ZipFile(place)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"data {data.name}: {place} is not a whole zip ({error}); make it again") from None
        with archive:
            yield cls(data, place, archive.namelist(), archive.read)

    def images(self) -> list[str]:
        """Names of the images, sorted."""
        images = sorted(name for name in self.names if name.lower().endswith(SUFFIXES) and not _hidden(name))
        if not images:
            raise self.wrong(f"holds no images ({', '.join(SUFFIXES)})")
        return images

    def read(self, name: str) -> bytes:
        """Content of a file."""
        try:
            return self._read(name)
        except BROKEN as error:
            raise self.wrong(f"cannot be read ({error}); make it again", name) from None

    def wrong(self, what: str, name: str = "") -> UserError:
        """A complaint about the folder, or about one file in it."""
        return UserError(f"data {self.data.name}: {self.place}{'/' if name else ''}{name} {what}")


def _hidden(name: str) -> bool:
    return any(part[0] == "." or part == "__MACOSX" for part in name.split("/"))


def image_files(data: Data, part: int, parts: int) -> Iterator[Encoded]:
    """Share `part` of `parts` of the images of a folder or zip, sorted by path, with their labels or captions.

    Labels are those of dataset.json (the layout of EDM's dataset tool) or, without one, the place of an image's first
    folder among all of them, sorted (torchvision's ImageFolder). Captions are in tables metadata.jsonl, .csv or
    .parquet, whose column file_name is a path from the table's folder (the convention of the library datasets), or,
    without one, in a .txt beside each image.

    Raises:
        UserError: nothing there, or an image without label or caption.
    """
    with _Files.open(data) as files:
        images = files.images()
        known: Mapping[str, int | str] | None = (
            _labels(files, images) if data.text is None else _by_table(files, images)
        )
        for name in (images[i] for i in share(len(images), parts, part)):
            condition = _beside(files, name) if known is None else known[name]
            yield f"{files.place}/{name}", files.read(name), condition


def _labels(files: _Files, images: list[str]) -> dict[str, int]:
    """Label of every image."""
    if "dataset.json" not in files.names:
        return _by_folder(files, images)
    try:
        pairs = json.loads(files.read("dataset.json"))["labels"]
        labels = {str(name).replace("\\", "/"): int(label) for name, label in pairs}
    except (ValueError, KeyError, TypeError):
        raise files.wrong(
            'is not {"labels": [["00000/img00000000.png", 6], ...]}: make the set again with labels', "dataset.json"
        ) from None
    _complete(files, images, set(labels), "label", "dataset.json")
    return labels


def _complete(files: _Files, images: list[str], listed: set[str], what: str, table: str) -> None:
    if missing := sorted(set(images) - listed):
        raise files.wrong(f"has no {what} in {table} ({len(missing)} such)", missing[0])
    if absent := sorted(listed - set(images)):
        raise UserError(
            f"data {files.data.name}: {table} lists {absent[0]}, which {files.place} lacks ({len(absent)} such)"
        )


def _by_folder(files: _Files, images: list[str]) -> dict[str, int]:
    if loose := [name for name in images if "/" not in name]:
        raise files.wrong("has no label: add a dataset.json or put images in a folder per class", loose[0])
    classes = sorted({name.split("/")[0] for name in images})
    if len(classes) != files.data.classes:
        raise files.wrong(
            f"has no dataset.json but {len(classes)} folders of images, and data.classes is {files.data.classes}: "
            "correct one of them"
        )
    number = {name: label for label, name in enumerate(classes)}
    return {name: number[name.split("/")[0]] for name in images}


def _by_table(files: _Files, images: list[str]) -> dict[str, str] | None:
    """Caption of every image by the metadata tables; None without one."""
    tables = sorted(n for n in files.names if n.rsplit("/", 1)[-1] in METADATA and not _hidden(n))
    captions: dict[str, str] = {}
    for name in tables:
        content = io.BytesIO(files.read(name))
        try:
            table = TABLES[Path(name).suffix](content, True)
            captions |= zip((_path(name, file) for file in table[FILE]), texts(table), strict=True)
        except KeyError:
            raise files.wrong(
                f"has no column {FILE}: add the path of each image from this file's folder", name
            ) from None
        except (OSError, ValueError, UserError) as error:
            raise files.wrong(f"cannot be used ({str(error).splitlines()[0]})", name) from None
    if tables:
        _complete(files, images, set(captions), "caption", " and ".join(tables))
    return captions if tables else None


def _path(table: str, file: object) -> str:
    return os.path.normpath(Path(table).parent / str(file)).replace(os.sep, "/")


def _beside(files: _Files, image: str) -> str:
    name = Path(image).with_suffix(".txt").as_posix()
    try:
        return files.read(name).decode("utf-8-sig").strip()
    except (UnicodeDecodeError, UserError):
        raise files.wrong(
            f"has no caption: write it, as UTF-8, in {Path(name).name} beside it, or all of them in metadata.jsonl",
            image,
        ) from None
