"""A comparison as Markdown, and as one self-contained page with the images side by side."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from dmd2.experiment.metrics import BETTER
from dmd2.publish.table_text import NONE, Cells, difference_text, grid, label, mean_sd
from dmd2.publish.template import template
from eval.compare.contrasts import EQUAL, Verdict
from eval.compare.versions import Side
from eval.pixels.grid import sample_grid
from eval.report.page import code, setting

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def markdown(document: Document) -> str:
    """The whole comparison as Markdown."""
    text = [f"# {document['a']['name']} → {document['b']['name']}", "", told(document), ""]
    for base, rows in bases(document):
        text += [f"## {base}", "", grid(*values(rows)), ""]
        if (others := other_metrics(rows))[1]:
            text += ["Other metrics, B - A:", "", grid(*others), ""]
    text += [READING, "", "## What changed", ""]
    for names, verdict, lines in alike(document):
        text += [f"{', '.join(f'`{name}`' for name in names)}: {verdict}", "", *(f"- {line}" for line in lines), ""]
    text += [line for line in remarks(document) for line in (line, "")]
    if document["claims"]:
        text += ["## Claims whose verdict changed", "", grid(*claims(document)), ""]
    return "\n".join(text)


def html(document: Document, a: Side, b: Side) -> str:
    """One page without scripts, images inlined; `a` and `b` are the sides that the document is about.

    Raises:
        UserError: a sample grid cannot be read.
    """
    return template(Path(__file__).with_name("templates") / "compare.html.j2", code=code).render(
        document=document,
        told=told(document),
        reading=READING,
        bases=[(base, values(rows), other_metrics(rows)) for base, rows in bases(document)],
        changed=alike(document),
        remarks=remarks(document),
        claims=claims(document),
        images=[(row, _images(row, a, b)) for row in document["rows"] if all(row["grids"]["paths"])],
    )


READING = (
    "Numbers are means ± SD over the training seeds that were compared; equal means to six digits; in bold, intervals "
    "that exclude 0. An interval over training seeds holds all noise but what the same sample seeds do to every "
    "training alike, one of the finite sample only that of the images; each holds its difference with 95 % by itself, "
    "so of many rows some are out by chance. Compared is the last snapshot."
)


def told(document: Document) -> str:
    """What the sides are, and how many rows got which verdict."""
    a, b = document["a"], document["b"]
    counts = Counter(row["verdict"] for row in document["rows"])
    verdicts = ", ".join(f"{counts[v]} {v}" for v in get_args(Verdict) if counts[v])
    margin = f" Differences up to {document['margin']:g} count as none." if document["margin"] else ""
    return f"A: {a['name']} ({a['what']}). B: {b['name']} ({b['what']}). Rows on both sides: {verdicts}.{margin}"


def bases(document: Document) -> Iterator[tuple[str, list[Row]]]:
    """Rows by base."""
    for base, rows in groupby(document["rows"], key=lambda row: row["base"]):
        yield base, list(rows)


def values(rows: list[Row]) -> Cells:
    """Header and cells of the main table of a base: the first metric of every row."""
    first = rows[0]
    direction = f"{first['better']} is better" if first["better"] else "no better direction"
    header = ["row", f"{first['label']} of A", "of B", f"B - A, 95 % ({direction})", "the interval covers", "verdict"]
    return header, [
        [f"`{row['run']}`", *(mean_sd(row[side].values()) if row[side] else NONE for side in "ab"), _difference(row),
         _covers(row["difference"]), row["verdict"]]
        for row in rows
    ]  # fmt: skip


def _covers(found: Mapping[str, Any] | None) -> str:
    return NONE if found is None or found["covers"] == EQUAL else found["covers"]


def other_metrics(rows: list[Row]) -> Cells:
    """Header and cells of the differences of all other metrics, with the direction that is better."""
    names = list(dict.fromkeys(name for row in rows for name in row["others"]))
    arrows = {"lower": " ↓", "higher": " ↑", None: ""}
    header = ["row", *(f"{label(name)}{arrows[BETTER.get(name)]}" for name in names)]
    lines = [[f"`{row['run']}`", *(_difference(row["others"].get(name)) for name in names)] for row in rows]
    return header, lines if names else []


def _difference(row: Row | None) -> str:
    found = row and row["difference"]
    return EQUAL if found and found["covers"] == EQUAL else difference_text(found)


def changes(row: Row) -> list[str]:
    """What is different about a row besides its numbers; nothing if all is as it was."""
    lines = [row["reason"]] if row["reason"] else []
    if row["seeds"].startswith("A "):
        lines.append(row["seeds"] if row["difference"] else row["seeds"].split(":")[0])
    lines += [f"config `{key}`: `{setting(old)}` → `{setting(new)}`" for key, (old, new) in row["config"].items()]
    return lines + row["other"]


def alike(document: Document) -> list[tuple[list[str], str, tuple[str, ...]]]:
    """Names of rows of which the same is to be said, their verdict, and what."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in document["rows"]:
        if lines := changes(row):
            groups.setdefault((row["verdict"], tuple(lines)), []).append(row["row"])
    return [(names, verdict, lines) for (verdict, lines), names in groups.items()]


