"""What each of two processes does for tests/unit/test_verified_once.py: a job whose process 0 is slow to verify."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

import dmd2.training.sampling
from dmd2.core import distributed, files
from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.run_inputs import Inputs
from dmd2.launch.job import TrainingJob
from dmd2.training.checkpoints import checkpoint
from tests import two_processes

torch.set_num_threads(1)
READ: list[str] = []
TIMEOUT = 4  # seconds


def counted(path: Path) -> str:
    """Checksum of a file, remembered."""
    READ.append(path.name)
    return sha256(path)


def slowly(*args: object) -> None:
    """Longer than any collective may take."""
    verify(*args)
    READ.append("verified")
    time.sleep(1.5 * TIMEOUT)


def patiently(*args: object) -> None:
    """Collectives may take their time again once the other process has waited for the verification."""
    verify_first(*args)
    distributed.TIMEOUT = timedelta(minutes=5)


verify_first, distributed.verify_first = distributed.verify_first, patiently
sha256, files.sha256 = files.sha256, counted
dmd2.training.sampling.PROBES = [0]
distributed.TIMEOUT = timedelta(seconds=TIMEOUT)
Inputs.of = staticmethod(lambda run, cfg: two_processes.INPUTS)
if hasattr(checkpoint, "verify_inputs"):
    verify, checkpoint.verify_inputs = checkpoint.verify_inputs, slowly
config = two_processes.config(train__steps=int(sys.argv[1]), train__checkpoint_every=1, train__log_every=1)
TrainingJob(RunId("tiny", "job", 0), config.training(), Hardware()).train()
Path(f"read-{os.environ['RANK']}-{sys.argv[1]}.json").write_text(json.dumps(READ))
