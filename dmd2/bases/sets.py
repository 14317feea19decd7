"""Looks at sets that are no folders of images: tar files, LMDB, idx, CIFAR-10, sets of the library datasets."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from dmd2.bases.found import LOOKED_AT, Found, Shapes, by_number, reading
from dmd2.core.errors import UserError
from dmd2.data.captions import COLUMN, OTHER_COLUMNS, as_caption
from dmd2.data.hub_sets import opened
from dmd2.data.readers import IDX_FOLDERS, read, read_idx
from dmd2.data.tar_sets import webdataset
from dmd2.experiment.data_config import Source

LABELS = ("label", "labels", "fine_label")


def look_at_tars(place: Path) -> Found:
    """A webdataset, whose images always have captions; all of it is read."""
    source, shapes, captions, count = Source(kind="webdataset", path=str(place)), Shapes(), list[str](), 0
    for name, content, caption in webdataset(reading(source, captioned=True), 0, 1):
        if count < LOOKED_AT:
            shapes.add(name, content, captioned=True)
            captions.append(str(caption))
        count += 1
    return shapes.found(source, count, captions=captions)


def look_at_lmdb(place: Path) -> Found:
    """An LMDB of the official convention, of images with labels.

    Raises:
        UserError: it holds something else or is damaged.
    """
    import lmdb

    try:
        with (
            lmdb.open(str(place), subdir=place.is_dir(), readonly=True, lock=False) as environment,
            environment.begin() as transaction,
        ):
            shape = transaction.get(b"images_shape")
            if shape is None:
                raise UserError(f"{place} has no images with labels: write `like: sd15` or sdxl for an LMDB of latents")
            count, channels, side, _ = map(int, shape.split())
            rows = (transaction.get(f"labels_{i}_data".encode()) or b"" for i in range(count))
            classes = by_number(Counter(int.from_bytes(row, "little", signed=True) for row in rows))
    except (lmdb.Error, ValueError) as error:
        raise UserError(f"{place} is not a readable LMDB of images ({error})") from None
    source = Source(kind="lmdb", path=str(place))
    return Found(source, count, Counter([side]), True, channels, classes, fixed=True)


def look_at_idx(place: Path) -> Found:
    """MNIST-like files."""
    folder = next(place / name for name in IDX_FOLDERS if any((place / name).glob("train-images-idx3-ubyte*")))
    images, labels = (read_idx(folder / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    source, classes = Source(kind="idx", path=str(place)), by_number(Counter(labels.tolist()))
    return Found(source, len(images), Counter([images.shape[-1]]), True, 1, classes, fixed=True)


def look_at_cifar10(place: Path) -> Found:
    """CIFAR-10 as its authors publish it; all of it is read."""
    source = Source(kind="cifar10", path=str(place))
    blocks = read(reading(source, classes=10).model_copy(update={"resolution": 32}))
    classes = by_number(Counter(label for _, labels in blocks for label in labels))
    return Found(source, sum(classes.values()), Counter([32]), True, 3, classes, fixed=True)


def look_at_hub(place: Path) -> Found:
    """A set of the library datasets: its first column of images, and one of captions or labels.

    Raises:
        UserError: it cannot be opened, or has no images.
    """
    import datasets

    try:
        rows = opened(place, "train")
        features = rows.features or {}
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise UserError(f"{place} has no column of images, only {', '.join(features) or 'unnamed ones'}")
        rows = rows.cast_column(images[0], datasets.Image(decode=False))
        texts = [name for name in (COLUMN, *OTHER_COLUMNS) if getattr(features.get(name), "dtype", "") == "string"]
        labels = [] if texts else [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        labels += [] if texts else [name for name in LABELS if name in features]
        return _hub_set(place, rows, images[0], texts[:1], labels[:1])
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{place} cannot be read by the library datasets ({str(error).splitlines()[0]})") from None


def _hub_set(place: Path, rows: Any, image: str, texts: list[str], labels: list[str]) -> Found:
    named = {"image": [image], "caption": texts, "label": labels}
    usual = {"image": "image", "caption": "text", "label": "label"}  # what the reader takes without a name
    source = Source(
        kind="hub", path=str(place), **{key: n for key, (n, *_) in _present(named) if n != usual[key]}  # type: ignore[arg-type]
    )  # fmt: skip
    shapes = Shapes()
    for number, row in enumerate(islice(rows, LOOKED_AT)):
        content = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
        shapes.add(f"{place}, row {number}", content, captioned=bool(texts))
    conditions = [row[column] for column in [*texts, *labels] for row in rows.select_columns([column])]
    if texts:
        return shapes.found(source, len(conditions), captions=[as_caption(text) for text in conditions[:LOOKED_AT]])
    if labels:
        counts, names = Counter(conditions), getattr(rows.features[labels[0]], "names", None)
        classes = {name: counts[i] for i, name in enumerate(names)} if names else by_number(counts)
        return shapes.found(source, len(conditions), classes=classes)
    return shapes.found(source, sum(1 for _ in rows))


def _present(named: dict[str, list[str]]) -> Iterable[tuple[str, list[str]]]:
    return ((key, names) for key, names in named.items() if names)
