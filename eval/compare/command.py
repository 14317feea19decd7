"""Compare two versions of the results: ``python -m eval.compare A B``.

A and B are git revisions, DVC experiments, workspaces, results folders or folders of tables; B is the current workspace
if it is not given. Rows are joined by base and run. Markdown goes to stdout; with --fail-if-worse the exit status is 1
and stderr has a sentence per row that got worse, cannot be compared or is gone; 2 means that nothing was compared.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from dmd2.core.errors import UserError
from dmd2.core.files import write_json, write_text
from dmd2.experiment.metrics import BETTER
from dmd2.experiment.metrics import measured as numbers_of
from dmd2.publish.table_text import difference_text, label
from eval.compare.contrasts import Contrast, Pair, Seeds, judge
from eval.compare.page import html, markdown
from eval.compare.versions import WORKSPACE, Rows, Side, open_side, read_rows, read_tables
from eval.pixels.grid import sample_side

Tables = Mapping[str, dict[str, Any]]


def compare(a: Side, b: Side, margin: float = 0.0) -> dict[str, Any]:
    """Everything that is to be said, as plain values; differences are B - A.

    Args:
        a: the older side.
        b: the newer side.
        margin: differences below this, in units of the row's metric, count as none.

    Raises:
        UserError: a file is damaged or is not what an evaluation writes, or no row is on both sides.
    """
    tables = read_tables(a), read_tables(b)
    published = read_tables(a, "reference"), read_tables(b, "reference")  # their claims are not compared
    known = tables[0] | (published[0] | tables[0]), tables[1] | (published[1] | tables[1])
    rows = read_rows(a, known[0].values()), read_rows(b, known[1].values())
    both = sorted(rows[0].keys() & rows[1].keys())
    if not both:
        names = [", ".join("/".join(row) for row in sorted(side)) or "none" for side in rows]
        raise UserError(f"no row is on both sides: A ({a.name}) has {names[0]}; B ({b.name}) has {names[1]}")
    return {
        "kind": "comparison", "margin": margin,
        "a": {"name": a.name, "what": a.what}, "b": {"name": b.name, "what": b.what},
        "rows": [_row(base, run, (a, b), rows, _metrics(base, rows, known), margin) for base, run in both],
        "only_a": ["/".join(row) for row in sorted(rows[0].keys() - rows[1].keys())],
        "only_b": ["/".join(row) for row in sorted(rows[1].keys() - rows[0].keys())],
        "claims": _claims(*tables),
        "tables": {"both": sorted(tables[0].keys() & tables[1].keys()),
                   "only_a": sorted(tables[0].keys() - tables[1].keys()),
                   "only_b": sorted(tables[1].keys() - tables[0].keys())},
        "notes": [*_stale("A", tables[0], rows[0]), *_stale("B", tables[1], rows[1])],
    }  # fmt: skip


def _row(
    base: str, run: str, sides: tuple[Side, Side], rows: tuple[Rows, Rows], metrics: list[str], margin: float
) -> dict[str, Any]:
    a, b = (side[base, run] for side in rows)
    data = _data(base, rows)
    first = next(iter(b.values()))
    pair = Pair(sides, a, b, data.get("classes") if first.protocol.get("labels") == "cyclic" else None)
    refused = pair.refusal()
    found = {metric: Contrast(metric, {}, {}, None, refused) if refused else _contrast(pair, metric)
             for metric in _measured(metrics, a, b)}  # fmt: skip
    primary = next((metric for metric in metrics if metric in BETTER), metrics[0])
    main = found.get(primary) or Contrast(primary, {}, {}, None, f"neither side has {primary}")
    better = BETTER.get(primary)
    return {
        "row": f"{base}/{run}", "base": base, "run": run, "metric": primary, "better": better,
        "label": label(primary), "verdict": judge(main.found, better, margin),
        "reason": main.reason or ("" if better else f"{primary} has no better direction"), "seeds": pair.seeds(),
        "a": main.a, "b": main.b, "difference": main.found,
        "others": {m: {"a": c.a, "b": c.b, "difference": c.found} for m, c in found.items() if m != primary and c.a},
        **pair.changes(), "grids": _grids(pair), "resolution": sample_side(data) if data else None,
    }  # fmt: skip


def _contrast(pair: Pair, metric: str) -> Contrast:
    try:
        return pair.contrast(metric)
    except UserError as damaged:
        return Contrast(metric, {}, {}, None, str(damaged))


def _data(base: str, rows: tuple[Rows, Rows]) -> dict[str, Any]:
    """The data section of the base's students; a teacher's evaluation does not repeat it."""
    return next((config["data"] for config in _configs(base, rows) if "data" in config), {})


def _configs(base: str, rows: tuple[Rows, Rows]) -> list[dict[str, Any]]:
    return [s.config for side in reversed(rows) for (b, _), seeds in side.items() if b == base for s in seeds.values()]


def _metrics(base: str, rows: tuple[Rows, Rows], tables: tuple[Tables, Tables]) -> list[str]:
    """Metrics of a base in the order of its evaluation, else of its tables, else as measured."""
    sections = [config.get("eval", {}).get("metrics") for config in _configs(base, rows)]
    sections += [t["metrics"] for side in reversed(tables) for t in side.values() if t["base"] == base]
    known = numbers_of(next((metrics for metrics in sections if metrics), []))
    return known or [m for (b, _), seeds in rows[1].items() if b == base for m in next(iter(seeds.values())).values]


def _measured(metrics: list[str], a: Seeds, b: Seeds) -> list[str]:
    """Those metrics and the other ones that either side has, in order."""
    names = [*metrics, *(m for side in (a, b) for s in side.values() for m in s.values)]
    have = {m for side in (a, b) for s in side.values() for m in s.values}
    return [name for name in dict.fromkeys(names) if name in have]


def _grids(pair: Pair) -> dict[str, Any]:
    """Seeds whose sample grids are shown, and the grids' paths on their sides; None where there is none."""
    seeds = [pair.shared[0]] * 2 if pair.shared else [min(pair.a), min(pair.b)]
    paths = [f"{rows[s].folder}/grid.png" for rows, s in zip((pair.a, pair.b), seeds, strict=True)]
    found = [path if path in side.files else None for path, side in zip(paths, pair.sides, strict=True)]
    return {"seeds": seeds, "paths": found}


