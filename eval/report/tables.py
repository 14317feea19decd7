"""One table of results: values beside the paper's, as JSON for the pages, Markdown (`table_text`), and tidy CSV."""

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
from dmd2.core.run import SAMPLERS, RunId
from dmd2.experiment.dotted_keys import differences
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.metrics import BETTER, FRECHET, best_first
from dmd2.experiment.protocols import of_record
from dmd2.experiment.tables import BESIDE, Table, experiment_with
from dmd2.publish.table_text import RowRecord, TableRecord, markdown, paper_value
from eval.metrics.estimate import Estimate
from eval.report.claims import claims_of, distance, judge
from eval.report.differences import difference, with_influences
from eval.report.logs import summary
from eval.report.passes import Passes, passes_by_config
from eval.report.rules import TEACHER, Measurements
from eval.report.warnings import Records, of_code, of_rows, of_teacher


def build(name: str) -> TableRecord:
    """The table with its rows, claims and warnings.

    Raises:
        UserError: a record of a run is missing or damaged.
    """
    experiment = experiment_with(name)
    table = experiment.tables[name]
    folders = {row.run: {s: RunId(table.base, row.run, s).folder for s in table.seeds} for row in experiment.rows[name]}
    folders |= {f"teacher-{sampler}": {0: SAMPLERS / table.base / sampler} for sampler in table.teachers}
    papers = [row.paper for row in experiment.rows[name]] + [*table.teachers.values()]
    records, rows, passes = dict[str, Records](), list[RowRecord](), passes_by_config()
    for (run, of_run), paper in zip(folders.items(), papers, strict=True):
        records[run] = found = {seed: read_json(folder / "metrics.json") for seed, folder in of_run.items()}
        row = {"run": run, "paper": paper, **_measured(table, of_run, found)}
        if cfg := experiment.runs.get((table.base, run)):
            changed = {key: value for key, _, value in differences(experiment.bases[table.base], cfg)}
            row |= {"ticks": experiment.ticks(name, run), "changed": changed, **_trained(of_run, found, passes)}
        else:
            row |= _sampled(found[0])
        rows.append(row)
    _add_differences(table, rows, records)
    warnings = [*of_rows(table, rows), *of_code(records), *_add_beside(experiment.beside(name), table, rows)]
    claims = judge(claims_of(table), measurements(table, rows), distance(table.metrics))
    about = table.model_dump(mode="json", exclude={"rows", "claims", "teachers", "change", "row_change"})
    warnings += of_teacher(table, rows, experiment.bases[table.base].eval.statistics)
    return {"name": name, **about, "rows": rows, "claims": claims, "warnings": warnings}


def _add_beside(file: Path | None, table: Table, rows: list[RowRecord]) -> list[str]:
    """Give rows the first metric of the rows of the same names in the record of another table; warnings about them."""
    if file is None:
        return []
    others = {row["run"]: row for row in read_json(file)["rows"]}
    for row in rows:
        row["beside"] = others.get(row["run"], {}).get("values", {}).get(table.metrics[0], {})
    here, there = ({of_record(row)["detector"] for row in of} for of in (rows, others.values()))
    if here == there:
        return []
    return [
        f"{table.beside} was measured with {', '.join(there)}, this table with {', '.join(here)}: compare orders only"
    ]


def _measured(table: Table, folders: dict[int, Path], records: Records) -> RowRecord:
    """The part of a row that students and samplers of the teacher share; numbers are by training seed."""
    chosen = {seed: _chosen(record["snapshots"], table) for seed, record in records.items()}
    values = {metric: {s: snapshot[metric] for s, snapshot in chosen.items()} for metric in table.metrics}
    if steadiness := {s: r["brightness_std"] for s, r in records.items() if "brightness_std" in r}:
        values["brightness_std"] = steadiness
    protocols = [of_record(record) for record in records.values()]
    return {
        "values": values,
        "step": {s: snapshot["step"] for s, snapshot in chosen.items()},
        "estimates": {s: snapshot["estimates"] for s, snapshot in chosen.items()},
        "seconds": {s: record["seconds"] for s, record in records.items()},
        "eval_seconds": {s: record.get("eval_seconds") for s, record in records.items()},
        "grid": {s: str(folder / "grid.png") for s, folder in folders.items()},
        "protocol": protocols[0],
        "protocols": protocols,
        "captions": next(iter(records.values())).get("captions", []),
    }


