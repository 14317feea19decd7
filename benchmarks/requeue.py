"""Work done twice and time until a training goes on, per fault of a real Slurm; seconds since the fault or its warning.

Needs root on Debian. The test cluster's time-outs are short (a dead node is noticed after 10 s, a requeued job waits
8 s; Slurm ships 300 s and 120 s), so a real cluster adds Slurm's own waiting. Start-up of the job is in all figures.
``python -m benchmarks.requeue [REPEATS]``
"""

import os
import shutil
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from tests.slurm.faults import STEPS, checkpoint_signal, killed_node, preemption, requeue
from tests.slurm.workspace import CLUSTER_FILE, Slurm, SlurmWorkspace
from tests.workspace import copy_repository

FAULTS = (checkpoint_signal, preemption, requeue, killed_node)


def main(repeats: Annotated[int, typer.Argument()] = 3) -> None:
    with TemporaryDirectory() as folder:
        slurm = Slurm(Path("/tmp") / f"slurm-test-{os.getpid()}")
        slurm.script("up")
        try:
            made = copy_repository(Path(folder) / "made")
            result = made.snakemake("data/teachers/digits-edm/manifest.json", "data/real/digits/manifest.json")
            assert result.returncode == 0, result.stderr
            shutil.copy(CLUSTER_FILE, made.path / "workflow/cluster/slurm.yaml")
            print(f"checkpoint every {STEPS['checkpoint_every']} steps, log every {STEPS['log_every']}")
            print(f"{'fault':<20}{'steps lost':>24}{'median':>8}{'seconds to go on':>26}{'median':>8}")
            for fault in FAULTS:
                outcomes = []
                for i in range(repeats):
                    workspace = SlurmWorkspace(Path(folder) / f"{fault.__name__}-{i}", slurm)
                    shutil.copytree(made.path, workspace.path, symlinks=True)
                    outcomes.append(fault(workspace))
                lost, seconds = [o.lost_steps for o in outcomes], [round(o.seconds, 1) for o in outcomes]
                print(f"{fault.__name__:<20}{lost!s:>24}{statistics.median(lost):>8.0f}{seconds!s:>26}"
                      f"{statistics.median(seconds):>8.1f}")  # fmt: skip
        finally:
            slurm.script("wipe")


if __name__ == "__main__":
    typer.run(main)
