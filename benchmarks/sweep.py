"""What a large sweep costs the login node: planning 1,000 runs, and 200 trainings that wait in a Slurm queue.

Needs root on Debian: a test Slurm (tests/slurm/cluster.sh) takes the jobs, in a partition that starts none of them.
``python -m benchmarks.sweep [WAITING]``
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import psutil
import typer
import yaml

from tests.slurm.workspace import CLUSTER_FILE, Slurm, SlurmWorkspace, until
from tests.workspace import copy_repository

RUNS = 1000
MINUTE = 60.0


def plan(workspace: SlurmWorkspace) -> tuple[float, float]:
    """Seconds and peak memory in MB of a dry run over the whole table."""
    started = time.perf_counter()
    command = ["snakemake", "--profile", "slurm", "-n", "-q", "all", "--", "sweep"]
    process = subprocess.Popen(command, cwd=workspace.path, env=workspace.slurm.client_env(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.02)
    assert process.wait() == 0
    return time.perf_counter() - started, peak / 1e6


def wait_in_queue(workspace: SlurmWorkspace, slurm: Slurm, count: int) -> None:
    """Start `count` trainings, and measure the launchers and the controller while they wait."""
    started = time.perf_counter()
    targets = [f"results/runs/digits/sweep/seed{seed}/train.json" for seed in range(count)]
    command = ["snakemake", "--profile", "slurm", "--", *targets]
    process = subprocess.Popen(command, cwd=workspace.path, env=workspace.slurm.client_env(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    queued = ["squeue", "-h", "-t", "PENDING", "-o", "%i"]
    until(lambda: len(slurm.call(*queued).splitlines()) >= count, "the jobs to be queued", 600)
    print(f"{count} jobs queued after {time.perf_counter() - started:.0f} s")
    time.sleep(10)
    slurm.call("sdiag", "-r")
    before = {p.pid: sum(p.cpu_times()[:2]) for p in psutil.Process(process.pid).children(recursive=True)}
    time.sleep(MINUTE)
    parent = psutil.Process(process.pid)
    launchers = [p for p in parent.children(recursive=True) if "dmd2.launch.wait" in p.cmdline()]
    memory = [p.memory_full_info() for p in launchers]
    busy = sum(sum(p.cpu_times()[:2]) - before.get(p.pid, 0) for p in launchers)
    print(f"snakemake: RSS {parent.memory_info().rss / 1e6:.0f} MB")
    rss, own = sum(m.rss for m in memory) / 1e6, sum(m.uss for m in memory) / len(memory) / 1e6
    print(f"{len(launchers)} launchers: RSS {rss:.0f} MB in all, {own:.1f} MB each not shared")
    print(f"launchers use {busy / MINUTE:.2f} CPU cores")
    asked = [line for line in slurm.call("sdiag").splitlines() if line.strip().startswith("REQUEST_JOB_INFO ")]
    print("controller, job-info requests in that minute:", asked[0].split("count:")[1].split()[0] if asked else 0)
    os.killpg(process.pid, signal.SIGINT)
    process.wait()


def main(waiting: Annotated[int, typer.Argument()] = 200) -> None:
    with TemporaryDirectory() as folder:
        slurm = Slurm(Path("/tmp") / f"slurm-test-{os.getpid()}")
        slurm.script("up")
        try:
            workspace = SlurmWorkspace(copy_repository(Path(folder) / "workspace").path, slurm)
            shutil.copy(CLUSTER_FILE, workspace.path / "workflow/cluster/slurm.yaml")
            table = {"title": "sweep", "base": "digits", "rows": [{"run": "sweep"}], "seeds": list(range(RUNS))}
            (workspace.path / "workflow/tables/sweep.yaml").write_text(yaml.safe_dump(table))
            for _ in range(3):
                print("planning {} runs: {:.1f} s, {:.0f} MB".format(RUNS, *plan(workspace)))
            made = workspace.snakemake("data/teachers/digits-edm/manifest.json", "data/real/digits/manifest.json")
            assert made.returncode == 0, made.stderr
            slurm.call("scontrol", "update", "partition=main", "state=down")
            (workspace.path / "workflow/cluster/slurm.yaml").write_text(
                CLUSTER_FILE.read_text().replace("poll_seconds: 1}", "poll_seconds: 15}")  # as shipped
            )
            wait_in_queue(workspace, slurm, waiting)
        finally:
            slurm.script("wipe")


if __name__ == "__main__":
    typer.run(main)
