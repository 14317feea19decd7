"""A test cluster, and a workspace whose trainings are sent to it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml

from dmd2.experiment.tables import load_experiment
from tests.workspace import Workspace

CLUSTER_SCRIPT = Path(__file__).with_name("cluster.sh")
CLUSTER_FILE = Path(__file__).with_name("cluster.yaml")


class Slurm:
    """The test cluster: its environment and its faults."""

    def __init__(self, root: Path) -> None:
        self.root = root
        port = 17000 + 500 * (os.getpid() % 30)  # another session's cluster may be up; stay below the ephemeral ports
        self.env = os.environ | {"SLURM_TEST_ROOT": str(root), "SLURM_TEST_PORT": str(port), "SLURM_TEST_NODES": "3"}

    def script(self, *args: str) -> str:
        """Run cluster.sh; its error output is part of the failure."""
        result = subprocess.run(
            ["bash", CLUSTER_SCRIPT, *args], env=self.env, capture_output=True, text=True, timeout=1500
        )
        assert result.returncode == 0, f"cluster.sh {' '.join(args)}: {result.stderr[-3000:]}"
        return result.stdout

    def client_env(self) -> dict[str, str]:
        """Environment in which Slurm's commands talk to this cluster."""
        path = [str(self.root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return os.environ | {"SLURM_CONF": str(self.root / "etc/slurm.conf"), "PATH": ":".join(path),
                             "OMP_NUM_THREADS": "1"}  # fmt: skip

    def call(self, *command: str) -> str:
        """Output of a Slurm command."""
        result = subprocess.run(command, env=self.client_env(), capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def sacct(self, job: str, field: str) -> list[str]:
        """A field of every start of a job, oldest first."""
        return self.call("sacct", "-X", "-n", "-P", "--duplicates", "-j", job, "-o", field).splitlines()

    def kill_node(self, node: str, job: str) -> None:
        """Kill a node's daemon and every process of the job on it, without a word to the controller."""
        self.script("kill-node", node)
        mine = processes(f"SLURM_CONF={self.root}/etc/slurm.conf")
        steps = [pid for pid in mine if command_of(pid).startswith(f"slurmstepd: [{job}.".encode())]
        for pid in [*steps, *processes(f"SLURM_JOB_ID={job}")]:  # the step daemons first: they would report the death
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class SlurmWorkspace(Workspace):
    """A workspace whose commands talk to the test cluster."""

    def __init__(self, path: Path, slurm: Slurm) -> None:
        super().__init__(path)
        self.slurm = slurm

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in its own process group, its output in one pipe."""
        return subprocess.Popen(command, cwd=self.path, env=self.slurm.client_env(), text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def train(self, run: str, cluster: str = "slurm", **changes: object) -> subprocess.Popen[str]:
        """Start the launcher of a run whose config is digits/dmd2's with `changes` in its section train."""
        command = [sys.executable, "-m", "dmd2.launch", "train", run, "--config", self.config(**changes)]
        return self.start(*command, "--cluster", cluster)

    def config(self, **changes: object) -> str:
        """digits/dmd2's training config as JSON."""
        experiment = load_experiment(self.path / "workflow/tables", self.path / "workflow/base")
        config = experiment.runs["digits", "dmd2"].training().model_dump(mode="json")
        config["train"] |= changes
        return json.dumps(config)

    def cluster_file(self, name: str, nodes: int = 1, processes: int = 1, **train: object) -> str:
        """A copy of the cluster file with another layout and other resources of `train`; returns its name."""
        values = yaml.safe_load(CLUSTER_FILE.read_text())
        values["jobs"]["train"] |= train
        values["training"] |= {"nodes": nodes, "processes": processes}
        (self.path / f"workflow/cluster/{name}.yaml").write_text(yaml.safe_dump(values))
        return name

    def checkpoint(self, run: str) -> int:
        """Step of a run's newest checkpoint, 0 without one."""
        found = (self.path / "results/runs" / run).glob("checkpoints-*/*.json")
        return max((int(path.stem) for path in found), default=0)

    def steps_done(self, run: str) -> int:
        """Last logged step of a run, 0 without one."""
        log = self.path / "results/runs" / run / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def training_pid(self, job: str) -> int:
        """Process in which a job of one task trains."""
        return next(pid for pid in processes(f"SLURM_JOB_ID={job}") if b"dmd2.launch.job" in command_of(pid)
                    and b"python" in command_of(pid).split(b"\0")[0])  # fmt: skip

    def jobs(self, run: str) -> list[str]:
        """Ids of all Slurm jobs submitted for a run."""
        path = self.path / "results/runs" / run / "job.json"
        return json.loads(path.read_text())["jobs"] if path.exists() else []

    def weights(self, run: str) -> str:
        """Checksum of the final snapshot."""
        return json.loads((self.path / "results/runs" / run / "train.json").read_text())["files"][-1]["sha256"]

    def log(self, run: str) -> str:
        """Messages of all jobs of a run."""
        return "".join(path.read_text() for path in sorted((self.path / "results/runs" / run / "jobs").glob("*.err")))


def processes(variable: str) -> list[int]:
    """Ids of the processes that have ``NAME=value`` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def command_of(pid: int) -> bytes:
    """Command line of a process, words ended by NUL."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Wait for something, or fail saying what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def ended(process: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str]:
    """Exit status and output of a launcher."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"did not end within {seconds} s:\n{output[-3000:]}") from None
    return process.returncode, output
