"""What is out of date is decided by content: after a clone or a pull there are no records of Snakemake and no clocks."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dmd2.core.files import write_json
from dmd2.core.provenance import signed
from tests.workspace import Workspace


@pytest.fixture
def pulled(edited: Workspace) -> Workspace:
    """The finished workspace as a clone with restored results: files in any order of time, no .snakemake."""
    shutil.rmtree(edited.path / ".snakemake")
    files = [path for folder in ("data", "results", "workflow") for path in (edited.path / folder).rglob("*")]
    order = random.Random(0)
    for path in files:
        if path.is_file():
            moment = 1.7e9 + order.random() * 1e6
            os.utime(path, (moment, moment))
    return edited


def test_input_dated_in_the_future_costs_no_finished_training(edited: Workspace) -> None:
    train, real = "results/runs/digits/dmd2/seed0/train.json", edited.path / "data/real/digits/manifest.json"
    os.utime(real, (4e9, 4e9))
    (edited.path / train).unlink()
    result = edited.snakemake(train)
    assert result.returncode == 0, result.stderr
    assert (edited.path / train).exists()


def remake(manifest: Path) -> None:
    """As if the same settings had given other files."""
    entry = json.loads(manifest.read_text())
    record = entry.pop("made_from")
    entry["files"][0]["sha256"] = "0" * 64
    write_json(manifest, signed(entry, record))


def change_weight_of_dmd(workspace: Workspace) -> None:
    for table in ("demo", "digits-table3", "digits-ttur"):
        workspace.edit(f"workflow/tables/{table}.yaml", "regression.weight: 5.0", "regression.weight: 4.0")


def files_of(workspace: Workspace) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file but Snakemake's and Python's own."""
    found = [path for path in workspace.path.rglob("*") if path.is_file() and not path.is_symlink()]
    own = {".snakemake", "__pycache__"}
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in found if not own & set(p.parts)}


def test_nothing_is_to_do_after_a_pull_and_a_changed_value_runs_exactly_its_jobs(pulled: Workspace) -> None:
    """And a dry run writes nothing."""
    (pulled.path / "results/.changed").unlink(missing_ok=True)
    before = files_of(pulled)
    jobs, messages = pulled.plan("demo")
    assert jobs == {} and "provenance" not in messages
    change_weight_of_dmd(pulled)
    changed = {path: entry for path, entry in files_of(pulled).items() if before.get(path) != entry}
    assert {path.rpartition("/")[2] for path in changed} == {"demo.yaml", "digits-table3.yaml", "digits-ttur.yaml"}
    before = files_of(pulled)
    jobs, messages = pulled.plan("demo")
    assert jobs == {"demo": 1, "evaluate": 1, "page": 1, "index": 1, "table": 1, "train": 1}
    reason = "was made with other settings (regression.weight from 5.0 to 4.0)"
    assert f"out of date: results/runs/digits/dmd/seed0/train.json {reason}" in messages
    assert files_of(pulled) == before


def test_changed_value_trains_once_and_then_nothing_is_to_do(pulled: Workspace) -> None:
    change_weight_of_dmd(pulled)
    old = json.loads((pulled.path / "results/runs/digits/dmd/seed0/train.json").read_text())
    result = pulled.snakemake("demo")
    assert result.returncode == 0, result.stderr
    new = json.loads((pulled.path / "results/runs/digits/dmd/seed0/train.json").read_text())
    assert new["config"]["regression"]["weight"] == 4.0 and new["key"] != old["key"]
    assert pulled.planned("demo") == {}


def test_another_teacher_runs_what_was_made_from_the_old_one(pulled: Workspace) -> None:
    remake(pulled.path / "data/teachers/digits-edm/manifest.json")
    planned = pulled.planned("demo")
    assert {rule: planned[rule] for rule in ("pairs_shard", "train", "evaluate", "evaluate_teacher", "table")} == {
        "pairs_shard": 2, "train": 2, "evaluate": 2, "evaluate_teacher": 2, "table": 1,
    }  # fmt: skip
    assert "teacher" not in planned and "real_data" not in planned


def test_another_sampler_of_the_teacher_measures_nothing_else_again(pulled: Workspace) -> None:
    base = pulled.path / "workflow/base/digits.yaml"
    values = yaml.safe_load(base.read_text())
    values["eval"]["teacher_samplers"]["more"] = {"solver": "heun", "steps": 9}
    base.write_text(yaml.safe_dump(values))
    assert pulled.planned("demo") == {}
    values["eval"]["teacher_samplers"]["ode"]["steps"] += 1
    base.write_text(yaml.safe_dump(values))
    assert pulled.planned("demo") == {"demo": 1, "evaluate_teacher": 1, "page": 1, "index": 1, "table": 1}


def test_metrics_that_were_changed_by_hand_are_named(pulled: Workspace) -> None:
    metrics = pulled.path / "results/runs/digits/dmd/seed0/metrics.json"
    metrics.write_text(metrics.read_text().replace('"fd":', '"fd":  '))
    assert "results/tables/demo.json was made from another results/runs/digits/dmd/seed0/metrics.json" in (
        pulled.snakemake("-n", "demo").stderr
    )


