"""What an artefact was made from, recorded in it, and whether that is still what would be made.

Clocks lie after a clone, a pull or a copy, and Snakemake's own records stay behind, so neither decides here what is out
of date: every manifest, train.json, metrics.json and table carries the digest of its settings, of the content of all
that it was made from, of itself and of the files made beside it.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.files import content_digest, digest_of, read_json, sha256, write_json
from dmd2.core.interrupts import single_writer
from dmd2.core.sources import source_listing

# What a person may have put in place, with a manifest that records nothing: it is theirs and never remade.
ADOPTED = ("real", "teacher", "classifier", "network", "reference")
COMMENT = re.compile(r"<!-- made from (\{.*\}) -->")


def made_from(config: Any, inputs: Iterable[Path | str], sources: Iterable[str | None] = ()) -> dict[str, Any]:
    """Record for an artefact: digest of its settings (JSON values), content of each of its inputs by path, and origins.

    `sources` are files, folders and patterns of files that no job made; those that are there are recorded by what lies
    in them (`dmd2.core.sources`).

    Origins are the inputs and all that those were made from, by path: digest of the settings (None for what a person
    brought) and content. An input may be absent later, not pulled or deleted by a job that was killed; its origins
    still tell. A join, which has no settings, hands on the origins of its inputs only: its checksums stand for them.
    """
    paths, records = sorted(map(str, inputs)), {}
    for path in paths:
        entry = _document(Path(path))
        records[path] = (isinstance(entry, dict) and entry.get("made_from")) or {}
    origins: dict[str, Any] = {}
    for record in records.values():
        origins |= record.get("origins", {})
    if config is not None:
        origins |= {path: [record.get("config"), content(path)] for path, record in records.items()}
    listed = {place: known for place in sources if place and (known := source_listing(place))}
    record = {"config": digest_of(config), "inputs": {path: content(path) for path in paths}, "origins": origins}
    return {**record, "sources": listed} if listed else record


def signed(entry: dict[str, Any], record: dict[str, Any], beside: Iterable[Path | str] = ()) -> dict[str, Any]:
    """An artefact's JSON with its record, which also knows the rest of the JSON and the files made `beside` it."""
    entry = json.loads(json.dumps(entry))  # as it is read back
    record = {**record, "beside": {str(path): sha256(Path(path))[:12] for path in beside}}
    return {**entry, "made_from": {**record, "content": _digest(entry)}}


def altered(path: Path) -> bool:
    """Whether a JSON file holds something else than what its record was made for."""
    entry = _document(path)
    record = entry.get("made_from") if isinstance(entry, dict) else None
    return isinstance(record, dict) and record.get("content", _digest(entry)) != _digest(entry)


def _digest(entry: dict[str, Any]) -> str:
    """Digest of an artefact's JSON, without its record."""
    return digest_of({key: value for key, value in entry.items() if key != "made_from"})


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
def recorded(
    out: Path,
    config: Any,
    inputs: Iterable[Path | str] = (),
    beside: Iterable[Path] = (),
    sources: Iterable[str | None] = (),
) -> Iterator[None]:
    """Put the record of `out`, taken before the block writes it and what lies `beside` it, into it after the block.

    Raises:
        UserError: another process makes it now, which shares checkpoints, shards or features with this one.
    """
    with sole_maker(out):
        record = made_from(config, inputs, sources)
        yield
        write_json(out, signed(read_json(out), record, beside))


def sole_maker(out: Path) -> AbstractContextManager[None]:
    """Hold the lock of an artefact while it is made."""
    return single_writer(out.parent, name=f".{out.name}.lock", doing=f"makes {out.name}")


