"""Captions and prompts: in texts and tables of the user, in JSON lines beside our own sets, and of an evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, read_json_lines, verified, write_text
from dmd2.data.sets import TensorSet, load_set
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import eval_prompts
from dmd2.networks.condition import Condition

if TYPE_CHECKING:
    import pandas as pd

COLUMN, OTHER_COLUMNS = "caption", ("prompt", "text")
PICKLES = (".pkl", ".pickle", ".pt", ".pth")
TABLES = (".csv", ".jsonl", ".parquet")


def read_captions(path: Path) -> list[str]:
    """The captions of a file, one for each image in the order of a sorted set, with their blanks at either end.

    Args:
        path: a UTF-8 text with one caption a line, or a csv, jsonl or parquet table with a column ``caption`` or, as
            its only candidate, ``prompt`` or ``text``.

    Raises:
        UserError: missing, unreadable, a pickle, empty, or a caption is blank.
    """
    captions = _read(path, skip_blank=False)
    blank = [number for number, caption in enumerate(captions) if not caption.strip()]
    if blank:
        where = f"line {blank[0] + 1}" if path.suffix.lower() not in TABLES else f"row {blank[0]} (from 0)"
        raise UserError(f"{path}: {where} is blank: every image needs its own caption")
    if not captions:
        raise UserError(f"{path} holds no captions")
    return captions


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file like those of `read_captions`, in order.

    Blank lines are dropped; a row of a table without text is the empty prompt, as in the official prompt lists.

    Raises:
        UserError: missing, unreadable, a pickle, or without prompts.
    """
    prompts = _read(path, skip_blank=True)
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def save_captions(path: Path, captions: list[str]) -> None:
    """Write captions as JSON lines ``{"caption": ...}`` in ASCII, atomically."""
    write_text(path, "".join(json.dumps({COLUMN: caption}) + "\n" for caption in captions))


def captions_of(manifest: Path) -> list[str]:
    """Captions of a prepared set in the order of its rows: the verified ``captions-*.jsonl`` its manifest lists.

    Raises:
        UserError: the manifest lists none, or a file is missing or changed.
    """
    entries = [entry for entry in read_json(manifest)["files"] if Path(entry["path"]).match("captions-*.jsonl")]
    if not entries:
        raise UserError(f"{manifest} lists no captions-*.jsonl: it is no set of captioned images or prompts")
    return [str(row[COLUMN]) for entry in entries for row in read_json_lines(verified(manifest.parent, entry))]


@dataclass(frozen=True)
class EvalPrompts:
    """The prompts that images are drawn for: captions and their encoded rows, of the file ``eval.prompts`` or of the
    real set; the sample seed s takes number s mod n.
    """

    captions: list[str]
    rows: TensorSet

    @staticmethod
    def of(cfg: RunConfig) -> EvalPrompts | None:
        """Those of a run, None where it is conditioned on classes.

        Raises:
            UserError: the manifest or a file of it is missing or changed.
        """
        manifest = eval_prompts(cfg)
        return None if manifest is None else EvalPrompts(captions_of(manifest), load_set(manifest))

    def condition(self, seeds: list[int], device: torch.device | str = "cpu") -> Condition:
        """Conditions of sample seeds."""
        return self.rows.condition(torch.tensor(seeds) % len(self.rows), device)

    def captions_of(self, seeds: list[int]) -> list[str]:
        """Captions of sample seeds."""
        return [self.captions[seed % len(self.captions)] for seed in seeds]


def _read(path: Path, skip_blank: bool) -> list[str]:
    """Captions as they are in a file, blank ones too unless their lines are to be skipped."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which may run code when opened: if you trust it, convert it once by python -c "
            "\"import json, pickle, sys; [print(json.dumps({'caption': p})) for p in pickle.load(sys.stdin.buffer)]\" "
            f"< {path.name} > {path.stem}.jsonl"
        )
    try:
        if suffix in TABLES:
            return texts(read_table(path, suffix, skip_blank))
        with open(path, encoding="utf-8-sig") as file:  # splitlines() would cut at other separators, too
            return [line.rstrip("\n") for line in file if line.strip() or not skip_blank]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # pandas' and pyarrow's parsers raise kinds of ValueError
        form = "table" if suffix in TABLES else "UTF-8 text"
        raise UserError(f"{path} is not a readable {form} of captions ({str(error).splitlines()[0]})") from None


def read_table(file: Any, suffix: str, skip_blank: bool = False) -> pd.DataFrame:
    """The table in a path or open file, of one of `TABLES`; `skip_blank` leaves out blank lines of a csv."""
    import pandas as pd  # which other captions need not pay for

    if suffix == ".csv":
        # "NA" and "None" are captions. A blank line is a missing caption, but nothing in a list of prompts.
        options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
        return pd.read_csv(file, skip_blank_lines=skip_blank, **options)
    return pd.read_json(file, lines=True, dtype=False) if suffix == ".jsonl" else pd.read_parquet(file)


def texts(table: pd.DataFrame) -> list[str]:
    """Captions of a table, in order; empty where there is no text.

    Raises:
        UserError: no column can be it, or a row holds something else.
    """
    import pandas as pd

    others = [name for name in OTHER_COLUMNS if name in table]
    if COLUMN not in table and len(others) != 1:
        raise UserError(
            f"there is no column {COLUMN}, only {', '.join(map(str, table.columns)) or 'nothing'}: rename the one with "
            f"the captions to {COLUMN}"
        )
    found = []
    for number, value in enumerate(table[COLUMN if COLUMN in table else others[0]]):
        nothing = pd.api.types.is_scalar(value) and pd.isna(value)
        try:
            found.append(as_caption(None if nothing else str(value) if isinstance(value, Number) else value))
        except UserError as error:
            raise UserError(f"row {number} (from 0) {error}") from None
    return found


def as_caption(value: Any) -> str:
    """A caption as text; None becomes the empty caption, as in the official lists.

    Raises:
        UserError: the value is neither text nor None.
    """
    if not isinstance(value, str | None):
        raise UserError(f"has {value!r:.60} instead of one text as its caption")
    return value or ""
