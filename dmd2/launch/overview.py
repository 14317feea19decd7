"""The table of `dmd2 status`: one line for each run, from its folder and one look at the queue."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from dmd2.core.errors import UserError
from dmd2.core.files import read_json
from dmd2.core.interrupts import is_being_trained
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import NO_SLURM, Entry, job_name, squeue
from dmd2.launch.state import is_published, run_state

SILENCE = 600.0  # seconds without a sign of life after which a running job is worth a look
COLUMNS = ("run", "state", "step", "it/s", "ETA", "node", "restarts", "last losses", "Slurm job")
FOLDED = ("state", "node", "last losses")  # columns that may take several lines
OTHER_COLUMNS = 114  # characters beside the name of the run, the folded columns on several lines
PIPED_WIDTH = 1000  # characters; more than any line needs, so that grep finds whole lines
NONE = "–"
MADE = ".manifest.json.lock"  # of what trainings wait for: sets, teachers, pairs (dmd2/core/provenance.py)


class RunLine(NamedTuple):
    """One run in the overview: the cells of `COLUMNS`."""

    run: RunId
    state: str  # with details in parentheses
    step: str = NONE
    rate: str = NONE
    eta: str = NONE
    node: str = NONE
    restarts: str = NONE
    losses: str = NONE
    job: str = NONE


def print_overview(runs: list[RunId]) -> None:
    """Print the table of these runs, how many are in which state, and why states are unknown if they are."""
    jobs, note = live_jobs(runs)
    now = time.time()
    lines = [run_line(run, jobs, now) for run in runs]
    console = Console(markup=False, highlight=False, emoji=False)
    # A terminal is used as wide as it is, but rich would cut off text of a narrower table.
    needed = max((len(str(line.run)) for line in lines), default=0) + OTHER_COLUMNS
    console.width = max(needed, console.width if sys.stdout.isatty() else PIPED_WIDTH)
    if lines:
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in COLUMNS:
            side: Literal["left", "right"] = "left" if name in ("run", *FOLDED) else "right"
            grid.add_column(name, justify=side, no_wrap=name not in FOLDED, overflow="fold")
        for line in lines:
            grid.add_row(*map(str, line))
        console.print(grid)
    counts = Counter(line.state.partition(" (")[0] for line in lines)
    told = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    console.print(f"{len(lines)} run{'' if len(lines) == 1 else 's'}{': ' if told else ''}{told}")
    if counts["ended"]:
        console.print("ended: complete, and the next `dmd2 run` publishes it")
    for folder in sorted(lock.parent for lock in Path("data").glob(f"*/*/{MADE}")):
        if is_being_trained(folder, MADE):
            console.print(f"{folder} is being made: its progress is in the terminal of `dmd2 run`")
    if note:
        console.print(f"states are unknown: {note}")


def live_jobs(runs: list[RunId]) -> tuple[dict[str, Entry] | None, str]:
    """The user's live Slurm jobs by name, and a note; no jobs but a note where Slurm cannot say.

    Slurm is asked once, and only if one of these runs may have a job.
    """
    if not any(
        (run.folder / "job.json").exists() and not is_published(run.folder, _read(run, "train.json")) for run in runs
    ):
        return {}, ""
    if shutil.which("sbatch") is None:
        return None, NO_SLURM
    try:
        entries = squeue().values()
    except UserError as error:
        return None, str(error)
    return {entry.name: entry for entry in sorted(entries, key=lambda e: e.state == "RUNNING") if not entry.ended}, ""


def run_line(run: RunId, jobs: Mapping[str, Entry] | None, now: float) -> RunLine:
    """The line of a run, from its folder and its Slurm job. Damaged files are a state of the run.

    Args:
        run: any run, started or not.
        jobs: live Slurm jobs by name; None if Slurm did not say.
        now: seconds since the epoch.
    """
    try:
        return _run_line(run, jobs, now)
    except UserError as error:
        return RunLine(run, f"damaged ({error})")
    except (AttributeError, KeyError, TypeError, ValueError):
        told = "progress.json or job.json holds something else than a job writes: delete it"
        return RunLine(run, f"damaged ({told})")


def _run_line(run: RunId, jobs: Mapping[str, Entry] | None, now: float) -> RunLine:
    progress, submitted = _read(run, "progress.json", {}), _read(run, "job.json", {})
    ids = submitted.get("jobs", [])
    # By name: a launcher killed right after sbatch left a job that job.json does not have, and the job.json of a copied
    # workspace has the original's.
    entry = (jobs or {}).get(job_name(run))
    state = run_state(run.folder, _read(run, "train.json"), progress, entry, unknown=jobs is None and bool(ids))
    detail = entry.reason if entry and state == "pending" and entry.reason != "None" else ""
    lock = run.folder / ".lock"  # which the newest process of the run opened for writing when it started
    began = lock.stat().st_mtime if lock.exists() else 0.0
    rate = eta = node = NONE
    if state == "running":
        node = (entry and entry.nodes) or progress.get("node", NONE)
        if progress and progress["time"] >= began:  # else these are of the process before a restart
            rate, eta = f"{progress['rate']:.3g}", _duration(progress["eta_seconds"])
        sign = max(progress.get("time", 0.0), began)
        if sign and now - sign > SILENCE:
            detail = f"silent for {(now - sign) / 60:.0f} min"
    values = progress.get("values", {})
    return RunLine(
        run=run,
        state=f"{state} ({detail})" if detail else state,
        step=f"{progress['step']}/{progress['total']}" if progress else NONE,
        rate=rate,
        eta=eta,
        node=node,
        restarts=str(progress.get("restarts", 0) + max(0, len(ids) - 1)) if progress or ids else NONE,
        losses="  ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in values.items()) or NONE,
        job=entry.job if entry else ids[-1] if ids else NONE,
    )


def _read(run: RunId, name: str, otherwise: Any = None) -> Any:
    path = run.folder / name
    return read_json(path) if path.exists() else otherwise


def _duration(seconds: float) -> str:
    """``2d 03h``, ``3h 05m`` or ``4m 09s``."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}h {minutes % 60:02d}m" if hours else f"{minutes}m {int(seconds % 60):02d}s"
