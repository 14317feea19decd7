"""Wait for the Slurm job of a training, say what becomes of it, and publish its result.

Hundreds of these processes may wait on a login node, so this module needs little more than the standard library:
``dmd2.launch train`` replaces itself by it once the job is submitted.
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dmd2.cost import slurm_cost, wall_clock_cost
from dmd2.errors import UserError, readable_errors
from dmd2.files import read_json, write_json
from dmd2.made import signed
from dmd2.run import Goal, RunId
from dmd2.slurm_queue import Entry, Queue, slurm

SETTLE = 5.0  # seconds between the end of a job and the verdict on it; longer where more may come:
GRACE = {
    **dict.fromkeys(("NODE_FAIL", "PREEMPTED", "BOOT_FAIL"), 60.0),  # Slurm may restart it
    "COMPLETED": 60.0,  # its last file may need that long to appear over a network file system
}
RELEASES = 3  # of a job held after a failed launch


def wait(goal: Goal, job: str, poll_seconds: float) -> dict[str, Any]:
    """Return the finished training's record.

    Raises:
        UserError: the job ended without finishing; the sentence has Slurm's word for it and the end of the log.
    """
    queue, watch = Queue(poll_seconds), Watch(goal.run, job)
    while True:
        if record := goal.reached():
            return record
        snapshot = queue.look()
        if snapshot is None:
            watch.unanswered()
        elif watch.over(snapshot.jobs.get(job), snapshot.time) and not goal.reached():
            raise UserError(obituary(goal.run, job))
        time.sleep(min(poll_seconds, 5))


class Watch:
    """What one launcher has seen of its job: says what changes, releases it if held, decides when it is over."""

    def __init__(self, run: RunId, job: str) -> None:
        self.run, self.job = run, job
        self.shown = ""
        self.ended_at: float | None = None  # when it was first seen to be over, by the clock of the snapshots
        self.releases = 0
        self.released_at = 0.0  # time of the snapshot that showed it held; each is looked at several times
        self.started = time.time()

    def over(self, entry: Entry | None, seen_at: float) -> bool:
        """Whether the job is over for good, given its entry in a snapshot of that time."""
        if seen_at < self.started:
            return False  # a snapshot from before the job was submitted
        self.show(entry)
        if entry is not None and entry.held_after_failed_launch and seen_at > self.released_at:
            self.release()
            self.released_at = seen_at
        if entry is not None and not entry.ended:
            self.ended_at = None
            return False
        if self.ended_at is None:
            self.ended_at = seen_at
        return seen_at - self.ended_at >= (GRACE.get(entry.state, SETTLE) if entry else SETTLE)

    def show(self, entry: Entry | None) -> None:
        """Say a state that is new."""
        if entry is None:
            text = "has left the queue"
        else:
            where = f" on {entry.nodes}" if entry.nodes else ""
            why = f" ({entry.reason})" if entry.reason not in ("None", "") and not entry.nodes else ""
            text = f"{entry.state}{where}{why}"
        if text != self.shown:
            say(self.run, f"job {self.job} {text}")
        self.shown = text

    def release(self) -> None:
        """Let a job start that Slurm holds after a failed launch.

        Raises:
            UserError: it happened again and again.
        """
        if self.releases == RELEASES:
            raise UserError(
                f"{self.run}: Slurm job {self.job} is held after {RELEASES + 1} failed launches: look at "
                f"`scontrol show job {self.job}`, then `scontrol release {self.job}` and run again"
            )
        self.releases += 1
        say(self.run, f"job {self.job} was held after a failed launch; releasing it")
        slurm("scontrol", "release", self.job)

    def unanswered(self) -> None:
        """The controller does not answer: the job may well be running."""
        if self.shown != "?":
            say(self.run, f"Slurm's controller does not answer; still waiting for job {self.job}")
        self.shown = "?"


def obituary(run: RunId, job: str) -> str:
    """What is known about a job that ended without result."""
    try:
        fields = slurm("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode,NodeList,Elapsed").strip()
        state, code, nodes, elapsed = fields.splitlines()[-1].split("|")
        fate = f"{state} with exit code {code} on {nodes} after {elapsed}"
    except (UserError, ValueError, IndexError):
        fate = "ended without a result (sacct has no record of it)"
    tail = log_tail(log_path(run, job))
    again = "the same command continues from the newest checkpoint"
    return f"{run}: Slurm job {job} {fate}; {again}. Log {log_path(run, job)}{tail}"


def log_path(run: RunId, job: str) -> Path:
    """Where process 0 of the job writes its messages."""
    return run.folder / "jobs" / f"{job}_0_log.err"


def log_tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log, indented under a colon, or a note that there are none."""
    if not path.exists():
        return " was never written: the job did not start"
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return " ends with:\n" + "\n".join(f"    {line}" for line in text)


def say(run: RunId, text: str) -> None:
    """One line about a run on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {run}: {text}", file=sys.stderr, flush=True)


def publish(goal: Goal, record: dict[str, Any]) -> None:
    """Write train.json, the node of the DAG that says this run is complete, with what it cost and was made from."""
    run = goal.run
    submissions = run.folder / "job.json"
    jobs = read_json(submissions)["jobs"] if submissions.exists() else []
    cost = (slurm_cost(jobs) if jobs else None) or wall_clock_cost(record)
    write_json(run.folder / "train.json", signed({**record, "cost": cost}, goal.made))


def main(name: str, job: str, key: str, made: str, poll_seconds: str) -> None:
    """Wait and publish; Ctrl-C leaves the job running."""
    run = RunId.parse(name)
    goal = Goal(run, key, json.loads(made))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with readable_errors():
        try:
            publish(goal, wait(goal, job, float(poll_seconds)))
        except KeyboardInterrupt:
            say(run, f"Slurm job {job} goes on without this launcher; the same command waits for it again, "
                     f"`python -m dmd2.launch cancel {run}` stops it")  # fmt: skip
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
