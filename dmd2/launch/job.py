"""What runs in a training job: on this machine, or in every task of a Slurm job.

A Slurm job has all that it needs on its command line, which Slurm keeps. It can therefore start, and start again,
without its launcher, sbatch's answer or files on the disk.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.interrupts import STOP, Actions, leave_to_another_job
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import NoAnswer, slurm
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import Inputs, goal_of

if TYPE_CHECKING:
    from dmd2.training.trainer import Training

FIRST_PORT, PORTS = 10_000, 7_000  # of the process group of a job, by its id
REQUEUE_PATIENCE = 60.0  # seconds in which a controller that restarts is asked again
LOCK_PATIENCE = 120.0  # seconds a restarted job waits for its dying predecessor (or for an NFS lease)


@dataclass(frozen=True)
class TrainingJob:
    """A training, which continues from what lies on the disk. A Slurm job is given it as text."""

    run: RunId
    cfg: TrainConfig
    hardware: Hardware

    def text(self) -> str:
        """The training as JSON, for a job's command line."""
        values = {"run": str(self.run), "config": self.cfg.settings(), **asdict(self.hardware)}
        return json.dumps(values, separators=(",", ":"))

    @staticmethod
    def read(text: str) -> "TrainingJob":
        """The training that `text` wrote."""
        values = json.loads(text)
        run, config = RunId.parse(values.pop("run")), TrainConfig.model_validate(values.pop("config"))
        return TrainingJob(run, config, Hardware(**values))

    def in_slurm(self) -> None:
        """Train in a Slurm task.

        After the warning before the time limit or a preemption (USR2), process 0 saves between two iterations and has
        Slurm requeue the job under the same id. After SIGTERM (scancel, requeue by hand) it saves and goes on: Slurm
        would not requeue a job that ends by itself in the grace time of a preemption.
        """
        from submitit.helpers import TorchDistributedEnvironment

        leads = os.environ["SLURM_PROCID"] == "0"
        signal.signal(signal.SIGUSR2, lambda *_: self.requeue() if leads else None)  # before there is anything to save
        signal.signal(signal.SIGTERM, lambda *_: None)
        # Below the ports that the kernel gives to connections: one of submitit's choice may be in use by any of them.
        os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS))
        TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
        with readable_errors():
            if leads:
                leave_to_another_job(self.run.folder)  # at once, not after the networks are built
            self.train({signal.SIGUSR2: self.requeue, signal.SIGTERM: lambda: None})

    def requeue(self) -> None:
        """Have Slurm start this job again under its id, and exit; return if Slurm refuses or does not answer."""
        job = os.environ["SLURM_JOB_ID"]
        print(f"Caught signal SIGUSR2: everything is saved, job {job} is requeued", file=sys.stderr, flush=True)
        until = time.monotonic() + REQUEUE_PATIENCE
        while True:
            try:
                (self.run.folder / "jobs").mkdir(exist_ok=True)  # without its log's folder it could not start
                slurm("scontrol", "requeue", job)
            except (OSError, UserError) as error:
                if isinstance(error, NoAnswer) and time.monotonic() < until:
                    time.sleep(3)
                    continue
                print(f"job {job} could not be requeued and goes on: {error}", file=sys.stderr, flush=True)
                return
            sys.exit(1)

    def train(self, actions: Actions = STOP) -> None:
        """Train in this process, which is one of those that the environment names.

        Raises:
            UserError: see `Training.run`.
        """
        if goal_of(self.run, self.cfg).reached():
            print(f"{self.run} is finished already", file=sys.stderr)
            return
        with self.built() as training:
            training.run(actions, LOCK_PATIENCE if actions is not STOP else 0)

    def warm(self) -> float:
        """Run one interval of turns, of which nothing is kept but compiled code; returns the seconds that it took."""
        never = {name: 1 << 30 for name in ("steps", "log_every", "snapshot_every", "checkpoint_every")}
        cfg = self.cfg.model_copy(update={"train": self.cfg.train.model_copy(update=never)})
        started = time.monotonic()
        with replace(self, cfg=cfg).built() as training:
            for _ in range(cfg.critic.ratio + 1):
                training.iterate()
            training.check_finite()
        return time.monotonic() - started

    @contextmanager
    def built(self) -> Iterator["Training"]:
        """The training in this process's memory, with the arithmetic and the process group that it runs in."""
        run, cfg, hardware = self.run, self.cfg, self.hardware
        import torch  # not above: a waiting launcher imports this module, and there may be hundreds

        from dmd2.core.distributed import local_device, process_group
        from dmd2.core.precision import deterministic_kernels, float32_products
        from dmd2.networks.light_diffusers import light_diffusers

        light_diffusers(cfg.data, adapters=cfg.generator.lora is not None)
        from dmd2.training.checkpoints.checkpoint import verify_inputs
        from dmd2.training.trainer import Training

        torch.set_num_threads(hardware.threads)
        device = local_device(hardware.device, "train")
        hardware, inputs = replace(hardware, device=str(device)), Inputs.of(run, cfg)
        kernels, products = deterministic_kernels(hardware.deterministic), float32_products(cfg.train.precision)
        with kernels, products, process_group(device, lambda: verify_inputs(run, cfg, inputs)):
            yield Training(run, cfg, hardware, inputs)


if __name__ == "__main__":
    TrainingJob.read(sys.argv[1]).in_slurm()
