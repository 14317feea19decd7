"""Bases, tables and presets that a test writes into a folder and loads."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmd2.core.errors import UserError
from dmd2.experiment.tables import Experiment, load_experiment
from tests import tiny

TABLE = {"title": "t", "base": "tiny", "rows": [{"run": "a"}, {"run": "b", "change": {"critic.ratio": 1}}]}


class Folder:
    """A folder with the base `tiny`, to which a test adds."""

    def __init__(self, path: Path) -> None:
        self.bases, self.tables, self.presets = (path / name for name in ("base", "tables", "presets"))
        for folder in (self.bases, self.tables, self.presets):
            folder.mkdir()
        self.base("tiny", tiny.values("edm"))

    def base(self, name: str, values: Any) -> None:
        (self.bases / f"{name}.yaml").write_text(values if isinstance(values, str) else yaml.safe_dump(values))

    def table(self, name: str = "one", text: str | None = None, **changes: Any) -> None:
        (self.tables / f"{name}.yaml").write_text(text or yaml.safe_dump({**TABLE, **changes}, sort_keys=False))

    def preset(self, name: str = "recipe", text: str | None = None, **change: Any) -> None:
        values = {"title": "t", "change": {key.replace("__", "."): value for key, value in change.items()}}
        (self.presets / f"{name}.yaml").write_text(text or yaml.safe_dump(values, sort_keys=False))

    def load(self) -> Experiment:
        return load_experiment(self.tables, self.bases)

    def error(self) -> str:
        """The one sentence about what is wrong."""
        with pytest.raises(UserError) as caught:
            self.load()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def says(self, *pieces: object) -> bool:
        """Whether that sentence has all of these pieces."""
        error = self.error()
        assert all(str(piece) in error for piece in pieces), error
        return True


def base_text(pattern: str, replacement: str) -> str:
    """The base `tiny` with one piece of text replaced."""
    text = yaml.safe_dump(tiny.values("edm"), sort_keys=False)
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text
    return changed


def line_of(path: Path, needle: str) -> int:
    """Number of the first line with that text."""
    return next(i for i, line in enumerate(path.read_text().splitlines(), start=1) if needle in line)