@pytest.mark.parametrize("missing", ["data/pairs", "data/teachers", "results/runs/digits/dmd/seed0/snapshots-*"])
def test_what_was_not_pulled_is_not_made_again(pulled: Workspace, missing: str) -> None:
    for folder in pulled.path.glob(missing):
        shutil.rmtree(folder)
    assert pulled.planned("demo") == {}


def test_run_of_a_seed_that_no_table_has_is_finished_too(pulled: Workspace) -> None:
    runs = pulled.path / "results/runs/digits/dmd"
    shutil.copytree(runs / "seed0", runs / "seed7")
    assert pulled.planned("results/runs/digits/dmd/seed7/metrics.json") == {}


def test_retraining_that_was_killed_goes_on(pulled: Workspace) -> None:
    (manifest,) = (pulled.path / "data/pairs").glob("*/*/manifest.json")
    remake(manifest)  # Snakemake then deletes what the training will make, which is killed
    (pulled.path / "results/runs/digits/dmd/seed0/train.json").unlink()
    assert pulled.planned("demo") == {"demo": 1, "evaluate": 1, "page": 1, "index": 1, "table": 1, "train": 1}


def test_damaged_record_is_made_again(pulled: Workspace) -> None:
    Path(pulled.path / "results/runs/digits/dmd/seed0/metrics.json").write_text("{")
    assert pulled.planned("demo") == {"demo": 1, "evaluate": 1, "page": 1, "index": 1, "table": 1}


CHANGED = "dmd2/method/objectives/distribution_matching.py"
TOLD = f"results/runs/digits/dmd/seed0/train.json was trained by other code ({CHANGED} changed"


def test_flipped_sign_in_the_losses_is_told_and_retrained_when_asked_to(pulled: Workspace) -> None:
    run = pulled.path / "results/runs/digits/dmd/seed0"
    old = json.loads((run / "train.json").read_text())
    pulled.edit(CHANGED, '"""Direction ``g``', '"""Another text')
    assert "other code" not in pulled.snakemake("-n", "demo").stderr
    pulled.edit(CHANGED, "g = (fake - real) / normaliser", "g = (real - fake) / normaliser")
    jobs, messages = pulled.plan("demo")
    assert jobs == {} and f"note: {TOLD}" in messages
    jobs, messages = pulled.plan("demo", "--config", "changed_code=retrain")
    assert jobs["train"] == 2 and f"out of date: {TOLD}" in messages
    wrong = pulled.snakemake("-n", "demo", "--config", "changed_code=yes")
    assert wrong.returncode != 0 and "write warn or retrain" in wrong.stdout + wrong.stderr

    result = pulled.run("python", "-m", "dmd2", "run", "digits/dmd/seed0", "--again")
    assert result.returncode == 0, result.stderr
    new = json.loads((run / "train.json").read_text())
    assert new["key"] != old["key"] and new["files"] != old["files"] and "resumes" not in result.stderr
    assert all((run / entry["path"]).exists() for entry in old["files"])
    # The other run, of the old code, is told of; what was made from the new one is made again, and the table says both.
    assert pulled.planned("demo") == {"demo": 1, "page": 1, "index": 1, "table": 1}
    assert TOLD not in pulled.snakemake("demo").stderr
    table = (pulled.path / "results/tables/demo.md").read_text()
    assert f"not all of this was trained by the same code: {CHANGED} differ" in table

    result = pulled.snakemake("demo", "--config", "changed_code=retrain")
    assert result.returncode == 0, result.stderr
    assert "same code" not in (pulled.path / "results/tables/demo.md").read_text()
    assert pulled.planned("demo") == {}


def test_picture_added_to_a_source_remakes_its_set(edited: Workspace) -> None:
    def picture(number: int) -> None:
        path = edited.path / f"pictures/{number % 10}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path)

    for number in range(40):
        picture(number)
    base = (
        (edited.path / "workflow/base/digits.yaml")
        .read_text()
        .replace("kind: sklearn-digits", "kind: image-folder\n    path: pictures")
    )
    (edited.path / "workflow/base/pictures.yaml").write_text(base.replace("digits", "pictures"))
    table = (edited.path / "workflow/tables/demo.yaml").read_text().replace("base: digits", "base: pictures")
    (edited.path / "workflow/tables/pictures.yaml").write_text(table)
    made = "data/real/pictures/manifest.json"
    result = edited.snakemake(made, "data/teachers/pictures-edm/manifest.json")
    assert result.returncode == 0, result.stderr
    assert edited.planned(made, "pictures-teacher").get("real_data") is None

    (edited.path / "pictures/notes.txt").write_text("no picture")
    assert edited.planned(made) == {"real_data": 1}
    assert f"{made} was made from another listing of pictures" in edited.snakemake(made).stderr
    assert edited.planned(made, "data/teachers/pictures-edm/manifest.json") == {}  # its content is as it was

    picture(40)
    assert edited.planned("data/teachers/pictures-edm/manifest.json") == {"real_data": 1, "teacher": 1}
    edited.snakemake(made)
    assert json.loads((edited.path / made).read_text())["count"] == 41
    shutil.rmtree(edited.path / "pictures")
    assert edited.planned(made) == {}
