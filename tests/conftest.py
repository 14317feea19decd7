"""What every test shares: one thread, the repository root, tiny networks."""

import os
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


@pytest.fixture
def loose_process() -> Iterator[None]:
    """A process that allows TF32 in all products, as trainers and notebooks often do."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """Folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose demo ran to the end."""
    workspace = copy_repository(tmp_path_factory.mktemp("finished"))
    result = workspace.snakemake("demo")
    assert result.returncode == 0, result.stderr[-5000:]
    return workspace
