"""Fixtures of several files."""

from pathlib import Path

import pytest

from tests import digits_run
from tests.experiment_folder import Folder
from tests.fake_slurm import FakeSlurm


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Bases, tables and presets of a test."""
    return Folder(tmp_path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A machine with (faked) Slurm."""
    slurm = FakeSlurm(tmp_path / "slurm", monkeypatch)
    slurm.answer("sbatch", "Submitted batch job 7")
    return slurm


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has what `digits_run.RUN` reads."""
    monkeypatch.chdir(tmp_path)
    digits_run.make_inputs()
