"""What goes wrong on a cluster, done to a running training. Each function returns once its run has finished.

All runs have the same config and seed, so that all must end with the weights of the undisturbed one. They are used by
test_faults.py and by benchmarks/requeue.py.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.slurm.workspace import SlurmWorkspace, ended, until

STEPS = {"steps": 400, "checkpoint_every": 40, "snapshot_every": 400, "log_every": 5}
STRIKE = 80  # the step whose checkpoint must exist before the fault comes


@dataclass
class Outcome:
    """What a fault did: final weights, jobs used, starts of the last one, steps done again, seconds until it went on."""

    weights: str
    jobs: list[str]
    lost_steps: int
    seconds: float
    output: str


class Fault:
    """One run that is disturbed once."""

    def __init__(self, workspace: SlurmWorkspace, name: str, cluster: str = "slurm") -> None:
        self.workspace, self.run, self.cluster = workspace, f"digits/{name}/seed0", cluster
        self.launcher = workspace.train(self.run, cluster, **STEPS)
        until(
            lambda: workspace.checkpoint(self.run) >= STRIKE or self.launcher.poll() is not None,
            f"a checkpoint of {name}",
        )
        assert self.launcher.poll() is None, ended(self.launcher)
        self.job = workspace.jobs(self.run)[-1]
        self.struck_at, self.step = time.monotonic(), workspace.steps_done(self.run)

    def resumed(self) -> tuple[int, float]:
        """Wait for the run to go on; steps that are done again, and seconds since the fault."""
        until(lambda: "resumes at step" in self.workspace.log(self.run), f"{self.run} to resume")
        step = int(self.workspace.log(self.run).split("resumes at step ")[-1].split()[0])
        until(lambda: self.workspace.steps_done(self.run) > step, f"{self.run} to go on")
        return max(0, self.step - step), time.monotonic() - self.struck_at

    def finish(self, launcher: "subprocess.Popen[str] | None" = None) -> Outcome:
        """Wait for the end."""
        lost, seconds = self.resumed()
        code, output = ended(launcher or self.launcher)
        assert code == 0, output + self.workspace.log(self.run)
        return Outcome(self.workspace.weights(self.run), self.workspace.jobs(self.run), lost, seconds, output)

    def again(self) -> "subprocess.Popen[str]":
        """The same command once more."""
        self.struck_at = time.monotonic()
        return self.workspace.train(self.run, self.cluster, **STEPS)


def checkpoint_signal(workspace: SlurmWorkspace) -> Outcome:
    """The warning that precedes a time limit, sent by hand."""
    fault = Fault(workspace, "signal")
    workspace.slurm.call("scancel", "--signal=USR2", fault.job)
    return fault.finish()


def preemption(workspace: SlurmWorkspace) -> Outcome:
    """A job of a higher partition takes the node."""
    cluster = workspace.cluster_file("low", slurm_partition="preempt", slurm_extra="--nodelist=127.0.0.2")
    fault = Fault(workspace, "preempted", cluster)
    urgent = [
        "sbatch",
        "--parsable",
        "-p",
        "main",
        "--nodelist=127.0.0.2",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap=sleep 3",
    ]
    workspace.slurm.call(*urgent)
    return fault.finish()


def time_limit(workspace: SlurmWorkspace) -> Outcome:
    """A real limit; the job is paused meanwhile, so that it lasts that long without using the CPU."""
    cluster = workspace.cluster_file("short", runtime=3)
    fault = Fault(workspace, "limit", cluster)
    os.kill(workspace.training_pid(fault.job), signal.SIGSTOP)
    until(lambda: "Caught signal SIGUSR2" in workspace.log(fault.run), "Slurm's warning")  # which also wakes the job
    fault.struck_at = time.monotonic()
    return fault.finish()


def requeue(workspace: SlurmWorkspace) -> Outcome:
    """An administrator's `scontrol requeue`: SIGTERM, and soon SIGKILL."""
    fault = Fault(workspace, "requeued")
    workspace.slurm.call("scontrol", "requeue", fault.job)
    return fault.finish()


def killed_node(workspace: SlurmWorkspace) -> Outcome:
    """A node dies with everything on it, and comes back once Slurm has noticed."""
    cluster = workspace.cluster_file("third", slurm_extra="--nodelist=127.0.0.3")
    fault = Fault(workspace, "node", cluster)
    workspace.slurm.kill_node("127.0.0.3", fault.job)
    until(lambda: "down" in workspace.slurm.call("sinfo", "-h", "-n", "127.0.0.3", "-o", "%T"), "the node to be down")
    workspace.slurm.script("start-node", "127.0.0.3")
    return fault.finish()


def cancelled(workspace: SlurmWorkspace) -> Outcome:
    """`cancel` by hand: the launcher says so, the next one continues in a new job."""
    fault = Fault(workspace, "cancelled")
    cancel = workspace.start(sys.executable, "-m", "dmd2", "cancel", fault.run)
    assert ended(cancel)[0] == 0
    code, output = ended(fault.launcher)
    assert code == 1 and "CANCELLED" in output and "Traceback" not in output, output
    outcome = fault.finish(fault.again())
    outcome.output = output
    return outcome


def interrupted_launcher(workspace: SlurmWorkspace) -> Outcome:
    """Ctrl-C: the job goes on, the same command attaches to it."""
    fault = Fault(workspace, "ctrl-c")
    os.kill(fault.launcher.pid, signal.SIGINT)
    code, output = ended(fault.launcher)
    assert code == 130 and "goes on without this launcher" in output, output
    code, output = ended(fault.again())
    assert code == 0 and f"attached to Slurm job {fault.job}" in output, output
    return Outcome(workspace.weights(fault.run), workspace.jobs(fault.run), 0, 0.0, output)


def restarted_controller(workspace: SlurmWorkspace) -> Outcome:
    """slurmctld stops and starts again while the launcher waits."""
    fault = Fault(workspace, "controller")
    workspace.slurm.script("restart-controller")
    code, output = ended(fault.launcher)
    assert code == 0, output
    return Outcome(workspace.weights(fault.run), workspace.jobs(fault.run), 0, 0.0, output)


def full_disk(workspace: SlurmWorkspace) -> Outcome:
    """The disk is full at a save: one sentence, nothing lost, the rerun continues."""
    folder = workspace.path / "results/runs/digits/full/seed0"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    try:
        fault = Fault(workspace, "full")
        used = os.statvfs(folder)
        kilobytes = (used.f_blocks - used.f_bfree) * used.f_frsize // 1024
        subprocess.run(["mount", "-o", f"remount,size={kilobytes + 100}k", folder], check=True)
        code, output = ended(fault.launcher)
        assert code == 1 and "the disk is full" in output and "Traceback" not in output, output
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        outcome = fault.finish(fault.again())
        outcome.output = output
        return outcome
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


FAULTS = (time_limit, killed_node, preemption, checkpoint_signal, requeue, cancelled, full_disk, interrupted_launcher,
          restarted_controller)  # fmt: skip
