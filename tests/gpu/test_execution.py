"""Compiled passes and CUDA graphs on the device: the numbers of plain iterations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2.data.sets import TensorSet
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.method.batches import Batches
from dmd2.method.interfaces import Models
from dmd2.method.step import train_step
from dmd2.training.build import build_models
from dmd2.training.execution import ReplayedStep, compile_passes
from tests import tiny

KIND = "edm-attention"
FOUR = {"generator": {"input": "backward_simulation", "steps": 4, "time": 80.0}}


def on(device: torch.device, cfg: RunConfig, folder: Path) -> tuple[Models, Batches]:
    """Models of a run, all equal, and batches on the device."""
    inputs = Inputs(tiny.teacher(folder, KIND, "tiny"), None, None, None)
    real = TensorSet(tiny.tensors(KIND, 32, seed=9))
    return build_models(cfg, 0, inputs, device), Batches(cfg, 0, device, 1 << 30, real, real)


@pytest.mark.parametrize("what", ["blocks", "network"])
def test_compiled_passes_are_near_plain_ones(what: str, real_device: torch.device, tmp_path: Path) -> None:
    cfg = tiny.config(KIND, critic__ratio=2)
    (plain, batches), (compiled, _) = (on(real_device, cfg, tmp_path) for _ in range(2))
    compile_passes(compiled, what, str(tmp_path), "inductor" if real_device.type == "cuda" else "eager")
    for it in range(4):
        expected, found = (train_step(m, batches.at(it), it, cfg) for m in (plain, compiled))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)


GUIDED_WITHIN = {"generator": {**FOUR["generator"], "isg": 0.5}}


@pytest.mark.parametrize("changes", [{}, FOUR, GUIDED_WITHIN, {"train__precision": "bf16-body"}])
def test_cuda_graphs_replay_the_step(changes: dict[str, Any], real_device: torch.device, tmp_path: Path) -> None:
    if real_device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU; tests/unit/test_execution.py replays without")
    cfg = tiny.config(KIND, critic__ratio=3, optim__warmup=40, **changes)
    (plain, batches), (replayed, _) = (on(real_device, cfg, tmp_path) for _ in range(2))
    step = ReplayedStep(replayed)
    for it in range(24):
        expected, found = train_step(plain, batches.at(it), it, cfg), step(replayed, batches.at(it), it, cfg)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)
    torch.cuda.synchronize()
