"""Workspaces: invented results of one table, and for the catalogue a few real trainings."""

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from dmd2.core.options import WORKSPACE
from tests.browser import fake_results
from tests.eval.catalogue_workspace import build


@pytest.fixture(autouse=True)
def no_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace is the temporary folder."""
    monkeypatch.setenv(WORKSPACE, str(tmp_path))


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


@pytest.fixture
def table3(root: Path, tmp_path: Path) -> Iterator[Path]:
    """The table digits-table3 of invented results of three seeds, in a workspace that is the current folder."""
    fake_results.workplace(tmp_path, root)
    with chdir(tmp_path):
        yield fake_results.table("digits-table3")
