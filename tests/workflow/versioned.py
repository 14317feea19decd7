"""Workspaces under git and DVC: the finished demo recorded and pushed, and clones of it."""

import json
import re
import shutil
from pathlib import Path

from tests.workspace import Workspace

RUN = "results/runs/digits/dmd2/seed0"


def call(workspace: Workspace, *command: str) -> str:
    """Output of a command that must succeed."""
    result = workspace.run(*command)
    assert result.returncode == 0, f"{command}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout


def recorded(finished: Workspace, path: Path) -> Workspace:
    """A copy of the finished workspace with one table on digits, its results recorded by ``dvc repro``."""
    shutil.copytree(finished.path, path, symlinks=True, ignore=shutil.ignore_patterns(".snakemake"))
    workspace = Workspace(path)
    for table in (path / "workflow/tables").glob("digits-*.yaml"):
        table.unlink()
    call(workspace, "git", "init", "-q")
    save(workspace, "code")
    call(workspace, "dvc", "repro")
    save(workspace, "results")
    return workspace


def save(workspace: Workspace, message: str) -> None:
    """Commit everything in git."""
    call(workspace, "git", "add", "-A")
    call(workspace, "git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", message)


def clone(workspace: Workspace, path: Path) -> Workspace:
    """A clone, without any results."""
    call(workspace, "git", "clone", "-q", str(workspace.path), str(path))
    return Workspace(path)


def restore(workspace: Workspace, *args: str) -> tuple[int, str]:
    """Exit status and messages of ``python -m dmd2.publish.restore``."""
    result = workspace.run("python", "-m", "dmd2.publish.restore", *args)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout + result.stderr


def stored(workspace: Workspace, remote: Path, path: str) -> Path:
    """Where a versioned file of the runs lies in a directory remote."""
    digest = re.search(
        r"md5: (\w+\.dir)\n.*\n.*\n *- path: results/teachers", (workspace.path / "dvc.lock").read_text()
    )
    assert digest is not None
    listing = json.loads((remote / "files/md5" / digest[1][:2] / digest[1][2:]).read_text())
    found = next(entry["md5"] for entry in listing if path.endswith(entry["relpath"]))
    return remote / "files/md5" / found[:2] / found[2:]
