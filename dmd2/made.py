"""What an artefact was made from, recorded in it, and whether that is still what would be made.

Clocks lie after a clone, a pull or a copy, and Snakemake's own records stay behind, so neither decides here what is out
of date: every manifest, train.json, metrics.json and table carries the digest of its settings and of the content of its
inputs.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dmd2.files import content_digest, digest_of, read_json, sha256, write_json

# What a person may have put in place, with a manifest that records nothing: it is theirs and never remade.
ADOPTED = ("real", "teacher", "classifier", "network", "reference")
COMMENT = re.compile(r"<!-- made from (\{.*\}) -->")


def made_from(config: Any, inputs: Iterable[Path | str]) -> dict[str, Any]:
    """Record for an artefact: digest of its settings (JSON values) and content of each of its inputs by path."""
    return {"config": digest_of(config), "inputs": {str(path): content(path) for path in sorted(map(str, inputs))}}


def content(path: Path | str) -> str:
    """Digest of what a file says: of a manifest, the checksums that it lists; of anything else, the bytes."""
    known = os.stat(path)
    return _content(str(path), known.st_mtime_ns, known.st_size)


@cache
def _content(path: str, _changed: int, _size: int) -> str:
    entry = _document(Path(path))
    lists = isinstance(entry, dict) and "files" in entry and entry.get("kind") != "metrics"
    return content_digest(entry["files"]) if lists else sha256(Path(path))[:12]


def _document(path: Path) -> Any:
    """A JSON file's value, or what an HTML page of ours records; None where nothing can be read."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        with open(path, encoding="utf-8") as file:
            found = COMMENT.search(file.read(4096)) if path.suffix == ".html" else None
        return {"made_from": json.loads(found[1])} if found else None
    except (OSError, ValueError):
        return None


@contextmanager
def recorded(out: Path, config: Any, inputs: Iterable[Path | str] = ()) -> Iterator[dict[str, Any]]:
    """Put the record of `out`, taken before the block writes it, into that JSON file after the block."""
    record = made_from(config, inputs)
    yield record
    write_json(out, {**read_json(out), "made_from": record})


@dataclass(frozen=True)
class Artefact:
    """Files that one job makes, the first of which carries the record."""

    outputs: Sequence[str]
    config: Any
    inputs: Sequence[str]

    def outdated(self) -> str | None:
        """Why it would be made again, or None. Inputs that are not here (not pulled, pruned) count as unchanged."""
        entry = _document(Path(self.outputs[0]))
        if entry is None:
            return "is damaged"
        record = entry.get("made_from")
        if record is None:
            return None if entry.get("kind") in ADOPTED else "does not say what it was made from"
        if record["config"] != digest_of(self.config):
            return "was made with other settings"
        if missing := set(self.inputs) - record["inputs"].keys():
            return f"was made without {min(missing)}"
        for path, known in record["inputs"].items():
            if Path(path).exists() and content(path) != known:
                return f"was made from another {path}"
        return None

    def touch(self) -> None:
        """Make every output younger than every input: the content says that they belong together."""
        newest = max((os.stat(path).st_mtime_ns for path in self.inputs if Path(path).exists()), default=0)
        for path in self.outputs:
            if Path(path).exists() and os.stat(path).st_mtime_ns <= newest:
                os.utime(path, ns=(newest + 1_000_000, newest + 1_000_000))


@dataclass
class Outdated:
    """Every artefact that exists but is not what would be made now, by its first output, with the reason."""

    reasons: dict[str, str] = field(default_factory=dict)

    def review(self, artefacts: Iterable[Artefact]) -> None:
        """Compare artefacts with their records, inputs before what is made from them."""
        for artefact in artefacts:
            if not Path(artefact.outputs[0]).exists():
                continue
            if reason := artefact.outdated():
                self.reasons[artefact.outputs[0]] = reason
            else:
                artefact.touch()

    def told(self, most: int = 5) -> list[str]:
        """A line for each, up to `most`."""
        lines = [f"{path} {reason}" for path, reason in self.reasons.items()]
        return lines[:most] + ([f"... and {len(lines) - most} more"] if len(lines) > most else [])
