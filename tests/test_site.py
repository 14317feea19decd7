"""The site of the documentation: complete, without a broken link, and without anything from elsewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest

from dmd2.command.app import COMMANDS, EVAL
from dmd2.experiment.cluster import Cluster
from dmd2.experiment.config import RunConfig
from dmd2.experiment.protocols import known_protocols
from dmd2.experiment.section import Strict
from dmd2.experiment.table_config import Preset, Table
from docs.reference.sections import sections, split
from eval.catalogue.columns import LOG_SCHEMA, SCHEMA
from eval.report.claims import CLAIMS

FILES = {"base": RunConfig, "table": Table, "preset": Preset, "cluster": Cluster}


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors: links, anchors, files of the navigation, snippets."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


class Elements(HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    @property
    def anchors(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.found if "id" in attributes}


def keys(model: type[Strict], place: str = "") -> Iterator[str]:
    """Dotted names of the keys of a section and of those below it, found by its annotations."""
    for name, field in model.model_fields.items():
        key = f"{place}{field.alias or name}"
        yield key
        for kind, suffix in below(field.annotation):
            if kind is not model:
                yield from keys(kind, f"{key}.{suffix}")


def below(annotation: Any, suffix: str = "") -> Iterator[tuple[type[Strict], str]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation, suffix
    for part in get_args(annotation):
        yield from below(part, "NAME." if getattr(annotation, "__origin__", None) is dict else suffix)


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_in_the_reference_with_its_meaning(site: Path, name: str) -> None:
    parts = sections(FILES[name])
    told = {
        f"{place}.{key.name.rpartition('.')[2]}".lstrip(".")
        for part in parts
        for place in part.places
        for key in part.keys
    }
    expected = set(keys(FILES[name]))
    assert expected <= told and len(expected) > 1
    anchors = Elements(site / f"reference/{name}.html").anchors
    for part in parts:
        for key in part.keys:
            assert key.name in anchors
            assert key.meaning, f"{key.name} says nothing: give the field a description"


def test_entries_of_a_docstring_are_told_from_its_text() -> None:
    text, meanings = split(
        "A part.\n\n    a, b: of both,\n        in two lines.\n    c: it: is one.\n\n    No: entry.", {"a", "b", "c"}
    )
    assert text == "A part.\n\n\nNo: entry."
    assert meanings == {"a": "of both, in two lines.", "b": "of both, in two lines.", "c": "it: is one."}


def test_every_command_and_its_options_are_in_the_reference(site: Path) -> None:
    page = site / "reference/commands.html"
    names = [name for listed in COMMANDS.values() for name, *_ in listed] + [f"eval-{name}" for name, *_ in EVAL]
    assert set(names) <= Elements(page).anchors
    text = page.read_text()
    for option in ("--protocol", "--profile", "--gpu-memory", "--workspace"):
        assert f"{option} <" in text.replace("&lt;", "<"), option


def test_lists_of_the_code_are_in_the_reference(site: Path, root: Path) -> None:
    for page, names in {"claims": CLAIMS, "protocols": known_protocols(), "catalogue": SCHEMA | LOG_SCHEMA}.items():
        text = (site / f"reference/{page}.html").read_text()
        missing = [name for name in names if f">{name}<" not in text]
        assert not missing, f"{page}: {missing}"
    for name in FILES:
        listed = {path.stem for path in (root / "workflow").glob(f"{name}*/*.yaml")}
        text = (site / f"reference/{name}.html").read_text()
        assert listed and all(f'id="file-{stem}"' in text for stem in listed)
        assert "yaml-language-server" not in text


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > 30
    for page in pages:
        for tag, attributes in Elements(page).found:
            assert "mermaid" not in attributes.get("class", ""), f"{page}: its script is fetched from elsewhere"
            if tag == "a" or (tag == "link" and attributes.get("rel") in ("prev", "next")):
                continue
            for name in ("src", "srcset", "href", "data", "poster"):
                assert not re.match(r"(\w+:)?//", attributes.get(name, "")), f"{page}: {tag} {attributes}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(\w+:)?//", style.read_text()), style


def test_files_of_the_repository_that_pages_link_to_are_pages(site: Path) -> None:
    pages = [*(site / "how-to").glob("*.html"), *(site / "explanation").glob("*.html"), site / "index.html"]
    links = {(page.parent / attributes["href"]).resolve() for page in pages for _, attributes in Elements(page).found
             if "/source/" in f"/{attributes.get('href', '')}"}  # fmt: skip
    assert links and all(target.exists() for target in links)
    for page in ("source/dmd2/method/step.py", "explanation/algorithm"):  # which has it as a snippet
        assert "def train_step" in re.sub("<[^>]*>", "", (site / f"{page}.html").read_text())
