"""What runs inside a training job: on this machine, or in every task of a Slurm job through submitit."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from dmd2.cluster import Cluster
from dmd2.config import TrainConfig
from dmd2.errors import readable_errors
from dmd2.inputs import Inputs, goal_of
from dmd2.interrupts import STOP, Actions
from dmd2.run import RunId

LOCK_PATIENCE = 120.0  # seconds a restarted job waits for its dying predecessor (or for an NFS lease)


@dataclass(frozen=True)
class TrainingJob:
    """Plain values only: submitit pickles this, and a job restarted from the pickle continues from disk."""

    run: str
    config: str
    threads: int
    device: str
    micro_batch: int
    shard: bool = False
    checkpointing: bool = False
    deterministic: bool = False

    @staticmethod
    def of(run: RunId, cfg: TrainConfig, cluster: Cluster) -> "TrainingJob":
        """The training of a run under a cluster file's settings."""
        how, job = cluster.training, cluster.jobs.train
        return TrainingJob(
            str(run), cfg.model_dump_json(), job.threads, job.device, how.micro_batch, how.shard, how.checkpointing,
            how.deterministic,
        )  # fmt: skip

    def __call__(self) -> None:
        """Train in a Slurm task.

        The warning before the time limit or a preemption (USR2) is acted on between two iterations: process 0 saves,
        then lets submitit requeue the job under the same id. After SIGTERM (scancel, requeue by hand) it saves and
        goes on, since a job that ends by itself in a preemption's grace time would not be requeued.
        """
        TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
        requeue = cast(Callable[..., Any], signal.getsignal(signal.SIGUSR2))
        with readable_errors():
            self.train({signal.SIGUSR2: lambda: requeue(signal.SIGUSR2, None), signal.SIGTERM: lambda: None})

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after the requeue: the same, since checkpoints lie on disk."""
        return DelayedSubmission(self)

    def train(self, actions: Actions = STOP) -> None:
        """Train in this process, as one of those the environment names.

        Raises:
            UserError: see `Training.run`.
        """
        run, cfg = RunId.parse(self.run), TrainConfig.model_validate(json.loads(self.config))
        if goal_of(run, cfg).reached():
            print(f"{run} is finished already", file=sys.stderr)
            return
        import torch  # not above: a waiting launcher imports this module, and there may be hundreds

        from dmd2.arithmetic import deterministic_kernels, float32_products
        from dmd2.distributed import local_device, process_group
        from dmd2.trainer import Hardware, Training

        torch.set_num_threads(self.threads)
        device = local_device(self.device, "train")
        patience = LOCK_PATIENCE if actions is not STOP else 0
        hardware = Hardware(
            str(device), self.threads, self.micro_batch, self.shard, self.checkpointing, self.deterministic
        )
        arithmetic = deterministic_kernels(self.deterministic), float32_products(cfg.train.precision)
        with arithmetic[0], arithmetic[1], process_group(device):
            Training(run, cfg, hardware, Inputs.of(run, cfg)).run(actions, patience)
