"""Atomic writes, and manifests with checksums.

Every node of the DAG is a small JSON manifest that lists the large files beside it with size and SHA-256. A truncated
or foreign file is thus found, and named, before it is used.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dmd2.core.errors import CannotWriteError, UserError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` only once the block ended and its bytes reached the disk.

    Raises:
        CannotWriteError: the disk is full or the place is not writable; `path` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{writer()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors creates its files readable by the owner only
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's zip writer and safetensors report a refused write by exceptions of their own.
        torch_writer = any(word in str(error) for word in ("inline_container", "iostream", "PytorchStreamWriter"))
        if isinstance(error, RuntimeError) and not torch_writer and not _no_space(path):
            raise
        raise refused(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, replaceable: bool, refusal: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` only once the block ended and its bytes reached the disk.

    Args:
        target: the folder to write.
        replaceable: whether a `target` that exists may be replaced.
        refusal: what is said of one that may not.

    Raises:
        UserError: `target` exists and may not be replaced, or a file cannot be written; `target` is then as before.
    """
    target = target.absolute()
    if target.exists() and not replaceable:
        raise UserError(f"{target} {refusal}")
    name = f".{target.name}.{writer()}"
    temporary, old = (target.with_name(f"{name}.{kind}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors creates its files readable by the owner only
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}; nothing was changed there") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def writer() -> str:
    """A name that no other write on a shared file system uses: host, process and a random part."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


REFUSALS = {  # why the system refuses a write, and what the user can do
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the quota is used up", "free some space"),
    errno.EROFS: ("the file system is read-only", "have it mounted for writing"),
    errno.EACCES: ("permission denied", "get the right to write there"),
    errno.EPERM: ("it may not be changed (immutable, perhaps: see lsattr)", "allow changes"),
}


def refused(path: Path, error: Exception) -> CannotWriteError:
    """The error for a write that the system refused: the reason, and what to do about it."""
    # torch's and safetensors' exceptions have the reason in their text only.
    named = (code for code in REFUSALS if os.strerror(code) in str(error))
    code = getattr(error, "errno", None) or next(named, None)
    if code not in REFUSALS and _no_space(path):
        code = errno.ENOSPC
    reason, advice = REFUSALS.get(code or 0, (str(error).splitlines()[0], "see to it"))
    return CannotWriteError(
        f"cannot write {path}: {reason}; earlier files are kept, {advice} and run the same command again"
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise CannotWriteError about `path` where a write in the block is refused."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error


def _no_space(path: Path) -> bool:
    return path.parent.exists() and shutil.disk_usage(path.parent).free < 1 << 16


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the Snakemake target that makes it") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run Snakemake again") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, in order.

    Raises:
        UserError: the file is missing, or a line is not JSON.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: run the Snakemake target that makes it")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is not valid JSON ({error}): damaged or half-written") from None
    return found


def digest_of(value: Any) -> str:
    """Eight hex digits of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(manifest: Path) -> str:
    """Twelve hex digits over the checksums that a manifest lists; they do not depend on when it was made."""
    return content_digest(read_json(manifest)["files"])


def content_digest(files: list[dict[str, Any]]) -> str:
    """Twelve hex digits over the checksums of manifest entries."""
    return hashlib.sha256("".join(entry["sha256"] for entry in files).encode()).hexdigest()[:12]


def listing(paths: list[Path], folder: Path) -> list[dict[str, Any]]:
    """Manifest entries (path relative to `folder`, bytes, sha256) of heavy files."""
    return [
        {"path": os.path.relpath(path, folder), "bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    ]


# Files that were verified, by path, time of change, size and checksum. To read 16 GB again would take ten seconds.
_held: set[tuple[str, int, int, str]] = set()


def held() -> list[tuple[str, int, int, str]]:
    """Files that this process has verified, for `trust`."""
    return sorted(_held)


def trust(files: Iterable[Sequence[Any]]) -> None:
    """Count files as verified that another process has verified (its `held`) and that are unchanged since."""
    _held.update((path, time, size, checksum) for path, time, size, checksum in files)


def verified(folder: Path, entry: dict[str, Any]) -> Path:
    """Path of a manifest entry after comparing its size and checksum; an unchanged file is read once per process.

    Raises:
        UserError: missing, truncated or different from what the manifest lists.
    """
    path = folder / entry["path"]
    if not path.exists():
        raise UserError(
            f"{path} is missing although its manifest lists it: delete the manifest and run Snakemake again"
        )
    status = path.stat()
    size, key = status.st_size, (str(path.resolve()), status.st_mtime_ns, status.st_size, entry["sha256"])
    if size != entry["bytes"]:
        raise UserError(f"{path} has {size} bytes instead of {entry['bytes']}: it is truncated; delete it, run again")
    if key not in _held and sha256(path) != entry["sha256"]:
        raise UserError(f"{path} does not match the checksum in its manifest: it was changed; delete it and run again")
    _held.add(key)
    return path
