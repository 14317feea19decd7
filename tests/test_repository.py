"""Promises about the repository itself: pages, schemas, sizes, no pickles."""

import ast
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from dmd2.experiment.cluster import Cluster
from dmd2.experiment.config import RunConfig
from dmd2.experiment.tables import Table, load_experiment
from tests.docs.pages import PAGES

REPO = Path(__file__).parents[1]
SOURCES = sorted([*(REPO / "dmd2").rglob("*.py"), *(REPO / "eval").rglob("*.py")])
# A package imports only from itself and from those before it.
PACKAGES = [
    "dmd2.core", "dmd2.experiment", "dmd2.networks", "dmd2.data", "dmd2.convert", "dmd2.method", "dmd2.training",
    "dmd2.launch", "dmd2.planning", "dmd2.bases", "dmd2.publish", "eval.pixels", "eval.metrics", "eval.detectors", "eval.score",
    "eval.runs", "eval.report", "eval.compare", "eval.catalogue", "dmd2.command",
]  # fmt: skip
CONTRIBUTING = (REPO / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_file_and_function_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_nothing_unpickles_foreign_code(path: Path) -> None:
    text = path.read_text()
    assert "allow_pickle" not in text
    if path != REPO / "dmd2/data/inert_pickle.py":  # whose unpickler imports and calls nothing
        assert not re.search(r"(import|from) _?(c|cloud)?pickle\b|\b(dill|joblib|shelve|marshal)\b", text)
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call


def package_of(module: str) -> str:
    """The first two parts of a dotted name."""
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    """What a file imports of this project, anywhere in it; every name of ``from a import b`` as ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("dmd2", "eval")}


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if len(p.relative_to(REPO).parts) > 2], ids=lambda p: str(p.relative_to(REPO))
)
def test_a_package_imports_only_those_before_it(path: Path) -> None:
    own = package_of(".".join(path.relative_to(REPO).with_suffix("").parts))
    for name in imports(path):
        assert PACKAGES.index(package_of(name)) <= PACKAGES.index(own), f"{own} imports {name}"


def test_what_is_imported_exists() -> None:
    """Also where mypy does not look, and inside functions that no test calls."""
    for path in [*SOURCES, *(REPO / "tests").rglob("*.py"), *(REPO / "benchmarks").glob("*.py")]:
        for name in imports(path):
            places = [REPO.joinpath(*name.split(".")), REPO.joinpath(*name.split(".")[:-1])]
            assert any(place.with_suffix(".py").exists() or place.is_dir() for place in places), f"{path}: {name}"


def test_imports_have_no_cycle() -> None:
    modules = {".".join(p.relative_to(REPO).with_suffix("").parts): p for p in SOURCES if p.name != "__init__.py"}
    graph = {
        name: {m for i in imports(path) for m in (i, i.rpartition(".")[0]) if m in modules and m != name}
        for name, path in modules.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_packages_are_small_and_their_init_files_empty() -> None:
    for folder in {path.parent for path in SOURCES} - {REPO / "dmd2", REPO / "eval"}:
        assert len([path for path in folder.glob("*.py") if not path.name.startswith("__")]) <= 15, folder
        assert (folder / "__init__.py").read_text() == "", "a waiting launcher imports no torch"


@pytest.mark.parametrize(("name", "model"), [("base", RunConfig), ("table", Table), ("cluster", Cluster)])
def test_exported_schema_is_current(name: str, model: type) -> None:
    exported = json.loads((REPO / f"workflow/schemas/{name}.schema.json").read_text())
    assert exported == model.model_json_schema(), "run python -m dmd2.launch schema"


def test_links_and_packages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#h][^)#]*)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
    for package in re.findall(r"^\| `([\w/]+)/`", CONTRIBUTING, re.M):
        assert (REPO / package).is_dir(), package
    for name in PACKAGES:
        assert f"| `{name.replace('.', '/')}/` |" in CONTRIBUTING, name


def test_pages_name_every_table() -> None:
    for name in load_experiment().tables:
        assert any(f"`{name}`" in page.read_text() for page in PAGES), name


def test_lock_names_no_index_host() -> None:
    lock = (REPO / "requirements.lock").read_text()
    assert "://" not in lock and "--hash=sha256:" in lock
