"""What each of two processes does for tests/unit/test_sharded.py: networks split over both of them.

Run twice by torchrun in a workspace with the inputs' manifests, `first` until it is killed, then `second`.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import dmd2.training.sampling
import dmd2.training.trainer
from dmd2.core import distributed
from dmd2.core.errors import UserError
from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.run_inputs import Inputs
from dmd2.training.checkpoints import checkpoint
from dmd2.training.sharding import gathered
from dmd2.training.trainer import Training
from tests import tiny, transformer_runs

KIND, STEPS, EVERY = "eps-sdxl", 4, 2
WIDE = {"block_out_channels": (16, 32)}  # so that rows of a process are enough for 8-bit states
INPUTS = Inputs(Path("manifest.json"), Path("set.json"), Path("set.json"), None)
EIGHT = {"optim__states": "8bit", "train__steps": 3}
BODY = {"train__precision": "bf16-body"}
SHARDED = Hardware(shard=True)
CUT = Hardware(shard=True, micro_batch=2, checkpointing=True)
PROBES = list(range(2))  # each is a pass through networks that are gathered block by block


def training(name: str, hardware: Hardware = SHARDED, **changes: Any) -> Training:
    """A text run with every loss term, a batch that two processes cannot share evenly, and checkpoints in between."""
    every = {"train__snapshot_every": STEPS, "train__checkpoint_every": EVERY, "train__log_every": STEPS}
    terms = {"regression__weight": 0.5, "gan__r1_weight": 1.0, "optim__ema": 0.9}
    size = {"critic__ratio": 2, "train__steps": STEPS, "optim__batch": 7}
    cfg = tiny.config(KIND, **{**size, **every, **terms, **changes})
    return Training(RunId("tiny", name, 0), cfg, hardware, INPUTS)


def trained(t: Training) -> dict[str, Tensor]:
    """All weights of a training by dotted names, whole, in process 0."""
    return {f"{who}.{name}": v for who, m in t.trained.items() for name, v in gathered(m.state_dict()).items()}


def finish(name: str, hardware: Hardware = SHARDED, **changes: Any) -> None:
    """Train to the end and leave the weights and the step at which it was resumed."""
    t = training(name, hardware, **changes)
    t.resume()
    resumed_at = t.step
    t.run()
    weights = trained(t)
    if t.leads:
        save_file(weights, f"{name}.safetensors")
        Path(f"{name}.json").write_text(json.dumps({"resumed_at": resumed_at}))


def killed_at(step: int) -> None:
    """Process 0 is killed when all parts of the checkpoint of `step` lie there, before they are listed."""
    publish = checkpoint.Checkpoints._publish

    def publish_or_die(self, now, manifest):
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, now, manifest)

    checkpoint.Checkpoints._publish = publish_or_die
    training("killed", CUT).run()


def signalled_at(step: int) -> None:
    """Process 0 alone gets SIGTERM in the iteration before `step`; both save, and it leaves."""
    original = dmd2.training.trainer.train_step

    def step_until(m, b, it, cfg):
        if it == step and distributed.rank() == 1:
            raise KeyboardInterrupt
        if it == step - 1 and distributed.rank() == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(m, b, it, cfg)

    dmd2.training.trainer.train_step = step_until
    try:
        training("signalled", CUT).run()
    except KeyboardInterrupt:
        pass
    finally:
        dmd2.training.trainer.train_step = original


def refused() -> str:
    """Three micro-batches in one process and four in the other."""
    try:
        return str(training("refused", replace(SHARDED, micro_batch=1)))
    except UserError as error:
        return str(error)


def transformers() -> None:
    """Two iterations of each family of transformers, its blocks gathered one by one and computed again in backward."""
    for kind, mode in transformer_runs.SPLIT:
        hardware = replace(CUT, micro_batch=0)
        found = transformer_runs.trained(transformer_runs.training(Path(), kind, mode, hardware), 2)
        if distributed.rank() == 0:
            save_file(found, f"{kind} {mode}.safetensors")


def first() -> None:
    """Whole trainings, the beginnings of others, and one that is killed."""
    finish("whole", CUT)
    finish("whole8", **EIGHT)
    finish("begun8", **{**EIGHT, "train__steps": EVERY})
    finish("body", **BODY)
    transformers()
    signalled_at(3)
    if distributed.rank() == 0:
        Path("refused.txt").write_text(refused())
    killed_at(4)


def second() -> None:
    """Continue all of them, and one that a single process began."""
    for name in ("killed", "signalled"):
        finish(name, CUT)
    finish("begun8", **EIGHT)
    finish("alone")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dmd2.training.sampling.PROBES = PROBES
    with distributed.process_group(torch.device("cpu")):
        {"first": first, "second": second}[sys.argv[1]]()
