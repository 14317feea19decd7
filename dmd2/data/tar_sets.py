"""WebDatasets: tar files in which the image and the caption of a sample are neighbours of one name.

The library datasets reads them, too, but takes a header that is cut off for the end of the file: rows would be lost.
"""

import glob
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from lzma import LZMAError
from pathlib import Path
from typing import Any

from dmd2.core.distributed import part as share
from dmd2.core.errors import UserError
from dmd2.data.captions import as_caption
from dmd2.data.decode import Encoded
from dmd2.experiment.data_config import Data

IMAGES = ("jpg", "jpeg", "png", "webp")
KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # a sample's key ends at the first dot of the name
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)
Member = tuple[str, str, bytes]  # key, extension and content


def webdataset(data: Data, part: int, parts: int) -> Iterator[Encoded]:
    """Share `part` of `parts` of the images of tar files, sorted by path, with their captions.

    A sample is a run of files with one key; its caption is the .txt, or the key `data.source.caption` (by default
    caption) of the .json. A share is one of whole tar files. Files of other kinds, pickles among them, are passed over
    unread; so are samples without an image.

    Raises:
        UserError: nothing there, fewer tar files than shares, a truncated one, or a sample without caption.
    """
    tars = _tars(data)
    if len(tars) < parts:
        raise UserError(
            f"data {data.name}: the {len(tars)} tar files at {data.source.path} cannot be shared by {parts} jobs: set "
            f"data.text.jobs to at most {len(tars)}"
        )
    for i in share(len(tars), parts, part):
        yield from _samples(data, tars[i])


def _tars(data: Data) -> list[Path]:
    pattern = data.source.path or ""
    tars = Path(pattern).glob("*.tar") if Path(pattern).is_dir() else map(Path, glob.glob(pattern, recursive=True))
    found = sorted(path for path in tars if path.is_file())
    if not found:
        raise UserError(
            f"data {data.name}: there are no tar files at {pattern}: give a folder, or a pattern like a/*.tar"
        )
    return found


def _samples(data: Data, tar: Path) -> Iterator[Encoded]:
    empty = True
    for key, members in groupby(_members(data, tar), lambda member: member[0]):
        files: dict[str, bytes] = {}
        for _, extension, content in members:
            if extension in files:
                raise UserError(f"data {data.name}: {tar}/{key}.{extension} is there twice: write the tar file again")
            files[extension] = content
        images = [extension for extension in files if extension in IMAGES]
        if len(images) > 1:
            raise UserError(f"data {data.name}: {tar}/{key} has {len(images)} images: {', '.join(images)}; keep one")
        if images:
            empty = False
            try:
                caption = _caption(files, data.source.caption)
            except UserError as error:
                raise UserError(f"data {data.name}: {tar}/{key}.{images[0]} has no caption: {error}") from None
            yield f"{tar}/{key}.{images[0]}", files[images[0]], caption
    if empty:
        raise UserError(f"data {data.name}: {tar} holds no images ({', '.join(IMAGES)})")


def _members(data: Data, path: Path) -> Iterator[Member]:
    """The files of a tar file that matter, in its order."""
    name = ""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = f"/{member.name}"
                match = KEY.fullmatch(member.name)
                if match and member.isfile() and match[2].lower() in (*IMAGES, "txt", "json"):
                    file = tar.extractfile(member)
                    assert file is not None  # isfile above
                    yield match[1], match[2].lower(), file.read()
            # To the library a header that is damaged or cut off is the end; a whole tar ends in a block of zeros.
            stream: Any = tar.fileobj
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("there is no end mark")
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        where = f", in or after {name[1:]}" if name else ""
        raise UserError(
            f"data {data.name}: {path} is truncated, damaged or no tar archive{where} ({reason}); fetch it again"
        ) from None


def _caption(files: dict[str, bytes], key: str | None) -> str:
    """Caption of a sample: the key of the .json if one is asked for or there is no .txt."""
    try:
        if "txt" in files and key is None:
            return files["txt"].decode("utf-8-sig").strip()
        if "json" not in files:
            raise UserError(
                "there is no .txt or .json of the same name beside it" if key is None else "there is no .json"
            )
        row = json.loads(files["json"])
    except ValueError as error:  # also UnicodeDecodeError
        raise UserError(f"its text cannot be read ({error})") from None
    key = key or "caption"
    if not isinstance(row, dict) or key not in row:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"the .json has no {key}, only {keys:.200}: name its key in data.source.caption")
    return as_caption(row[key])
