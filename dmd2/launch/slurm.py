"""A training as a Slurm job: submit it, or attach to the live one.

A launcher may be killed, doubled or started again at any time: Slurm runs the job, and the job writes its folder.
Checkpoints and finished.json decide what is done; job.json only helps to find the job.
"""

import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from typing import Any, TextIO

from submitit import SlurmExecutor
from submitit.helpers import clean_env

from dmd2.core.errors import UserError
from dmd2.core.files import write_json, write_text, writing
from dmd2.core.interrupts import is_being_trained
from dmd2.core.retraining import When, is_due, make_anew
from dmd2.core.run import Goal, RunId
from dmd2.core.slurm_queue import NO_SLURM, STUCK, NoAnswer, is_live, job_name, slurm, squeue, state_of, submissions
from dmd2.experiment.cluster import Cluster, import_environment
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import goal_of
from dmd2.launch.job import TrainingJob
from dmd2.launch.wait import SETTLE, log_path, say

PATIENCE = 120.0  # seconds that sbatch may take
SBATCH = {  # options of sbatch by key of jobs.train
    "slurm_partition": "partition", "slurm_account": "account", "qos": "qos", "constraint": "constraint",
    "gpu": "gpus-per-node", "gres": "gres", "cpus_per_gpu": "cpus-per-gpu", "mem_mb": "mem",
    "mem_mb_per_cpu": "mem-per-cpu",
}  # fmt: skip
GIVEN_BY = {  # options of sbatch that slurm_extra may not have, and why
    "time": "is the key runtime", "nodes": "is training.nodes", "ntasks-per-node": "is training.processes",
    "cpus-per-task": "is the key threads", "signal": "is training.signal_seconds",
    **dict.fromkeys(("job-name", "output", "error", "open-mode"), "is needed to find the job again"),
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
    def name(self) -> str:
        """Job name, by which a job whose id was lost is found."""
        return job_name(self.run)

    def script(self) -> str:
        """The batch script that would be sent, written by submitit. It has all that the job needs.

        Raises:
            UserError: there is no Slurm here, or slurm_extra cannot be read.
        """
        if None in (shutil.which("sbatch"), shutil.which("srun")):
            raise UserError(NO_SLURM)
        wanted, training, python = self.cluster.jobs.train, self.cluster.training, self.cluster.python
        given = {SBATCH[key]: value for key, value in wanted.snakemake().items() if key in SBATCH}
        options = {name: f"{value}M" if name.startswith("mem") else value for name, value in given.items()}
        cpus = None if wanted.cpus_per_gpu else wanted.threads  # Slurm refuses both
        executor = SlurmExecutor(self.run.folder / "jobs", python=python)
        executor.update_parameters(
            job_name=self.name,
            time=wanted.runtime,
            nodes=training.nodes,
            ntasks_per_node=self.cluster.processes,
            cpus_per_task=cpus,
            signal_delay_s=training.signal_seconds,
            setup=[*self.cluster.setup, *(f"export {k}={shlex.quote(v)}" for k, v in import_environment().items())],
            # srun does not take over sbatch's CPUs per task since Slurm 22.05: a task would get one CPU.
            srun_args=["--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])],
            additional_parameters=options | {"requeue": True} | extra_options(wanted.slurm_extra),
        )
        job = TrainingJob(self.run, self.cfg, self.cluster.hardware)
        command = f"{python} -u -m dmd2.launch.job {shlex.quote(job.text())}"
        return executor._make_submission_file_text(command, "")

    def submit_or_attach(self) -> str | None:
        """Id of the live job of this run, submitted now if there was none; None if the training is finished.

        A controller that does not answer is waited for.

        Raises:
            UserError: a live job trains another config of this run, or this one while it is to be trained anew, Slurm
                refuses, or the folder cannot be written.
        """
        anew = is_due(self.goal, self.again)
        if not anew and submissions(self.run)["config"] in (None, self.goal.config) and self.goal.reached():
            return None  # whatever Slurm may still have to clear away
        silent = False
        with self._submission_lock() as lock:
            while True:
                try:
                    if live := self._attached(after_silence=silent, anew=anew):
                        return live
                    if anew:
                        make_anew(self.goal)
                        self._record([])  # the train.json of the old training says what that cost
                        anew = False
                    return None if self.goal.reached() else self._submitted(lock)
                except NoAnswer as error:
                    if not silent:
                        say(self.run, f"{error}; waiting until it does")
                    silent = True
                    time.sleep(max(SETTLE, self.cluster.training.poll_seconds))

    @contextmanager
    def _submission_lock(self) -> Iterator[TextIO]:
        """The lock of who submits this run. A sbatch whose launcher was killed holds it until Slurm has its job."""
        path = self.run.folder / ".submit.lock"
        with writing(path):
            self.run.folder.mkdir(parents=True, exist_ok=True)
            lock = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below
        with lock:
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                say(self.run, "another launcher, or a sbatch that it left, is submitting this run: waiting for it")
                flock(lock, LOCK_EX)  # two launchers at once: the second finds the first one's job
            yield lock

    def _record(self, jobs: list[str]) -> None:
        write_json(self.run.folder / "job.json", {"name": self.name, "config": self.goal.config, "jobs": jobs})

    def _attached(self, after_silence: bool, anew: bool) -> str | None:
        """Id of the live job of this run, which job.json then names."""
        known = submissions(self.run)
        if not (live := self._live_job(known)) and after_silence:
            time.sleep(SETTLE)  # a sbatch that got no answer may still be carried out
            live = self._live_job(known)
        if not live:
            return None
        stop = f"wait for it, or stop it by `dmd2 cancel {self.run}`"
        if known["config"] not in (None, self.goal.config):
            raise UserError(f"{self.run}: Slurm job {live} trains an older config of this run: {stop}, and run again")
        if anew and self.again == "always":
            raise UserError(f"{self.run}: Slurm job {live} trains this run: {stop}, before you train it again")
        if live not in known["jobs"]:  # killed between sbatch and the record
            self._record([*known["jobs"], live])
        say(self.run, f"attached to Slurm job {live}")
        return live

    def _live_job(self, known: dict[str, Any]) -> str | None:
        """Id of this run's job that is waiting or running; the first that runs if there are several.

        One that is just ending is waited for, but not longer than it may take once its processes are gone.

        Raises:
            UserError: it does not end.
        """
        until: float | None = None
        while True:
            named = [entry for entry in squeue("--name", self.name).values() if entry.name == self.name]
            entries = [entry for entry in named if not entry.ended]
            if live := [entry for entry in entries if entry.live]:
                return min(live, key=lambda entry: (entry.state != "RUNNING", int(entry.job))).job
            if not entries:  # squeue may not show a job of this workspace that lives
                jobs = known["jobs"] if known["name"] == self.name else []
                return jobs[-1] if jobs and is_live(state_of(jobs[-1])) else None
            job, nodes = entries[-1].job, entries[-1].nodes
            if until is None:
                until = time.monotonic() + STUCK
                say(self.run, f"job {job} is COMPLETING on {nodes}; waiting until it is cleared away")
            if time.monotonic() >= until:
                if is_being_trained(self.run.folder):
                    raise UserError(
                        f"{self.run}: Slurm job {job} has been COMPLETING for {STUCK / 60:.0f} min and still holds the "
                        f"run: let an administrator look at {nodes}, and run again"
                    )
                say(self.run, f"job {job} is COMPLETING still, but its training has ended: going on without it")
                return None
            time.sleep(1)

    def _submitted(self, lock: TextIO) -> str:
        """Id of the job that is submitted now, which job.json then names."""
        known = submissions(self.run)
        jobs = known["jobs"] if known["config"] == self.goal.config else []
        self._record(jobs)
        job = self._sent(lock)
        try:
            self._record([*jobs, job])
        except UserError as error:
            left = "was submitted and is left to run, and the same command will find it"
            raise UserError(f"{self.run}: Slurm job {job} {left}; but {error}") from None
        say(self.run, f"submitted Slurm job {job}; log: {log_path(self.run, job)}")
        return job

    def _sent(self, lock: TextIO) -> str:
        """Id that sbatch gave. It inherits the lock: if this process is killed, the next launcher waits for its end."""
        kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or k.startswith("SBATCH_")}
        path = self.run.folder / "jobs/submission.sh"
        write_text(path, self.script())
        # Inside another job SLURM_MEM_PER_CPU and the like would contradict the script; these are the user's own.
        with clean_env():
            os.environ.update(kept)
            try:
                said = slurm("sbatch", str(path.absolute()), timeout=PATIENCE, inherited=(lock.fileno(),))
            except NoAnswer:
                raise
            except UserError as error:
                raise UserError(f"{self.run}: the job could not be submitted: {error}") from None
        if not (job := re.search(r"job (\d+)", said)):
            raise UserError(f"{self.run}: sbatch printed no job id but {said.strip()!r}; run again, to find the job")
        return job[1]


def extra_options(text: str | None) -> dict[str, Any]:
    """``--nice=5 --exclusive`` as submitit's dictionary of options.

    Raises:
        UserError: an option is not written in its long form, or has a key of its own.
    """
    options: dict[str, Any] = {}
    words = shlex.split(text or "")
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"slurm_extra: write options in their long form, as --name=value, not {word!r}")
        name, sign, value = word[2:].partition("=")
        if name in GIVEN_BY:
            raise UserError(f"slurm_extra: --{name} {GIVEN_BY[name]}")
        if not sign and words and not words[0].startswith("-"):
            options[name] = words.pop(0)
        else:
            options[name] = value if sign else True
    return options
