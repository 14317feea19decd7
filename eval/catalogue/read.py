"""Every run of a workspace as one pandas table, to plot what you like; also as Parquet and CSV.

One line per evaluated snapshot; a run without metrics, and a training newer than the metrics beside it, has one line
whose `state` says why. ``dmd2 catalogue --schema`` explains every column. Frechet distance over student
updates for every row, with the range over its seeds as a band:

>>> import matplotlib.pyplot as plt
>>> from eval.catalogue.read import catalogue
>>> done = catalogue().query("base == 'digits' and kind == 'student' and state == 'evaluated'")
>>> for row, fd in done.groupby(["row", "student_updates"]).fd.agg(["min", "mean", "max"]).groupby("row"):
...     fd = fd.droplevel("row")
...     plt.semilogy(fd.index, fd["mean"], label=row)
...     _ = plt.fill_between(fd.index, fd["min"], fd["max"], alpha=0.3)
>>> _ = plt.legend()
"""

import json
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmd2.core.errors import UserError
from dmd2.core.run import RUNS, SAMPLERS, RunId, run_folders
from eval.catalogue.columns import (
    DTYPES,
    IN_JSON,
    MAX_INT,
    PREFIXES,
    SCHEMA,
    describe,
)
from eval.catalogue.records import Folder, Line, student_lines, teacher_lines


def catalogue(root: Path | str = ".") -> pd.DataFrame:
    """One line per evaluated snapshot of every student and teacher of a workspace, or one that says why there is none.

    Args:
        root: folder of the workspace, with ``results/runs`` and ``results/teachers``; nothing is written there.

    Returns:
        The columns of `SCHEMA`, then the metrics found (NAME, NAME_se ...), ``config.*`` and ``sampler.*``.

    Raises:
        UserError: `root` has no results.
    """
    root, lines = Path(root), list[Line]()
    runs, others = _runs(root)
    for path in others:
        print(f"warning: {path} is no run folder (base/row/seedN) and is left out", file=sys.stderr)
    for run, path in runs.items():
        lines += student_lines(run, Folder(path))
    for path in sorted(p for p in (root / SAMPLERS).glob("*/*") if p.is_dir()):
        lines += teacher_lines(path.parent.name, path.name, Folder(path))
    found = {name: None for line in lines for name in line if name not in SCHEMA}
    settings = [name for name in found if name.startswith(tuple(PREFIXES))]  # after the metrics, kind by kind
    settings.sort(key=lambda name: next(i for i, prefix in enumerate(PREFIXES) if name.startswith(prefix)))
    names = [*SCHEMA, *(name for name in found if name not in settings), *settings]
    columns = describe(names)
    return pd.DataFrame({name: _series([line.get(name) for line in lines], columns[name].type) for name in names})


def _runs(root: Path) -> tuple[dict[RunId, Path], list[Path]]:
    """See `run_folders`."""
    if not any((root / place).is_dir() for place in (RUNS, SAMPLERS)):
        raise UserError(f"{root.absolute()} has no {RUNS} or {SAMPLERS}: give the folder of a workspace")
    return run_folders(root)


def _series(values: list[Any], kind: str) -> pd.Series:
    """Values as a column of a type of `DTYPES`, or else of the type that all of them have."""
    found = {type(value) for value in values} - {type(None)}
    if kind in DTYPES:
        return pd.Series(values, dtype=DTYPES[kind])
    if not found:
        return pd.Series(values, dtype=object)  # the type null of Parquet
    huge = int in found and any(type(value) is int and abs(value) > MAX_INT for value in values)
    for name, kinds in IN_JSON.items():
        if found <= kinds and not huge:
            return pd.Series(values, dtype=DTYPES[name])
    return pd.Series([None if v is None else json.dumps(v) for v in values], dtype="string")


def training_logs(root: Path | str = ".") -> pd.DataFrame:
    """What all trainings logged, one value a line: the columns of `LOG_SCHEMA`.

    Lines that are damaged, as the last one may be while it is written, are told on stderr and left out.

    Raises:
        UserError: `root` has no results.
    """
    runs, _ = _runs(Path(root))
    names: dict[str, int] = {}
    steps, codes, values, counts = array("q"), array("q"), array("d"), list[int]()  # 8 bytes a number
    for path in runs.values():
        before = len(values)
        for step, line in _log(path / "log.jsonl"):
            steps.extend([step] * len(line))
            codes.extend(names.setdefault(name, len(names)) for name in line)
            values.extend(line.values())
        counts.append(len(values) - before)
    of_run = np.repeat(np.arange(len(runs)), counts)
    return pd.DataFrame(
        {
            "run": pd.Categorical.from_codes(of_run, pd.Index([*map(str, runs)], dtype=str)),
            "step": np.array(steps, dtype=np.int64),
            "name": pd.Categorical.from_codes(np.array(codes, dtype=np.int64), pd.Index([*names], dtype=str)),
            "value": np.array(values, dtype=np.float64),
        }
    )


def _log(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and values of the good lines of a log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        print(f"warning: {path} is left out: {error}", file=sys.stderr)
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            step, values = int(entry.pop("step")), {name: float(value) for name, value in entry.items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            print(f"warning: {path} line {number} is damaged or half-written and is left out", file=sys.stderr)
            continue
        yield step, values