def _claims(a: Tables, b: Tables) -> list[dict[str, Any]]:
    """Claims of tables that both sides have, if their verdict changed or only one side judges them."""
    found = []
    for name in sorted(a.keys() & b.keys()):
        ours, theirs = ({claim["id"]: claim for claim in side[name]["claims"]} for side in (a, b))
        for claim in dict.fromkeys([*ours, *theirs]):
            old, new = ours.get(claim, {}), theirs.get(claim, {})
            if old.get("verdict") != new.get("verdict"):
                found.append({
                    "table": name, "id": claim, "claim": (new or old)["claim"],
                    "from": old.get("verdict", "not judged"), "to": new.get("verdict", "not judged"),
                    "evidence_from": old.get("evidence", ""), "evidence_to": new.get("evidence", ""),
                })  # fmt: skip
    return found


def _stale(side: str, tables: Tables, rows: Rows) -> Iterator[str]:
    """Tables whose numbers are not those of the evaluations beside them: their claims are of those."""
    for name, table in tables.items():
        for row in table["rows"]:
            seeds = rows.get((table["base"], row["run"]), {})
            told = {(int(s), m): v for m, values in row["values"].items() for s, v in values.items()}
            gone = any(s not in seeds for s, _ in told)
            other = table.get("select") == "last" and any(
                not isclose(v, seeds[s].values.get(m, v)) for (s, m), v in told.items() if s in seeds
            )
            if gone or other:
                what = "seeds without an evaluation" if gone else "other numbers than its evaluations"
                yield f"table {name} of {side}, whose claims are compared, has {what} ({row['run']}): make it again"
                break


def failures(document: Mapping[str, Any]) -> list[str]:
    """One sentence per row that must not pass: got worse, cannot be compared, or is gone."""
    found = []
    for row in document["rows"]:
        if row["verdict"] == "worse":
            found.append(f"{row['row']} got worse: {row['label']} {difference_text(row['difference']).strip('*')}")
        elif row["verdict"] == "not comparable":
            found.append(f"{row['row']} cannot be compared: {row['reason']}")
    return found + [f"{row} is gone: only A ({document['a']['name']}) has it" for row in document["only_a"]]


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Bad input exits with 2: 1 means that something got worse."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def main(
    a: Annotated[str, typer.Argument(help="git revision, DVC experiment or folder", show_default=False)],
    b: Annotated[str, typer.Argument(help="the same; by default the current workspace")] = WORKSPACE,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="write the Markdown here, too")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="write one page with the images here")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all numbers here")] = None,
    fail_if_worse: Annotated[bool, typer.Option("--fail-if-worse", help="exit 1 if a row got worse, cannot be "
                                                "compared or is gone")] = False,
    margin: Annotated[float, typer.Option(min=0, help="differences below this count as none")] = 0.0,
) -> None:  # fmt: skip
    """Say how the results of B differ from those of A: values, configs, claims and images."""
    with _usage_errors(), TemporaryDirectory() as scratch:
        sides = open_side(a, Path(scratch) / "a"), open_side(b, Path(scratch) / "b")
        document = compare(*sides, margin)
        text = markdown(document)
        if markdown_file:
            write_text(markdown_file, text)
        if html_file:
            write_text(html_file, html(document, *sides))
        if json_file:
            write_json(json_file, document)
    print(text, end="")
    if fail_if_worse and (bad := failures(document)):
        print("\n".join(bad), file=sys.stderr)
        raise typer.Exit(1)
