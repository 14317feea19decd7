"""One table: measured values beside the paper's, as tidy CSV, Markdown, and a JSON bundle for the report."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
import yaml

from dmd2.ablations import BESIDE, Experiment, Table, load_experiment
from dmd2.changes import dotted_keys
from dmd2.config import RunConfig
from dmd2.errors import readable_errors
from dmd2.files import read_json, read_json_lines, write_json, write_text
from dmd2.made import recorded
from dmd2.run import SAMPLERS, RunId
from eval.claims import Measurements, judge, show
from eval.differences import Arm, difference, influences, shown

FRECHET = ("fd", "fid")  # metrics whose evaluation leaves per-image influences
PAPER_NAME = {"fd": "fid"}  # the paper's metric that ours stands in for
LABELS = {
    "fd": "FD", "fid": "FID", "patch_fid": "Patch FID", "clip_score": "CLIP", "accuracy": "Class accuracy",
    "brightness": "Brightness", "brightness_std": "Brightness SD",
}  # fmt: skip

Row = dict[str, Any]


def student_row(experiment: Experiment, name: str, run: str, paper: dict[str, float | None]) -> Row:
    """Everything the table and report say about one row, over its seeds."""
    table = experiment.tables[name]
    metrics = {s: read_json(RunId(table.base, run, s).folder / "metrics.json") for s in table.seeds}
    chosen = {s: _chosen(m["snapshots"], table) for s, m in metrics.items()}
    values = {metric: {s: chosen[s][metric] for s in metrics} for metric in table.metrics}
    values["brightness_std"] = {s: m["brightness_std"] for s, m in metrics.items()}
    first = next(iter(metrics.values()))
    logs = {s: read_json_lines(RunId(table.base, run, s).folder / "log.jsonl") for s in metrics}
    return {
        "run": run, "kind": "student", "ticks": experiment.ticks(name, run), "paper": paper, "values": values,
        "step": {s: chosen[s]["step"] for s in metrics}, "student_updates": first["student_updates"],
        "seconds": {s: m["seconds"] for s, m in metrics.items()}, "device": first["device"],
        "cost": {s: m["cost"] for s, m in metrics.items()},
        "curves": {s: m["snapshots"] for s, m in metrics.items()},
        "probe": {s: [[line["step"], line["probe/brightness"]] for line in log] for s, log in logs.items()},
        "grid": {s: str(RunId(table.base, run, s).folder / "grid.png") for s in metrics},
        "changed": _changed(experiment.bases[table.base], experiment.runs[table.base, run]),
        "config": first["config"], "protocol": first["protocol"],
        "commits": {s: m["train_commit"] for s, m in metrics.items()},
        "estimates": {s: chosen[s]["estimates"] for s in metrics},
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
        "protocol": metrics["protocol"], "commits": {0: metrics["eval_commit"]},
        "network_calls": metrics["network_calls"], "estimates": {0: metrics["snapshots"][0]["estimates"]},
    }  # fmt: skip


def _chosen(snapshots: list[dict[str, Any]], table: Table) -> dict[str, Any]:
    """The snapshot that is reported: the last one, or, if the table says so, the best of its first metric."""
    return snapshots[-1] if table.select == "last" else min(snapshots, key=lambda s: s[table.metrics[0]])


def _changed(base: RunConfig, cfg: RunConfig) -> dict[str, Any]:
    old, new = base.complete(), cfg.complete()
    return {key: _at(new, key) for key in dotted_keys(new) if key.count(".") == 1 and _at(old, key) != _at(new, key)}


def _at(values: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return values[section][name]


def build(name: str) -> dict[str, Any]:
    """The table as a bundle: rows, claims, warnings."""
    experiment = load_experiment()
    table = experiment.tables[name]
    rows = [student_row(experiment, name, row.run, row.paper) for row in experiment.rows[name]]
    rows += [teacher_row(table, sampler, paper) for sampler, paper in table.teachers.items()]
    _add_differences(table, rows)
    measured = {(row["run"], metric): values for row in rows for metric, values in row["values"].items()}
    claims = judge(table.claims, Measurements(measured), table.metrics[0])
    about = table.model_dump(mode="json", exclude={"rows", "claims", "teachers", "change", "row_change"})
    return {"name": name, **about, "rows": rows, "claims": claims, "warnings": _warnings(rows)}


def _add_differences(table: Table, rows: list[Row]) -> None:
    """Give every row its paired difference to the reference row in the first metric, if that is a Frechet distance."""
    first = table.metrics[0]
    base = next((row for row in rows if row["run"] == table.reference_row and first in FRECHET), None)
    reference = None if base is None else _arm(base, first)
    for row in rows:
        row["difference"] = None
        if base is not None and reference is not None and row is not base:
            classes = base["config"]["data"]["classes"] if base["protocol"]["labels"] == "cyclic" else None
            row["difference"] = difference(_arm(row, first), reference, classes)


def _arm(row: Row, metric: str) -> Arm:
    folders = {seed: Path(grid).parent for seed, grid in row["grid"].items()}
    psi = {s: influences(read_json(f / "metrics.json"), f, row["step"][s]) for s, f in folders.items()}
    return Arm(row["values"][metric], psi, row["kind"] == "teacher")


def _warnings(rows: list[Row]) -> list[str]:
    warnings = []
    commits = {c for row in rows if row["kind"] == "student" for c in row["commits"].values()}
    if len(commits) > 1:
        warnings.append(f"rows were trained at different commits: {', '.join(sorted(commits))}")
    if any(c.endswith("+") or c == "unknown" for c in commits):
        warnings.append("some rows were trained from files that differ from their commit (marked +)")
    if len({json.dumps(row["protocol"], sort_keys=True) for row in rows}) > 1:
        warnings.append("rows were measured with different protocols and must not be compared")
    return warnings


def paper_value(row: Row, metric: str) -> float | None:
    """The paper's number for a metric, or for the one ours stands in for."""
    return row["paper"].get(metric, row["paper"].get(PAPER_NAME.get(metric, metric)))


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


