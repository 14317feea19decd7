"""One table: measured values beside the paper's, as tidy CSV, Markdown (`table_text`), and JSON for the report."""

import json
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
import yaml

from dmd2.core.errors import readable_errors
from dmd2.core.files import read_json, read_json_lines, write_json, write_text
from dmd2.core.provenance import recorded
from dmd2.core.retraining import differences, named, other_code
from dmd2.core.run import SAMPLERS, RunId
from dmd2.experiment.config import RunConfig
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.metrics import BETTER, FRECHET, best_first
from dmd2.experiment.protocols import of_record
from dmd2.experiment.tables import BESIDE, Experiment, Table, load_experiment
from dmd2.publish.table_text import Row, markdown, paper_value
from eval.report.claims import CLAIMS, distance, judge
from eval.report.differences import Arm, difference, influences
from eval.report.rules import TEACHER, Curve, Measurements


def student_row(experiment: Experiment, name: str, run: str, paper: dict[str, float | None]) -> Row:
    """Everything the table and report say about one row, over its seeds."""
    table = experiment.tables[name]
    metrics = {s: read_json(RunId(table.base, run, s).folder / "metrics.json") for s in table.seeds}
    chosen = {s: _chosen(m["snapshots"], table) for s, m in metrics.items()}
    values = {metric: {s: chosen[s][metric] for s in metrics} for metric in table.metrics}
    first, devices = next(iter(metrics.values())), dict.fromkeys(m["device"] for m in metrics.values())
    logs: dict[int, list[dict[str, Any]]] = {}
    if experiment.runs[table.base, run].train.released is None:
        if steadiness := {s: m["brightness_std"] for s, m in metrics.items() if "brightness_std" in m}:
            values["brightness_std"] = steadiness
        logs = {s: read_json_lines(RunId(table.base, run, s).folder / "log.jsonl") for s in metrics}
    return {
        "run": run, "kind": "student", "ticks": experiment.ticks(name, run), "paper": paper, "values": values,
        "step": {s: chosen[s]["step"] for s in metrics}, "student_updates": first["student_updates"],
        "seconds": {s: m["seconds"] for s, m in metrics.items()}, "device": ", ".join(devices),
        "deterministic": all(m.get("deterministic", m["device"] == "cpu") for m in metrics.values()),
        "cost": {s: m["cost"] for s, m in metrics.items() if m["cost"]},
        "curves": {s: m["snapshots"] for s, m in metrics.items()},
        "times": {s: _times(m, logs[s]) for s, m in metrics.items() if s in logs},
        "probe": {s: [[line["step"], line["probe/brightness"]] for line in log] for s, log in logs.items()},
        "grid": {s: str(RunId(table.base, run, s).folder / "grid.png") for s in metrics},
        "changed": _changed(experiment.bases[table.base], experiment.runs[table.base, run]),
        "config": first["config"], "protocol": of_record(first),
        "protocols": [of_record(m) for m in metrics.values()],
        "commits": {s: m["train_commit"] for s, m in metrics.items()},
        "estimates": {s: chosen[s]["estimates"] for s in metrics}, "captions": first.get("captions", []),
    }  # fmt: skip


def teacher_row(table: Table, sampler: str, paper: dict[str, float | None]) -> Row:
    """The same for one sampler of the teacher: one deterministic value, repeated for no seed."""
    folder = SAMPLERS / table.base / sampler
    metrics = read_json(folder / "metrics.json")
    values = {metric: {0: metrics["snapshots"][0][metric]} for metric in table.metrics}
    return {
        "run": f"teacher-{sampler}", "kind": "teacher", "ticks": {}, "paper": paper, "values": values,
        "step": {0: 0}, "student_updates": 0, "seconds": {0: metrics["seconds"]}, "device": "", "cost": {},
        "curves": {}, "probe": {}, "grid": {0: str(folder / "grid.png")}, "changed": {}, "config": metrics["sampler"],
        "protocol": of_record(metrics), "protocols": [of_record(metrics)], "commits": {0: metrics["eval_commit"]},
        "network_calls": Sampler.model_validate(metrics["sampler"]).network_calls,
        "estimates": {0: metrics["snapshots"][0]["estimates"]},
        "captions": metrics.get("captions", []),
    }  # fmt: skip


def _chosen(snapshots: list[dict[str, Any]], table: Table) -> dict[str, Any]:
    """The snapshot that is reported: the last one, or, if the table says so, the best of its first metric."""
    metric = table.metrics[0]
    return snapshots[-1] if table.select == "last" else min(snapshots, key=lambda s: best_first(metric, s[metric]))


