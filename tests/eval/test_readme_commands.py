"""Commands of eval of README and pages, as written, on small folders of real digits."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import eval.score.command as command
from tests.docs.pages import lines_of

COMMANDS = [line.removeprefix("dmd2 eval ") for line in lines_of("dmd2 eval ")]


@pytest.fixture
def folders(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    for i, name in enumerate(("samples", "reference", "samples-a", "samples-b")):
        (tmp_path / name).mkdir()
        for j, image in enumerate(digits[i * 30 : (i + 1) * 30]):
            Image.fromarray(image).save(tmp_path / name / f"{j:03d}.png")


@pytest.mark.parametrize("line", COMMANDS)
def test_it_runs(line: str, folders: None) -> None:
    result = CliRunner().invoke(command.app, line.split())
    assert result.exit_code == 0, result.output
    assert "lite0-320@64" in result.output


def test_there_are_some() -> None:
    assert {line.split()[0] for line in COMMANDS} == {"score", "paired", "stats"}
