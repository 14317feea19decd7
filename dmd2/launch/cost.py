"""What a training cost: GPU- and CPU-hours as Slurm accounted them, or as the wall clock says."""

import re
import time
from contextlib import suppress
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, write_json
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import sacct, submissions

LAG = 20.0  # seconds the accounting may run behind


def training_cost(run: RunId, record: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Cost of a finished run by Slurm's accounting, as it says now or said before, or else by the wall clock.

    The second value is a sentence where the accounting should know the cost and does not say it.
    """
    known = submissions(run)
    if not (jobs := known["jobs"]):
        return wall_clock_cost(record), ""
    if cost := slurm_cost(jobs):
        # Kept where Snakemake does not delete it, unless another job was submitted while sacct was asked.
        if submissions(run) == known:
            write_json(run.folder / "job.json", {**known, "cost": {"jobs": jobs, "value": cost}})
        return cost, ""
    kept = known.get("cost") or {}
    before = kept["value"] if kept.get("jobs") == jobs else _published_cost(run, record)
    now = "what it said before is kept" if before else "train.json has hours by the wall clock"
    return before or wall_clock_cost(record), f"sacct does not say what the jobs cost; {now}"


def _published_cost(run: RunId, record: dict[str, Any]) -> dict[str, Any] | None:
    """What the accounting said of exactly this training when it was published before."""
    with suppress(UserError, AttributeError):
        published = read_json(run.folder / "train.json")
        same = all(published.get(key) == value for key, value in record.items())
        return published["cost"] if same and published.get("cost", {}).get("source") == "sacct" else None
    return None


def wall_clock_cost(record: dict[str, Any]) -> dict[str, Any]:
    """Training time of a finished run times its processes and threads, without evaluation and waiting."""
    hours = record["seconds"] * record["processes"] / 3600
    gpus = 0.0 if record["device"] == "cpu" else hours
    return {"source": "wall clock", "gpu_hours": gpus, "cpu_hours": hours * record["threads"]}


def slurm_cost(jobs: list[str]) -> dict[str, Any] | None:
    """Hours of all jobs of a run, with every restart; None where sacct does not tell them."""
    until = time.monotonic() + LAG
    while True:
        try:
            starts = sacct(jobs, "State,ElapsedRaw,AllocTRES", "--duplicates", timeout=LAG)
        except UserError:
            return None
        busy = any(state.split()[0] in ("RUNNING", "COMPLETING", "PENDING") for state, _, _ in starts)
        if (starts and not busy) or time.monotonic() > until:
            break
        time.sleep(1)
    hours = {
        name: sum(int(seconds) * _tres(resource, tres) for _, seconds, tres in starts) / 3600
        for name, resource in (("gpu_hours", "gres/gpu"), ("cpu_hours", "cpu"))
    }
    return {"source": "sacct", **hours, "starts": len(starts)} if starts else None


def _tres(name: str, text: str) -> int:
    """Count of a trackable resource in ``cpu=8,gres/gpu=2,mem=10G``."""
    match = re.search(rf"(?:^|,){name}=(\d+)", text)
    return int(match[1]) if match else 0
