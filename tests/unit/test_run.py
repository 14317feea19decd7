"""The recorded commit is that of the code, whatever folder a command is started in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dmd2

MODULES = ("__init__.py", "core/__init__.py", "core/run.py", "core/errors.py", "core/files.py")


def git(folder: Path, *words: str) -> str:
    line = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def repository(folder: Path, text: str) -> str:
    """Make a repository with one commit; returns its short hash."""
    folder.mkdir(exist_ok=True)
    (folder / "note").write_text(text)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", text)
    return git(folder, "rev-parse", "--short=9", "HEAD")


def copy_of_the_package(folder: Path) -> Path:
    (folder / "dmd2/core").mkdir(parents=True)
    for name in MODULES:
        shutil.copy(Path(dmd2.__file__).parent / name, folder / "dmd2" / name)
    return folder


def commit_seen(code: Path, start: Path) -> str:
    line = [sys.executable, "-P", "-c", "from dmd2.core.run import commit; print(commit())"]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    return subprocess.run(line, cwd=start, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_code_in_any_folder(tmp_path: Path) -> None:
    code, other = copy_of_the_package(tmp_path / "code"), tmp_path / "other"
    expected, foreign = repository(code, "code"), repository(other, "other")
    assert expected != foreign
    assert [commit_seen(code, start) for start in (code, other, tmp_path)] == [expected] * 3
    (other / "note").write_text("changed")
    assert commit_seen(code, other) == expected
    (code / "note").write_text("changed")
    assert commit_seen(code, other) == f"{expected}+"


@pytest.mark.parametrize("place", ["plain", "other/.venv"])
def test_code_outside_its_checkout_has_no_commit(tmp_path: Path, place: str) -> None:
    repository(tmp_path / "other", "other")
    assert commit_seen(copy_of_the_package(tmp_path / place), tmp_path / "other") == "unknown"
