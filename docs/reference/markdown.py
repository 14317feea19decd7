"""Markdown of generated pages."""

import re
from collections.abc import Iterable
from typing import Any


def page(title: str, *blocks: str) -> str:
    """Blocks below a title."""
    return "\n\n".join([f"# {title}", *blocks]) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; what a cell says is one line. One that ends with a meaning is a list on a telephone."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
    return f'<div class="told" markdown>\n\n{text}\n\n</div>' if head[-1] == "meaning" else text


def _cell(value: Any) -> str:
    """One line; outside code, ``|`` would begin another cell."""
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or "\\|", " ".join(str(value).split()))


def anchor(name: str) -> str:
    """A key that a link can name: the part after the last dot, with the whole name as its anchor."""
    return f"`{name.rpartition('.')[2]}`{{ #{name} }}"


def code(value: object) -> str:
    """A value as code; nothing for None."""
    return "" if value is None else f"`{value}`"
