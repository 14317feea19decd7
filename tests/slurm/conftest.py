"""A real Slurm on this machine for the session."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.faults import STEPS
from tests.slurm.workspace import CLUSTER_FILE, Slurm, SlurmWorkspace, ended
from tests.workspace import Workspace


def why_not() -> str | None:
    """Why this machine cannot run the test cluster, if it cannot."""
    if os.geteuid() != 0:
        return "a test Slurm needs root"
    if shutil.which("apt-get") is None:
        return "a test Slurm is installed by apt-get, which is not here"
    return None


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A running cluster; skipped with its reason where there can be none, unless REQUIRE_SLURM is set (.ci/run)."""
    if reason := why_not():
        (pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip)(reason)
    for left in Path("/tmp").glob("slurm-test-[0-9]*"):  # by a session that was killed
        if not Path("/proc", left.name.rsplit("-")[-1]).exists():
            Slurm(left).script("wipe")
    cluster = Slurm(Path("/tmp") / f"slurm-test-{os.getpid()}")  # short: munge's socket path has a limit of 108 bytes
    cluster.script("up")
    try:
        yield cluster
    finally:
        cluster.script("wipe")


@pytest.fixture(scope="session")
def workspace(finished: Workspace, slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> SlurmWorkspace:
    """A copy of the finished workspace on the test cluster."""
    path = tmp_path_factory.mktemp("slurm") / "workspace"
    shutil.copytree(finished.path, path, symlinks=True)
    shutil.copy(CLUSTER_FILE, path / "workflow/cluster/slurm.yaml")
    return SlurmWorkspace(path, slurm)


@pytest.fixture(scope="session")
def calm(workspace: SlurmWorkspace) -> str:
    """Final weights of the run that nothing disturbs, trained on this machine without Slurm."""
    code, output = ended(workspace.train("digits/calm/seed0", cluster="local", **STEPS))
    assert code == 0, output
    return workspace.weights("digits/calm/seed0")
