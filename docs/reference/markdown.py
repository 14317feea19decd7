"""Markdown of generated pages."""

from collections.abc import Iterable
from typing import Any


def page(title: str, *blocks: str) -> str:
    """Blocks below a title."""
    return "\n\n".join([f"# {title}", *blocks]) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; ``|`` and line breaks in cells are kept as text."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def anchor(name: str) -> str:
    """A key that a link can name: the part after the last dot, with the whole name as its anchor."""
    return f"`{name.rpartition('.')[2]}`{{ #{name} }}"


def code(value: object) -> str:
    """A value as code; nothing for None."""
    return "" if value is None else f"`{value}`"
