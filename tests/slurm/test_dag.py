"""The headline command on a real Slurm: the whole DAG, and what happens when Snakemake itself is stopped."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm.faults import STEPS, STRIKE
from tests.slurm.workspace import Slurm, SlurmWorkspace, ended, until

SNAKEMAKE = [sys.executable, str(Path(__file__).with_name("snakemake_now.py")), "--profile", "slurm"]
FAST = ["--slurm-init-seconds-before-status-checks", "1"]
COPIES = ["one", "two", "three"]


def test_pairs_training_and_evaluation_run_as_slurm_jobs_up_to_the_report(
    workspace: SlurmWorkspace, slurm: Slurm
) -> None:
    for made in ("data/pairs", "results/runs/digits/dmd", "results/runs/digits/dmd2", "results/tables"):
        shutil.rmtree(workspace.path / made)
    (workspace.path / "results/report.html").unlink()
    code, output = ended(workspace.start(*SNAKEMAKE, *FAST, "demo"), 900)
    assert code == 0, output[-5000:]
    assert (workspace.path / "results/report.html").exists()
    jobs = slurm.call("sacct", "-X", "-n", "-P", "-a", "-o", "JobName,Comment,State").splitlines()
    for rule, count in {"pairs_shard": 2, "evaluate": 2}.items():
        found = [job for job in jobs if re.search(rf"\|rule_{rule}_", job)]
        assert len(found) == count and all(job.endswith("COMPLETED") for job in found), jobs
    trained = [job for job in jobs if re.match(r"digits\.dmd2?\.seed0\.", job)]
    assert len(trained) == 2 and all(job.endswith("COMPLETED") for job in trained), jobs
    cost = json.loads((workspace.path / "results/runs/digits/dmd2/seed0/train.json").read_text())["cost"]
    assert cost["source"] == "sacct" and cost["gpu_hours"] > 0


def test_the_readmes_launcher_commands_answer(workspace: SlurmWorkspace) -> None:
    readme = (workspace.path / "README.md").read_text()
    expected = {
        "status": "digits/dmd2/seed0",
        "print": "#SBATCH --requeue",
        "logs": "20/20",
        "cancel": "is not running",
    }
    for verb, words in expected.items():
        command = re.search(rf"^python -m (dmd2\.launch {verb} .*)$", readme, re.M)[1].split()
        code, output = ended(workspace.start(sys.executable, "-m", *command))
        assert words in output and "Traceback" not in output and code == (verb == "cancel"), output


@pytest.fixture
def copies(workspace: SlurmWorkspace) -> SlurmWorkspace:
    """Three rows under other names, all with the config of the undisturbed run."""
    base = workspace.path / "workflow/base/digits.yaml"
    text = base.read_text()
    values = yaml.safe_load(text)
    values["train"] |= STEPS
    base.write_text(yaml.safe_dump(values))
    table = {"title": "copies", "base": "digits", "rows": [{"run": name} for name in COPIES]}
    (workspace.path / "workflow/tables/copies.yaml").write_text(yaml.safe_dump(table))
    yield workspace
    base.write_text(text)
    (workspace.path / "workflow/tables/copies.yaml").unlink()


def test_a_stopped_snakemake_finds_its_three_trainings_again(copies: SlurmWorkspace, slurm: Slurm, calm: str) -> None:
    runs = [f"digits/{name}/seed0" for name in COPIES]
    command = [
        *SNAKEMAKE,
        *FAST,
        "--rerun-triggers",
        "input",
        "--",
        *(f"results/runs/{run}/train.json" for run in runs),
    ]

    first = copies.start(*command)
    until(lambda: all(copies.checkpoint(run) for run in runs), "three trainings")
    jobs = {run: copies.jobs(run) for run in runs}
    os.killpg(first.pid, signal.SIGINT)
    code, output = ended(first)
    assert code != 0 and "goes on without this launcher" in output, output

    second = copies.start(*command)
    until(lambda: all(copies.checkpoint(run) >= STRIKE for run in runs), "progress without a launcher")
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    slurm.script("restart-controller")

    unlock = copies.start(*SNAKEMAKE, "--unlock")
    assert ended(unlock)[0] == 0
    code, output = ended(copies.start(*command), 600)
    assert code == 0, output[-5000:]
    assert {run: copies.jobs(run) for run in runs} == jobs, "another job was submitted"
    assert {copies.weights(run) for run in runs} == {calm}


def test_two_launchers_at_once_share_one_job(workspace: SlurmWorkspace, calm: str) -> None:
    launchers = [workspace.train("digits/twice/seed0", **STEPS) for _ in range(2)]
    outputs = [ended(launcher) for launcher in launchers]
    assert [code for code, _ in outputs] == [0, 0], outputs
    text = "".join(output for _, output in outputs)
    assert text.count("submitted Slurm job") == 1 and text.count("attached to Slurm job") == 1
    assert len(workspace.jobs("digits/twice/seed0")) == 1 and workspace.weights("digits/twice/seed0") == calm


def test_a_finished_run_submits_no_job(workspace: SlurmWorkspace, calm: str) -> None:
    code, output = ended(workspace.train("digits/calm/seed0", **STEPS))
    assert code == 0 and "submitted" not in output and workspace.jobs("digits/calm/seed0") == []
