"""Commands of the pages about networks, as written: what a base takes, and NVlabs' networks converted and back."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import edm_reference as edm
from tests.docs.pages import lines_of
from tests.fork_server import quick_bin
from tests.workspace import REPO

# SDXL's takes minutes, and others of bases and rows plan nothing that these do not.
PLANS = [*lines_of("dmd2 plan imagenet64"), *lines_of("dmd2 plan dmd2-table3 ")]
PLANS = [line for line in PLANS if "imagenet64/" not in line]
CONVERSIONS = lines_of("dmd2 convert ")


def run(line: str, folder: Path) -> str:
    words = shlex.split(line)
    result = subprocess.run([str(quick_bin() / "python"), "-m", *words], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_some() -> None:
    assert len(PLANS) == 2 and len(CONVERSIONS) == 2


@pytest.mark.parametrize("line", PLANS)
def test_a_plan_names_memory_time_and_disk(line: str) -> None:
    text = run(line, REPO)
    assert "295,899,267" in text and "Disk" in text and "A100" in text
    assert ("gan-only-ttur" in text) == ("dmd2-table3" in line)


def test_a_network_is_converted_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    state = edm.random_state(edm.ADM)
    edm.write(tmp_path / shlex.split(CONVERSIONS[0])[2], edm.ADM, state)
    assert "UNet2DModel" in run(CONVERSIONS[0], tmp_path)
    config = json.loads((tmp_path / "data/teachers/edm-imagenet64/unet/config.json").read_text())
    assert config["num_class_embeds"] == edm.ADM["labels"]
    run(CONVERSIONS[1], tmp_path)
    back = load_file(tmp_path / "edm-imagenet64.safetensors")
    assert all(back[name].equal(value) for name, value in state.items()) and len(back) == len(state)
