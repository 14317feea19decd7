"""Which code trained a run, and training it anew: on request, or because that code is no longer the present one.

A training made anew gets a key of its own, so it neither continues from a checkpoint of the old one nor writes over its
snapshots: those stay, listed by the old records, until the new ones replace those records and `dmd2.publish.prune`
is run.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dmd2.core.code_digest import differing, modules_of
from dmd2.core.files import digest_of, read_json, write_json
from dmd2.core.interrupts import single_writer
from dmd2.core.run import Goal, RunId, commit

When = Literal["never", "changed", "always"]
Part = Mapping[str, Any]  # first step, commit and modules of the code that trained from there on
MOST = 5  # files named


def current_key(run: RunId, key: str) -> str:
    """Key of the training that stands for one of that key: its own, or that of the last time it was made anew."""
    following = _following(run.folder)
    while key in following:
        key = following[key]
    return key


def replaced(folder: Path, key: str) -> bool:
    """Whether the training of that key is being made anew, or was."""
    return key in _following(folder)


def _following(folder: Path) -> dict[str, str]:
    path = folder / "again.json"
    return read_json(path) if path.exists() else {}


def is_due(goal: Goal, when: When) -> bool:
    """Whether a training is to be made anew before it starts, however far it is."""
    return when == "always" or (when == "changed" and other_code(code_parts(goal.run, goal.key)) is not None)


def make_anew(goal: Goal) -> None:
    """Let the next training towards that goal be another one; its goal has to be looked up anew.

    Raises:
        UserError: a process trains the run.
    """
    with single_writer(goal.run.folder):
        write_json(goal.run.folder / "again.json", {
            **_following(goal.run.folder), goal.key: digest_of([goal.key, "again"]),
        })  # fmt: skip


def code_parts(run: RunId, key: str) -> list[dict[str, Any]]:
    """By which code the training of that key was done so far, from which step on; empty where that is unknown."""
    path = run.folder / "code.json"
    known = read_json(path) if path.exists() else {}
    return list(known["parts"]) if known.get("key") == key else []


def continued(run: RunId, key: str, step: int, modules: Mapping[str, str]) -> list[dict[str, Any]]:
    """Note that code of these modules trains from `step` on, and return all parts of the training.

    What was trained after the checkpoint that it continues from is lost, and so is the code that did it.
    """
    parts = [part for part in code_parts(run, key) if part["step"] < step]
    if not parts or differing(parts[-1]["modules"], modules):
        parts.append({"step": step, "commit": commit(), "modules": dict(modules)})
    write_json(run.folder / "code.json", {"key": key, "parts": parts})
    return parts


def other_code(parts: Sequence[Part]) -> str | None:
    """How the code of a training differs from the present one, as the end of a sentence; None where it does not."""
    other = [part for part in parts if differing(part["modules"], modules_of())]
    if not other:
        return None
    partly = "" if len(other) == len(parts) else "in part "
    since = "" if other[0]["commit"] == "unknown" else f" since commit {other[0]['commit']}"
    return f"was trained {partly}by other code ({named(differences([*parts, _present()]))} changed{since})"


def trained_by_other_code(record: Path) -> str | None:
    """The same of the training that a train.json records."""
    return other_code(read_json(record).get("code", [])) if record.exists() else None


def differences(parts: Iterable[Part]) -> list[str]:
    """Files that are not the same code in all of these parts."""
    first, *others = [part["modules"] for part in parts] or [{}]
    return sorted({name for other in others for name in differing(first, other)})


def named(files: Sequence[str]) -> str:
    """Files as a list that ends before it gets long."""
    more = len(files) - MOST
    return ", ".join(files[:MOST]) + (f" and {more} more" if more > 0 else "")


def _present() -> Part:
    return {"modules": modules_of()}
