"""From the records in the folder of a run, or of a teacher's sampler, to lines of the run catalogue."""

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
from eval.catalogue.columns import IN_JSON, MAX_INT, SUFFIXES, describe

Row = dict[str, Any]
RECORDED = {  # key of a record and its column
    "key": "digest", "steps": "steps", "student_updates": "student_updates", "seconds": "seconds", "device": "device",
    "processes": "processes", "threads": "threads", "restarts": "restarts", "torch": "torch", "commit": "train_commit",
    "train_commit": "train_commit",
}  # fmt: skip
COST = {"source": "cost_source", "gpu_hours": "gpu_hours", "cpu_hours": "cpu_hours", "starts": "starts"}


class Folder:
    """The records of one run or sampler; what is damaged is told on stderr and remembered."""

    def __init__(self, path: Path) -> None:
        self.path, self.damaged = path, False

    def read(self, name: str) -> Row:
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

    def key(self) -> str | None:
        """Key of the training that wrote here last, by its checkpoints and snapshots."""
        folders = [*self.path.glob("checkpoints-*"), *self.path.glob("snapshots-*")]
        newest = max(folders, key=lambda folder: folder.stat().st_mtime, default=None)
        return newest.name.partition("-")[2] if newest else None


def student_rows(run: RunId, folder: Folder) -> list[Row]:
    """Lines of the metrics of a run, and one of its training where there are none or none of this training."""
    identity = {"base": run.base, "row": run.name, "seed": run.seed, "kind": "student", "run": str(run)}
    train, metrics = folder.read("train.json"), folder.read("metrics.json")
    record = train or folder.read("finished.json")
    about = "train.json" if train else "finished.json" if record else "progress.json"
    training = _sound(folder, about, lambda: [_training(str(run), folder, train, record)])
    if not training:
        training, record = [{"is_last": False}], {}
    measured = _sound(folder, "metrics.json", lambda: _measured(str(run), record, metrics)) if metrics else []
    newer = training[0]
    if newer.get("state") in ("trained", "ended"):
        outdated = bool(measured) and not _same(record, metrics)
    else:  # a training that was begun after these metrics were made
        outdated = newer.get("state") == "running" or (newer.get("step") or 0) < (newer.get("steps") or 0)
    for row in measured:
        row["state"] = "outdated" if outdated else "evaluated"
    return _finished(identity, folder, measured + training if outdated or not measured else measured)


def teacher_rows(base: str, sampler: str, folder: Folder) -> list[Row]:
    """Lines of a teacher's sampler."""
    name, metrics = f"teacher-{sampler}", folder.read("metrics.json")
    identity = {"base": base, "row": name, "kind": "teacher", "run": f"{base}/{name}"}
    measured = _sound(folder, "metrics.json", lambda: _of_sampler(metrics)) if metrics else []
    return _finished(identity, folder, measured or [{"state": "trained", "is_last": True}])


def _finished(identity: Row, folder: Folder, rows: list[Row]) -> list[Row]:
    damage = {"state": "unreadable"} if folder.damaged else {}
    return [{**identity, **row, **damage} for row in rows]


def _sound(folder: Folder, name: str, make: Callable[[], list[Row]]) -> list[Row]:
    """What `make` makes of a file; nothing, after a warning, if the file holds something else than it should."""
    try:
        rows = make()
        _check(rows)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        folder.tell(f"{folder.path / name} is damaged ({reason}): delete it and run Snakemake again")
        return []
    return rows


def _check(rows: list[Row]) -> None:
    """Raise ValueError if a value is not of its column's type, before it spoils the column of all runs."""
    columns = describe({name: None for row in rows for name in row})
    if unknown := [name for row in rows for name in row if name not in columns]:
        raise ValueError(f"{unknown[0]} is not expected there")
    typed = {name: (about.type, IN_JSON[about.type]) for name, about in columns.items() if about.type in IN_JSON}
    for row in rows:
        for name, (wanted, kinds) in typed.items():
            value = row.get(name)
            if type(value) not in kinds or (type(value) is int and abs(value) > MAX_INT):
                raise ValueError(f"{name} is {value!r}, not {wanted}")


def _measured(run: str, record: Row, metrics: Row) -> list[Row]:
    """Lines of a student's metrics; the record adds what they do not repeat, if it is of the same training."""
    same = _same(record, metrics)
    common = {
        **(_facts(record) if same and record else {}), **_facts(metrics),
        "brightness_std": metrics.get("brightness_std"), "eval_seconds": metrics.get("eval_seconds"),
    }  # fmt: skip
    return _snapshots(common, metrics, _weights(run, record) if same else {})


def _training(run: str, folder: Folder, train: Row, record: Row) -> Row:
    """What the folder says about its present training, without asking Slurm."""
    progress = {} if is_published(folder.path, train or None) else folder.read("progress.json")
    state = run_state(folder.path, train or None, progress).replace("finished", "trained")
    if state in ("trained", "ended"):
        last = record["steps"]
        return {"state": state, "step": last, "is_last": True, **_facts(record), **_weights(run, record).get(last, {})}
    step, total = progress.get("step"), progress.get("total")
    return {"state": state, "digest": folder.key(), "step": step, "steps": total, "is_last": False}


def _same(record: Row, metrics: Row) -> bool:
    """Whether these are the metrics of this training; no record is no contradiction."""
    return not record or record.get("key") == metrics.get("key")


def _of_sampler(metrics: Row) -> list[Row]:
    """Lines of the metrics of a teacher's sampler; its record calls the time of the evaluation seconds."""
    common = {
        "state": "evaluated", "eval_seconds": metrics.get("seconds"),
        "network_calls": Sampler.model_validate(metrics["sampler"]).network_calls,
        **leaves(metrics["sampler"], "sampler"),
    }  # fmt: skip
    return _snapshots(common, metrics, {})


def _snapshots(common: Row, metrics: Row, weights: dict[int, Row]) -> list[Row]:
    """A line per snapshot of a metrics.json."""
    common = {
        **common, "eval_commit": metrics.get("eval_commit"),
        **{f"protocol_{name}": value for name, value in of_record(metrics).items()},
    }  # fmt: skip
    last, rows = max((s["step"] for s in metrics["snapshots"]), default=0), []
    for snapshot in metrics["snapshots"]:
        values = {name: value for name, value in snapshot.items() if name != "estimates"}
        step, updates = values.pop("step"), values.pop("student_updates")
        row = {**common, "step": step, "student_updates": updates, "is_last": step == last, **weights.get(step, {})}
        for name, value in values.items():
            estimate = snapshot.get("estimates", {}).get(name, {})
            row |= {name: value} | {f"{name}_{suffix}": estimate.get(suffix) for suffix in SUFFIXES}
        rows.append(row)
    return rows


def _facts(record: Row) -> Row:
    """What train.json and finished.json record about a training, and metrics.json repeats in part."""
    facts = {column: record[key] for key, column in RECORDED.items() if key in record}
    cost = {COST[key]: value for key, value in record.get("cost", {}).items() if key in COST}
    return facts | cost | leaves(record["config"], "config")


def _weights(run: str, record: Row) -> dict[int, Row]:
    """Where the snapshots lie, by step."""
    return {
        int(Path(entry["path"]).stem): {
            "weights_path": str(RUNS / run / entry["path"]), "weights_sha256": entry["sha256"],
            "weights_bytes": entry["bytes"],
        }
        for entry in record.get("files", [])
    }  # fmt: skip
