"""A real Slurm: the headline command, trainings of several processes, and faults that end with the same weights.

One file, so that one worker runs all of it: two clusters at once on two cores miss each other's deadlines, and nodes go
down that no test has killed.
"""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.slurm.faults import FAULTS, STEPS, STRIKE, Fault, Outcome
from tests.slurm.workspace import Slurm, SlurmWorkspace, ended, until

NEW_JOB = ("cancelled", "full_disk")  # the only faults after which another job is submitted


@pytest.fixture(scope="module")
def outcomes(calm: str, workspace: SlurmWorkspace) -> Iterator[dict[str, Future[Outcome]]]:
    """All faults, three at a time: most of each is waiting for Slurm."""
    with ThreadPoolExecutor(3) as pool:
        yield {fault.__name__: pool.submit(fault, workspace) for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_weights_are_those_of_an_undisturbed_run(
    fault: Callable[..., Outcome], outcomes: dict[str, Future[Outcome]], calm: str
) -> None:
    outcome = outcomes[fault.__name__].result()
    assert outcome.weights == calm
    assert len(outcome.jobs) == (2 if fault.__name__ in NEW_JOB else 1)
    assert outcome.lost_steps <= 2 * STEPS["checkpoint_every"]  # the newest checkpoint may still be being written


def test_a_signalled_job_loses_nothing(outcomes: dict[str, Future[Outcome]]) -> None:
    assert outcomes["checkpoint_signal"].result().lost_steps == 0


def test_the_error_of_a_cancelled_job_says_so_and_how_to_go_on(outcomes: dict[str, Future[Outcome]]) -> None:
    output = outcomes["cancelled"].result().output
    assert "CANCELLED" in output and "the same command continues" in output and "_0_log.err" in output


SNAKEMAKE = [sys.executable, str(Path(__file__).with_name("snakemake_now.py")), "--profile", "slurm"]
FAST = ["--slurm-init-seconds-before-status-checks", "1"]
COPIES = ["one", "two", "three"]


def test_pairs_training_and_evaluation_run_as_slurm_jobs_up_to_the_report(
    workspace: SlurmWorkspace, slurm: Slurm
) -> None:
    for made in ("data/pairs", "results/runs/digits/dmd", "results/runs/digits/dmd2", "results/tables"):
        shutil.rmtree(workspace.path / made)
    (workspace.path / "results/report/index.html").unlink()
    code, output = ended(workspace.start(*SNAKEMAKE, *FAST, "demo"), 900)
    assert code == 0, output[-5000:]
    assert (workspace.path / "results/report/index.html").exists()
    jobs = slurm.call("sacct", "-X", "-n", "-P", "-a", "-S", "now-1days", "-o", "JobName,Comment,State").splitlines()
    for rule, count in {"pairs_shard": 2, "evaluate": 2}.items():
        found = [job for job in jobs if re.search(rf"\|rule_{rule}_", job)]
        assert len(found) == count and all(job.endswith("COMPLETED") for job in found), jobs
    trained = [job for job in jobs if re.match(r"digits\.dmd2?\.seed0\.", job)]
    assert len(trained) == 2 and all(job.endswith("COMPLETED") for job in trained), jobs
    cost = json.loads((workspace.path / "results/runs/digits/dmd2/seed0/train.json").read_text())["cost"]
    assert cost["source"] == "sacct" and cost["gpu_hours"] > 0


def test_commands_that_look_after_runs_answer(workspace: SlurmWorkspace) -> None:
    expected = {
        "status": "digits/dmd2/seed0",
        "print": "#SBATCH --requeue",
        "logs": "20/20",
        "cancel": "is not running",
    }
    for verb, words in expected.items():
        code, output = ended(workspace.start(sys.executable, "-m", "dmd2", verb, "digits/dmd2/seed0"))
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


@pytest.fixture(scope="module")
def two_tasks(workspace: SlurmWorkspace) -> str:
    """A run of two processes on one node that nothing disturbs."""
    cluster = workspace.cluster_file("one-by-two", processes=2)
    code, output = ended(workspace.train("digits/one-by-two/seed0", cluster, **STEPS))
    assert code == 0, output
    return "digits/one-by-two/seed0"


def test_two_processes_end_with_the_weights_of_one_to_rounding(
    workspace: SlurmWorkspace, two_tasks: str, calm: str
) -> None:
    early = {"steps": 10, "checkpoint_every": 10, "snapshot_every": 10, "log_every": 10}
    snapshots = []
    for name, cluster in {"ten-one": "local", "ten-two": "one-by-two"}.items():
        code, output = ended(workspace.train(f"digits/{name}/seed0", cluster, **early))
        assert code == 0, output
        folder = workspace.path / f"results/runs/digits/{name}/seed0"
        record = json.loads((folder / "train.json").read_text())
        snapshots.append(load_file(folder / record["files"][-1]["path"]))
        assert record["processes"] == len(snapshots)
    for name, weights in snapshots[0].items():
        torch.testing.assert_close(snapshots[1][name], weights, rtol=1e-4, atol=1e-5)


def test_two_nodes_signalled_on_the_way_end_with_the_weights_of_one_node(
    workspace: SlurmWorkspace, two_tasks: str
) -> None:
    fault = Fault(workspace, "two-by-one", workspace.cluster_file("two-by-one", nodes=2))
    assert workspace.slurm.call("squeue", "-h", "-j", fault.job, "-o", "%D") == "2"
    workspace.slurm.call("scancel", "--signal=USR2", fault.job)
    outcome = fault.finish()
    assert len(outcome.jobs) == 1 and outcome.lost_steps == 0
    assert outcome.weights == workspace.weights(two_tasks)
