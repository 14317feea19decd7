"""Folders and zips of image files, with labels or with captions."""

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from dmd2.core.distributed import rows_of_part
from dmd2.core.errors import UserError
from dmd2.data.captions import read_table, texts
from dmd2.data.decode import BROKEN, SUFFIXES, Encoded
from dmd2.experiment.data_config import Data

METADATA, FILE = ("metadata.jsonl", "metadata.csv", "metadata.parquet"), "file_name"  # tables and their column


class Files:
    """Files of a folder or zip by their path in it.

    Raises:
        UserError: there is neither at `place`.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        if not place.exists():
            raise UserError(f"{place} does not exist: put a folder or zip of images there")
        try:
            self._zip = None if place.is_dir() else zipfile.ZipFile(place)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{place} is not a whole zip ({error}); make it again") from None

    @cached_property
    def names(self) -> list[str]:
        """Paths of all files, in no order."""
        if self._zip is not None:
            return self._zip.namelist()
        found = ((Path(folder), names) for folder, _, names in os.walk(self.place, followlinks=True))
        return [(folder / name).relative_to(self.place).as_posix() for folder, names in found for name in names]

    def images(self) -> list[str]:
        """Names of the images, sorted, without hidden ones and those of hidden folders.

        Raises:
            UserError: there is none.
        """
        images = sorted(name for name in self.names if name.lower().endswith(SUFFIXES) and not _hidden(name))
        if not images:
            raise UserError(f"{self.place} holds no images ({', '.join(SUFFIXES)})")
        return images

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return (self.place / name).read_bytes() if self._zip is None else self._zip.read(name)
        except BROKEN as error:
            raise UserError(f"{self.place}/{name} cannot be read ({error}); make it again") from None


def _hidden(name: str) -> bool:
    return any(word[0] == "." or word == "__MACOSX" for word in name.split("/"))


def image_files(data: Data, part: int, parts: int) -> Iterator[Encoded]:
    """Part `part` of `parts` of the images of a folder or zip, sorted by path, with their labels or captions.

    Labels are those of dataset.json (the layout of EDM's dataset tool) or, without one, the place of an image's first
    folder among all of them, sorted (torchvision's ImageFolder). Captions are in tables metadata.jsonl, .csv or
    .parquet, whose column file_name is a path from the table's folder (the convention of the library datasets), or,
    without one, in a .txt beside each image.

    Raises:
        UserError: nothing there, or an image without the label or caption that the config asks for.
    """
    files = Files(Path(data.source.path or ""))
    images = files.images()
    conditions: Mapping[str, int | str] | None
    if data.text is not None:
        conditions = _captions(files, images)
    else:
        conditions = read_labels(files, images, data.classes) if data.labelled else dict.fromkeys(images, 0)
    for name in (images[i] for i in rows_of_part(len(images), parts, part)):
        condition = _caption_beside(files, name) if conditions is None else conditions[name]
        yield f"{files.place}/{name}", files.read(name), condition


def read_labels(files: Files, images: list[str], classes: int) -> dict[str, int]:
    """Label of every image.

    Raises:
        UserError: an image has none, or there are other classes than so many.
    """
    if "dataset.json" in files.names:
        try:
            pairs = json.loads(files.read("dataset.json"))["labels"]
            labels = {str(name).replace("\\", "/"): int(label) for name, label in pairs}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'{files.place}/dataset.json is not {{"labels": [["00000/img00000000.png", 6], ...]}}: make the set '
                "again with labels"
            ) from None
        _complete(files.place, images, set(labels), "label", "dataset.json")
        return labels
    if loose := [name for name in images if "/" not in name]:
        raise UserError(
            f"{files.place}/{loose[0]} has no label: add a dataset.json, put images in a folder per class, or set "
            "data.classes: 0"
        )
    folders = {name: label for label, name in enumerate(sorted({name.split("/")[0] for name in images}))}
    if len(folders) != classes:
        raise UserError(
            f"{files.place} has no dataset.json but {len(folders)} folders of images, and data.classes is {classes}: "
            "correct one of them"
        )
    return {name: folders[name.split("/")[0]] for name in images}


def _captions(files: Files, images: list[str]) -> dict[str, str] | None:
    """Caption of every image by the metadata tables; None without one."""
    tables = sorted(name for name in files.names if name.rsplit("/", 1)[-1] in METADATA and not _hidden(name))
    captions: dict[str, str] = {}
    for name in tables:
        content = io.BytesIO(files.read(name))
        try:
            table = read_table(content, Path(name).suffix, skip_blank=True)
            if FILE not in table:
                raise UserError(f"there is no column {FILE}: add the path of each image from this file's folder")
            paths = (os.path.normpath(Path(name).parent / str(file)).replace(os.sep, "/") for file in table[FILE])
            captions |= zip(paths, texts(table), strict=True)
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"{files.place}/{name} cannot be used ({str(error).splitlines()[0]})") from None
    if tables:
        _complete(files.place, images, set(captions), "caption", " and ".join(tables))
    return captions if tables else None


def _complete(place: Path, images: list[str], listed: set[str], what: str, table: str) -> None:
    if missing := sorted(set(images) - listed):
        raise UserError(f"{place}/{missing[0]} has no {what} in {table} ({len(missing)} such)")
    if absent := sorted(listed - set(images)):
        raise UserError(f"{table} lists {absent[0]}, which {place} lacks ({len(absent)} such)")


def _caption_beside(files: Files, image: str) -> str:
    name = Path(image).with_suffix(".txt")
    try:
        return files.read(name.as_posix()).decode("utf-8-sig").strip()
    except (UnicodeDecodeError, UserError):
        raise UserError(
            f"{files.place}/{image} has no caption: write it, as UTF-8, in {name.name} beside it, or all of them in "
            "metadata.jsonl"
        ) from None
