"""What a training cost: GPU- and CPU-hours as Slurm accounted them, or as the wall clock says."""

import re
import time
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.slurm_queue import slurm

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
            text = slurm("sacct", "-X", "-n", "-P", "--duplicates", "-j", ",".join(jobs),
                         "-o", "JobIDRaw,State,ElapsedRaw,AllocTRES", timeout=LAG)  # fmt: skip
        except UserError:
            return None
        lines = [line.split("|", 3) for line in text.splitlines()]
        busy = any(state.split()[0] in ("RUNNING", "COMPLETING", "PENDING") for _, state, _, _ in lines)
        if (lines and not busy) or time.monotonic() > until:
            break
        time.sleep(1)
    if not lines:
        return None
    gpus = sum(int(seconds) * _tres("gres/gpu", tres) for _, _, seconds, tres in lines)
    cpus = sum(int(seconds) * _tres("cpu", tres) for _, _, seconds, tres in lines)
    return {"source": "sacct", "gpu_hours": gpus / 3600, "cpu_hours": cpus / 3600, "starts": len(lines)}


def _tres(name: str, text: str) -> int:
    """Count of a trackable resource in ``cpu=8,gres/gpu=2,mem=10G``."""
    match = re.search(rf"(?:^|,){name}=(\d+)", text)
    return int(match[1]) if match else 0
