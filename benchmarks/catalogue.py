"""How long the run catalogue takes for many runs: invented records as large as those of digits runs.

``python -m benchmarks.catalogue [RUNS]`` from the repository root; about 120 MB below the temporary folder.
"""

import json
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dmd2.core.files import write_json, write_text
from dmd2.core.run import RunId
from dmd2.experiment.tables import load_experiment
from eval.catalogue.columns import LOG_SCHEMA, describe, write_parquet
from eval.catalogue.read import catalogue, training_logs
from eval.metrics.estimate import Estimate

RUNS, SNAPSHOTS, LOG_LINES, VALUES = 1000, 10, 150, 18


def invent(root: Path, run: RunId, config: dict[str, object]) -> None:
    """Write train.json, metrics.json and log.jsonl of one run."""
    folder, steps = root / run.folder, [150 * (i + 1) for i in range(SNAPSHOTS)]
    common = {"student_updates": 300, "seconds": 152.8, "device": "cpu",
              "cost": {"source": "wall clock", "gpu_hours": 0.0, "cpu_hours": 0.04}}  # fmt: skip
    files = [{"path": f"snapshots-0123abcd/{s:07d}.safetensors", "bytes": 705740, "sha256": f"{s:064x}"} for s in steps]
    write_json(folder / "train.json", {
        "kind": "run", "run": str(run), "key": "0123abcd", "steps": steps[-1], "processes": 1, "threads": 1,
        "torch": "2", "commit": "4be1c02d9", "restarts": 0, "files": files, **common,
        "config": {name: part for name, part in config.items() if name != "eval"},
    })  # fmt: skip
    found = {name: Estimate(run.seed + 0.5, 0.5, 2000, 0.25) for name in ("fd", "accuracy", "brightness")}
    values = {**{n: e.value for n, e in found.items()}, "estimates": {n: e.as_json() for n, e in found.items()}}
    write_json(folder / "metrics.json", {
        "kind": "metrics", "run": str(run), "row": run.name, "seed": run.seed, "brightness_std": 0.01,
        "protocol": {"detector": "d", "reference": "r", "images": 2000, "draws": 1, "labels": "cyclic"},
        "snapshots": [{"step": s, "student_updates": s // 5, **values} for s in steps], "config": config,
        "train_commit": "4be1c02d9", "eval_commit": "4be1c02d9", "eval_seconds": 14.2, "files": [], **common,
    })  # fmt: skip
    line = {f"part/value{i}": 0.123456789012345 * i for i in range(VALUES)}
    log = [json.dumps({"step": 10 * i, "seconds": float(i), **line}) + "\n" for i in range(1, LOG_LINES + 1)]
    write_text(folder / "log.jsonl", "".join(log))


def main(count: Annotated[int, typer.Argument()] = RUNS) -> None:
    config = load_experiment().runs["digits", "dmd2"].model_dump(mode="json")
    with TemporaryDirectory() as name:
        root = Path(name)
        for seed in range(count):
            invent(root, RunId("digits", "dmd2", seed), config)
            if seed % 100 == 99:
                print(f"{seed + 1} of {count} runs invented", file=sys.stderr, flush=True)
        marks = [time.perf_counter()]
        table = catalogue(root)
        marks.append(time.perf_counter())
        write_parquet(table, root / "catalogue.parquet", describe(table.columns))
        marks.append(time.perf_counter())
        logs = training_logs(root)
        marks.append(time.perf_counter())
        write_parquet(logs, root / "logs.parquet", LOG_SCHEMA)
        marks.append(time.perf_counter())
        sizes = [(root / f"{kind}.parquet").stat().st_size / 1e6 for kind in ("catalogue", "logs")]
    seconds = [after - before for before, after in pairwise(marks)]
    print(f"{count} runs: {len(table)} lines of {len(table.columns)} columns read in {seconds[0]:.1f} s, "
          f"written in {seconds[1]:.1f} s ({sizes[0]:.1f} MB)")  # fmt: skip
    print(f"{len(logs)} logged values read in {seconds[2]:.1f} s, written in {seconds[3]:.1f} s ({sizes[1]:.1f} MB)")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
