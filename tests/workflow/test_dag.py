"""The real DAG on shrunk digits: what runs, and what an edit makes run again."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.workspace import ROWS, Workspace


def test_demo_ends_with_table_and_report(finished: Workspace) -> None:
    table = pd.read_csv(finished.path / "results/tables/demo.csv")
    assert {"run", "seed", "metric", "value", "paper", "student_updates", "seconds"} <= set(table.columns)
    fd = table[table.metric == "fd"].set_index("run")
    assert set(fd.index) == {*ROWS, "teacher-ode", "teacher-sde"}
    assert fd.loc["dmd2", "paper"] == 1.51 and fd.loc["dmd2", "student_updates"] == 4
    assert fd.loc["dmd", "student_updates"] == 20
    markdown = (finished.path / "results/tables/demo.md").read_text()
    assert "this table has one" in markdown and "| `dmd2` | ✓ | ✓ | ✓ | ✓ |" in markdown
    assert (finished.path / "results/report/demo.html").stat().st_size > 10_000
    assert '<a href="demo.html">' in (finished.path / "results/report/index.html").read_text()


def test_pairs_come_in_shards_that_cover_every_seed_once(finished: Workspace) -> None:
    manifest = next((finished.path / "data/pairs").glob("*/*/manifest.json"))
    shards = [json.loads(path.read_text()) for path in sorted(manifest.parent.glob("shard-*.json"))]
    assert json.loads(manifest.read_text())["count"] == 40
    assert shards[0]["seeds"][1] + 1 == shards[1]["seeds"][0]


def test_no_training_begins_before_all_that_trainings_wait_for_is_made(finished: Workspace) -> None:
    pairs = next((finished.path / "data/pairs").glob("*/*/manifest.json")).stat().st_mtime_ns
    logs = [path.stat().st_mtime_ns for path in (finished.path / "results/runs/digits").glob("*/seed0/finished.json")]
    assert len(logs) == len(ROWS) and pairs < min(logs)


def test_whatever_a_training_reads_is_made_before_trainings() -> None:
    rules = [rule for path in (ROOT / "workflow/rules").glob("*.smk") for rule in path.read_text().split("\nrule ")[1:]]
    made = re.compile(r'output:\n\s+"data/(real|teachers|pairs|pipelines|prompts|weights/\{network\})/')
    read = {rule.partition(":")[0]: "priority: BEFORE_TRAINING" in rule for rule in rules if made.search(rule)}
    assert len(read) == 9 and all(read.values()), read


def test_second_run_has_nothing_to_do(finished: Workspace) -> None:
    assert finished.planned("demo") == {}


def test_what_dvc_records_after_the_demo_is_all_made(edited: Workspace) -> None:
    assert edited.planned("digits-data", "digits-teacher", "digits-runs") == {}
    (edited.path / "results/tables/digits-ttur.json").write_text("{}")
    assert "digits-ttur made here, but not named in `tables` of dvc.yaml" in edited.plan("digits-runs")[1]
    (edited.path / "dvc.yaml").unlink()
    assert edited.planned("digits-runs")["train"] > 10


def test_snakemakes_own_report_has_pages_curves_and_samples_with_captions(finished: Workspace) -> None:
    result = finished.snakemake("demo", "--report", "snakemake.html")
    assert result.returncode == 0, result.stderr
    text = (finished.path / "snakemake.html").read_text()
    for name in ("demo.html", "demo.curves.svg", "demo.training.svg", "grid.png"):
        assert f"Adding {name}" in result.stderr
    assert "The table demo: numbers, verdicts on claims" in text and "Samples of digits: the same noise" in text


def test_edits_of_comments_code_and_hardware_restart_nothing(edited: Workspace) -> None:
    edited.edit("workflow/cluster/local.yaml", "  train:     {threads: 1, device: cpu}", "  train:     {threads: 1}")
    edited.edit("workflow/tables/demo.yaml", "# a comment", "# another comment")
    edited.edit("dmd2/method/step.py", '"""One iteration', '"""An iteration')
    edited.edit("workflow/base/digits.yaml", "data:", "# why\ndata:")
    assert edited.planned("demo") == {}


def test_edited_paper_number_remakes_the_table_and_the_report_only(edited: Workspace) -> None:
    edited.edit("workflow/tables/demo.yaml", "fid: 1.51", "fid: 1.52")
    assert edited.planned("demo") == {"demo": 1, "page": 1, "index": 1, "table": 1}


def test_added_row_schedules_its_training_evaluation_table_and_report(edited: Workspace) -> None:
    edited.edit("workflow/tables/demo.yaml", "rows:\n", "rows:\n- run: ratio-20\n  change: {critic.ratio: 20}\n")
    assert edited.planned("demo") == {"demo": 1, "evaluate": 1, "page": 1, "index": 1, "table": 1, "train": 1}


def test_passes_are_compiled_once_before_the_trainings_of_a_base(edited: Workspace) -> None:
    edited.edit("workflow/cluster/local.yaml", "jobs:", "training: {compiled: blocks}\njobs:")
    assert edited.planned("demo") == {}
    trained = [f"results/runs/digits/{row}/seed0/train.json" for row in ROWS]
    for record in trained:
        (edited.path / record).unlink()
    assert edited.planned(*trained) == {"compiled": 1, "train": len(ROWS)}
    code = edited.path / f"data/compiled/digits-blocks-0-torch{version('torch')}.json"
    code.parent.mkdir()
    code.write_text("{}")
    os.utime(code, (0, 0))
    assert edited.planned(*trained) == {"train": len(ROWS)}
    edited.edit("workflow/cluster/local.yaml", "{compiled: blocks}", "{micro_batch: 8}")  # no compiler is needed here
    log = (edited.path / "results/runs/digits/dmd2/seed0/log.jsonl").read_text()
    made = edited.run("python", "-m", "dmd2.launch", "warm", "digits/dmd2/seed0", "compiled.json")
    assert made.returncode == 0, made.stderr
    told = json.loads((edited.path / "compiled.json").read_text())
    assert told["run"] == "digits/dmd2/seed0" and told["seconds"] > 0
    assert (edited.path / "results/runs/digits/dmd2/seed0/log.jsonl").read_text() == log


def test_changed_row_retrains_that_row_only(edited: Workspace) -> None:
    for table in ("demo", "digits-table3", "digits-ttur"):  # the same run must be the same in every table
        edited.edit(f"workflow/tables/{table}.yaml", "regression.weight: 5.0", "regression.weight: 4.0")
    assert edited.planned("demo") == {"demo": 1, "evaluate": 1, "page": 1, "index": 1, "table": 1, "train": 1}


def test_changed_evaluation_retrains_nothing(edited: Workspace) -> None:
    edited.edit("workflow/base/digits.yaml", "images: 60", "images: 61")
    planned = edited.planned("demo")
    assert "train" not in planned and planned["evaluate"] == len(ROWS)


def test_a_reference_of_a_strict_process_serves_evaluations_of_one_that_allows_tf32(
    edited: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (edited.path / "sitecustomize.py").write_text(
        "import sys\nif any(part == 'eval.runs' for part in sys.orig_argv):\n    import torch\n"
        "    torch.set_float32_matmul_precision('high')\n    torch.backends.cudnn.allow_tf32 = True\n"
    )
    metrics = edited.path / "results/runs/digits/dmd2/seed0/metrics.json"
    before = json.loads(metrics.read_text())["snapshots"]
    table = edited.path / "results/tables/demo.md"
    metrics.unlink()
    table.unlink()
    monkeypatch.setenv("PYTHONPATH", str(edited.path))
    result = edited.snakemake("demo")
    assert result.returncode == 0, result.stderr
    assert json.loads(metrics.read_text())["snapshots"] == before
    assert table.exists()


def test_longer_training_continues_from_the_old_checkpoint(edited: Workspace) -> None:
    edited.edit("workflow/base/digits.yaml", "steps: 20", "steps: 25")
    result = edited.snakemake("results/runs/digits/dmd2/seed0/train.json")
    assert result.returncode == 0, result.stderr
    lines = (edited.path / "results/runs/digits/dmd2/seed0/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20, 25]
    old = json.loads(lines[3])
    before = (edited.path / "results/runs/digits/dmd2/seed0/train.json").read_text()
    assert old["seconds"] < json.loads(before)["seconds"] + 1


def test_bad_table_stops_before_any_job_with_one_sentence(edited: Workspace) -> None:
    edited.edit("workflow/tables/demo.yaml", "regression.weight: 5.0", "regression.wieght: 5.0")
    result = edited.snakemake("-n", "demo")
    output = result.stderr + result.stdout
    assert result.returncode != 0
    assert "demo.yaml:" in output and "did you mean regression.weight?" in output
    assert "Traceback" not in output


def test_paper_tables_plan_completely(finished: Workspace) -> None:
    planned = finished.planned("dmd2-table3")
    assert planned["train"] == planned["evaluate"] == 18 and planned["pairs_shard"] == 25
    assert finished.planned("dmd2-table4")["train"] == 4


MISSING = {
    "data/teachers/edm-imagenet64/manifest.json": "put a diffusers UNet",
    "data/real/imagenet64/manifest.json": "put safetensors shards",
    "data/weights/inception-2015-12-05/manifest.json": "copy it from elsewhere to data/weights/inception",
}


def test_what_the_user_must_bring_is_said_in_a_sentence(finished: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no internet, wherever this runs
    result = finished.snakemake(*MISSING)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert not any((finished.path / target).exists() for target in MISSING)
    for sentence in MISSING.values():
        assert sentence in result.stderr + result.stdout
    assert "put safetensors shards" in (finished.path / "logs/real_data/imagenet64.log").read_text()


def test_without_slurm_the_profile_says_so_in_one_sentence(edited: Workspace, tmp_path: Path) -> None:
    for tool in Path("/usr/bin").iterdir():  # a PATH on which all is as here, except that there is no Slurm
        if not tool.name.startswith("s") or tool.name in ("sh", "sed", "sort"):
            (tmp_path / tool.name).symlink_to(tool)
    environment = {"PATH": f"{Path(sys.executable).parent}:{tmp_path}", "HOME": os.environ.get("HOME", "/")}
    command = ["snakemake", "--profile", "slurm", "--forceall", "demo"]
    result = subprocess.run(command, cwd=edited.path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "there is no Slurm on this machine" in result.stderr + result.stdout and "Traceback" not in result.stderr


def test_evaluation_in_two_jobs_gives_the_numbers_of_one(edited: Workspace) -> None:
    metrics = "results/runs/digits/dmd2/seed0/metrics.json"
    edited.edit("workflow/base/digits.yaml", "images: 60", "images: 1200")
    assert edited.planned(metrics) == {"evaluate": 1}
    assert edited.snakemake(metrics).returncode == 0
    alone = json.loads((edited.path / metrics).read_text())
    edited.edit("workflow/base/digits.yaml", "images: 1200", "images: 1200\n  shards: 2")
    assert edited.planned(metrics) == {"evaluate": 1, "evaluate_part": 2}
    result = edited.snakemake(metrics)
    assert result.returncode == 0, result.stderr
    assert json.loads((edited.path / metrics).read_text())["snapshots"] == alone["snapshots"]
    assert not list((edited.path / metrics).parent.glob("features*"))
