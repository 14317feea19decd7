"""The demo at reduced length on the device, through Snakemake to table and report, and `eval score` of image files."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tests.workspace import ROWS, Workspace, copy_repository


@pytest.fixture(scope="module")
def demo(real_device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose demo ran on the device, with deterministic kernels."""
    workspace = copy_repository(tmp_path_factory.mktemp("demo"))
    file = workspace.path / "workflow/cluster/local.yaml"
    cluster = yaml.safe_load(file.read_text())
    for resources in cluster["jobs"].values():
        resources["device"] = real_device.type
    cluster["training"] = {**(cluster.get("training") or {}), "deterministic": True}
    file.write_text(yaml.safe_dump(cluster))
    result = workspace.snakemake("demo")
    assert result.returncode == 0, result.stderr[-5000:]
    return workspace


def test_the_demo_ends_with_table_and_report(demo: Workspace, real_device: torch.device) -> None:
    table = pd.read_csv(demo.path / "results/tables/demo.csv")
    assert set(table[table.metric == "fd"]["run"]) == {*ROWS, "teacher-ode", "teacher-sde"}
    assert (demo.path / "results/report/demo.html").stat().st_size > 10_000
    records = [json.loads(path.read_text()) for path in demo.path.glob("results/runs/digits/*/seed0/train.json")]
    assert len(records) == len(ROWS)
    for record in records:
        assert (record["device"] == "cpu") == (real_device.type == "cpu") and record["deterministic"]


def test_nothing_is_left_to_do(demo: Workspace) -> None:
    assert demo.planned("demo") == {}


def test_a_stopped_training_ends_with_the_same_weights(demo: Workspace) -> None:
    """The record and the last checkpoint of a run are taken away: what goes on from the one before is bit-equal."""
    run = demo.path / "results/runs/digits/dmd2/seed0"
    before = json.loads((run / "train.json").read_text())
    for path in [*run.glob("checkpoints-*/*0000020*"), run / "train.json", run / "finished.json"]:
        path.unlink()
    assert list(run.glob("checkpoints-*/*0000015*"))
    result = demo.snakemake("results/runs/digits/dmd2/seed0/train.json")
    assert result.returncode == 0, result.stderr[-5000:]
    after = json.loads((run / "train.json").read_text())
    assert "resumes at step 15" in (demo.path / "logs/train/digits/dmd2/seed0.log").read_text()
    assert after["files"][-1]["sha256"] == before["files"][-1]["sha256"]


def test_image_files_are_scored(demo: Workspace, real_device: torch.device) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(demo.path / f"{name}.npy", rng.integers(0, 256, (80, 32, 32, 3), dtype=np.uint8))
    found = {}
    for device in {real_device.type, "cpu"}:
        command = [sys.executable, "-m", "eval", "score", "a.npy", "b.npy", "--detector", "lite0-320@32"]
        result = demo.run(*command, "--metrics", "fd,kid", "--device", device, "--json", f"{device}.json")
        assert result.returncode == 0, result.stderr[-5000:]
        rows = json.loads((demo.path / f"{device}.json").read_text())["rows"]
        found[device] = {row["metric"]: row["value"] for row in rows}
        for cached in demo.path.glob("data/features/*"):
            shutil.rmtree(cached) if cached.is_dir() else cached.unlink()
    assert found["cpu"].keys() == {"FD (lite0-320@32)", "KID"}
    assert found[real_device.type] == pytest.approx(found["cpu"], rel=1e-3, abs=1e-6)
