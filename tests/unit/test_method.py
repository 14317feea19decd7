"""The digest of the code that makes a training's numbers: what counts, and that nothing which counts is missing."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.core import code_digest as method
from dmd2.core.code_digest import NO_PART, differing, digest_of_code, modules_of
from tests.conftest import ROOT

CODE = '''
"""A module."""
import torch
from dmd2.core.rng import Draws, stream as draw

SIGN = -1.0


def loss(x: torch.Tensor, weight: float = 2.0) -> torch.Tensor:
    """The loss."""
    if weight < 0:
        raise ValueError(f"weight {weight} is negative")
    return SIGN * (x * weight).mean()  # a comment


class Row(Section):
    """A row."""

    weight: float = 1.0

    @model_validator(mode="after")
    def _check(self):
        return self

    @property
    def doubled(self) -> float:
        return 2 * self.weight
'''


def digest(old: str = "", new: str = "") -> str:
    assert old in CODE
    return digest_of_code(ast.parse(CODE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a comment", ""),
        ('"""The loss."""', '"""Another text\n    of two lines."""'),
        ("x: torch.Tensor, weight: float = 2.0", "x, weight=2.0"),
        ("SIGN * (x * weight).mean()", "(\n        SIGN\n        * (x * weight).mean()\n    )"),
        ("weight {weight} is negative", "no negative weight, please"),
        ("from dmd2.core.rng import Draws, stream as draw", "from dmd2.training.rng import Draws\nfrom dmd2.x import stream as draw"),
        ("    weight: float = 1.0\n", "    weight: float = 1.0\n    added: int = 0\n"),
        ("        return self\n", "        return self if self.weight > 0 else None\n"),
    ],
    ids=["comment", "docstring", "annotations", "formatting", "wording", "moved imports", "new key", "check of keys"],
)  # fmt: skip
def test_what_does_not_change_the_numbers_does_not_count(old, new) -> None:
    assert digest(old, new) == digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [("-1.0", "1.0"), ("* weight", "+ weight"), ("= 2.0", "= 3.0"), ("weight < 0", "weight > 0"),
     ("stream as draw", "Draws as draw"), ("import torch", "import numpy as torch"), ("2 * self", "3 * self")],
)  # fmt: skip
def test_what_may_change_the_numbers_counts(old, new) -> None:
    assert digest(old, new) != digest()


def test_module_that_moves_is_the_same_and_one_that_changes_is_named() -> None:
    old = {"dmd2.method.batches": "a", "dmd2.method.step": "b"}
    assert differing(old, {"dmd2.training.losses": "a", "dmd2.method.step": "b"}) == []
    assert differing(old, {"dmd2.method.batches": "c", "dmd2.method.step": "b"}) == ["dmd2/method/batches.py"]
    assert differing(old, {**old, "dmd2.new": "c"}) == ["dmd2/new.py"]


def test_every_module_that_a_training_imports_counts_or_is_said_to_have_no_part() -> None:
    code = "import sys, dmd2.training.trainer; print(*[name for name in sys.modules if name.startswith('dmd2.')])"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    packages = {name.rpartition(".")[0] for name in loaded}
    unknown = {name for name in loaded - packages - modules_of().keys() if name.rpartition(".")[2] not in NO_PART}
    assert len(loaded) > 20 and unknown == set()
    method_of = "step passes distribution_matching gan halves student_input batches rng schedules denoisers samplers condition head optimiser build"
    known = {name.rpartition(".")[2] for name in modules_of()}
    assert set(f"{method_of} trainer lora lpips song_unet quantised precision".split()) <= known


def test_stale_exclusions_are_named() -> None:
    assert {name for name in NO_PART if not list((ROOT / "dmd2").rglob(f"{name}.py"))} == set()


def test_module_that_the_step_starts_to_import_counts(tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(ROOT / "dmd2", tmp_path / "dmd2")
    monkeypatch.setattr(method, "ROOT", tmp_path)
    before = modules_of.__wrapped__()
    assert before == modules_of()
    (tmp_path / "dmd2/newloss.py").write_text("def new(x):\n    return -x\n")
    with open(tmp_path / "dmd2/method/step.py", "a", encoding="utf-8") as file:
        file.write("\n\ndef late():\n    from dmd2 import newloss\n    return newloss\n")
    assert differing(before, modules_of.__wrapped__()) == ["dmd2/method/step.py", "dmd2/newloss.py"]


def test_digest_needs_no_torch() -> None:
    code = "import sys, dmd2.core.retraining; dmd2.core.retraining.modules_of(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
