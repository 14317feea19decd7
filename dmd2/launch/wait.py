"""Wait for the Slurm job of a training, say how its state changes, and publish its result.

``dmd2.launch train`` replaces itself by this program once the job is submitted. Hundreds of them may wait on a login
node, so it imports little more than the standard library.
"""

import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError, readable_errors, show
from dmd2.core.files import write_json
from dmd2.core.provenance import signed
from dmd2.core.run import Goal, RunId
from dmd2.core.slurm_queue import STUCK, Entry, NoAnswer, Queue, is_live, job_name, sacct, slurm, state_of
from dmd2.launch.cost import training_cost

SETTLE = 5.0  # seconds for which a job must stay over; more seconds for these states:
GRACE = {
    **dict.fromkeys(("NODE_FAIL", "PREEMPTED", "BOOT_FAIL"), 60.0),  # Slurm may restart it
    "COMPLETING": STUCK,
    "COMPLETED": 60.0,  # its last file may need that long to appear over a network file system
}
RELEASES = 3  # of a job held after a failed launch


def wait(goal: Goal, job: str, poll_seconds: float) -> dict[str, Any]:
    """Wait for the record of the training. If another job of the run lives when this one ends, wait for that.

    Raises:
        UserError: the job ended and the training is not finished; the sentence has its state and the end of its log.
    """
    queue, watch, name = Queue(poll_seconds), Watch(goal.run, job), job_name(goal.run)
    while True:
        if record := goal.reached():
            return record
        with suppress(OSError):  # Slurm cannot start a job again whose log has no folder
            log_path(goal.run, job).parent.mkdir(exist_ok=True)
        snapshot = queue.look()
        if snapshot is None:
            watch.tell("is still waited for: Slurm's controller does not answer")
        elif watch.over(snapshot.jobs.get(watch.job), snapshot.time) and not goal.reached():
            others = [entry.job for entry in snapshot.jobs.values() if entry.name == name and entry.live]
            if not others:
                raise UserError(obituary(goal.run, watch.job))
            say(goal.run, f"job {watch.job} has ended, but job {others[0]} of this run lives: waiting for that one")
            watch = Watch(goal.run, others[0])
        time.sleep(min(poll_seconds, 5))


class Watch:
    """Follows one job through snapshots of the queue: says new states, releases it if held, tells when it is over."""

    def __init__(self, run: RunId, job: str) -> None:
        self.run, self.job = run, job
        self.said = ""
        self.hidden = False  # whether squeue does not show it although it lives
        self.ended_at: float | None = None  # when it was first seen to be over, by the clock of the snapshots
        self.releases = 0
        self.released_at = 0.0  # time of the snapshot that showed it held; each is looked at several times
        self.started = time.time()

    def over(self, entry: Entry | None, seen_at: float) -> bool:
        """Whether the job is over for good, given its entry in a snapshot of that time.

        Raises:
            UserError: Slurm holds it after one failed launch after another.
        """
        if seen_at < self.started:
            return False  # a snapshot from before the job was submitted
        if entry is None:
            if not self.hidden:
                self.tell("has left the queue")
        elif entry.nodes:
            self.tell(f"{entry.state} on {entry.nodes}")
        else:
            self.tell(entry.state + (f" ({entry.reason})" if entry.reason not in ("None", "") else ""))
        if entry is not None and entry.held_after_failed_launch and seen_at > self.released_at:
            self._release()
            self.released_at = seen_at
        if entry is not None and entry.live:
            self.ended_at, self.hidden = None, False
            return False
        self.ended_at = seen_at if self.ended_at is None else self.ended_at
        patience = SETTLE if entry is None else GRACE.get(entry.state, SETTLE)
        return seen_at - self.ended_at >= patience and (entry is not None or self._gone())

    def _gone(self) -> bool:
        """Whether a job that squeue does not show is gone by the controller's record of it and the accounting, too."""
        try:
            state = state_of(self.job)
        except NoAnswer:
            state = "UNKNOWN"
        if not is_live(state):
            return True
        self.ended_at, self.hidden = None, True
        self.tell(f"is not shown by squeue, but it is {state}; still waiting for it")
        return False

    def tell(self, text: str) -> None:
        """Say something about the job, unless it is what was said last."""
        if text != self.said:
            say(self.run, f"job {self.job} {text}")
        self.said = text

    def _release(self) -> None:
        """Let a job start that Slurm holds after a failed launch."""
        if self.releases == RELEASES:
            raise UserError(
                f"{self.run}: Slurm job {self.job} is held after {RELEASES + 1} failed launches: look at "
                f"`scontrol show job {self.job}`, then `scontrol release {self.job}` and run again"
            )
        with suppress(NoAnswer):  # the next snapshot shows it held still
            slurm("scontrol", "release", self.job)
            self.releases += 1
            say(self.run, f"job {self.job} was held after a failed launch and is released")


def obituary(run: RunId, job: str) -> str:
    """A sentence about a job that ended without a result, and the last 20 lines of its log."""
    try:
        *_, (state, code, nodes, elapsed) = sacct([job], "State,ExitCode,NodeList,Elapsed")
        fate = f"{state} with exit code {code} on {nodes} after {elapsed}"
    except (UserError, ValueError):
        fate = "ended without a result (sacct has no record of it)"
    path, tail = log_path(run, job), " was never written: the job did not start"
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        tail = " ends with:\n" + "\n".join(f"    {line}" for line in lines)
    return f"{run}: Slurm job {job} {fate}; the same command continues from the newest checkpoint. Log {path}{tail}"


def log_path(run: RunId, job: str) -> Path:
    """Where process 0 of the job writes its messages."""
    return run.folder / "jobs" / f"{job}_0_log.err"


def say(run: RunId, text: str) -> None:
    """One line about a run."""
    show(f"{time.strftime('%H:%M:%S')} {run}: {text}")


def publish(goal: Goal, record: dict[str, Any]) -> None:
    """Write train.json, with which the run is complete for the DAG: its record, its cost and its provenance."""
    cost, missing = training_cost(goal.run, record)
    if missing:
        say(goal.run, missing)
    write_json(goal.run.folder / "train.json", signed({**record, "cost": cost}, goal.made))


def main(name: str, job: str, key: str, made: str, poll_seconds: str) -> None:
    """Wait and publish; Ctrl-C leaves the job running."""
    run = RunId.parse(name)
    goal = Goal(run, key, json.loads(made))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with readable_errors():
        try:
            record = wait(goal, job, float(poll_seconds))
            try:
                publish(goal, record)
            except UserError as error:
                raise UserError(f"{run} is trained, but {error}") from None
        except KeyboardInterrupt:
            stop = f"`dmd2 cancel {run}` stops it"
            say(run, f"Slurm job {job} goes on without this launcher; the same command waits for it again, {stop}")
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
