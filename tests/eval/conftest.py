"""A small workspace of real trainings, for the tests of the catalogue."""

import shutil
from pathlib import Path

import pytest

from tests.eval.catalogue_workspace import build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trainings, evaluated, and one sampler of their teacher."""
    return build(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def place(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy of it as the current folder."""
    shutil.copytree(built / "results", tmp_path / "w/results")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"
