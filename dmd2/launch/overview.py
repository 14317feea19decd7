"""What `python -m dmd2.launch status` shows: one line per run, read from its folder and one look at the queue."""

import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from dmd2.core.errors import UserError, did_you_mean
from dmd2.core.files import read_json
from dmd2.core.run import RunId, run_folders
from dmd2.core.slurm_queue import NO_SLURM, Entry, job_name, squeue
from dmd2.experiment.tables import Experiment, load_experiment
from dmd2.launch.state import is_published, run_state

SILENCE = 600.0  # seconds without a sign of life after which a running job is worth a look
OTHER_COLUMNS = 114  # characters beside the name of the run, the foldable columns on several lines
PIPED_WIDTH = 1000  # characters; more than any line needs, so that grep finds whole lines
NONE = "–"


@dataclass(frozen=True)
class Row:
    """One line of the overview, as text apart from the run itself."""

    run: RunId
    state: str
    detail: str = ""  # in parentheses after the state
    step: str = NONE
    rate: str = NONE
    eta: str = NONE
    node: str = NONE
    restarts: str = NONE
    losses: str = NONE
    job: str = NONE

    def cells(self) -> list[str]:
        """In the order of the table's columns."""
        state = f"{self.state} ({self.detail})" if self.detail else self.state
        return [str(self.run), state, self.step, self.rate, self.eta, self.node, self.restarts, self.losses, self.job]


def chosen_runs(names: list[str]) -> list[RunId]:
    """Runs that names of runs, of all seeds (``base/run``) or of tables stand for; without names, all with a folder.

    Raises:
        UserError: a name is none of these.
    """
    found = list(run_folders()[0])
    if not names:
        return found
    experiment = load_experiment()
    seeds: dict[str, set[RunId]] = {}  # of base/run
    for run in [*(run for table in experiment.tables for run in _runs_of(experiment, table)), *found]:
        seeds.setdefault(f"{run.base}/{run.name}", set()).add(run)
    chosen: list[RunId] = []
    for name in names:
        if name in experiment.tables:
            chosen += _runs_of(experiment, name)
        elif name in seeds:
            chosen += sorted(seeds[name])
        elif name.rpartition("/")[0] in seeds and re.fullmatch(r"seed\d+", name.rpartition("/")[2]):
            chosen.append(RunId.parse(name))  # of any seed, as `train` takes it
        else:
            known = [*experiment.tables, *seeds, *sorted(str(run) for runs in seeds.values() for run in runs)]
            hint = did_you_mean(name, known, f"; tables: {', '.join(experiment.tables) or 'none'}")
            raise UserError(f"no run or table is called {name}{hint}")
    return list(dict.fromkeys(chosen))


def _runs_of(experiment: Experiment, table: str) -> list[RunId]:
    spec = experiment.tables[table]
    return [RunId(spec.base, row.run, seed) for row in experiment.rows[table] for seed in spec.seeds]


def print_overview(runs: list[RunId]) -> None:
    """Print the table of these runs, how many are in which state, and why states are unknown if they are."""
    jobs, note = live_jobs(runs)
    now = time.time()
    rows = [overview_row(run, jobs, now) for run in runs]
    console = _console(rows)
    if rows:
        console.print(_grid(rows))
    counts = Counter(row.state for row in rows)
    told = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    console.print(f"{len(rows)} run{'' if len(rows) == 1 else 's'}{': ' if told else ''}{told}")
    if counts["ended"]:
        console.print("ended: complete, and the next snakemake call publishes it")
    if note:
        console.print(f"states are unknown: {note}")


def _console(rows: list[Row]) -> Console:
    """Where to print: whole lines into a pipe; as wide as the terminal, but never so narrow that rich cuts text off."""
    console = Console(markup=False, highlight=False, emoji=False)
    needed = max((len(str(row.run)) for row in rows), default=0) + OTHER_COLUMNS
    console.width = max(console.width, needed) if sys.stdout.isatty() else max(needed, PIPED_WIDTH)
    return console


