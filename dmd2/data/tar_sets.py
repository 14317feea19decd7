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

from dmd2.core.distributed import rows_of_part
from dmd2.core.errors import UserError
from dmd2.data.captions import as_caption
from dmd2.data.decode import Encoded
from dmd2.experiment.data_config import Data

IMAGES = ("jpg", "jpeg", "png", "webp")
KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # a sample's key ends at the first dot of the name
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)


def webdataset(data: Data, part: int, parts: int) -> Iterator[Encoded]:
    """The images in part `part` of `parts` of the tar files, sorted by path, with their captions.

    A sample is a run of files with one key; its caption is the .txt, or the key `data.source.caption` (by default
    caption) of the .json. Files of other kinds, pickles among them, are passed over unread; so are samples without an
    image.

    Raises:
        UserError: nothing there, fewer tar files than parts, a truncated one, or a sample without caption.
    """
    pattern = data.source.path or ""
    places = Path(pattern).glob("*.tar") if Path(pattern).is_dir() else map(Path, glob.glob(pattern, recursive=True))
    tars = sorted(path for path in places if path.is_file())
    if not tars:
        raise UserError(f"there are no tar files at {pattern}: give a folder, or a pattern like a/*.tar")
    if len(tars) < parts:
        raise UserError(
            f"the {len(tars)} tar files at {pattern} cannot be shared by {parts} jobs: set data.text.jobs to at most "
            f"{len(tars)}"
        )
    for i in rows_of_part(len(tars), parts, part):
        yield from _samples(tars[i], data.source.caption)


def _samples(tar: Path, caption: str | None) -> Iterator[Encoded]:
    empty = True
    for key, members in groupby(_members(tar), lambda member: member[0]):
        files: dict[str, bytes] = {}
        for _, extension, content in members:
            if extension in files:
                raise UserError(f"{tar}/{key}.{extension} is there twice: write the tar file again")
            files[extension] = content
        images = [extension for extension in files if extension in IMAGES]
        if len(images) > 1:
            raise UserError(f"{tar}/{key} has {len(images)} images: {', '.join(images)}; keep one")
        if images:
            empty, name = False, f"{tar}/{key}.{images[0]}"
            try:
                yield name, files[images[0]], _caption(files, caption)
            except UserError as error:
                raise UserError(f"{name} has no caption: {error}") from None
    if empty:
        raise UserError(f"{tar} holds no images ({', '.join(IMAGES)})")


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and content of the images and captions in a tar file, in its order."""
    where = ""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                where = f", in or after {member.name}"
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
        raise UserError(f"{path} is truncated, damaged or no tar archive{where} ({reason}); fetch it again") from None


def _caption(files: dict[str, bytes], key: str | None) -> str:
    """Caption of a sample: the key of the .json if one is asked for or there is no .txt."""
    try:
        if "txt" in files and key is None:
            return files["txt"].decode("utf-8-sig").strip()
        if "json" not in files:
            raise UserError("there is no .json" if key else "there is no .txt or .json of the same name beside it")
        row = json.loads(files["json"])
    except ValueError as error:  # also UnicodeDecodeError
        raise UserError(f"its text cannot be read ({error})") from None
    key = key or "caption"
    if not isinstance(row, dict) or key not in row:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"the .json has no {key}, only {keys:.200}: name its key in data.source.caption")
    return as_caption(row[key])