@dataclass(frozen=True)
class Artefact:
    """Files that one job makes, the first of which carries the record."""

    outputs: Sequence[str]
    config: Any
    inputs: Sequence[str]

    def outdated(
        self, settings: Mapping[str, str] | None = None, listed: Callable[[str], str | None] = source_listing
    ) -> str | None:
        """Why it would be made again, or None.

        What it was made from and is not here (not pulled, or deleted by a job that was killed) counts as unchanged if
        it would be made with the same of the `settings`, digests by path. `listed` tells what lies in a source.
        """
        entry = _document(Path(self.outputs[0]))
        if not isinstance(entry, dict):
            return "is damaged"
        record = entry.get("made_from")
        if record is None:
            return None if entry.get("kind") in ADOPTED else "does not say what it was made from"
        try:
            return self._contradicted(entry, record, settings or {}) or _other_source(record, listed)
        except (AttributeError, KeyError, TypeError, ValueError):
            return "has a damaged record of what it was made from"

    def _contradicted(self, entry: Any, record: Any, settings: Mapping[str, str]) -> str | None:
        if record["config"] != digest_of(self.config):
            return "was made with other settings"
        if missing := set(self.inputs) - record["inputs"].keys():
            return f"was made without {min(missing)}"
        if "content" in record and record["content"] != _digest(entry):  # a page has none
            return "was changed after it was made"
        contents = {path: known for path, (_, known) in record.get("origins", {}).items()} | record["inputs"]
        if other := [path for path, known in contents.items() if Path(path).exists() and content(path) != known]:
            return f"was made from another {other[-1]}"
        if other := [path for path in self.inputs if _of_another_training(entry, Path(path))]:
            return f"was made from another {other[0]}"
        for path, (config, _) in record.get("origins", {}).items():
            if not Path(path).exists() and config is not None and settings.get(path, config) != config:
                return f"was made from a {path} of other settings"
        beside = [Path(path) for path in self.outputs[1:] if Path(path).exists()]
        foreign = [path for path in beside if sha256(path)[:12] != record["beside"].get(str(path))]
        return f"was not made together with {foreign[0]}" if foreign else None

    def younger(self, times: Mapping[str, int]) -> dict[str, int]:
        """Modification times (ns) that make every output younger than every input: the content says that they belong
        together. `times` are those that other files are to get, or of absent ones those of what they were made from.
        """
        newest = self.newest_input(times)
        present = [path for path in self.outputs if Path(path).exists()]
        return {path: newest + 1_000_000 for path in present if _moment(path, times) <= newest}

    def newest_input(self, times: Mapping[str, int]) -> int:
        """Time (ns) of its youngest input, 0 without any; `times` as in `younger`."""
        return max((_moment(path, times) for path in self.inputs), default=0)


def _moment(path: str, times: Mapping[str, int]) -> int:
    return times[path] if path in times else os.stat(path).st_mtime_ns if Path(path).exists() else 0


def _of_another_training(entry: Any, path: Path) -> bool:
    """Whether metrics are of a training that was made anew since, though perhaps with equal weights."""
    train = _document(path) if entry.get("kind") == "metrics" and path.name == "train.json" else None
    return isinstance(train, dict) and train.get("key", entry.get("key")) != entry.get("key")


def _other_source(record: Any, listed: Callable[[str], str | None]) -> str | None:
    """A source in which something else lies than was recorded; one that is not here (any more) counts as unchanged."""
    found = {place: (known, listed(place)) for place, known in record.get("sources", {}).items()}
    other = [place for place, (known, now) in found.items() if now is not None and now != known]
    return f"was made from another listing of {other[0]}" if other else None


@dataclass
class Outdated:
    """Every artefact that exists but is not what would be made now, by its first output, with the reason."""

    reasons: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # digests by path, of absent ones too
    times: dict[str, int] = field(default_factory=dict)  # to be given to what is up to date, for `date`

    def review(self, artefacts: Iterable[Artefact]) -> None:
        """Compare artefacts with their records, inputs before what is made from them."""
        listed = cache(source_listing)  # the parts of a set have one source
        absent: dict[str, int] = {}
        for artefact in artefacts:
            self.settings[artefact.outputs[0]] = digest_of(artefact.config)
            self.not_in_the_future(artefact.inputs)
            if not Path(artefact.outputs[0]).exists():
                # Snakemake looks past an absent file at what it is made from.
                absent[artefact.outputs[0]] = artefact.newest_input(absent | self.times)
                continue
            if reason := artefact.outdated(self.settings, listed):
                self.reasons[artefact.outputs[0]] = reason
            else:
                self.times |= artefact.younger(absent | self.times)

    def not_in_the_future(self, paths: Iterable[Path | str]) -> None:
        """Files of the future, from a clock that was ahead, get the present time: Snakemake deletes outputs older than
        their inputs.
        """
        now = time.time_ns()
        found = [str(path) for path in paths if Path(path).exists()]
        self.times |= {path: now for path in found if self.times.get(path, os.stat(path).st_mtime_ns) > now}

    def date(self) -> None:
        """Give the files their times, for a run; a dry run only tells Snakemake.

        Raises:
            UserError: one is somebody else's file.
        """
        for path, moment in self.times.items():
            try:
                os.utime(path, ns=(moment, moment))
            except OSError as error:
                raise UserError(f"{path} cannot be given another time ({error.strerror}): touch it") from None

    def told(self, most: int = 5) -> list[str]:
        """A line for each, up to `most`."""
        lines = [f"{path} {reason}" for path, reason in self.reasons.items()]
        return lines[:most] + ([f"... and {len(lines) - most} more"] if len(lines) > most else [])
