"""Reads the records in the folder of a run, or of a teacher's sampler, into lines of the run catalogue."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.files import read_json
from dmd2.core.run import RUNS, RunId
from dmd2.experiment.dotted_keys import leaves
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.protocols import of_record
from dmd2.launch.state import is_published, run_state
from eval.catalogue.columns import IN_JSON, MAX_INT, SCHEMA, SUFFIXES, describe
from eval.compare.versions import numbers_of

Line = dict[str, Any]  # values by column
Record = dict[str, Any]  # what a JSON file of the folder holds
COLUMN = {key: name for name, column in SCHEMA.items() for key in column.record}  # of each key of a record


class Folder:
    """The records of one run or sampler; what is damaged is told on stderr and remembered."""

    def __init__(self, path: Path) -> None:
        self.path, self.damaged = path, False

    def read(self, name: str) -> Record:
        """A record; empty if there is none or it is damaged."""
        try:
            value = read_json(self.path / name) if (self.path / name).exists() else {}
            if not isinstance(value, dict):
                raise UserError(f"{self.path / name} holds no record: delete it and run Snakemake again")
        except (UserError, OSError) as error:
            self.tell(str(error))
            return {}
        return value

    def tell(self, text: str) -> None:
        """Warn about damage."""
        self.damaged = True
        print(f"warning: {text}", file=sys.stderr)

    def sound(self, name: str, make: Callable[[], list[Line]]) -> list[Line]:
        """What `make` makes of a file; nothing, after a warning, if the file holds something else than it should."""
        try:
            lines = make()
            _check(lines)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            self.tell(f"{self.path / name} is damaged ({reason}): delete it and run Snakemake again")
            return []
        return lines

    def key(self) -> str | None:
        """Key of the training that wrote here last, by its checkpoints and snapshots."""
        folders = [*self.path.glob("checkpoints-*"), *self.path.glob("snapshots-*")]
        newest = max(folders, key=lambda folder: folder.stat().st_mtime, default=None)
        return newest.name.partition("-")[2] if newest else None

    def finished(self, identity: Line, lines: list[Line]) -> list[Line]:
        """The lines with the columns that name their run; what is damaged has no other state."""
        damage = {"state": "unreadable"} if self.damaged else {}
        return [{**identity, **line, **damage} for line in lines]


def _check(lines: list[Line]) -> None:
    """Raise ValueError if a value is not of its column's type, before it spoils the column of all runs."""
    columns = describe({name: None for line in lines for name in line})
    for line in lines:
        for name, value in line.items():
            if name not in columns:
                raise ValueError(f"{name} is not expected there")
            kinds = IN_JSON.get(columns[name].type)
            if kinds and (type(value) not in kinds or (type(value) is int and abs(value) > MAX_INT)):
                raise ValueError(f"{name} is {value!r}, not {columns[name].type}")


def student_lines(run: RunId, folder: Folder) -> list[Line]:
    """Lines of the metrics of a run, and one of its training where there are none or none of this training."""
    identity = {"base": run.base, "row": run.name, "seed": run.seed, "kind": "student", "run": str(run)}
    train, metrics = folder.read("train.json"), folder.read("metrics.json")
    record = train or folder.read("finished.json")
    about = "train.json" if train else "finished.json" if record else "progress.json"
    training = folder.sound(about, lambda: [_training(str(run), folder, train, record)])
    if not training:
        training, record = [{"is_last": False}], {}
    same = not record or record.get("key") == metrics.get("key")  # no record is no contradiction
    # The record adds what the metrics do not repeat.
    measured = folder.sound(
        "metrics.json",
        lambda: _snapshots(_facts(record) if same and record else {}, metrics, _weights(run, record) if same else {}),
    )
    newer = training[0]
    if newer.get("state") in ("trained", "ended"):
        outdated = bool(measured) and not same
    else:  # a training that was begun after these metrics were made
        outdated = newer.get("state") == "running" or (newer.get("step") or 0) < (newer.get("steps") or 0)
    for line in measured:
        line["state"] = "outdated" if outdated else "evaluated"
    return folder.finished(identity, measured + training if outdated or not measured else measured)


def teacher_lines(base: str, sampler: str, folder: Folder) -> list[Line]:
    """Lines of a teacher's sampler, whose record calls the time of the evaluation seconds."""
    name, metrics = f"teacher-{sampler}", folder.read("metrics.json")
    identity = {"base": base, "row": name, "kind": "teacher", "run": f"{base}/{name}"}
    if metrics:
        metrics["eval_seconds"] = metrics.pop("seconds", None)

    def measured() -> list[Line]:
        calls = Sampler.model_validate(metrics["sampler"]).network_calls
        return _snapshots({"state": "evaluated", "network_calls": calls}, metrics, {})

    lines = folder.sound("metrics.json", measured) if metrics else []
    return folder.finished(identity, lines or [{"state": "trained", "is_last": True}])


def _training(run: str, folder: Folder, train: Record, record: Record) -> Line:
    """What the folder says about its present training, without asking Slurm."""
    progress = {} if is_published(folder.path, train or None) else folder.read("progress.json")
    state = run_state(folder.path, train or None, progress).replace("finished", "trained")
    if state in ("trained", "ended"):
        last = record["steps"]
        return {"state": state, "step": last, "is_last": True, **_facts(record), **_weights(run, record).get(last, {})}
    step, total = progress.get("step"), progress.get("total")
    return {"state": state, "digest": folder.key(), "step": step, "steps": total, "is_last": False}


def _snapshots(common: Line, metrics: Record, weights: dict[int, Line]) -> list[Line]:
    """A line per snapshot of a metrics.json."""
    if not metrics:
        return []
    common = {**common, **_facts(metrics)}
    common |= {f"protocol_{name}": value for name, value in of_record(metrics).items()}
    last, lines = max((s["step"] for s in metrics["snapshots"]), default=0), []
    for snapshot in metrics["snapshots"]:
        step, estimates = snapshot["step"], snapshot.get("estimates", {})
        line = {**common, "step": step, "student_updates": snapshot["student_updates"], "is_last": step == last}
        for name, value in numbers_of(snapshot).items():
            line |= {name: value} | {f"{name}_{end}": estimates.get(name, {}).get(end) for end in SUFFIXES}
        lines.append({**line, **weights.get(step, {})})
    return lines


def _facts(record: Record) -> Line:
    """What a record says about a training or an evaluation, by column, and its settings."""
    known = {key: value for key, value in record.items() if key in COLUMN} | leaves(record.get("cost", {}), "cost")
    settings = "sampler" if "sampler" in record else "config"
    facts = {COLUMN[key]: value for key, value in known.items() if key in COLUMN}
    return facts | leaves(record[settings], settings)


def _weights(run: RunId | str, record: Record) -> dict[int, Line]:
    """Where the snapshots lie, by step."""
    return {
        int(Path(entry["path"]).stem): {
            "weights_path": str(RUNS / str(run) / entry["path"]),
            "weights_sha256": entry["sha256"],
            "weights_bytes": entry["bytes"],
        }
        for entry in record.get("files", [])
    }
