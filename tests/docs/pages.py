"""The blocks of README and pages, and the command lines that no test runs."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.workspace import REPO

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]
# Their beginnings, with the reason. A line that is none of `dmd2` and not here fails tests/docs/test_commands.py.
NOT_RUN = {
    "make ": "they install packages or run all tests; that the Makefile has the target is checked",
    ". .venv/bin/activate": "the tests run in an environment that is active",
    "dvc ": "tests/workflow/test_versions.py runs repro and push with a remote in a repository of its own",
    "dmd2 restore": "tests/workflow/test_versions.py pulls from that remote",
    "dmd2 plan sdxl": "takes minutes; its options are parsed, tests/unit/test_plan.py plans SDXL",
    "dmd2 eval weights": "needs the internet",
    "python exported/": "tests/unit/test_export*.py run the script of every kind of student",
}


class Block(NamedTuple):
    """A fenced block: its page, its text, and the page's text before it."""

    page: Path
    text: str
    before: str


def blocks(language: str) -> list[Block]:
    """All blocks of a language, their indentation taken away."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^( *)```{language}\n(.*?)^ *```$", text, re.M | re.S):
            lines = [line.removeprefix(match[1]) for line in match[2].splitlines(keepends=True)]
            found.append(Block(page, "".join(lines), text[: match.start()]))
    return found


def commands() -> list[str]:
    """All distinct command lines of console blocks."""
    return list(dict.fromkeys(line for block in blocks("console") for line in block.text.splitlines() if line.strip()))


def lines_of(start: str) -> list[str]:
    """The command lines that begin with this."""
    return [line for line in commands() if line.startswith(start)]


def written() -> dict[str, str]:
    """Files of the workflow that YAML blocks are, by the path that the text before them names last.

    Parts of a file, which have no title, base or like of their own, are not among them.
    """
    found = {}
    for block in blocks("yaml"):
        if re.search(r"^(title|like):", block.text, re.M):
            found[re.findall(r"`(workflow/[\w/-]+\.yaml)`", block.before)[-1]] = block.text
    return found
