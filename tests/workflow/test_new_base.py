"""Grey images without labels, from the folder to the table, in a few steps."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.workspace import copy_repository


def test_unlabelled_grey_images_come_to_a_table(tmp_path: Path) -> None:
    workspace, images = copy_repository(tmp_path / "workspace"), tmp_path / "images"
    images.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 20, 24), np.uint8)):
        Image.fromarray(pixels).save(images / f"{number}.png")
    written = workspace.run("python", "-m", "dmd2", "new-base", "grey", str(images))
    assert written.returncode == 0, written.stderr
    assert "12 grey images without labels, 20 pixels at the shorter side" in written.stdout
    planned = workspace.planned("grey-gpu-data", "grey-gpu-teacher")  # no table is on that base
    assert planned.items() >= {"real_data": 1, "teacher": 1, "reference": 1}.items() and "train" not in planned

    base, table = (workspace.path / "workflow" / name for name in ("base/grey.yaml", "tables/grey-table3.yaml"))
    values = yaml.safe_load(base.read_text())
    values["teacher"]["train"] |= {"steps": 3, "batch": 4}
    values["train"] |= {"steps": 3, "snapshot_every": 3, "checkpoint_every": 3, "log_every": 1}
    values["optim"] |= {"batch": 4}
    values["eval"] |= {"images": 12, "batch": 12, "teacher_samplers": {"ode": {"solver": "heun", "steps": 2}}}
    base.write_text(yaml.safe_dump(values))
    rows = {"rows": [{"run": "dmd2"}], "row_change": {}, "teachers": {}, "claims": []}
    table.write_text(yaml.safe_dump({**yaml.safe_load(table.read_text()), **rows}))
    made = workspace.snakemake("grey-table3")
    assert made.returncode == 0, made.stderr[-4000:]
    run = workspace.path / "results/runs/grey/dmd2/seed0"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["protocol"]["labels"] == "none" and metrics["snapshots"][-1]["fd"] > 0
    assert Image.open(run / "grid.png").size == (160, 96)
    assert "| `dmd2` |" in (workspace.path / "results/tables/grey-table3.md").read_text()
