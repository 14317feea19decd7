"""Files of the repository that pages link to, as pages of the site: the same links work on a forge and offline."""

import ast
import os
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()\.\./[^)#\s]+")
NOTEBOOK = ".ipynb"
IMAGES = (".png", ".svg", ".pdf")
HIDDEN = "---\nsearch: {exclude: true}\n---\n\n"


def linked(texts: Iterable[tuple[str, str]]) -> dict[str, str | bytes]:
    """Files of the site for all that pages, given as place and Markdown, link to outside of docs/."""
    paths = {path for place, text in texts for link in LINK.findall(text) if (path := _outside(place, link))}
    paths = {path for path in paths if not path.endswith(NOTEBOOK)}  # which has a page already
    return {_place(path): _content(path) for path in sorted(paths)}


def relinked(place: str, text: str) -> str:
    """The Markdown of the page `place` with links to the pages of `linked`; other links stay as they are."""

    def replaced(found: re.Match[str]) -> str:
        path = _outside(place, found[0])
        return os.path.relpath(_place(path), os.path.dirname(place)) if path else found[0]

    return LINK.sub(replaced, text)


def _outside(place: str, link: str) -> str | None:
    """The file or folder of the repository outside docs/ that a link of a page names, if there is one."""
    path = os.path.normpath(os.path.join("docs", os.path.dirname(place), link))
    return None if path.split(os.sep)[0] in ("docs", "..") or not (ROOT / path).exists() else path


def _place(path: str) -> str:
    if path.endswith(NOTEBOOK):
        return path.removesuffix(NOTEBOOK) + ".md"
    suffix = "/index.md" if (ROOT / path).is_dir() else "" if path.endswith((".md", *IMAGES)) else ".md"
    return f"source/{path}{suffix}"


def _content(path: str) -> str | bytes:
    file = ROOT / path
    if path.endswith(IMAGES):
        return file.read_bytes()
    if file.is_dir():
        lines = [f"- `{below.name}`: {_purpose(below)}" for below in sorted(file.glob("*.py")) if below.stat().st_size]
        return f"{HIDDEN}# {path}\n\n" + "\n".join(lines) + "\n"
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return HIDDEN + text
    return f"{HIDDEN}# {path}\n\n``````{file.suffix.removeprefix('.') or 'text'}\n{text}``````\n"


def _purpose(module: Path) -> str:
    return (ast.get_docstring(ast.parse(module.read_bytes())) or "").partition("\n")[0]
