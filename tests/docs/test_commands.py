"""Command lines of README and pages: each is parsed by its command, and what `dmd2 run` is to make can be planned.

Others are really run: those of eval by tests/eval/test_readme_commands.py, compare, catalogue and export by
tests/workflow/test_readme.py, plan and convert by tests/workflow/test_readme_networks.py.
"""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.core import TyperGroup

from dmd2.command.app import group
from tests.docs.pages import NOT_RUN, PAGES, blocks, commands, lines_of, written
from tests.workspace import REPO, copy_repository


def parsed(line: str) -> dict[str, Any]:
    """Parameters of the innermost command of a line, as its own parser reads them."""
    command: Any = group()
    context = command.make_context("dmd2", shlex.split(line)[1:])
    while isinstance(command, TyperGroup):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return {**context.params, "rest": context.args}


@pytest.mark.parametrize("line", lines_of("dmd2 "))
def test_a_command_takes_its_options(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    parsed(line)


def test_other_lines_have_a_reason_or_a_target() -> None:
    rules = (REPO / "Makefile").read_text()
    for line in commands():
        assert line.startswith(("dmd2 ", *NOT_RUN)), line
        if line.startswith("make "):
            assert f"\n{line.split()[1]}:" in rules, line
    for start in NOT_RUN:
        assert lines_of(start) or start == "dmd2 eval weights", f"no page has {start}"


def test_every_yaml_block_is_a_file_or_stands_beside_a_command_of_its_own() -> None:
    parts = [block for block in blocks("yaml") if block.text not in written().values()]
    assert [block.page.name for block in parts] == ["add-a-row.md"]  # tests/workflow/test_readme_snippets.py has it


def test_what_is_to_be_made_can_be_planned(tmp_path: Path) -> None:
    workspace = copy_repository(tmp_path / "workspace")
    files = written()
    del files["workflow/tables/tv.yaml"]  # of a loss of the reader's own, which test_examples.py puts in place
    for place, text in files.items():
        (workspace.path / place).write_text(text)
    (workspace.path / "photos").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)):
        Image.fromarray(pixels).save(workspace.path / "photos" / f"{number}.png")
    for line in lines_of("dmd2 new-base"):
        made = workspace.run("python", "-m", *line.split())
        assert made.returncode == 0, made.stderr
    asked: dict[str, dict[str, None]] = {}
    for line in lines_of("dmd2 run"):
        options = parsed(line)
        if "tv" in (options["targets"] or []):
            continue
        given = options["targets"] or []  # with options of Snakemake, such as --resources gpu=1
        words = dict.fromkeys(word for word in given if not word.startswith("-") and "=" not in word)
        asked.setdefault(options["profile"], {}).update(words)
    assert asked.keys() == {"local", "slurm"}
    for profile, targets in asked.items():
        planned = workspace.run("python", "-m", "dmd2", "run", "--profile", profile, "-n", *targets)
        assert planned.returncode == 0, planned.stderr + planned.stdout


def test_the_readme_is_short_and_no_page_names_the_entry_points_of_jobs() -> None:
    assert len((REPO / "README.md").read_bytes()) <= 9000
    for page in PAGES:
        text = page.read_text()
        for old in ("python -m dmd2", "python -m eval", "results/report.html"):
            assert old not in text or page.name == "CONTRIBUTING.md", f"{page} names {old}"
