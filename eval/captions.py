"""Captions of a set of images: one for each, by the image's place in the sorted set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dmd2.errors import UserError

COLUMN = "caption"
TABLES: dict[str, Callable[[Path], pd.DataFrame]] = {
    # "NA" and "None" are captions, and a blank line is a missing one
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}


def read_captions(path: Path) -> list[str]:
    """The captions of a file, in order, with their blanks at either end.

    Args:
        path: a UTF-8 text with one caption a line, or a csv, jsonl or parquet table with a column ``caption``.

    Raises:
        UserError: missing, unreadable, empty, or a caption is blank.
    """
    captions = _column(path) if path.suffix.lower() in TABLES else _lines(path)
    blank = [number for number, caption in enumerate(captions) if not caption.strip()]
    if blank:
        where = f"line {blank[0] + 1}" if path.suffix.lower() not in TABLES else f"row {blank[0]} (from 0)"
        raise UserError(f"{path}: {where} is blank: every image needs its own caption")
    if not captions:
        raise UserError(f"{path} holds no captions")
    return captions


def _lines(path: Path) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.rstrip("\n") for line in file]  # splitlines() would cut at other separators, too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable UTF-8 text of captions ({error})") from None


def _column(path: Path) -> list[str]:
    try:
        table = TABLES[path.suffix.lower()](path)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's parsers raise kinds of ValueError
        raise UserError(f"{path} is not a readable table of captions ({str(error).splitlines()[0]})") from None
    if COLUMN not in table:
        raise UserError(f"{path} has no column {COLUMN}, only {', '.join(map(str, table.columns)) or 'nothing'}")
    return ["" if pd.isna(value) else str(value) for value in table[COLUMN]]
