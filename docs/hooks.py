"""Hooks of mkdocs: the pages that are made from the code when the site is built."""

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference and of the notebook."""
    sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed
    from docs.reference.notebook import notebook
    from docs.reference.pages import pages

    made: dict[str, str | bytes] = {f"reference/{name}.md": text for name, text in pages().items()}
    made |= {f"examples/{name}": content for name, content in notebook(ROOT / "examples/catalogue.ipynb").items()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files
