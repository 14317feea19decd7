"""What every test shares: one thread, the repository root, tiny networks."""

import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.workspace import Workspace, copy_repository

torch.set_num_threads(1)
# A shell starts background jobs with Ctrl-C ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parents[1]
# Longest first, so that no worker ends with one of them while the other has nothing left to do (`make test`).
LONGEST = [
    "slurm/test_slurm.py", "workflow/test_text.py",
    "workflow/test_fresh.py", "workflow/test_versions.py", "workflow/test_dag.py", "unit/test_sharded.py",
    "workflow/test_interruption.py", "unit/test_memory.py", "workflow/test_prune.py", "unit/test_distributed.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which ``--dist loadfile --no-loadscope-reorder`` hands out files."""
    rank = {str(ROOT / "tests" / name): number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(str(item.path), len(rank)))


@pytest.fixture
def loose_process() -> Iterator[None]:
    """A process that allows TF32 in all products, as trainers and notebooks often do."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def root() -> Path:
    """Folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose demo ran to the end: made by the first worker that needs it, a copy for each of them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    made, own = shared / "demo", tmp_path_factory.mktemp("finished") / "workspace"
    with open(shared / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            workspace = copy_repository(tmp_path_factory.mktemp("demo"))
            result = workspace.snakemake("demo")
            assert result.returncode == 0, result.stderr[-5000:]
            workspace.path.rename(made)
    shutil.copytree(made, own, symlinks=True)
    return Workspace(own)