def _times(metrics: dict[str, Any], log: list[dict[str, Any]]) -> list[float]:
    """Seconds trained until every snapshot: as logged, for a run may have gone on elsewhere, at another speed."""
    steps = [snapshot["step"] for snapshot in metrics["snapshots"]]
    known = [(line["step"], line["seconds"]) for line in log if "seconds" in line]
    if not known or known[-1][0] < steps[-1]:  # no times, or the log of a training that goes on
        known = [(steps[-1], metrics["seconds"])]
    at, seconds = np.array([(0, 0.0), *known]).T
    return [float(value) for value in np.interp(steps, at, seconds)]


def _changed(base: RunConfig, cfg: RunConfig) -> dict[str, Any]:
    """Keys of the sections that a row has otherwise than its base."""
    old, new = base.model_dump(mode="json"), cfg.model_dump(mode="json")
    return {f"{section}.{key}": value for section, values in new.items() for key, value in values.items()
            if old[section][key] != value}  # fmt: skip


def build(name: str) -> dict[str, Any]:
    """The table as a bundle: rows, claims, warnings."""
    experiment = load_experiment()
    table = experiment.tables[name]
    rows = [student_row(experiment, name, row.run, row.paper) for row in experiment.rows[name]]
    rows += [teacher_row(table, sampler, paper) for sampler, paper in table.teachers.items()]
    _add_differences(table, rows)
    warnings = _warnings(table, rows) + _code_warnings(rows)
    claims = judge(table.claims, measurements(table, rows), distance(table.metrics))
    about = table.model_dump(mode="json", exclude={"rows", "claims", "teachers", "change", "row_change"})
    return {"name": name, **about, "rows": rows, "claims": claims, "warnings": warnings}


def measurements(table: Table, rows: list[Row]) -> Measurements:
    """What the claims may ask for; the best published value of a metric is ``published best``.

    ``teacher`` is its sampler at the guidance that is distilled, and where none has that one the last of the table.
    """
    values = {(row["run"], metric): _seeded(row, found) for row in rows for metric, found in row["values"].items()}
    for metric in (metric for metric in table.metrics if metric in BETTER):
        if known := [numbers[metric] for numbers in table.published.values() if metric in numbers]:
            values["published best", metric] = {0: min(known, key=partial(best_first, metric))}
    teachers, students = ([row for row in rows if row["kind"] == kind] for kind in ("teacher", "student"))
    distilled = students[0]["config"]["teacher"]["guidance"]
    for row in sorted(teachers, key=lambda row: row["config"]["guidance"] == distilled):  # that one last, so it stays
        values |= {(TEACHER, metric): found for metric, found in row["values"].items()}
    trained = [row for row in students if all(row["seconds"].values())]
    curves = {(row["run"], metric): _over_time(row, metric) for row in trained for metric in table.metrics}
    return Measurements(values, curves)


def _over_time(row: Row, metric: str) -> dict[int, Curve]:
    """Values at every snapshot of every seed, by the seconds trained until then."""
    return {s: [(seconds, point[metric]) for seconds, point in zip(times, row["curves"][s], strict=True)]
            for s, times in row["times"].items()}  # fmt: skip


def _seeded(row: Row, found: dict[int, float]) -> dict[int, float]:
    """Values by seed; only the first of a released student, whose one training every seed repeats."""
    released = row["kind"] == "student" and row["config"]["train"]["released"] is not None
    return dict([*found.items()][:1]) if released else found


def _add_differences(table: Table, rows: list[Row]) -> None:
    """Give every row its paired difference to the reference row in the first metric, if that is a Frechet distance."""
    first = table.metrics[0]
    base = next((row for row in rows if row["run"] == table.reference_row and first in FRECHET), None)
    reference = None if base is None else _arm(base, first)
    for row in rows:
        row["difference"] = None
        if base is not None and reference is not None and row is not base:
            cyclic = base["protocol"]["labels"] == "cyclic"  # captions are not
            classes = base["config"]["data"]["classes"] if cyclic else None
            row["difference"] = difference(_arm(row, first), reference, classes)


def _arm(row: Row, metric: str) -> Arm:
    folders = {seed: Path(grid).parent for seed, grid in row["grid"].items()}
    psi = {s: influences(read_json(f / "metrics.json"), f, row["step"][s], metric) for s, f in folders.items()}
    return Arm(row["values"][metric], psi, row["kind"] == "teacher")


