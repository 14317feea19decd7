"""The user's Slurm jobs as squeue shows them, asked for once for all waiting launchers of a workspace."""

import subprocess
import time
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from dmd2.errors import UserError
from dmd2.files import read_json, write_json
from dmd2.run import RUNS

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "NODE_FAIL", "PREEMPTED",
         "BOOT_FAIL", "REVOKED"}  # fmt: skip

NO_SLURM = (
    "there is no Slurm on this machine (sbatch is not on PATH): run this on the cluster's login node, or use "
    "--profile local"
)


def slurm(*command: str, timeout: float = 60) -> str:
    """Output of a Slurm command.

    Raises:
        UserError: it failed, does not exist or did not answer.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise UserError(NO_SLURM) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm did not answer `{' '.join(command)}` within {timeout:.0f} s") from None
    if result.returncode:
        reason = (result.stderr or result.stdout).strip().splitlines()
        raise UserError(f"Slurm refused `{' '.join(command)}`: {reason[-1] if reason else 'no reason given'}")
    return result.stdout


@dataclass(frozen=True)
class Entry:
    """One job: state as squeue prints it, Slurm's reason, the nodes it has."""

    job: str
    name: str
    state: str
    reason: str
    nodes: str

    @property
    def ended(self) -> bool:
        """Whether the job is over; a NODE_FAIL or PREEMPTED one may still be requeued."""
        return self.state in ENDED

    @property
    def held_after_failed_launch(self) -> bool:
        """Slurm holds a job for ever after a launch that failed (a restart while the old step was still dying)."""
        return self.state in ("PENDING", "SPECIAL_EXIT") and "launch failed" in self.reason


def squeue(*options: str) -> dict[str, Entry]:
    """The user's jobs by id, those that ended a moment ago included."""
    text = slurm("squeue", "--me", "--noheader", "--states=all", "--format=%i|%j|%T|%r|%N", *options)
    entries = [Entry(*line.split("|", 4)) for line in text.splitlines() if line.count("|") >= 4]
    return {entry.job: entry for entry in entries}


@dataclass(frozen=True)
class Snapshot:
    """All of the user's jobs at a moment (seconds since the epoch)."""

    time: float
    jobs: dict[str, Entry]


class Queue:
    """Snapshots at most `interval` seconds old, shared through a file: 500 launchers ask the controller once."""

    def __init__(self, interval: float, folder: Path = RUNS) -> None:
        self.interval, self.path = interval, folder / ".queue.json"

    def look(self) -> Snapshot | None:
        """The newest snapshot, before the first an empty one of time 0; None while the controller does not answer."""
        known = self._read()
        if known and 0 <= time.time() - known.time < self.interval:
            return known
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                return known or Snapshot(0.0, {})  # another launcher is asking
            asked = time.time()
            try:
                jobs = squeue()
            except UserError:
                return None
            write_json(self.path, {"time": asked, "jobs": [asdict(entry) for entry in jobs.values()]})
            return Snapshot(asked, jobs)

    def _read(self) -> Snapshot | None:
        try:
            value = read_json(self.path)
            return Snapshot(value["time"], {entry["job"]: Entry(**entry) for entry in value["jobs"]})
        except (UserError, KeyError, TypeError):
            return None
