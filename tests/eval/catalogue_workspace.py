"""A workspace for the run catalogue: real trainings of a tiny network, metrics in the form of an evaluation's."""

from contextlib import chdir
from pathlib import Path
from typing import Any

import pandas as pd

from dmd2.core.files import read_json, write_json
from dmd2.core.run import RunId
from eval.catalogue.read import catalogue
from eval.metrics.estimate import Estimate
from tests import tiny
from tests.exported import trained

STEPS = 6
RUNS = [RunId("digits", row, seed) for row in ("few", "many") for seed in (0, 1)]
RUN = RUNS[0]
PROTOCOL = {"detector": "d@1", "reference": "r@2 (9 images)", "images": 8, "draws": 1, "labels": "cyclic",
            "rounding": "round", "covariance_init": "zeros"}  # fmt: skip


def measured(value: float) -> dict[str, Any]:
    found = {"fd": Estimate(value, 0.5, 8, 0.25), "accuracy": Estimate(0.5, None, 8)}
    return {**{n: e.value for n, e in found.items()}, "estimates": {n: e.as_json() for n, e in found.items()}}


def evaluate(run: RunId) -> None:
    """Write metrics.json as `eval.runs.evaluate` does, with made-up values."""
    record = read_json(run.folder / "train.json")
    snapshots = [{"step": s, "student_updates": -(-s // 2), **measured(10.0 * s + run.seed)} for s in (2, 4, 6)]
    write_json(run.folder / "metrics.json", {
        "kind": "metrics", "run": str(run), "row": run.name, "seed": run.seed, "protocol": PROTOCOL,
        "brightness_std": 0.01, "snapshots": snapshots,
        **{key: record[key] for key in ("key", "student_updates", "seconds", "device", "cost")},
        "train_commit": record["commit"], "eval_commit": "abc", "eval_seconds": 1.5, "files": [],
        "config": {**record["config"], "eval": tiny.values()["eval"]},
    })  # fmt: skip


def sampler(name: str) -> None:
    write_json(Path("results/teachers/digits") / name / "metrics.json", {
        "kind": "metrics", "run": f"digits/teacher-{name}", "row": f"teacher-{name}", "seed": 0, "protocol": PROTOCOL,
        "network_calls": 7, "sampler": {"solver": "heun", "steps": 4}, "eval_commit": "abc", "seconds": 3.0,
        "snapshots": [{"step": 0, "student_updates": 0, **measured(5.0)}], "files": [],
    })  # fmt: skip


def build(folder: Path) -> Path:
    """Make `folder` a workspace with four trainings, evaluated, and one sampler of their teacher."""
    with chdir(folder):
        for run in RUNS:
            changes = {"train__steps": STEPS, "train__snapshot_every": 2, "train__log_every": 3}
            evaluate(trained("edm", run=run, dm__weight=1.0 if run.name == "few" else 0.0, **changes))
        sampler("ode")
    return folder


def of(run: RunId, table: pd.DataFrame | None = None) -> pd.DataFrame:
    table = catalogue() if table is None else table
    return table[table.run == str(run)]


def edit(path: Path, **changes: Any) -> None:
    write_json(path, {**read_json(path), **changes})
