"""Sets of the Hugging Face hub and files of its library datasets, with labels or with captions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmd2.core.distributed import part as share
from dmd2.core.errors import UserError
from dmd2.data.captions import as_caption
from dmd2.data.decode import Encoded
from dmd2.experiment.data_config import Data


def hub(data: Data, part: int, parts: int) -> Iterator[Encoded]:
    """Share `part` of `parts` of the images of a Hugging Face set in its order, with labels or captions (null is "").

    The path is a folder (of save_to_disk, or of parquet, arrow or image files as on the hub), a parquet or arrow file,
    or the name of a set on the hub. A share is one of rows or, of local files, which are streamed, one of whole files.

    Raises:
        UserError: it cannot be opened, lacks a column, has fewer files than shares, or holds what is no image, label
            or text.
    """
    source = data.source
    column, value = (source.label or "label", _label) if data.text is None else (source.caption or "text", as_caption)
    with _readable(data):
        yield from _encoded(data, _share(data, _columns(data, column), part, parts), column, value)


@contextmanager
def _readable(data: Data) -> Iterator[None]:
    """What the library raises, as one sentence."""
    import datasets  # four seconds

    place = Path(data.source.path or "")
    try:
        yield
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


def _columns(data: Data, condition: str) -> Any:
    """The rows with two columns: the image, not decoded, and `condition`."""
    import datasets

    source, place, image = data.source, Path(data.source.path or ""), data.source.image or "image"
    rows = _opened(datasets, place, source.split or "train")
    columns: Any = rows.features or next(iter(rows), {})
    if lacking := {image, condition} - set(columns):
        raise UserError(
            f"data {data.name}: {place} has no column {min(lacking)}, only {', '.join(columns)}: name them with "
            f"data.source.image and data.source.{'label' if data.text is None else 'caption'}"
        )
    return rows.select_columns([image, condition]).cast_column(image, datasets.Image(decode=False))


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


def _share(data: Data, rows: Any, part: int, parts: int) -> Any:
    if parts == 1:
        return rows
    if hasattr(rows, "__len__"):
        return rows.select(share(len(rows), parts, part))
    if rows.num_shards < parts:
        raise UserError(
            f"data {data.name}: the {rows.num_shards} files of {data.source.path} cannot be shared by {parts} jobs: "
            f"set data.text.jobs to at most {rows.num_shards}"
        )
    return rows.shard(parts, part, contiguous=True)


def _encoded(data: Data, rows: Any, condition: str, read: Any) -> Iterator[Encoded]:
    image = data.source.image or "image"
    for number, row in enumerate(rows):
        name = f"{data.source.path}, row {number}"
        if row[image] is None:
            raise UserError(f"data {data.name}: {name} has no image")
        try:
            value = read(row[condition])
        except UserError as error:
            raise UserError(f"data {data.name}: {name} {error}") from None
        content = row[image]["bytes"]
        yield name, Path(row[image]["path"]).read_bytes() if content is None else content, value


def _label(value: Any) -> int:
    if not isinstance(value, int):
        raise UserError(f"has no whole-number label: {value!r:.60}")
    return value