def _trained(folders: dict[int, Path], records: Records, passes: Passes) -> RowRecord:
    """The part of a row that only students have, those of released weights included."""
    first = next(iter(records.values()))
    released = first["config"]["train"]["released"] is not None
    of_iteration = None if released else passes(first["config"])
    logs = {} if released else {s: read_json_lines(folder / "log.jsonl") for s, folder in folders.items()}
    return {
        "kind": "student",
        "student_updates": first["student_updates"],
        "device": ", ".join(dict.fromkeys(record["device"] for record in records.values())),
        "deterministic": all(r.get("deterministic", r["device"] == "cpu") for r in records.values()),
        "cost": {s: record["cost"] for s, record in records.items() if record["cost"]},
        "passes": of_iteration and of_iteration * first["config"]["critic"]["ratio"],  # of an update of the student
        "curves": {s: _with_passes(record["snapshots"], of_iteration) for s, record in records.items()},
        "times": {s: _times(records[s], log) for s, log in logs.items()},
        "log": summary(logs.values(), first["config"]["train"]["steps"]),
        "probe": {s: [[line["step"], line["probe/brightness"]] for line in log] for s, log in logs.items()},
        "config": first["config"],
        "commits": {s: record["train_commit"] for s, record in records.items()},
    }


def _with_passes(snapshots: list[dict[str, Any]], of_iteration: float | None) -> list[dict[str, Any]]:
    """Snapshots with the network passes of the training up to them, where these are known."""
    return [s if of_iteration is None else {**s, "passes": of_iteration * s["step"]} for s in snapshots]


def _sampled(metrics: dict[str, Any]) -> RowRecord:
    """The part of a row that only samplers of the teacher have. They have no training seeds: numbers are under 0."""
    return {
        "kind": "teacher",
        "student_updates": 0,
        "device": "",
        **{name: {} for name in ("ticks", "cost", "curves", "log", "probe", "changed")},
        "config": metrics["sampler"],
        "commits": {0: metrics["eval_commit"]},
        "network_calls": Sampler.model_validate(metrics["sampler"]).network_calls,
    }


def _chosen(snapshots: list[dict[str, Any]], table: Table) -> dict[str, Any]:
    """The snapshot that the table reports: the last one, or with ``select: best`` the best by its first metric."""
    metric = table.metrics[0]
    return snapshots[-1] if table.select == "last" else min(snapshots, key=lambda s: best_first(metric, s[metric]))


def _times(metrics: dict[str, Any], log: list[dict[str, Any]]) -> list[float]:
    """Seconds of training before each snapshot, from the log: a run may have continued on another machine."""
    steps = [snapshot["step"] for snapshot in metrics["snapshots"]]
    known = [(line["step"], line["seconds"]) for line in log if "seconds" in line]
    if not known or known[-1][0] < steps[-1]:  # no times, or a newer training has begun another log
        known = [(steps[-1], metrics["seconds"])]
    at, seconds = np.array([(0, 0.0), *known]).T
    return [float(value) for value in np.interp(steps, at, seconds)]


def measurements(table: Table, rows: list[RowRecord]) -> Measurements:
    """The values and curves that claims are judged by, of each row and of two more.

    ``published best`` has the best published value of each metric. ``teacher`` is the sampler with the guidance that is
    distilled (where it is drawn, the last one in its range), or the table's last sampler if none has that guidance.
    """
    values, curves = {}, {}
    for row in rows:
        # The one training of a released student is not repeated by seeds.
        released = row["kind"] == "student" and row["config"]["train"]["released"] is not None
        for metric, found in row["values"].items():
            values[row["run"], metric] = dict([*found.items()][:1]) if released else found
    for metric in (metric for metric in table.metrics if metric in BETTER):
        if known := [numbers[metric] for numbers in table.published.values() if metric in numbers]:
            values["published best", metric] = {0: min(known, key=partial(best_first, metric))}
    teachers, students = ([row for row in rows if row["kind"] == kind] for kind in ("teacher", "student"))
    dm, distilled = students[0]["config"]["dm"], students[0]["config"]["teacher"]["guidance"]
    low, high = (dm.get("guidance") if dm.get("weight", 1) > 0 else None) or (distilled, distilled)
    for row in sorted(teachers, key=lambda row: low <= row["config"]["guidance"] <= high):  # the last one overwrites
        values |= {(TEACHER, metric): found for metric, found in row["values"].items()}
    for row in (row for row in students if all(row["seconds"].values())):
        for metric in table.metrics:
            curves[row["run"], metric] = {
                s: [(seconds, point[metric]) for seconds, point in zip(times, row["curves"][s], strict=True)]
                for s, times in row["times"].items()
            }
    return Measurements(values, curves)


