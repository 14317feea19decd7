"""A workspace of one's own to edit and plan in."""

import shutil
from pathlib import Path

import pytest

from tests.workspace import Workspace


@pytest.fixture
def edited(finished: Workspace, tmp_path: Path) -> Workspace:
    """A private copy of the finished workspace, modification times kept."""
    shutil.copytree(finished.path, tmp_path / "copy", symlinks=True)
    return Workspace(tmp_path / "copy")
