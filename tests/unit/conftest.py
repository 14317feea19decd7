"""Fixtures of several files."""

from pathlib import Path

import pytest

from tests.experiment_folder import Folder
from tests.fake_slurm import FakeSlurm


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Bases, tables and presets of a test."""
    return Folder(tmp_path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A machine with (faked) Slurm."""
    return FakeSlurm(tmp_path / "slurm", monkeypatch)
