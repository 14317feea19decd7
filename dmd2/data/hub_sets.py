"""Sets of the Hugging Face hub and files of its library datasets, with labels or with captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmd2.core.distributed import rows_of_part
from dmd2.core.errors import UserError
from dmd2.data.captions import as_caption
from dmd2.data.decode import Encoded
from dmd2.experiment.data_config import Data


def hub(data: Data, part: int, parts: int) -> Iterator[Encoded]:
    """Part `part` of `parts` of the images of a Hugging Face set in its order, with labels or captions (null is "").

    The path is a folder (of save_to_disk, or of parquet, arrow or image files as on the hub), a parquet or arrow file,
    or the name of a set on the hub. Parts are of rows or, of local files, which are streamed, of whole files.

    With classes 0 and no text its labels are not read.

    Raises:
        UserError: it cannot be opened, lacks a column, has fewer files than parts, or holds what is no image, label
            or text.
    """
    import datasets  # four seconds

    source, place, image = data.source, Path(data.source.path or ""), data.source.image or "image"
    kind, column = ("label", source.label or "label") if data.text is None else ("caption", source.caption or "text")
    try:
        rows = opened(place, source.split or "train")
        columns: Any = rows.features or next(iter(rows), {})
        wanted = [image, *([column] if data.labelled or data.text is not None else [])]
        if lacking := {*wanted} - set(columns):
            raise UserError(
                f"{place} has no column {min(lacking)}, only {', '.join(columns)}: name them with data.source.image "
                f"and data.source.{kind}"
            )
        rows = rows.select_columns(wanted).cast_column(image, datasets.Image(decode=False))
        for number, row in enumerate(_part_of(rows, place, part, parts)):
            name = f"{place}, row {number}"
            if row[image] is None:
                raise UserError(f"{name} has no image")
            try:
                if data.text is not None:
                    value: int | str = as_caption(row[column])
                else:
                    value = _label(row[column]) if data.labelled else 0
            except UserError as error:
                raise UserError(f"{name} {error}") from None
            content = row[image]["bytes"]
            yield name, Path(row[image]["path"]).read_bytes() if content is None else content, value
    except (OSError, ValueError, KeyError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = (
            "check data.source, or fetch it again"
            if place.exists()
            else "nothing is downloaded unless asked: "
            "download it to a folder that you name as path, or prepare it with HF_HUB_OFFLINE=0 in the environment"
        )
        raise UserError(f"the hub set {place} cannot be read ({reason}); {advice}") from None


def opened(place: Path, split: str) -> Any:
    """The rows of a set; those of local files are streamed, without a copy in the cache.

    Raises:
        ValueError: there is no such split, or the file is of another kind; or what the library raises.
    """
    import datasets

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


def _part_of(rows: Any, place: Path, part: int, parts: int) -> Any:
    if parts == 1:
        return rows
    if hasattr(rows, "__len__"):
        return rows.select(rows_of_part(len(rows), parts, part))
    if rows.num_shards < parts:
        raise UserError(
            f"the {rows.num_shards} files of {place} cannot be shared by {parts} jobs: set data.text.jobs to at most "
            f"{rows.num_shards}"
        )
    return rows.shard(parts, part, contiguous=True)


def _label(value: Any) -> int:
    if not isinstance(value, int):
        raise UserError(f"has no whole-number label: {value!r:.60}")
    return value
