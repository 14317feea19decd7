"""Pruning frees what finished trainings no longer need, and nothing else: nothing is to be made again."""

import fcntl
import json
from pathlib import Path

import pytest

from dmd2.core.files import write_json
from dmd2.publish.prune import Prunable, prunable
from tests.workspace import Workspace

RUN = Path("results/runs/digits/dmd2/seed0")


@pytest.fixture
def inside(edited: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The workspace as the current folder."""
    monkeypatch.chdir(edited.path)
    (RUN / "snapshots-00000000").mkdir()
    (RUN / "snapshots-00000000/0000010.safetensors").write_bytes(b"x" * 1000)
    return edited


def found(folder: Path = RUN) -> Prunable | None:
    return next((each for each in prunable(dry_run=True) if each.folder == folder), None)


def test_prune_frees_checkpoints_and_nothing_is_to_do(inside: Workspace) -> None:
    before = {path for path in Path().rglob("*") if path.is_file() and ".snakemake" not in path.parts}
    dry = inside.run("python", "-m", "dmd2.publish.prune", "--dry-run")
    assert dry.returncode == 0 and "would delete" in dry.stdout and all(path.exists() for path in before)
    result = inside.snakemake("prune")
    assert result.returncode == 0, result.stderr
    gone = {path for path in before if not path.exists() and path.parts[0] != ".pytest_cache"}
    assert {path.parent.name.partition("-")[0] for path in gone} == {"checkpoints", "snapshots"}
    assert {path.parent.name for path in gone if "snapshots" in str(path)} == {"snapshots-00000000"}
    assert not list(Path().glob("results/runs/*/*/*/checkpoints-*"))
    assert "made longer now starts anew" in result.stdout and " MB were freed" in result.stdout
    assert inside.planned("demo") == {}
    assert inside.run("python", "-m", "dmd2.publish.prune").stdout == "0.0 MB were freed.\n"


def test_teachers_checkpoints_are_freed_once_it_is_made(inside: Workspace) -> None:
    folder = Path("data/teachers/digits-edm")
    (folder / "checkpoints-00000000").mkdir()
    assert found(folder).folders == [folder / "checkpoints-00000000"]
    (folder / "manifest.json").unlink()
    assert found(folder) is None


def test_run_that_is_trained_or_not_finished_is_kept(inside: Workspace) -> None:
    assert len(found().folders) == 2
    with open(RUN / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert found().kept == "a process trains it"
        assert RUN not in {each.folder for each in prunable() if each.folders}
    (RUN / "train.json").unlink()
    assert found().kept == "it is not finished" and not found().folders


def test_run_whose_row_changed_is_kept(inside: Workspace) -> None:
    inside.edit("workflow/base/digits.yaml", "steps: 20", "steps: 40")
    assert found().kept == "it is to be trained with other settings, and may continue from there"


def test_run_of_which_another_training_was_sent_to_slurm_is_kept(inside: Workspace) -> None:
    config = json.loads((RUN / "train.json").read_text())["made_from"]["config"]
    write_json(RUN / "job.json", {"name": "x", "config": config, "jobs": ["1"]})
    assert found().folders
    write_json(RUN / "job.json", {"name": "x", "config": "00000000", "jobs": ["1", "2"]})
    assert found().kept == "a Slurm job was sent for another training of it"


def test_run_that_others_start_from_is_kept(inside: Workspace) -> None:
    rows = "[{run: dmd2}, {run: second, change: {train.init_from: dmd2}}]"
    Path("workflow/tables/second.yaml").write_text(f"title: x\nbase: digits\nrows: {rows}\n")
    assert found().kept.startswith("other runs start from it")


def test_run_that_no_table_has_any_more_is_freed(inside: Workspace) -> None:
    for table in Path("workflow/tables").glob("digits-*.yaml"):
        table.unlink()
    inside.edit("workflow/tables/demo.yaml", "reference_row: dmd2", "reference_row: dmd")
    text = Path("workflow/tables/demo.yaml").read_text()
    Path("workflow/tables/demo.yaml").write_text(text.replace("run: dmd2\n", "run: other\n"))
    assert found().folders
