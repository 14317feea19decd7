"""The state of a training by the files in its folder, for `status` and for the run catalogue."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmd2.core.interrupts import is_being_trained
from dmd2.core.retraining import replaced
from dmd2.core.slurm_queue import Entry

TRACES = ("job.json", "progress.json", "checkpoints-*", "snapshots-*")  # files of a training that began


def is_published(folder: Path, train: Mapping[str, Any] | None) -> bool:
    """Whether a run is complete and is not being trained again; `train` is its train.json, if there is one."""
    return train is not None and not replaced(folder, train.get("key", ""))


def run_state(
    folder: Path,
    train: Mapping[str, Any] | None,
    progress: Mapping[str, Any],
    job: Entry | None = None,
    unknown: bool = False,
) -> str:
    """``finished``, Slurm's word in lower case, ``running``, ``unknown``, ``ended``, ``stopped`` or ``not started``.

    Args:
        folder: of the run.
        train: its train.json; None if there is none.
        progress: its progress.json; empty if there is none.
        job: its live Slurm job.
        unknown: whether a job was submitted and Slurm did not say if it lives.
    """
    if is_published(folder, train):
        return "finished"
    if job is not None:
        return job.state.lower()
    if is_being_trained(folder):
        return "running"
    if unknown:
        return "unknown"
    # A finished.json beside half a training belongs to an older config of the run.
    complete = not progress or progress["step"] >= progress["total"]
    if complete and (folder / "finished.json").exists():
        return "ended"
    return "stopped" if any(next(folder.glob(trace), None) for trace in TRACES) else "not started"
