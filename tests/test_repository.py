"""Promises about the repository itself: README, schemas, sizes, no pickles."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.ablations import Table, load_experiment
from dmd2.cluster import Cluster
from dmd2.config import RunConfig

REPO = Path(__file__).parents[1]
SOURCES = sorted([*(REPO / "dmd2").glob("*.py"), *(REPO / "eval").glob("*.py")])
README = (REPO / "README.md").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_file_and_function_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_unpickles_foreign_code(path: Path) -> None:
    text = path.read_text()
    assert "import pickle" not in text and "allow_pickle" not in text
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call


@pytest.mark.parametrize(("name", "model"), [("base", RunConfig), ("table", Table), ("cluster", Cluster)])
def test_exported_schema_is_current(name: str, model: type) -> None:
    exported = json.loads((REPO / f"workflow/schemas/{name}.schema.json").read_text())
    assert exported == model.model_json_schema(), "run python -m dmd2.launch schema"


def _commands() -> list[str]:
    whole = re.sub(r"```yaml\n.*?```console\n.*?```", "", README, flags=re.S)  # a file and what is then asked for
    return [line for block in re.findall(r"```console\n(.*?)```", whole, re.S) for line in block.splitlines() if line]


# tests/workflow/test_readme_snippets.py runs those beside a file to be written, tests/slurm/test_dag.py runs those of dmd2.launch, tests/eval/test_readme_commands.py those of eval, the rest runs in
# tests/workflow/test_readme.py.
@pytest.mark.parametrize("command", [c for c in _commands() if not re.search(r"python -m (dmd2|eval)|^dvc", c)])
def test_readme_command_plans(command: str) -> None:
    words = command.split()
    dry = [*words, "-n"] if "-n" not in words else words
    env_bin = str(Path(sys.executable).parent)
    result = subprocess.run(
        dry, cwd=REPO, capture_output=True, text=True, env={"PATH": f"{env_bin}:/usr/bin:/bin", "HOME": "/tmp"}
    )
    assert result.returncode == 0, result.stderr


def test_readme_links_and_named_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#h][^)]*)\)", README):
        assert (REPO / target).exists(), target
    for row in re.findall(r"^\| `(\w+)/`", README, re.M):
        assert (REPO / row).is_dir(), row


def test_readme_names_every_table() -> None:
    for name in load_experiment().tables:
        assert f"`{name}`" in README, name


def test_lock_names_no_index_host() -> None:
    lock = (REPO / "requirements.lock").read_text()
    assert "://" not in lock and "--hash=sha256:" in lock
