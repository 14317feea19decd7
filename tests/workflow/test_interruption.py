"""What survives: kills, Ctrl-C, damaged files. Each on a real training of the finished workspace."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workspace import Workspace

RUN = Path("results/runs/digits/dmd2/seed0")


def _lengthen(workspace: Workspace, steps: int) -> None:
    workspace.edit("workflow/base/digits.yaml", "steps: 20", f"steps: {steps}")


def test_killed_training_ends_with_the_weights_of_an_undisturbed_one(edited: Workspace) -> None:
    _lengthen(edited, 120)
    result = edited.run("python", "-m", "tests.workflow.kill_loop", "digits/dmd2", "5")
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["same_weights"] and report["same_log"], report
    assert any(lines > 0 for _, lines in report["kills_and_log_lines"]), "every kill came before the first log line"


def test_ctrl_c_saves_a_checkpoint_and_exits_130(edited: Workspace) -> None:
    _lengthen(edited, 5000)
    command = [sys.executable, "-m", "dmd2.launch", "train", "digits/dmd2/seed7"]
    process = subprocess.Popen(command, cwd=edited.path, stderr=subprocess.PIPE, text=True)
    folder = edited.path / "results/runs/digits/dmd2/seed7"
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints-*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in stderr and "Traceback" not in stderr


def test_changed_snapshot_is_named_and_not_evaluated(edited: Workspace) -> None:
    snapshot = next((edited.path / RUN).glob("snapshots-*/0000020.safetensors"))
    raw = bytearray(snapshot.read_bytes())
    raw[-1] ^= 1
    snapshot.write_bytes(raw)
    (edited.path / RUN / "metrics.json").unlink()
    result = edited.snakemake(str(RUN / "metrics.json"))
    assert result.returncode != 0
    assert "0000020.safetensors does not match the checksum" in result.stdout + result.stderr


def test_truncated_pairs_shard_is_named(edited: Workspace) -> None:
    shard = next((edited.path / "data/pairs").glob("*/*/shard-00001.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    result = edited.run("python", "-m", "dmd2.launch", "train", "digits/dmd/seed5")
    assert result.returncode == 1
    assert "shard-00001.safetensors has" in result.stderr and "truncated" in result.stderr
    assert "Traceback" not in result.stderr


def test_diverged_training_stops_with_the_step_and_keeps_its_checkpoint(edited: Workspace) -> None:
    edited.edit("workflow/base/digits.yaml", "lr: 0.0002", "lr: 1.0e+30")
    result = edited.run("python", "-m", "dmd2.launch", "train", "digits/dmd2/seed6")
    assert result.returncode == 1
    assert " at step " in result.stderr and "is kept" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system of its own needs root")
def test_full_disk_keeps_the_last_checkpoint_and_the_rerun_continues(edited: Workspace) -> None:
    folder = edited.path / "results/runs/digits/dmd2/seed4"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        command = ["python", "-m", "dmd2.launch", "train", "digits/dmd2/seed4"]
        full = edited.run(*command)
        assert full.returncode == 1
        assert "the disk is full" in full.stderr and "run the same command again" in full.stderr
        assert "Traceback" not in full.stderr
        assert list(folder.glob("checkpoints-*/*.json")), "the checkpoint before the full disk is gone"
        subprocess.run(["mount", "-o", "remount,size=90m", folder], check=True)
        again = edited.run(*command)
        assert again.returncode == 0, again.stderr
        assert (folder / "train.json").exists()
    finally:
        subprocess.run(["umount", folder], check=True)
