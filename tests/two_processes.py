"""What each of two processes does for tests/unit/test_distributed.py, in one start, since importing takes longest.

Run by torchrun in a workspace with the inputs' manifests; every process leaves its weights of both trainings.
"""

import json
import os
import signal
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import dmd2.training.trainer
from dmd2.core import distributed
from dmd2.core.distributed import GradientSums
from dmd2.core.errors import UserError
from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.training.trainer import Training
from tests import tiny

INPUTS = Inputs(Path("manifest.json"), Path("set.json"), Path("set.json"), None)
STEPS, STOP = 6, 3
DEVICE = distributed.local_device(os.environ.get("DMD2_TEST_DEVICE") or "cpu", "train")


def config(**changes: object) -> RunConfig:
    """Every loss term, and a batch that two processes cannot share evenly."""
    every = {"train__snapshot_every": STEPS, "train__checkpoint_every": STEPS, "train__log_every": 2}
    terms = {"regression__weight": 0.5, "gan__r1_weight": 1.0, "optim__ema": 0.9}
    return tiny.config(
        "edm", **{"critic__ratio": 2, "train__steps": STEPS, "optim__batch": 7, **every, **terms, **changes}
    )


def training(name: str, micro_batch: int = 0, **changes: object) -> Training:
    """A training of that config under some name."""
    hardware = Hardware(str(DEVICE), micro_batch=micro_batch)
    return Training(RunId("tiny", name, 0), config(**changes), hardware, INPUTS)


def trained(t: Training) -> dict[str, Tensor]:
    """All weights of a training by dotted names."""
    modules = {"student": t.models.student, "critic": t.models.critic, "head": t.models.head, "ema": t.ema}
    return {f"{who}.{name}": v.cpu().contiguous() for who, m in modules.items() for name, v in m.state_dict().items()}


def interrupt_at(step: int) -> None:
    """Process 0 gets a signal during the iteration before `step`, saves after it and leaves; the other dies with it."""
    original = dmd2.training.trainer.train_step

    def step_until(m, b, it, cfg):
        if it == step and distributed.rank() == 1:
            raise KeyboardInterrupt
        if it == step - 1 and distributed.rank() == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(m, b, it, cfg)

    dmd2.training.trainer.train_step = step_until
    try:
        training("stopped").run()
    except KeyboardInterrupt:
        return
    finally:
        dmd2.training.trainer.train_step = original
    raise AssertionError("it was not interrupted")


def finished(name: str, micro_batch: int = 0, **changes: object) -> list[tuple[int, int]]:
    """Train undisturbed and leave the weights; buckets that were sent during a backward pass, and all, of each sum."""
    sent, finish = [], GradientSums.finish

    def counting(self: GradientSums) -> None:
        early = self.sent
        finish(self)
        sent.append((early, len(self.buckets)))

    with mock.patch.object(GradientSums, "finish", counting):
        t = training(name, micro_batch, **changes)
        t.run()
    save_file(trained(t), f"{name}-{distributed.rank()}.safetensors")
    return sent


def heard() -> list[int]:
    """What process 0 tells, slowly: the other asks before it, and must not take what was told earlier."""
    values = []
    for value in (0, 1, 0, 2):
        if distributed.rank() == 0:
            time.sleep(0.1)
        values.append(distributed.agreed(value if distributed.rank() == 0 else -1))
    dist.barrier()
    return values


def main() -> None:
    """Train undisturbed in four ways, train and stop and continue, and try a batch that is too small."""
    torch.set_num_threads(1)
    distributed.BUCKET = 500  # so that tiny networks fill several
    with distributed.process_group(DEVICE):
        me = distributed.rank()
        sent = {"two": finished("two"), "cut": finished("cut", micro_batch=2)}
        sent["body"] = finished("body", train__precision="bf16-body")
        with mock.patch.object(GradientSums, "overlap", lambda *_: None):
            sent["late"] = finished("late")
        interrupt_at(STOP)
        continued = training("stopped")
        continued.resume()
        resumed_at = continued.step
        continued.run()
        save_file(trained(continued), f"stopped-{me}.safetensors")
        try:
            refused = str(training("small", optim__batch=1))
        except UserError as error:
            refused = str(error)
        facts = {"resumed_at": resumed_at, "refused": refused, "sent": sent, "heard": heard()}
        Path(f"facts-{me}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