def _grid(rows: list[Row]) -> Grid:
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "state", "step", "it/s", "ETA", "node", "restarts", "last losses", "Slurm job"):
        if name in ("state", "node", "last losses"):
            grid.add_column(name, overflow="fold")
        else:
            grid.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row.cells())
    return grid


def live_jobs(runs: list[RunId]) -> tuple[dict[str, Entry] | None, str]:
    """The user's live Slurm jobs by name, and a note; no jobs but a note where Slurm cannot say.

    Slurm is asked once, and only if one of these runs may have a job.
    """
    if not any((run.folder / "job.json").exists() and not is_published(run.folder, _train(run)) for run in runs):
        return {}, ""
    if shutil.which("sbatch") is None:
        return None, NO_SLURM
    try:
        entries = squeue().values()
    except UserError as error:
        return None, str(error)
    return {entry.name: entry for entry in sorted(entries, key=lambda e: e.state == "RUNNING") if not entry.ended}, ""


def overview_row(run: RunId, jobs: Mapping[str, Entry] | None, now: float) -> Row:
    """What a run's folder and its Slurm job say about it at the time `now`. Damaged files are a state of the run.

    Args:
        run: any run, started or not.
        jobs: live Slurm jobs by name; None if Slurm did not say.
        now: seconds since the epoch.
    """
    try:
        return _row(run, jobs, now)
    except UserError as error:
        return Row(run, "damaged", str(error))
    except (AttributeError, KeyError, TypeError, ValueError):
        return Row(run, "damaged", "progress.json or job.json holds something else than a job writes: delete it")


def _row(run: RunId, jobs: Mapping[str, Entry] | None, now: float) -> Row:
    progress, submitted = _read(run.folder / "progress.json"), _read(run.folder / "job.json")
    ids = submitted.get("jobs", [])
    # By name: a launcher killed right after sbatch left a job that job.json does not have, and the job.json of a copied
    # workspace has the original's.
    entry = (jobs or {}).get(job_name(run))
    state = run_state(run.folder, _train(run), progress, entry, unknown=jobs is None and bool(ids))
    detail = entry.reason if entry and state == "pending" and entry.reason != "None" else ""
    began = _process_began(run.folder)
    rate = eta = node = NONE
    if state == "running":
        node = (entry and entry.nodes) or progress.get("node", NONE)
        if progress and progress["time"] >= began:  # else these are of the process before a restart
            rate, eta = f"{progress['rate']:.3g}", _duration(progress["eta_seconds"])
        sign = max(progress.get("time", 0.0), began)
        if sign and now - sign > SILENCE:
            detail = f"silent for {(now - sign) / 60:.0f} min"
    restarts = progress.get("restarts", 0) + max(0, len(ids) - 1)
    return Row(
        run, state, detail, f"{progress['step']}/{progress['total']}" if progress else NONE, rate, eta, node,
        str(restarts) if progress or ids else NONE, _losses(progress.get("values", {})),
        entry.job if entry else ids[-1] if ids else NONE,
    )  # fmt: skip


def _train(run: RunId) -> dict[str, Any] | None:
    path = run.folder / "train.json"
    return read_json(path) if path.exists() else None


def _process_began(folder: Path) -> float:
    """When the newest process of a run started: it opened the lock for writing; 0 if there was none."""
    path = folder / ".lock"
    return path.stat().st_mtime if path.exists() else 0.0


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _losses(values: Mapping[str, float]) -> str:
    """``denoise 0.123  gan 0.69``: the part of the name that says what it is."""
    return "  ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in values.items()) or NONE


def _duration(seconds: float) -> str:
    """``2d 03h``, ``3h 05m`` or ``4m 09s``."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}h {minutes % 60:02d}m" if hours else f"{minutes}m {int(seconds % 60):02d}s"
