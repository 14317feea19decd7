"""A comparison as Markdown, and as one self-contained page: the same Markdown with the images side by side."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from markdown_it import MarkdownIt
from markupsafe import Markup
from PIL import Image

from dmd2.experiment.metrics import BETTER
from dmd2.publish.table_text import difference_text, label, mean_sd
from dmd2.publish.template import template
from eval.compare.contrasts import EQUAL, Verdict
from eval.compare.versions import Side
from eval.pixels.grid import Grid, sample_grid
from eval.report.page import setting

TEMPLATES = Path(__file__).with_name("templates")
# What of Markdown `compare.md.j2` uses: neither HTML nor links, which names could hold.
IN_USE = ["heading", "table", "list", "backticks", "emphasis"]
COLOURED = re.compile(r"<td>((worse|better|not) ?\w*)</td>")

Comparison = Mapping[str, Any]  # what `eval.compare.command.compare` returns
ComparedRow = Mapping[str, Any]  # one of its rows


def markdown(comparison: Comparison) -> str:
    """The whole comparison as Markdown."""
    changed: dict[tuple[str, tuple[str, ...]], list[ComparedRow]] = {}
    for row in comparison["rows"]:
        changed.setdefault((row["verdict"], tuple(_changes(row))), []).append(row)
    same = [row for (_, lines), rows in changed.items() if not lines for row in rows]
    filters = {"mean_sd": mean_sd, "difference": _difference, "label_with_arrow": _label_with_arrow}
    text = template(TEMPLATES / "compare.md.j2", **filters).render(
        comparison=comparison,
        verdicts=get_args(Verdict),
        changed={what: rows for what, rows in changed.items() if what[1]},
        same=sorted(same, key=lambda row: row["row"]),
    )
    return text.rstrip("\n") + "\n"


def html(comparison: Comparison, a: Side, b: Side) -> str:
    """One page without scripts, images inlined; `a` and `b` are the sides that were compared.

    Raises:
        UserError: a sample grid cannot be read.
    """
    body = MarkdownIt("zero").enable(IN_USE).render(markdown(comparison))
    body = body.replace("<table>", '<table tabindex="0">').replace("<th>", '<th scope="col">')
    return template(TEMPLATES / "compare.html.j2").render(
        a=comparison["a"],
        b=comparison["b"],
        body=Markup(COLOURED.sub(r'<td class="\2">\1</td>', body)),
        images=[(row, *_images(row, a, b)) for row in comparison["rows"] if all(row["grids"]["paths"])],
    )


def _difference(found: Mapping[str, Any] | None) -> str:
    return EQUAL if found and found["covers"] == EQUAL else difference_text(found)


def _label_with_arrow(metric: str) -> str:
    return label(metric) + {"lower": " ↓", "higher": " ↑"}.get(BETTER.get(metric, ""), "")


def _changes(row: ComparedRow) -> list[str]:
    """What is different about a row besides its numbers; nothing if all is as it was."""
    lines = [row["reason"]] if row["reason"] else []
    if row["seeds"].startswith("A "):
        lines.append(row["seeds"] if row["difference"] else row["seeds"].split(":")[0])
    lines += [f"config `{key}`: `{setting(old)}` → `{setting(new)}`" for key, (old, new) in row["config"].items()]
    return lines + row["other"]


def _images(row: ComparedRow, a: Side, b: Side) -> tuple[list[Grid], bool, bool]:
    """Both grids of a row, whether they are of other data, and whether they are identical."""
    paths = [side.fetch(path) for side, path in zip((a, b), row["grids"]["paths"], strict=True)]
    grids = []
    for path in paths:
        side = row["resolution"]
        if side is None:
            with Image.open(path) as image:
                side = image.width
        grids.append(sample_grid(path, side))
    other_data = any(key.startswith("data.") for key in row["config"])
    return grids, other_data, paths[0].read_bytes() == paths[1].read_bytes()
