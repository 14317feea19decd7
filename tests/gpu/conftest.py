"""The device of these tests, from one place: DMD2_TEST_DEVICE is ``cuda`` (`make test-gpu`), ``cpu``, or not set.

Not set, as in the ordinary suite, they run on a CUDA device that is pretended, which finds tensors of mixed devices;
those that start processes or take times and memory run on the CPU, so that they do not rot.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dmd2.core.precision import float32_products
from tests.pretended import pretended_cuda

KIND = os.environ.get("DMD2_TEST_DEVICE", "")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device under test, or a pretended one."""
    if KIND:
        yield _real()
    elif torch.cuda.is_available():
        pytest.skip("there is a GPU here, none is pretended: make test-gpu")
    else:
        with pretended_cuda() as pretended:
            yield pretended


@pytest.fixture(scope="session")
def real_device() -> torch.device:
    """The device under test, or the CPU in its place, for what cannot run on a pretended one."""
    if KIND:
        return _real()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: make test-gpu")
    return torch.device("cpu")


def _real() -> torch.device:
    if KIND == "cuda" and not torch.cuda.is_available():
        pytest.fail("DMD2_TEST_DEVICE is cuda, but PyTorch sees no GPU here")
    return torch.device(KIND, 0) if KIND == "cuda" else torch.device(KIND)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Numbers are compared with those of the CPU; cuDNN would convolve in TF32 where nothing is said."""
    with float32_products("fp32"):
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