def _add_differences(table: Table, rows: list[RowRecord], records: dict[str, Records]) -> None:
    """Give every row its paired difference to the reference row in the first metric, if that is a Frechet distance."""
    metric = table.metrics[0]
    base = next((row for row in rows if row["run"] == table.reference_row and metric in FRECHET), None)
    # Only cyclic labels say of which class an image is; images drawn for captions have none.
    classes = base["config"]["data"]["classes"] if base and base["protocol"]["labels"] == "cyclic" else None
    reference = _by_seed(metric, base, records[base["run"]], classes) if base else {}
    for row in rows:
        row["difference"] = None
        if base is not None and row is not base:
            ours, theirs = _by_seed(metric, row, records[row["run"]], classes), reference
            if row["kind"] == "teacher":  # its one value is compared with every seed
                ours = dict.fromkeys(theirs, ours[0])
            elif base["kind"] == "teacher":
                theirs = dict.fromkeys(ours, theirs[0])
            row["difference"] = difference([ours[s].minus(theirs[s]) for s in sorted(ours.keys() & theirs)])


def _by_seed(metric: str, row: RowRecord, records: Records, classes: int | None) -> dict[int, Estimate]:
    return {
        s: with_influences(records[s], Path(grid).parent, row["step"][s], metric, row["values"][metric][s], classes)
        for s, grid in row["grid"].items()
    }


def tidy(table: TableRecord) -> pd.DataFrame:
    """One line per run, seed and metric."""
    lines = [
        {
            "run": row["run"],
            "seed": seed,
            "metric": metric,
            "value": value,
            "paper": paper_value(row, metric),
            "student_updates": row["student_updates"],
            "seconds": row["seconds"][seed],
            "step": row["step"][seed],
            **{name: row["cost"].get(seed, {}).get(name) for name in ("gpu_hours", "cpu_hours")},
            **{name: row["protocol"][name] for name in ("images", "detector", "reference")},
            "commit": row["commits"][seed],
            **{key: row["estimates"][seed].get(metric, {}).get(key) for key in ("se", "low", "high", "bias")},
        }
        for row in table["rows"]
        for metric, values in row["values"].items()
        for seed, value in values.items()
    ]
    return pd.DataFrame(lines)


def means(table: TableRecord) -> dict[str, dict[str, float]]:
    """Mean of every metric over seeds, by row: what ``dvc metrics diff`` compares."""
    return {row["run"]: {m: fmean(values.values()) for m, values in row["values"].items()} for row in table["rows"]}


def curves(table: TableRecord) -> pd.DataFrame:
    """First metric of every snapshot of every run and seed: what ``dvc plots diff`` draws."""
    metric = table["metrics"][0]
    lines = [
        (row["run"], seed, point["step"], point[metric])
        for row in table["rows"]
        for seed, points in row["curves"].items()
        for point in points
    ]
    return pd.DataFrame(lines, columns=["run", "seed", "step", "value"])


def main(name: str, out: Annotated[Path, typer.Option(help="folder")] = Path("results/tables")) -> None:
    """Write the table NAME as Markdown, CSV and JSON from the metrics of its runs, and what DVC compares."""
    with readable_errors():
        experiment = experiment_with(name)
        beside = [out / f"{name}.{suffix}" for suffix in BESIDE]
        with recorded(out / f"{name}.json", experiment.shown(name), experiment.measured(name), beside):
            table = build(name)
            texts = [markdown(table), tidy(table).to_csv(index=False), curves(table).to_csv(index=False)]
            for path, text in zip(beside, texts, strict=True):
                write_text(path, text)
            for_dvc = {out / f"metrics/{name}/{run}.yaml": values for run, values in means(table).items()}
            for left in set((out / f"metrics/{name}").glob("*.yaml")) - set(for_dvc):
                left.unlink()
            for path, values in for_dvc.items():
                write_text(path, yaml.safe_dump(values, sort_keys=False))
            write_json(out / f"{name}.json", table)


if __name__ == "__main__":
    typer.run(main)