def summary(values: dict[Any, float]) -> str:
    """``mean ± SD`` over seeds, or the single value."""
    return show(np.array(list(values.values())))


def hours(values: Iterable[float]) -> str:
    """Mean of hours over seeds, with three digits."""
    return show(np.array([fmean(values)]))


def gap(bundle: dict[str, Any], row: Row) -> str:
    """Distance to the paper: a difference when the metric is the paper's own, else both ratios to the reference row."""
    metric = bundle["metrics"][0]
    value, paper = float(np.mean(list(row["values"][metric].values()))), paper_value(row, metric)
    if metric in row["paper"] and paper is not None:
        return f"{value - paper:+.2f}"
    reference = next((r for r in bundle["rows"] if r["run"] == bundle["reference_row"]), None)
    if reference is None:
        return "–"
    ours = value / float(np.mean(list(reference["values"][metric].values())))
    base = paper_value(reference, metric)
    return f"×{ours:.2f}" + (f" (paper ×{paper / base:.2f})" if paper is not None and base else "")


def cells(bundle: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and text cells of the table, for Markdown and for the report."""
    first = bundle["metrics"][0]
    own = first in PAPER_NAME
    gap_name = f"gap to `{bundle['reference_row']}`" if own else "gap"
    header = ["run", *bundle["columns"], LABELS.get(first, first), f"paper's {LABELS[PAPER_NAME.get(first, first)]}"]
    rest = [m for m in [*bundle["metrics"][1:], "brightness_std"]]
    header += [gap_name, *(LABELS.get(m, m) for m in rest), "student updates", "wall time"]
    gpu = any(cost["gpu_hours"] for row in bundle["rows"] for cost in row["cost"].values())
    header.append("GPU-hours" if gpu else "CPU-hours")
    lines = []
    for row in bundle["rows"]:
        paper = paper_value(row, first)
        ticks = ["✓" if row["ticks"].get(c) else "" for c in bundle["columns"]]
        others = [summary(row["values"][m]) if m in row["values"] else "–" for m in rest]
        seconds = float(np.mean(list(row["seconds"].values())))
        updates = str(row["student_updates"]) if row["kind"] == "student" else f"{row['network_calls']} calls"
        papers = "–" if paper is None else f"{paper:.2f}"
        spent = [cost["gpu_hours" if gpu else "cpu_hours"] for cost in row["cost"].values()]
        lines.append([f"`{row['run']}`", *ticks, summary(row["values"][first]), papers, gap(bundle, row), *others,
                      updates, f"{seconds:.0f} s" if row["kind"] == "student" else "–",
                      hours(spent) if spent else "–"])  # fmt: skip
    return header, lines


def certainty(bundle: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the second table: how sure the first metric is, and the paired differences."""
    metric, base = bundle["metrics"][0], bundle["reference_row"]
    label = LABELS.get(metric, metric)
    header = ["run", label, "SE of the images", "bias at this n", f"{label} without bias"]
    header += [f"minus `{base}`, paired, 95 %"] if base else []
    lines = []
    for row in bundle["rows"]:
        found = [estimates[metric] for estimates in row["estimates"].values()]
        value = float(np.mean([e["value"] for e in found]))
        error = _root_mean_square([e["se"] for e in found])
        bias = None if any(e["bias"] is None for e in found) else float(np.mean([e["bias"] for e in found]))
        numbers = [value, error, bias, None if bias is None else value - bias]
        lines.append([f"`{row['run']}`", *("–" if x is None else f"{x:.3g}" for x in numbers),
                      *([shown(row["difference"])] if base else [])])  # fmt: skip
    return header, lines


def _root_mean_square(errors: list[float | None]) -> float | None:
    known = [e for e in errors if e is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if len(known) == len(errors) else None


def explained(bundle: dict[str, Any]) -> str:
    """What the intervals of the second table cover."""
    seeds = len(bundle["seeds"])
    noise = (f"a t-interval over {seeds} training seeds, so it covers the noise of training and of sampling"
             if seeds > 1 else "of one run: it covers the finite sample of images, not another training")  # fmt: skip
    return ("SE and bias are those of the finite number of images at one training seed (root mean square over "
            "seeds). Differences are taken at equal training seeds, sample seeds and labels; the interval is "
            f"{noise}.")  # fmt: skip


def markdown(bundle: dict[str, Any]) -> str:
    """The table as Markdown with its protocol, claims and warnings."""
    header, lines = cells(bundle)
    protocol = bundle["rows"][0]["protocol"]
    text = [f"# {bundle['title']}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    seeds = bundle["seeds"]
    spread = "one seed" if len(seeds) == 1 else f"mean ± SD over seeds {', '.join(map(str, seeds))}"
    chosen = "the last snapshot" if bundle["select"] == "last" else "the best snapshot by the reported metric itself"
    text += ["", f"{spread[0].upper()}{spread[1:]}; {chosen}; {protocol['images']} images per number, labels "
             f"{protocol['labels']}, rounding {protocol['rounding']}; detector {protocol['detector']}; reference "
             f"{protocol['reference']}. Brightness SD: fixed noise, over training without its first 20 %."]  # fmt: skip
    if bundle["metrics"][0] in PAPER_NAME:
        text += ["", "FD is the Fréchet distance in this detector's features: it is not FID, and the paper's column "
                 "is FID on its own dataset, so only ratios and orders can be compared."]  # fmt: skip
    if bundle["metrics"][0] in FRECHET:
        header, lines = certainty(bundle)
        text += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        text += ["| " + " | ".join(line) + " |" for line in lines] + ["", explained(bundle)]
    text += ["", bundle["notes"]] if bundle["notes"] else []
    text += ["", *(f"**Warning:** {warning}." for warning in bundle["warnings"])] if bundle["warnings"] else []
    if bundle["claims"]:
        text += ["", "| claim | paper | verdict | evidence |", "|---|---|---|---|"]
        text += [f"| {c['id']}: {c['claim']} | {c['paper']} | **{c['verdict']}** | {c['evidence']} |"
                 for c in bundle["claims"]]  # fmt: skip
    return "\n".join(text) + "\n"


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
