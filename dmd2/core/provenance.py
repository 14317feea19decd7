"""What an artefact was made from, recorded in its own JSON, and whether the same would be made now.

File times change with a clone, a pull or a copy, and Snakemake's own records stay on the machine that ran it, so
neither decides what is out of date. Every manifest, train.json, metrics.json and table carries a record instead: the
digest of its settings, and the content of every file that it was made from, of itself and of those made beside it.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dmd2.core.files import content_digest, digest_of, read_json, sha256, write_json
from dmd2.core.interrupts import single_writer
from dmd2.core.sources import source_listing

# What a person may have put in place, with a manifest that records nothing: it is theirs and never remade.
ADOPTED = ("real", "teacher", "classifier", "network", "reference")
MOST_NAMED, LONGEST = 3, 40  # keys that differ, and characters of a value
ABSENT = "the default"  # what settings without a key have there
COMMENT = re.compile(r"<!-- made from (\{.*\}) -->")


def made_from(config: Any, inputs: Iterable[Path | str], sources: Iterable[str | None] = ()) -> dict[str, Any]:
    """The record of an artefact.

    ``config`` is the digest of its settings, and ``settings`` are these, so that what differs later can be named by its
    key. ``inputs`` is the content of each file that it is made from. ``origins`` are those files and all that they were
    made from in turn, each with the digest of its settings (None for what a person brought) and its content: a file
    that is absent later (not pulled, or deleted by a job that was killed) is still known by them. An artefact without
    settings only joins its inputs: its origins are those of its inputs.

    Args:
        config: the settings, JSON values; None for a join.
        inputs: files that jobs made.
        sources: files, folders and glob patterns of the user; `dmd2.core.sources` says what is recorded of them.
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
    record |= {} if config is None else {"settings": config}
    return {**record, "sources": listed} if listed else record


def signed(entry: dict[str, Any], record: dict[str, Any], beside: Iterable[Path | str] = ()) -> dict[str, Any]:
    """The JSON of an artefact with its record, completed by the digests of `entry` and of the files `beside` it."""
    entry = json.loads(json.dumps(entry))  # as it is read back
    record = {**record, "beside": {str(path): sha256(Path(path))[:12] for path in beside}}
    return {**entry, "made_from": {**record, "content": _digest(entry)}}


@contextmanager
def recorded(
    out: Path,
    config: Any,
    inputs: Iterable[Path | str] = (),
    beside: Iterable[Path] = (),
    sources: Iterable[str | None] = (),
) -> Iterator[None]:
    """Sign `out`, which the block writes, with a record of its inputs as they were before the block.

    Raises:
        UserError: another process makes it now; both would write the same checkpoints, shards or features.
    """
    with sole_maker(out):
        record = made_from(config, inputs, sources)
        yield
        write_json(out, signed(read_json(out), record, beside))


def sole_maker(out: Path) -> AbstractContextManager[None]:
    """Hold the lock of an artefact while it is made."""
    return single_writer(out.parent, name=f".{out.name}.lock", doing=f"makes {out.name}")


def content(path: Path | str) -> str:
    """Digest of what a file says: of a manifest, the checksums that it lists; of anything else, the bytes."""
    known = os.stat(path)
    return _content(str(path), known.st_mtime_ns, known.st_size)


@cache
def _content(path: str, _changed: int, _size: int) -> str:
    entry = _document(Path(path))
    lists = isinstance(entry, dict) and "files" in entry and entry.get("kind") != "metrics"
    return content_digest(entry["files"]) if lists else sha256(Path(path))[:12]


def altered(path: Path) -> bool:
    """Whether a JSON file holds something else than what its record was made for."""
    entry = _document(path)
    record = entry.get("made_from") if isinstance(entry, dict) else None
    return isinstance(record, dict) and _altered(entry, record)


def _altered(entry: dict[str, Any], record: dict[str, Any]) -> bool:
    return record.get("content", _digest(entry)) != _digest(entry)  # a page has no digest of itself


def _digest(entry: dict[str, Any]) -> str:
    return digest_of({key: value for key, value in entry.items() if key != "made_from"})


