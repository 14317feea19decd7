"""Finds out what lies in a folder of the user's: which kind of source it is, and what it holds."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from dmd2.bases.found import LOOKED_AT, Found, Shapes, by_number, reading
from dmd2.bases.sets import look_at_cifar10, look_at_hub, look_at_idx, look_at_lmdb, look_at_tars
from dmd2.core.errors import UserError
from dmd2.data.image_files import METADATA, Files, image_files, read_labels
from dmd2.data.readers import IDX_FOLDERS
from dmd2.experiment.data_config import Source

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}


def look(place: Path) -> Found:
    """What lies at a path.

    Raises:
        UserError: nothing is there or nothing that a reader knows, or images that cannot be used as they are.
    """
    if not place.exists():
        raise UserError(f"{place} does not exist: give the folder of your images")
    described = (describe for recognises, describe in KINDS if recognises(place))
    return next(described, look_at_images)(place)


def look_at_images(place: Path) -> Found:
    """A folder or zip of images: in a folder for each class, with captions, or neither.

    Raises:
        UserError: there are no images, or the folders are parts of a set.
    """
    if not place.is_dir() and place.suffix != ".zip":
        raise UserError(
            f"{place} is of no kind that is known: give a folder or zip of images, or a set in tar files, an LMDB, "
            "parquet, idx or CIFAR-10 files"
        )
    source, files, shapes = Source(kind="image-folder", path=str(place)), Files(place), Shapes()
    names = files.images()
    firsts = Counter(name.split("/")[0] if "/" in name else "" for name in names)
    in_folders = len(firsts) > 1 or all(name.count("/") > 1 for name in names)
    if in_folders and {first.lower() for first in firsts} <= SPLITS:
        raise UserError(f"{place} holds {', '.join(sorted(firsts))}: give one of these folders")
    if in_folders and len(firsts) == 1:
        (only,) = firsts
        told = f"give {place}/{only}" if place.is_dir() else f"pack what is in {only}"
        raise UserError(f"{place} holds only the folder {only}, and the classes would be in there: {told}")
    captions = _captions(source, files, names)
    for name in names[:: max(1, len(names) // LOOKED_AT)]:
        shapes.add(f"{place}/{name}", files.read(name), captioned=bool(captions))
    classes, note = {} if captions else _classes(files, names, firsts), ""
    if in_folders and firsts[""] and not (classes or captions):
        loose = next(name for name in names if "/" not in name)
        note = f"taken without labels, as {firsts['']} images lie beside the folders ({loose}): move them for classes"
    return shapes.found(source, len(names), classes=classes, captions=captions, note=note)


def _captions(source: Source, files: Files, names: list[str]) -> list[str]:
    """Some captions of the images, if they are in a table of the folder or beside each image."""
    there = set(files.names)
    beside = sum(str(Path(name).with_suffix(".txt")) in there for name in names)
    if not any(name.rsplit("/", 1)[-1] in METADATA for name in there):
        if not beside:
            return []
        if beside < len(names):
            raise UserError(f"{files.place}: {beside} of {len(names)} images have a .txt beside them: write the others")
    return [str(caption) for *_, caption in islice(image_files(reading(source, captioned=True), 0, 1), LOOKED_AT)]


def _classes(files: Files, names: list[str], firsts: Counter[str]) -> dict[str, int]:
    """Images of each class: by dataset.json, or by a folder for each."""
    if "dataset.json" in files.names:
        return by_number(Counter(read_labels(files, names, 0).values()))
    return {} if "" in firsts or len(firsts) < 2 else dict(sorted(firsts.items()))


def _has(*patterns: str) -> Callable[[Path], bool]:
    """Whether a folder has a file of such a name."""
    return lambda place: place.is_dir() and any(any(place.glob(pattern)) for pattern in patterns)


def _ends(*endings: str) -> Callable[[Path], bool]:
    return lambda place: place.name.endswith(endings)


# How other sources are recognised, the first that fits, and what looks at them.
KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], Found]]] = [
    (_has("dataset_dict.json", "state.json", "*.parquet", "data/*.parquet", "*.arrow"), look_at_hub),
    (_ends(".parquet", ".arrow"), look_at_hub),
    (_has("data.mdb"), look_at_lmdb),
    (_ends(".mdb", ".lmdb"), look_at_lmdb),
    (_has("*.tar"), look_at_tars),
    (_has(*(f"{name}/train-images-idx3-ubyte*".lstrip("/") for name in IDX_FOLDERS)), look_at_idx),
    (_has("data_batch_1*", "cifar-10-*"), look_at_cifar10),
    (_ends("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"), look_at_cifar10),
]
