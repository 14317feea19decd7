"""Tables of which only the CSV is left, as results/reference has them in git: numbers and part of their protocol."""

import io
from typing import Any

import pandas as pd
import yaml

from dmd2.core.errors import UserError

PROTOCOL = ("images", "detector", "reference")  # what the CSV repeats of it


def from_csv(name: str, csv: str, specification: str) -> dict[str, Any]:
    """The parts of a table's bundle that its CSV still tells; configs, claims and influences are not among them.

    Args:
        name: of the table.
        csv: text of results/reference/NAME.csv.
        specification: text of workflow/tables/NAME.yaml, which knows the base and the order of the metrics.

    Raises:
        UserError: the CSV lacks a column.
    """
    spec, frame = yaml.safe_load(specification), pd.read_csv(io.StringIO(csv))
    select = spec.get("select", "last")
    missing = {"run", "seed", "metric", "value", "step", "commit", *PROTOCOL} - set(frame.columns)
    if missing:
        raise UserError(f"results/reference/{name}.csv has no column {', '.join(sorted(missing))}: publish it again")
    rows = [_row(spec["base"], str(run), part, select) for run, part in frame.groupby("run", sort=False)]
    return {"name": name, "base": spec["base"], "select": select, "metrics": spec.get("metrics", ["fd"]), "rows": rows}


def _row(base: str, run: str, part: pd.DataFrame, select: str) -> dict[str, Any]:
    lines = part.astype(object).where(part.notna(), None).to_dict("records")
    values: dict[str, dict[str, float]] = {}
    estimates: dict[str, dict[str, Any]] = {}
    for line in lines:
        seed, metric = str(line["seed"]), line["metric"]
        values.setdefault(metric, {})[seed] = float("nan") if line["value"] is None else line["value"]
        estimates.setdefault(seed, {})[metric] = {"se": line.get("se")}
    first = {str(line["seed"]): line for line in reversed(lines)}
    return {
        "run": run, "kind": "teacher" if run.startswith("teacher-") else "student", "values": values, "curves": {},
        "step": {seed: line["step"] for seed, line in first.items()}, "estimates": estimates, "config": {},
        "protocol": {key: lines[0][key] for key in PROTOCOL} | {"snapshot": select}, "device": "",
        "commits": {seed: line["commit"] for seed, line in first.items()},
        "grid": {seed: f"results/runs/{base}/{run}/seed{seed}/grid.png" for seed in first},
    }  # fmt: skip
