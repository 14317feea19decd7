"""Trainings of several processes on one and on two nodes of a real Slurm."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.faults import STEPS, Fault
from tests.slurm.workspace import SlurmWorkspace, ended


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