def _warnings(table: Table, rows: list[Row]) -> list[str]:
    warnings = []
    commits = {c for row in rows if row["kind"] == "student" for c in row["commits"].values()}
    if len(commits) > 1:
        warnings.append(f"rows were trained at different commits: {', '.join(sorted(commits))}")
    if any(c.endswith("+") or c == "unknown" for c in commits):
        warnings.append("some rows were trained from files that differ from their commit (marked +)")
    devices = sorted({device for row in rows if row["kind"] == "student" for device in row["device"].split(", ")})
    if (timed := [claim for claim in table.claims if CLAIMS[claim].timed]) and len(devices) > 1:
        machines = f"trained on different devices ({', '.join(devices)})"
        warnings.append(f"{', '.join(timed)}: rows are compared at equal training time but {machines}")
    if len({json.dumps(protocol, sort_keys=True) for row in rows for protocol in row["protocols"]}) > 1:
        warnings.append("rows were measured with different protocols and must not be compared")
    return warnings


def _code_warnings(rows: list[Row]) -> list[str]:
    """Which code trained the rows, where that is known; the table is not out of date when the code changes."""
    records = {row["run"]: [Path(grid).with_name("metrics.json") for grid in row["grid"].values()]
               for row in rows if row["kind"] == "student"}  # fmt: skip
    trained = {run: [read_json(path).get("train_code", []) for path in paths] for run, paths in records.items()}
    parts = {run: [part for seed in seeds for part in seed] for run, seeds in trained.items()}
    files = differences([part for found in parts.values() for part in found])
    mixed = [run for run, seeds in trained.items() if any(len(seed) > 1 for seed in seeds)]
    other = [run for run, found in parts.items() if other_code(found)]
    told = {f"not all of this was trained by the same code: {named(files)} differ": files,
            f"other code went on with half-trained runs: {', '.join(mixed)}": mixed,
            f"trained by other code than the table was made with: {', '.join(other)}": other}  # fmt: skip
    return [text for text, found in told.items() if found]


def tidy(bundle: dict[str, Any]) -> pd.DataFrame:
    """One line per run, seed and metric."""
    lines = [
        {
            "run": row["run"], "seed": seed, "metric": metric, "value": value, "paper": paper_value(row, metric),
            "student_updates": row["student_updates"], "seconds": row["seconds"][seed], "step": row["step"][seed],
            **{name: row["cost"].get(seed, {}).get(name) for name in ("gpu_hours", "cpu_hours")},
            "images": row["protocol"]["images"], "detector": row["protocol"]["detector"],
            "reference": row["protocol"]["reference"], "commit": row["commits"][seed],
            **{key: row["estimates"][seed].get(metric, {}).get(key) for key in ("se", "low", "high", "bias")},
        }
        for row in bundle["rows"] for metric, values in row["values"].items() for seed, value in values.items()
    ]  # fmt: skip
    return pd.DataFrame(lines)


def means(bundle: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Mean of every metric over seeds, by row: what ``dvc metrics diff`` compares."""
    return {row["run"]: {m: fmean(values.values()) for m, values in row["values"].items()} for row in bundle["rows"]}


def curves(bundle: dict[str, Any]) -> pd.DataFrame:
    """First metric of every snapshot of every run and seed: what ``dvc plots diff`` draws."""
    metric = bundle["metrics"][0]
    lines = [(row["run"], seed, point["step"], point[metric])
             for row in bundle["rows"] for seed, points in row["curves"].items() for point in points]  # fmt: skip
    return pd.DataFrame(lines, columns=["run", "seed", "step", "value"])


def main(name: str, out: Annotated[Path, typer.Option(help="folder")] = Path("results/tables")) -> None:
    """Write the table NAME as Markdown, CSV and JSON from the metrics of its runs, and what DVC compares."""
    with readable_errors():
        experiment = load_experiment()
        beside = [out / f"{name}.{suffix}" for suffix in BESIDE]
        with recorded(out / f"{name}.json", experiment.shown(name), experiment.measured(name), beside):
            bundle = build(name)
            texts = [markdown(bundle), tidy(bundle).to_csv(index=False), curves(bundle).to_csv(index=False)]
            for path, text in zip(beside, [*texts, yaml.safe_dump(means(bundle), sort_keys=False)], strict=True):
                write_text(path, text)
            write_json(out / f"{name}.json", bundle)


if __name__ == "__main__":
    typer.run(main)
