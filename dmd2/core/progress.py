"""The progress of a job: a line every few seconds, for a terminal or a log file, and a file for other programs."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dmd2.core.errors import show
from dmd2.core.files import write_json

INTERVAL = 10.0  # seconds between lines


class Progress:
    """Prints ``name  step/total  rate  ETA  values`` to stderr; with a `folder`, also writes progress.json there."""

    def __init__(self, name: str, total: int, done: int = 0, folder: Path | None = None) -> None:
        self.name, self.total, self.first, self.folder = name, total, done, folder
        self.started = time.monotonic()
        self.last = self.started - INTERVAL if folder else self.started

    def update(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Report that `step` of the total are done; at most every `INTERVAL` seconds, and at the end."""
        now = time.monotonic()
        if now - self.last < INTERVAL and step != self.total:
            return
        self.last = now
        rate = (step - self.first) / max(now - self.started, 1e-9)
        left = int((self.total - step) / max(rate, 1e-9))
        numbers = {name: float(value) for name, value in values.items()}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        width = len(str(self.total))
        line = f"{self.name}  {step:>{width}}/{self.total}  {rate:.1f} it/s  ETA {left // 60}:{left % 60:02d}  {shown}"
        show(line, kept=False)
        if self.folder:
            state = {"step": step, "total": self.total, "rate": rate, "eta_seconds": left, "values": numbers}
            node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
            job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            place = {"node": node, "time": time.time(), "job": job, "restarts": restarts}
            write_json(self.folder / "progress.json", state | place)
