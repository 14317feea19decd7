"""Hooks of mkdocs: the pages that are made from the code when the site is built."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, the notebook, and the files of the repository that pages link to."""
    sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed
    from docs.reference.notebook import notebook
    from docs.reference.pages import pages
    from docs.reference.sources import linked

    made: dict[str, str | bytes] = {f"reference/{name}.md": text for name, text in pages().items()}
    made |= {f"examples/{name}": content for name, content in notebook(ROOT / "examples/catalogue.ipynb").items()}
    made |= linked((file.src_uri, file.content_string) for file in files.documentation_pages())
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files of the repository lead to their pages."""
    from docs.reference.sources import relinked

    return relinked(page.file.src_uri, markdown)
