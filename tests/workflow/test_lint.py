"""Snakemake's own opinion of the workflow, its layout, and what its catalogue reads."""

import re
import subprocess
import sys

import yaml

from tests.conftest import ROOT


def test_every_lint_has_its_reason() -> None:
    command = [sys.executable, "-m", "snakemake", "--lint"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    found = {re.sub(r" in line \d+\.?$", "", lint) for lint in re.findall(r"^    \* (.*):$", said, re.M)}
    reasons = yaml.safe_load((ROOT / "workflow/lint-exceptions.yaml").read_text())
    assert found == set(reasons) and all(reasons.values()), said
