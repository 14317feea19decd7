"""Commands of README and pages on finished runs, as written, in a workspace that is a git repository."""

import shutil

import pytest

from tests.docs.pages import lines_of
from tests.workspace import Workspace

COMMANDS = [line for name in ("compare", "catalogue", "export") for line in lines_of(f"dmd2 {name} ")]


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
    "compare": None,
    "catalogue": "results/catalogue.parquet",
    "export": "exported/digits-dmd2/sample.py",
}


def test_there_are_some() -> None:
    assert {line.split()[1] for line in COMMANDS} == set(MAKES)


@pytest.mark.parametrize("line", COMMANDS)
def test_it_runs(repository: Workspace, line: str) -> None:
    result = repository.run("python", "-m", *line.split())
    assert result.returncode == 0, result.stderr + result.stdout
    made = MAKES[line.split()[1]]
    assert (repository.path / made).exists() if made else "Rows on both sides" in result.stdout, result.stdout
