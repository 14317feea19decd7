"""The README's commands on finished runs, as written, in a workspace that is a git repository."""

import re
import shutil

import pytest

from tests.workspace import REPO, Workspace

README = (REPO / "README.md").read_text()
COMMANDS = re.findall(r"^python -m (?:eval\.[\w.]+|dmd2\.publish\.export) .*$", README, re.M)


@pytest.fixture(scope="module")
def repository(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The finished workspace under git, on a branch called main."""
    path = tmp_path_factory.mktemp("readme") / "workspace"
    shutil.copytree(finished.path, path, symlinks=True)
    workspace = Workspace(path)
    for words in ("init -q -b main", "add -A", "-c user.name=n -c user.email=e commit -q -m finished"):
        result = workspace.run("git", *words.split())
        assert result.returncode == 0, result.stderr
    return workspace


MAKES = {
    "eval.compare": None,
    "eval.catalogue": "results/catalogue.parquet",
    "dmd2.publish.export": "exported/digits-dmd2/sample.py",
}


def test_there_are_some() -> None:
    assert {line.split()[2] for line in COMMANDS} == set(MAKES)


@pytest.mark.parametrize("line", COMMANDS)
def test_it_runs(repository: Workspace, line: str) -> None:
    result = repository.run("bash", "-c", line)
    assert result.returncode == 0, result.stderr + result.stdout
    made = MAKES[line.split()[2]]
    assert (repository.path / made).exists() if made else "Rows on both sides" in result.stdout, result.stdout
