"""What differs between two versions of the results, row by row; rows are joined by base and run."""

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from typing import Any, TypeVar

from dmd2.core.errors import UserError
from dmd2.experiment.metrics import BETTER
from dmd2.experiment.metrics import measured as numbers_of
from dmd2.publish.table_text import difference_text, label
from eval.compare.contrasts import MatchedRow, verdict_on
from eval.compare.versions import Rows, Side, read_rows, read_tables
from eval.pixels.grid import sample_side

Tables = Mapping[str, dict[str, Any]]
Key = TypeVar("Key", str, tuple[str, str])


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
    # The claims of published tables are not compared; a newer table of the same name replaces them.
    known = [{**read_tables(side, "reference"), **found} for side, found in zip((a, b), tables, strict=True)]
    rows = read_rows(a, known[0].values()), read_rows(b, known[1].values())
    both, only_a, only_b = _apart(*rows)
    if not both:
        names = [", ".join("/".join(row) for row in sorted(side)) or "none" for side in rows]
        raise UserError(f"no row is on both sides: A ({a.name}) has {names[0]}; B ({b.name}) has {names[1]}")
    configs: dict[str, list[dict[str, Any]]] = {base: [] for base, _ in both}
    for side in reversed(rows):
        for (base, _), seeds in side.items():
            configs.get(base, []).extend(each.config for each in seeds.values())
    listed = {base: _metrics(base, configs[base], known) for base in configs}
    # A teacher's evaluation does not repeat the data section of its base.
    data = {base: next((c["data"] for c in found if "data" in c), dict[str, Any]()) for base, found in configs.items()}
    return {
        "kind": "comparison",
        "margin": margin,
        "a": {"name": a.name, "what": a.what},
        "b": {"name": b.name, "what": b.what},
        "rows": [_row(base, run, (a, b), rows, listed[base], data[base], margin) for base, run in both],
        "only_a": ["/".join(row) for row in only_a],
        "only_b": ["/".join(row) for row in only_b],
        "claims": _claims(*tables),
        "tables": dict(zip(("both", "only_a", "only_b"), _apart(*tables), strict=True)),
        "notes": [*_stale("A", tables[0], rows[0]), *_stale("B", tables[1], rows[1])],
    }


def _apart(a: Mapping[Key, Any], b: Mapping[Key, Any]) -> tuple[list[Key], list[Key], list[Key]]:
    """Keys of both, of A only and of B only, sorted."""
    return sorted(a.keys() & b.keys()), sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())


def _metrics(base: str, configs: list[dict[str, Any]], tables: Sequence[Tables]) -> list[str]:
    """Metrics of a base in the order of its evaluation, else of its tables; empty if neither says them."""
    sections = [config.get("eval", {}).get("metrics") for config in configs]
    sections += [table["metrics"] for side in reversed(tables) for table in side.values() if table["base"] == base]
    return numbers_of(next((metrics for metrics in sections if metrics), []))


def _row(
    base: str,
    run: str,
    sides: tuple[Side, Side],
    rows: tuple[Rows, Rows],
    metrics: list[str],
    data: dict[str, Any],
    margin: float,
) -> dict[str, Any]:
    """One row of the comparison; `metrics` come first, `data` is the section of its base, empty where unknown."""
    a, b = (side[base, run] for side in rows)
    cyclic = next(iter(b.values())).protocol.get("labels") == "cyclic"
    row = MatchedRow(sides, a, b, data.get("classes") if cyclic else None)
    measured = dict.fromkeys(metric for side in (a, b) for each in side.values() for metric in each.values)
    found: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for metric in dict.fromkeys([*metrics, *measured]):
        try:
            if metric in measured:
                found[metric] = row.contrast(metric)
        except UserError as error:
            reasons[metric] = str(error)
    named = metrics or [*measured]
    primary = next((metric for metric in named if metric in BETTER), named[0])
    better = BETTER.get(primary)
    if primary in found:
        unknown = found[primary]["difference"] is None
        reasons[primary] = "the finite sample has no standard error" if unknown else ""
    main = found.pop(primary, {"a": {}, "b": {}, "difference": None})
    reason = reasons.get(primary, f"neither side has {primary}")
    seeds = [row.shared[0]] * 2 if row.shared else [min(a), min(b)]
    grids = [f"{side[seed].folder}/grid.png" for side, seed in zip((a, b), seeds, strict=True)]
    paths = [grid if grid in side.files else None for grid, side in zip(grids, sides, strict=True)]
    return {
        "row": f"{base}/{run}",
        "base": base,
        "run": run,
        "metric": primary,
        "better": better,
        "label": label(primary),
        "verdict": verdict_on(main["difference"], better, margin),
        "reason": reason or ("" if better else f"{primary} has no better direction"),
        "seeds": row.seeds(),
        **main,
        "others": found,
        **row.changes(),
        "grids": {"seeds": seeds, "paths": paths},
        "resolution": sample_side(data) if data else None,
    }


def _claims(a: Tables, b: Tables) -> list[dict[str, Any]]:
    """Claims of tables that both sides have, if their verdict changed or only one side judges them."""
    found = []
    for name in sorted(a.keys() & b.keys()):
        ours, theirs = ({claim["id"]: claim for claim in side[name]["claims"]} for side in (a, b))
        for claim in dict.fromkeys([*ours, *theirs]):
            old, new = ours.get(claim, {}), theirs.get(claim, {})
            if old.get("verdict") != new.get("verdict"):
                found.append(
                    {
                        "table": name,
                        "id": claim,
                        "claim": (new or old)["claim"],
                        "from": old.get("verdict", "not judged"),
                        "to": new.get("verdict", "not judged"),
                        "evidence_from": old.get("evidence", ""),
                        "evidence_to": new.get("evidence", ""),
                    }
                )
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


def failures(comparison: Mapping[str, Any]) -> list[str]:
    """One sentence per row that must not pass: got worse, cannot be compared, or is gone."""
    found = []
    for row in comparison["rows"]:
        if row["verdict"] == "worse":
            found.append(f"{row['row']} got worse: {row['label']} {difference_text(row['difference']).strip('*')}")
        elif row["verdict"] == "not comparable":
            found.append(f"{row['row']} cannot be compared: {row['reason']}")
    return found + [f"{row} is gone: only A ({comparison['a']['name']}) has it" for row in comparison["only_a"]]