def remarks(document: Document) -> list[str]:
    """Rows and tables of one side only, what could not be shown, and claims that did not change."""
    same = [row for row in document["rows"] if not changes(row)]
    other = [row for row in same if row["difference"]["covers"] != EQUAL]
    told = {"Same seeds, config, data, commit and device, as far as recorded": same,
            "Of these, other numbers although nothing recorded changed": other}  # fmt: skip
    lines = [f"{text}: {', '.join(f'`{name}`' for name in _names(rows))}." for text, rows in told.items() if rows]
    for side in "ab":
        name = side.upper()
        if rows := document[f"only_{side}"]:
            lines.append(f"Rows only in {name}: {', '.join(f'`{row}`' for row in rows)}.")
        if tables := document["tables"][f"only_{side}"]:
            lines.append(f"Tables only in {name}, whose claims are not compared: {', '.join(tables)}.")
        bare = [row for row in document["rows"] if not row["grids"]["paths"]["ab".index(side)]]
        if bare:
            some = "" if len(bare) == len(document["rows"]) else f" of {', '.join(f'`{n}`' for n in _names(bare))}"
            lines.append(f"{name} has no sample grids{some}.")
    if document["tables"]["both"] and not document["claims"]:
        lines.append(f"No verdict on a claim changed in {', '.join(document['tables']['both'])}.")
    return lines + [f"Warning: {note}." for note in document["notes"]]


def _names(rows: list[Row]) -> list[str]:
    return [row["row"] for row in rows]


def claims(document: Document) -> Cells:
    """Header and cells of the claims whose verdict changed."""
    lines = [
        [f"{c['table']}, {c['id']}: {c['claim']}", c["from"], f"**{c['to']}**", c["evidence_from"], c["evidence_to"]]
        for c in document["claims"]
    ]
    return ["claim", "A", "B", "evidence in A", "evidence in B"], lines


def _images(row: Row, a: Side, b: Side) -> dict[str, Any]:
    """Both grids of a row, and what must be said about them."""
    paths = [side.fetch(path) for side, path in zip((a, b), row["grids"]["paths"], strict=True)]
    grids = []
    for path in paths:
        side = row["resolution"]
        if side is None:
            with Image.open(path) as image:
                side = image.width
        grids.append(sample_grid(path, side))
    first, second = row["grids"]["seeds"]
    seeds = (
        f"training seed {first}" if first == second else f"training seed {first} in A, {second} in B: none is shared"
    )
    other = any(key.startswith("data.") for key in row["config"])
    noise = "other data, so not the same noise" if other else "the same noise in the same place"
    same = paths[0].read_bytes() == paths[1].read_bytes()
    return {"grids": grids, "caption": f"{seeds}; {noise}{'; the images are identical' if same else ''}"}
