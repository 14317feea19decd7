"""Two processes on two GPUs, or on the CPU in their place, train the same weights and go on from a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.conftest import ROOT


def test_two_processes_train_and_resume(real_device: torch.device, place: Path) -> None:
    if real_device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"two processes need two GPUs, here is {torch.cuda.device_count()}")
    tiny.teacher(place)
    tiny.real_set(place / "set.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*command, "-m", "tests.two_processes"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    found = {(name, rank): load_file(f"{name}-{rank}.safetensors") for name in ("two", "stopped") for rank in (0, 1)}
    for key, weight in found["two", 0].items():
        assert torch.equal(weight, found["two", 1][key])
        torch.testing.assert_close(weight, found["stopped", 0][key], rtol=1e-4, atol=1e-4)
