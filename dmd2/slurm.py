"""A training as a Slurm job through submitit: submit it, or attach to the live one.

The launcher owns nothing: Slurm runs the job, the job writes its folder. So a launcher may be killed, doubled or
started again at any time; checkpoints and finished.json are the truth, job.json only remembers where to look.
"""

import os
import shlex
import shutil
import time
from dataclasses import dataclass
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.helpers import clean_env

from dmd2.again import When, is_due, make_anew
from dmd2.cluster import Cluster
from dmd2.config import TrainConfig
from dmd2.errors import UserError
from dmd2.files import digest_of, read_json, write_json
from dmd2.inputs import goal_of
from dmd2.job import TrainingJob
from dmd2.run import Goal, RunId
from dmd2.slurm_queue import NO_SLURM, squeue
from dmd2.wait import log_path, say

REQUEUES = 1000  # submitit's own limit on restarts after a time limit; a run may take weeks of short jobs
OWN = {
    "time": "is the key runtime", "nodes": "is training.nodes", "ntasks-per-node": "is training.processes",
    "cpus-per-task": "is the key threads", "signal": "is training.signal_seconds",
    **{name: "is needed to find the job again" for name in ("job-name", "output", "error", "open-mode")},
}  # fmt: skip


@dataclass(frozen=True)
class SlurmTraining:
    """One run on one cluster."""

    run: RunId
    cfg: TrainConfig
    cluster: Cluster
    again: When = "never"

    @property
    def goal(self) -> Goal:
        """Exactly this training, with its inputs in their usual places."""
        return goal_of(self.run, self.cfg)

    @property
    def folder(self) -> Path:
        """Pickles and logs of its jobs."""
        return self.run.folder / "jobs"

    @property
    def name(self) -> str:
        """Job name, unique per run and workspace, by which a job whose id was lost is found."""
        return f"{self.run.base}.{self.run.name}.seed{self.run.seed}.{digest_of(str(self.run.folder.resolve()))}"

    def executor(self) -> SlurmExecutor:
        """submitit's executor with the cluster file's resources."""
        if shutil.which("sbatch") is None:
            raise UserError(NO_SLURM)
        resources, training = self.cluster.jobs.train, self.cluster.training
        cpus = None if resources.cpus_per_gpu else resources.threads  # Slurm refuses both
        # srun does not take over sbatch's CPUs per task since Slurm 22.05: without the repetition a task gets one CPU.
        srun_args = ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])]
        executor = SlurmExecutor(self.folder, max_num_timeout=REQUEUES, python=self.cluster.python)
        executor.update_parameters(
            job_name=self.name, time=resources.runtime, nodes=training.nodes, ntasks_per_node=self.cluster.processes,
            cpus_per_task=cpus, signal_delay_s=training.signal_seconds, setup=self.cluster.setup,
            srun_args=srun_args, additional_parameters=self.options(),
        )  # fmt: skip
        return executor

    def options(self) -> dict[str, Any]:
        """The other options of sbatch, by their long names."""
        r = self.cluster.jobs.train
        options: dict[str, Any] = {
            "partition": r.slurm_partition, "account": r.slurm_account, "qos": r.qos, "constraint": r.constraint,
            "gpus-per-node": r.gpu, "gres": r.gres, "cpus-per-gpu": r.cpus_per_gpu,
            "mem": r.mem_mb and f"{r.mem_mb}M", "mem-per-cpu": r.mem_mb_per_cpu and f"{r.mem_mb_per_cpu}M",
        }  # fmt: skip
        return {k: v for k, v in options.items() if v is not None} | {"requeue": True} | extra_options(r.slurm_extra)

    def script(self) -> str:
        """The batch script that would be sent."""
        executor = self.executor()
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def submit_or_attach(self) -> str | None:
        """Id of the live job of this run, submitted now if there was none; None if the training is finished.

        Raises:
            UserError: a live job trains another config of this run, or this one while it is to be trained anew, or
                Slurm refuses.
        """
        record, config = self.run.folder / "job.json", self.goal.config
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with open(self.run.folder / ".submit.lock", "w", encoding="utf-8") as lock:
            flock(lock, LOCK_EX)  # two launchers at once: the second finds the first one's job
            known = read_json(record) if record.exists() else {"config": config, "jobs": []}
            if live := self.live_job():
                if known["config"] != config:
                    raise UserError(
                        f"{self.run}: Slurm job {live} trains an older config of this run: wait for it, or stop it by "
                        f"`python -m dmd2.launch cancel {self.run}`, and run again"
                    )
                if self.again == "always":
                    raise UserError(
                        f"{self.run}: Slurm job {live} trains this run: wait for it, or stop it by "
                        f"`python -m dmd2.launch cancel {self.run}`, before you train it again"
                    )
                if live not in known["jobs"]:  # killed between sbatch and the record
                    write_json(record, {**known, "name": self.name, "jobs": [*known["jobs"], live]})
                say(self.run, f"attached to Slurm job {live}")
                return live
            if is_due(self.goal, self.again):
                make_anew(self.goal)
                known = {**known, "jobs": []}  # what the old training cost is told by its train.json
            if self.goal.reached():
                return None
            known = {"name": self.name, "config": config, "jobs": known["jobs"] if known["config"] == config else []}
            write_json(record, known)
            job = self.submit()
            write_json(record, {**known, "jobs": [*known["jobs"], job]})
            say(self.run, f"submitted Slurm job {job}; log: {log_path(self.run, job)}")
            return job

    def live_job(self) -> str | None:
        """Id of this run's job that is waiting or running; one that is just ending is waited for."""
        while True:
            entries = [entry for entry in squeue("--name", self.name).values() if not entry.ended]
            if not any(entry.state == "COMPLETING" for entry in entries):
                return entries[-1].job if entries else None
            time.sleep(1)

    def submit(self) -> str:
        """Send the job."""
        kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or k.startswith("SBATCH_")}
        # Inside another job SLURM_MEM_PER_CPU and the like would contradict the script; these are the user's own.
        with clean_env():
            os.environ.update(kept)
            try:
                return str(self.executor().submit(TrainingJob.of(self.run, self.cfg, self.cluster)).job_id)
            except (OSError, RuntimeError) as error:  # submitit's errors carry what sbatch said
                raise UserError(f"{self.run}: the job could not be submitted: {_last_line(str(error))}") from None


def extra_options(text: str | None) -> dict[str, Any]:
    """``--nice=5 --exclusive`` as submitit's dictionary of options.

    Raises:
        UserError: an option is not written in its long form, or has a key of its own.
    """
    options: dict[str, Any] = {}
    words = shlex.split(text or "")
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            if name in OWN:
                raise UserError(f"slurm_extra: --{name} {OWN[name]}")
            following = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("-") else True
            options[name] = value if sign else following
        elif word.startswith("-") or i == 0 or not (words[i - 1].startswith("--") and "=" not in words[i - 1]):
            raise UserError(f"slurm_extra: write options in their long form, as --name=value, not {word!r}")
    return options


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason given"
