"""A digest of what lies in a user's folder or file, cheap enough for every start of Snakemake.

It covers names and sizes. Times are left out, because a clone or a copy changes them; contents, because reading them
takes as long as preparing the set. A file that is replaced by another of the same size is therefore not noticed. Above
20,000 files only names count: for 1.3 million files reading the folders takes one to two seconds, sizes take fifteen.
"""

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

WITH_SIZES = 20_000  # files up to which sizes count
NO_CONTENT = ("lock.mdb", "__MACOSX")  # what readers of an LMDB leave beside it, and what macOS puts into archives


def source_listing(place: str) -> str | None:
    """Digest of the files at a path or glob pattern, without hidden ones; None if there are none to be read.

    An empty folder counts as absent, since a disk that is not mounted looks like one.
    """
    try:
        names = sorted(_names(place))
        if len(names) <= WITH_SIZES:
            names = [f"{name} {os.stat(_path(place, name)).st_size}" for name in names]
    except OSError:
        return None
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:12] if names else None


def _names(place: str) -> Iterator[str]:
    if Path(place).is_dir():
        yield from _below(place, "")
    elif Path(place).exists():
        yield ""
    else:
        yield from (name for name in glob.glob(place, recursive=True) if Path(name).is_file())


def _path(place: str, name: str) -> str:
    return os.path.join(place, name) if Path(place).is_dir() else name or place


def _below(folder: str, prefix: str) -> Iterator[str]:
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == "." or entry.name in NO_CONTENT:
                continue
            if entry.is_dir():
                folders.append(entry.name)
            else:
                yield prefix + entry.name
    for name in folders:
        yield from _below(os.path.join(folder, name), f"{prefix}{name}/")
