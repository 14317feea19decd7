"""What a training cost: GPU- and CPU-hours as Slurm accounted them, or as the wall clock says."""

import re
import time
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.slurm_queue import sacct

LAG = 20.0  # seconds the accounting may run behind


def wall_clock_cost(record: dict[str, Any]) -> dict[str, Any]:
    """Training time of a finished run times its processes and threads; evaluation and waiting are not in it."""
    hours = record["seconds"] * record["processes"] / 3600
    gpus = 0.0 if record["device"] == "cpu" else hours
    return {"source": "wall clock", "gpu_hours": gpus, "cpu_hours": hours * record["threads"]}


def slurm_cost(jobs: list[str]) -> dict[str, Any] | None:
    """Hours of all jobs of a run, every restart included; None where sacct cannot say."""
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
