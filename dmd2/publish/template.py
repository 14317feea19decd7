"""Jinja templates of pages, cards and scripts."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

TEMPLATES = Path(__file__).with_name("templates")  # what others may import lies here


def template(path: Path, **filters: Any) -> Template:
    """A template; in HTML values are escaped. A value that it asks for and is not given is an error."""
    html = ".html" in path.name
    environment = Environment(
        loader=FileSystemLoader([path.parent, TEMPLATES]),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=not html,
    )
    environment.filters |= filters
    return environment.get_template(path.name)
