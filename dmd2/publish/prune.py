"""Delete what a finished training no longer needs: its checkpoints, and snapshots that no record lists."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import digest_of, read_json
from dmd2.core.interrupts import is_being_trained, single_writer
from dmd2.core.provenance import sole_maker
from dmd2.core.retraining import replaced
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import submissions
from dmd2.experiment.run_inputs import TEACHERS
from dmd2.experiment.tables import Experiment, load_experiment
from dmd2.launch.names import Names, runs_named

KEYED = re.compile(r"(checkpoints|snapshots)-[0-9a-f]{8}")
RESTARTS = "A training that is made longer now starts anew, since its checkpoints are gone."


@dataclass(frozen=True)
class Prunable:
    """What may be deleted in the folder of one training, or why nothing is touched."""

    folder: Path
    folders: list[Path]
    kept: str | None = None


def prunable(names: Sequence[str] = (), dry_run: bool = False) -> Iterator[Prunable]:
    """Every training that has something to delete or keep, or those named; while one is yielded, its lock is held."""
    experiment = load_experiment()
    for run in runs_named(names):
        if not _keyed(run.folder):
            continue
        if is_being_trained(run.folder):
            yield Prunable(run.folder, [], "a process trains it")
            continue
        try:
            with nullcontext() if dry_run else single_writer(run.folder):
                reason = _needed(run, experiment)
                yield Prunable(run.folder, [] if reason else _unlisted(run.folder), reason)
        except UserError as error:
            yield Prunable(run.folder, [], str(error))
    for manifest in [] if names else sorted(TEACHERS.glob("*/manifest.json")):
        try:
            with nullcontext() if dry_run else sole_maker(manifest):
                yield Prunable(manifest.parent, _keyed(manifest.parent))
        except UserError as error:
            yield Prunable(manifest.parent, [], str(error))


def _needed(run: RunId, experiment: Experiment) -> str | None:
    """Why a run, which nobody trains now, may still need its checkpoints; None if it does not."""
    record, cfg = run.folder / "train.json", experiment.runs.get((run.base, run.name))
    if not record.exists():
        return "it is not finished"
    train = read_json(record)
    config, submitted = train.get("made_from", {}).get("config"), submissions(run)["config"]
    if cfg is not None and config != digest_of(cfg.training().settings()):
        return "it is to be trained with other settings, and may continue from there"
    if replaced(run.folder, train["key"]):
        return "it is being trained again, and its snapshots are in use until that ends"
    if submitted not in (None, config):
        return "a Slurm job was sent for another training of it"
    if any((other.train.init_from, base) == (run.name, run.base) for (base, _), other in experiment.runs.items()):
        return "other runs start from it (train.init_from) and take its critic"
    return None


def _unlisted(folder: Path) -> list[Path]:
    """Folders of checkpoints and snapshots without a file that a record of the run lists."""
    records = [read_json(path) for name in ("train.json", "finished.json") if (path := folder / name).exists()]
    listed = {Path(entry["path"]).parts[0] for record in records for entry in record["files"]}
    return [path for path in _keyed(folder) if path.name not in listed]


def _keyed(folder: Path) -> list[Path]:
    """Folders of checkpoints and snapshots."""
    return sorted(path for path in folder.glob("*") if KEYED.fullmatch(path.name))


def main(
    names: Annotated[list[str] | None, Names] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be deleted")] = False,
) -> None:
    """Delete checkpoints of finished trainings, and snapshots that no train.json lists; nothing is to be made again."""
    with readable_errors():
        freed = 0
        for found in prunable(names or (), dry_run):
            if found.kept:
                print(f"{found.folder} is kept: {found.kept}")
            for path in found.folders:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                print(f"{'would delete' if dry_run else 'deleted'} {path}, {size / 1e6:.1f} MB")
                freed += size
                if not dry_run:
                    shutil.rmtree(path)
        print(f"{freed / 1e6:.1f} MB {'would be' if dry_run else 'were'} freed. {RESTARTS if freed else ''}".rstrip())


if __name__ == "__main__":
    typer.run(main)
