"""What a table warns of: rows that are not comparable, other code, and a teacher that has not learned its images."""

import json
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dmd2.core.files import read_json
from dmd2.core.retraining import differences as code_differences
from dmd2.core.retraining import named, other_code
from dmd2.experiment.run_inputs import REFS
from dmd2.experiment.tables import Table
from dmd2.publish.table_text import RowRecord, label, number
from eval.report.claims import claims_of, distance, is_timed

Records = dict[int, dict[str, Any]]  # the metrics.json of every training seed; of a teacher's sampler under 0


def of_rows(table: Table, rows: list[RowRecord]) -> list[str]:
    """Of rows that may not be comparable."""
    warnings = []
    commits = {c for row in rows if row["kind"] == "student" for c in row["commits"].values()}
    if any(c.endswith("+") or c == "unknown" for c in commits):
        warnings.append("some rows were trained from files that differ from their commit (marked +)")
    devices = sorted({device for row in rows if row["kind"] == "student" for device in row["device"].split(", ")})
    if (timed := [claim.id for claim in claims_of(table) if is_timed(claim)]) and len(devices) > 1:
        machines = f"trained on different devices ({', '.join(devices)})"
        warnings.append(f"{', '.join(timed)}: rows are compared at equal training time but {machines}")
    if len({json.dumps(protocol, sort_keys=True) for row in rows for protocol in row["protocols"]}) > 1:
        warnings.append("rows were measured with different protocols and must not be compared")
    return warnings


def of_teacher(table: Table, rows: list[RowRecord], statistics: str) -> list[str]:
    """A warning where the teacher's samples are farther from the images than images that are all alike can be.

    Those have no covariance: their Frechet distance is the trace of that of the real features, or more.
    """
    metric, manifest = distance(table.metrics), REFS / statistics / "manifest.json"
    own = [row["values"][metric][0] for row in rows if row["kind"] == "teacher"] if metric else []
    if not own or not manifest.exists():
        return []
    moments = load_file(manifest.with_name("moments.safetensors"))
    alike = float(np.trace(moments["scatter"])) / (read_json(manifest)["count"] - 1)
    if min(own) <= alike:
        return []
    told = f"the teacher's samples are far from the images: {label(metric)} {number(min(own))}"
    return [f"{told}, and images that are all alike can have {number(alike)}; train it longer (teacher.train.steps)"]


def of_code(records: dict[str, Records]) -> list[str]:
    """Warnings about rows that were trained by different code, or at different commits where a record says no more."""
    students = [one for of_run in records.values() for one in of_run.values() if "train_commit" in one]
    commits = sorted({one["train_commit"] for one in students})
    told_by_commit = len(commits) > 1 and not all(one.get("train_code") for one in students)
    trained = {run: [record.get("train_code", []) for record in of_run.values()] for run, of_run in records.items()}
    parts = {run: [part for seed in seeds for part in seed] for run, seeds in trained.items()}
    files = code_differences([part for found in parts.values() for part in found])
    mixed = [run for run, seeds in trained.items() if any(len(seed) > 1 for seed in seeds)]
    other = [run for run, found in parts.items() if other_code(found)]
    told = {
        f"rows were trained at different commits: {', '.join(commits)}": told_by_commit,
        f"not all of this was trained by the same code: {named(files)} differ": files,
        f"other code went on with half-trained runs: {', '.join(mixed)}": mixed,
        f"trained by other code than the table was made with: {', '.join(other)}": other,
    }
    return [text for text, found in told.items() if found]
