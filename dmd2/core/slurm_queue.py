"""Slurm's commands, and the user's jobs in its queue, which all waiting launchers of a workspace look up together."""

import re
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.files import digest_of, read_json, write_json
from dmd2.core.run import RUNS, RunId

NO_SLURM = (
    "there is no Slurm on this machine (sbatch is not on PATH): run this on the cluster's login node, or use "
    "--profile local"
)
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL",
    "REVOKED",
}  # fmt: skip
STUCK = 300.0  # seconds after which Slurm does not get rid of a COMPLETING job any more
# Parts of what Slurm's commands say when the controller is away or too busy, which passes.
SILENT = (
    "unable to contact", "unable to establish", "connection failure", "connection refused", "timed out", "zero bytes",
    "in standby", "temporarily unavailable", "communication",
)  # fmt: skip


class NoAnswer(UserError):
    """Slurm did not answer. It may still have done what it was asked to do."""


def job_name(run: RunId) -> str:
    """Name of a run's jobs. It is unique for run and workspace, so that a copy of the workspace has other jobs."""
    return f"{run.base}.{run.name}.seed{run.seed}.{digest_of(str(run.folder.resolve()))}"


def submissions(run: RunId) -> dict[str, Any]:
    """The jobs that were submitted for a run, by its job.json: their name and ids, and the digest of their config.

    Name and config are None where no job was submitted.

    Raises:
        UserError: the file is damaged.
    """
    path = run.folder / "job.json"
    if not path.exists():
        return {"name": None, "config": None, "jobs": []}
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("jobs"), list) or "config" not in value:
        raise UserError(f"{path} is damaged: delete it and run again; a job that lives is found by its name")
    return {"name": None, **value}


def slurm(*command: str, timeout: float = 60, inherited: tuple[int, ...] = ()) -> str:
    """Output of a Slurm command; `inherited` are file descriptors that it keeps open.

    Raises:
        NoAnswer: it took too long, or could not reach the controller.
        UserError: it failed or does not exist.
    """
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, pass_fds=inherited
        )
    except FileNotFoundError:
        raise UserError(NO_SLURM) from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"Slurm did not answer `{' '.join(command)}` within {timeout:.0f} s") from None
    if result.returncode:
        reason = (result.stderr or result.stdout).strip().splitlines() or ["no reason given"]
        kind = NoAnswer if any(word in reason[-1].lower() for word in SILENT) else UserError
        raise kind(f"Slurm refused `{' '.join(command)}`: {reason[-1]}")
    return result.stdout


@dataclass(frozen=True)
class Entry:
    """One job as squeue prints it: id, name, state, reason of the state, nodes."""

    job: str
    name: str
    state: str
    reason: str
    nodes: str

    @property
    def ended(self) -> bool:
        """Whether the job is over; Slurm may still requeue one that is NODE_FAIL or PREEMPTED."""
        return self.state in ENDED

    @property
    def live(self) -> bool:
        """Whether the job waits or runs. Of a COMPLETING job Slurm only clears away the remains."""
        return is_live(self.state)

    @property
    def held_after_failed_launch(self) -> bool:
        """Whether Slurm holds the job for ever after a failed launch (a restart while the old step was still dying)."""
        return self.state in ("PENDING", "SPECIAL_EXIT") and "launch failed" in self.reason


def is_live(state: str) -> bool:
    """Whether a job in this state waits or runs."""
    return bool(state) and state not in ENDED and state != "COMPLETING"


def state_of(job: str) -> str:
    """State of a job by the controller's record of it, or else by the accounting; empty if it is unknown.

    It is asked for jobs that squeue does not show, since an empty answer of squeue is not always the truth.

    Raises:
        NoAnswer: the controller does not answer.
    """
    try:
        if found := re.search(r"\bJobState=(\w+)", slurm("scontrol", "show", "job", "--oneliner", job)):
            return found[1]
    except NoAnswer:
        raise
    except UserError as error:
        if "Invalid job id" in str(error):
            return ""  # the controller has forgotten it; the accounting may have lost its end
    with suppress(UserError):
        if known := sacct([job], "State"):
            return known[-1][0].split()[0]  # of "CANCELLED by 1000"
    return ""


def sacct(jobs: list[str], fields: str, *options: str, timeout: float = 60) -> list[list[str]]:
    """Fields of each start of jobs in Slurm's accounting.

    Raises:
        UserError: see `slurm`.
    """
    text = slurm("sacct", "-X", "-n", "-P", *options, "-j", ",".join(jobs), "-o", fields, timeout=timeout)
    return [line.split("|") for line in text.splitlines() if line]


def squeue(*options: str) -> dict[str, Entry]:
    """The user's jobs by id, with those that ended a moment ago."""
    text = slurm("squeue", "--me", "--noheader", "--states=all", "--format=%i|%j|%T|%r|%N", *options)
    entries = [Entry(*line.split("|", 4)) for line in text.splitlines() if line.count("|") >= 4]
    return {entry.job: entry for entry in entries}


@dataclass(frozen=True)
class Snapshot:
    """All of the user's jobs at a time (seconds since the epoch)."""

    time: float
    jobs: dict[str, Entry]


class Queue:
    """Snapshots that are at most `interval` seconds old. A file shares them: 500 launchers ask the controller once."""

    def __init__(self, interval: float, folder: Path = RUNS) -> None:
        self.interval, self.path = interval, folder / ".queue.json"
        self.own: Snapshot | None = None  # used where the file cannot be written

    def look(self) -> Snapshot | None:
        """The newest snapshot; one of time 0 before there is any, and None while the controller does not answer."""
        known = self.own or self._read()
        if known and 0 <= time.time() - known.time < self.interval:
            return known
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
                try:
                    flock(lock, LOCK_EX | LOCK_NB)
                except BlockingIOError:
                    return known or Snapshot(0.0, {})  # another launcher is asking
                return self._ask()
        return self._ask()

    def _ask(self) -> Snapshot | None:
        asked = time.time()
        try:
            jobs = squeue()
        except UserError:
            return None
        try:
            write_json(self.path, {"time": asked, "jobs": [asdict(entry) for entry in jobs.values()]})
            self.own = None
        except UserError:  # a full disk or a read-only one stops no launcher from waiting
            self.own = Snapshot(asked, jobs)
        return Snapshot(asked, jobs)

    def _read(self) -> Snapshot | None:
        try:
            value = read_json(self.path)
            return Snapshot(value["time"], {entry["job"]: Entry(**entry) for entry in value["jobs"]})
        except (UserError, OSError, KeyError, TypeError):
            return None
