"""The code that trained a run, and training a run anew: on request, or because its code is not the present one.

A training that is made anew gets another key. It therefore neither continues from a checkpoint of the old one nor
overwrites its snapshots; those stay until the new records replace the old ones and `dmd2.publish.prune` is run.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dmd2.core.code_digest import differing, modules_of
from dmd2.core.files import digest_of, read_json, write_json
from dmd2.core.interrupts import single_writer
from dmd2.core.run import Goal, RunId, commit

When = Literal["never", "changed", "always"]
Part = Mapping[str, Any]  # of a training: its first step, and commit and modules of the code that did it
MOST_NAMED = 5  # files


def current_key(run: RunId, key: str) -> str:
    """Key of the newest training of a run: `key` itself, or the key of the last training that replaced it."""
    following = _following(run.folder)
    while key in following:
        key = following[key]
    return key


def replaced(folder: Path, key: str) -> bool:
    """Whether a training was made anew, or is being made anew."""
    return key in _following(folder)


def _following(folder: Path) -> dict[str, str]:
    path = folder / "again.json"
    return read_json(path) if path.exists() else {}


def is_due(goal: Goal, when: When) -> bool:
    """Whether a training is to be made anew, however far it is."""
    return when == "always" or (when == "changed" and other_code(code_parts(goal.run, goal.key)) is not None)


def make_anew(goal: Goal) -> None:
    """Give the training another key, under which it starts anew. The goal must be looked up again afterwards.

    Raises:
        UserError: a process trains the run.
    """
    with single_writer(goal.run.folder):
        following = {**_following(goal.run.folder), goal.key: digest_of([goal.key, "again"])}
        write_json(goal.run.folder / "again.json", following)


def code_parts(run: RunId, key: str) -> list[dict[str, Any]]:
    """The code of a training so far, with the first step of each version; empty where that is unknown."""
    path = run.folder / "code.json"
    known = read_json(path) if path.exists() else {}
    return list(known["parts"]) if known.get("key") == key else []


def continued(run: RunId, key: str, step: int, modules: Mapping[str, str]) -> list[dict[str, Any]]:
    """Record that code of these modules trains from `step` on, and return all parts of the training.

    The training continues from a checkpoint; what was trained after that is lost, and its code is forgotten.
    """
    parts = [part for part in code_parts(run, key) if part["step"] < step]
    if not parts or differing(parts[-1]["modules"], modules):
        parts.append({"step": step, "commit": commit(), "modules": dict(modules)})
    write_json(run.folder / "code.json", {"key": key, "parts": parts})
    return parts


def other_code(parts: Sequence[Part]) -> str | None:
    """End of a sentence about a training by code that differs from the present code; None where it does not differ."""
    other = [part for part in parts if differing(part["modules"], modules_of())]
    if not other:
        return None
    partly = "" if len(other) == len(parts) else "in part "
    since = "" if other[0]["commit"] == "unknown" else f" since commit {other[0]['commit']}"
    changed = named(differences([*parts, {"modules": modules_of()}]))
    return f"was trained {partly}by other code ({changed} changed{since})"


def trained_by_other_code(record: Path) -> str | None:
    """`other_code` of the training that a train.json records."""
    return other_code(read_json(record).get("code", [])) if record.exists() else None


def differences(parts: Iterable[Part]) -> list[str]:
    """Files whose code is not the same in all of these parts."""
    first, *others = [part["modules"] for part in parts] or [{}]
    return sorted({name for other in others for name in differing(first, other)})


def named(files: Sequence[str]) -> str:
    """Files as a list for a sentence; of many, only the first are named."""
    more = len(files) - MOST_NAMED
    return ", ".join(files[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