def _document(path: Path) -> Any:
    """A JSON file's value, or what an HTML page of ours records; None where nothing can be read."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        with open(path, encoding="utf-8") as file:
            found = COMMENT.search(file.read(1 << 16)) if path.suffix == ".html" else None
        return {"made_from": json.loads(found[1])} if found else None
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Artefact:
    """Files that one job makes, the first of which carries the record; its settings, and the files it is made from."""

    outputs: Sequence[str]
    config: Any
    inputs: Sequence[str]

    def outdated(
        self, configs: Mapping[str, str] | None = None, listed: Callable[[str], str | None] = source_listing
    ) -> str | None:
        """Why it would be made again, as the end of a sentence; None if it is what would be made now.

        Args:
            configs: digests of the present settings by path: an input that is not here counts as unchanged if it would
                be made with the settings that it had.
            listed: what lies in a source.
        """
        entry = _document(Path(self.outputs[0]))
        if not isinstance(entry, dict):
            return "is damaged"
        record = entry.get("made_from")
        if record is None:
            return None if entry.get("kind") in ADOPTED else "does not say what it was made from"
        try:
            return self._contradicted(entry, record, configs or {}) or _other_source(record, listed)
        except (AttributeError, KeyError, TypeError, ValueError):
            return "has a damaged record of what it was made from"

    def _contradicted(self, entry: Any, record: Any, configs: Mapping[str, str]) -> str | None:
        if record["config"] != digest_of(self.config):
            keys = list(_differences(record["settings"], self.config)) if "settings" in record else []
            more = [f"{len(keys) - MOST_NAMED} more"] if len(keys) > MOST_NAMED else []
            return "was made with other settings" + (f" ({', '.join(keys[:MOST_NAMED] + more)})" if keys else "")
        if missing := set(self.inputs) - record["inputs"].keys():
            return f"was made without {min(missing)}"
        if _altered(entry, record):
            return "was changed after it was made"
        contents = {path: known for path, (_, known) in record.get("origins", {}).items()} | record["inputs"]
        if other := [path for path, known in contents.items() if Path(path).exists() and content(path) != known]:
            return f"was made from another {other[-1]}"
        if other := [path for path in self.inputs if _of_another_training(entry, Path(path))]:
            return f"was made from another {other[0]}"
        for path, (config, _) in record.get("origins", {}).items():
            if not Path(path).exists() and config is not None and configs.get(path, config) != config:
                return f"was made from a {path} of other settings"
        beside = [Path(path) for path in self.outputs[1:] if Path(path).exists()]
        foreign = [path for path in beside if sha256(path)[:12] != record["beside"].get(str(path))]
        return f"was not made together with {foreign[0]}" if foreign else None


def _differences(then: Any, now: Any, *path: str) -> Iterator[str]:
    """``KEY from THEN to NOW`` for each value that differs between the settings of two versions of an artefact."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):  # sections side by side
        for pair in zip(then, now, strict=True):
            yield from _differences(*pair, *path)
    elif isinstance(then, dict) and isinstance(now, dict):
        for key in then | now:
            yield from _differences(then.get(key, ABSENT), now.get(key, ABSENT), *path, key)
    elif then != now and path:
        told = [value if isinstance(value, str) else json.dumps(value) for value in (then, now)]
        old, new = (text if len(text) <= LONGEST else text[: LONGEST - 3] + "..." for text in told)
        yield f"{'.'.join(path)} from {old} to {new}"


def _of_another_training(entry: Any, path: Path) -> bool:
    """Whether metrics are of a training that was made anew since, though perhaps with equal weights."""
    train = _document(path) if entry.get("kind") == "metrics" and path.name == "train.json" else None
    return isinstance(train, dict) and train.get("key", entry.get("key")) != entry.get("key")


def _other_source(record: Any, listed: Callable[[str], str | None]) -> str | None:
    """A source in which something else lies than was recorded; one that is not here (any more) counts as unchanged."""
    found = {place: (known, listed(place)) for place, known in record.get("sources", {}).items()}
    other = [place for place, (known, now) in found.items() if now is not None and now != known]
    return f"was made from another listing of {other[0]}" if other else None


def outdated(artefacts: Iterable[Artefact]) -> dict[str, str]:
    """Artefacts that exist and would be made again, by their first output, with the reason.

    `artefacts` come in the order of the workflow: inputs before what is made from them.
    """
    listed = cache(source_listing)  # the parts of a set have one source
    reasons: dict[str, str] = {}
    configs: dict[str, str] = {}
    for artefact in artefacts:
        first = artefact.outputs[0]
        configs[first] = digest_of(artefact.config)
        if Path(first).exists() and (reason := artefact.outdated(configs, listed)):
            reasons[first] = reason
    return reasons
