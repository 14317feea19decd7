"""The YAML of adding a row and the code of adding a metric, put where their text says, on a finished demo."""

import json
import re

import pytest
import yaml

from tests.docs.pages import blocks
from tests.workspace import REPO, ROWS, Workspace

PAGE = (REPO / "docs/how-to/add-a-row.md").read_text()
SNIPPETS = list(re.finditer(r"```yaml\n(.*?)```\s*```console\ndmd2 run -n (\S+)\n```", PAGE, re.S))


def test_every_snippet_has_its_command() -> None:
    assert len(SNIPPETS) == PAGE.count("```yaml\n") == 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet[2])
def test_it_schedules_what_the_text_says(edited: Workspace, snippet: re.Match[str]) -> None:
    table3 = edited.path / "workflow/tables/dmd2-table3.yaml"  # as the demo was run in this workspace
    cut = yaml.safe_load(table3.read_text())
    table3.write_text(yaml.safe_dump({**cut, "rows": [row for row in cut["rows"] if row["run"] in ROWS]}))
    shipped = (REPO / "workflow/tables/demo.yaml").read_text()
    (edited.path / "workflow/tables/demo.yaml").write_text(shipped)
    place = edited.path / re.findall(r"`(workflow/[\w/-]+\.yaml)`", PAGE[: snippet.start()])[-1]
    if place.exists():
        edited.edit(str(place.relative_to(edited.path)), "rows: dmd2-table3\n", snippet[1])
    else:
        place.write_text(snippet[1])
    target = snippet[2]
    assert "one training per seed, its evaluation, the table and the report, and nothing else" in PAGE
    assert edited.planned(target) == {target: 1, "train": 1, "evaluate": 1, "table": 1, "page": 1, "index": 1}


def test_a_metric_is_measured_without_a_training(edited: Workspace) -> None:
    number, metric, function = (block.text for block in blocks("python") if block.page.name == "add-a-metric.md")
    edited.edit("dmd2/experiment/metrics.py", "_NUMBERS = (\n", f"_NUMBERS = (\n{number}")
    edited.edit("dmd2/experiment/metrics.py", "_METRICS = (\n", f"_METRICS = (\n{metric}")
    edited.edit("eval/metrics/appearance.py", "def brightness", f"{function}\n\ndef brightness")
    for file in ("base/digits.yaml", "tables/demo.yaml"):
        path = edited.path / "workflow" / file
        values = yaml.safe_load(path.read_text())
        values.get("eval", values)["metrics"].append("contrast")
        path.write_text(yaml.safe_dump(values))
    planned = edited.planned("demo")
    assert planned["evaluate"] == len(ROWS) and not {"train", "teacher", "pairs"} & planned.keys()
    run = "results/runs/digits/dmd/seed0/metrics.json"
    made = edited.snakemake(run)
    assert made.returncode == 0, made.stderr
    assert 0 < json.loads((edited.path / run).read_text())["snapshots"][-1]["contrast"] < 1
