"""Snakemake's own opinion of the workflow, its layout, and what its catalogue reads."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from dmd2.experiment.table_config import Table
from tests.conftest import ROOT

SNAKEMAKE = [sys.executable, "-m", "snakemake"]


def test_every_lint_has_its_reason() -> None:
    said = subprocess.run([*SNAKEMAKE, "--lint"], cwd=ROOT, capture_output=True, text=True).stderr
    found = {re.sub(r" in line \d+\.?$", "", lint) for lint in re.findall(r"^    \* (.*):$", said, re.M)}
    reasons = yaml.safe_load((ROOT / "workflow/lint-exceptions.yaml").read_text())
    assert found == set(reasons) and all(reasons.values()), said


def test_the_catalogue_finds_what_it_needs() -> None:
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert set(usage["mandatory-flags"]) == {"desc", "flags"} and (ROOT / "workflow/Snakefile").is_file()
    readme = (ROOT / "config/README.md").read_text()
    for target in re.findall(r"\]\(\.\./([^)]*)\)", readme):
        assert (ROOT / target).exists(), target
    Table.model_validate(yaml.safe_load(re.search(r"```yaml\n(.*?)```", readme, re.S)[1]))
    words = usage["mandatory-flags"]["flags"].split()
    planned = subprocess.run([*SNAKEMAKE, *words, "-n", "--", "digits-data"], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


def test_a_bare_snakemake_plans_the_demo_on_this_machine() -> None:
    planned = subprocess.run([*SNAKEMAKE, "-n", "--quiet", "host"], cwd=ROOT, capture_output=True, text=True)
    said = planned.stdout + planned.stderr
    assert planned.returncode == 0 and "workflow specific profile default" in said, said
    assert re.search(r"rule all:\n +input: results/tables/demo.md", said), said


def test_a_table_with_the_name_of_a_rule_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "workflow/tables/train.yaml"
    table.parent.mkdir(parents=True)
    table.write_text((ROOT / "workflow/tables/demo.yaml").read_text())
    command = [*SNAKEMAKE, "-n", "--snakefile", str(ROOT / "workflow/Snakefile"), "train"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "workflow/tables/train.yaml: train is a rule of the workflow: rename the file" in done.stdout + done.stderr
