"""Bring versioned results back, and read every byte of them: ``python -m dmd2.publish.restore``.

DVC takes what a remote or its cache gives, a damaged listing of a folder included, and its database of states hides
what is damaged later: ``dvc data status`` calls such files unchanged. So after the pull each file is compared with what
dvc.lock, which lies in git, and the manifests say.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import md5, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.progress import track

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import read_json
from dmd2.core.provenance import altered

LOCK, CACHE = Path("dvc.lock"), Path(".dvc/cache")
NOTHING = (
    "dvc.lock is missing, so there is nothing to restore: git has it in commits whose results were versioned; "
    "elsewhere make them (dmd2 run), then dvc repro writes it"
)
# Where artefacts keep the list of their files with checksums.
MANIFESTS = ("data/*/*/manifest.json", "data/pairs/*/*/manifest.json", "data/pairs/*/*/shard-?????.json",
             "results/runs/*/*/seed*/train.json", "results/runs/*/*/seed*/metrics.json",
             "results/teachers/*/*/metrics.json", "results/tables/*.json")  # fmt: skip
THREADS = 8
CHUNK = 1 << 20  # bytes that are read at a time


@dataclass
class Listed:
    """What is said about one file: its MD5 in dvc.lock, its SHA-256 in a manifest, or both."""

    md5: str | None = None
    sha256: str | None = None
    manifest: Path | None = None


def cache_folder() -> Path:
    """Where DVC keeps its copies; the usual place if there is no DVC to ask."""
    asked = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True, check=False)
    folder = Path(asked.stdout.strip()) if asked.returncode == 0 else CACHE
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def versioned_files(targets: list[str], cache: Path) -> dict[Path, Listed]:
    """MD5 of every versioned file that the targets (stages or paths; none means all) name.

    Raises:
        UserError: there is no dvc.lock, it names no such target, or the listing of a folder was not pulled.
    """
    if not LOCK.exists():
        raise UserError(NOTHING)
    stages = yaml.safe_load(LOCK.read_text(encoding="utf-8"))["stages"]
    found: dict[Path, Listed] = {}
    for target in targets or ["."]:
        before = len(found)
        for name, stage in stages.items():
            is_stage = target in (name, name.partition("@")[0])
            for path, digest in ((Path(out["path"]), out["md5"]) for out in stage.get("outs", [])):
                if is_stage or path.is_relative_to(target) or Path(target).is_relative_to(path):
                    files = _files(path, digest, cache)
                    found |= {file: Listed(md5) for file, md5 in files if is_stage or file.is_relative_to(target)}
        if targets and len(found) == before:
            raise UserError(f"{target} is no stage and no versioned file or folder in dvc.lock")
    return found


def _files(path: Path, digest: str, cache: Path) -> Iterator[tuple[Path, str]]:
    """Files of an output with their MD5; those of a folder are listed in the cache."""
    if not digest.endswith(".dir"):
        yield path, digest
        return
    listing = _cached(cache, digest)
    if not listing.exists():
        raise UserError(f"{listing}, the list of what {path} holds, is missing: dvc pull did not bring it")
    raw = listing.read_bytes()
    if md5(raw, usedforsecurity=False).hexdigest() != digest.removesuffix(".dir"):
        raise UserError(f"{listing}, the list of what {path} holds, is damaged: delete it and restore again")
    for entry in json.loads(raw):
        yield path / entry["relpath"], entry["md5"]


def _cached(cache: Path, digest: str) -> Path:
    return cache / "files" / "md5" / digest[:2] / digest[2:]


def _digests(path: Path) -> tuple[str, str]:
    """MD5 and SHA-256 of a file, which is read once."""
    hashes = md5(usedforsecurity=False), sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            for each in hashes:
                each.update(chunk)
    return hashes[0].hexdigest(), hashes[1].hexdigest()


def with_manifests(listed: dict[Path, Listed], partial: bool) -> dict[Path, Listed]:
    """Add the SHA-256 of every manifest that is here and can be read (`judged` tells of others).

    Files that a partial pull left out, or that were not versioned with their manifest (.dvcignore), are no damage.
    """
    versioned = set(listed)
    for manifest in sorted(path for pattern in MANIFESTS for path in Path().glob(pattern)):
        for entry in _entries(manifest):
            path = manifest.parent / entry["path"]
            if path in listed or path.exists() or not (partial or manifest in versioned):
                about = listed.setdefault(path, Listed())
                about.sha256, about.manifest = entry["sha256"], manifest
    return listed


def _entries(manifest: Path) -> list[dict[str, Any]]:
    """Files that a manifest lists, without entries that cannot be read."""
    try:
        value = read_json(manifest)
    except UserError:
        return []
    files = value.get("files", []) if isinstance(value, dict) else []
    return [entry for entry in files if isinstance(entry, dict) and {"path", "sha256"} <= entry.keys()]


def judged(path: Path, listed: Listed, cache: Path) -> str | None:
    """What is wrong with a file and what to do, in a sentence, or None.

    Args:
        path: the file.
        listed: what is said about it.
        cache: DVC's folder of copies.
    """
    copy = _cached(cache, listed.md5) if listed.md5 else None
    if not path.exists():
        where = LOCK if listed.md5 else listed.manifest
        return f"{path} is missing although {where} lists it: " + _again(None, copy)
    by_md5, by_sha256 = _digests(path)
    if listed.md5 and by_md5 != listed.md5:
        return f"{path} is not what dvc.lock lists: if you made it anew, run dvc repro; else " + _again(path, copy)
    if listed.sha256 and by_sha256 != listed.sha256:
        return (
            f"{path} does not match the checksum in {listed.manifest}, as it was versioned: delete both and let "
            "Snakemake make them again"
        )
    if path.suffix == ".json" and altered(path):
        return f"{path} was changed after it was made: delete it and let Snakemake make it again"
    return None


def _again(path: Path | None, copy: Path | None) -> str:
    """How to get a file back."""
    if copy is None:
        return "delete that and let Snakemake make both again"
    bad = copy.exists() and _digests(copy)[0] != "".join(copy.parts[-2:])
    files = " and ".join(str(file) for file in (path, copy if bad else None) if file)
    text = f"delete {files} and restore again" if files else "restore again"
    lasting = "; if it comes back so, the remote holds it damaged: push it again from where it was made"
    return text + (lasting if bad else "")


def verify(targets: Iterable[str] = ()) -> tuple[int, list[str]]:
    """Number of files that were read, and a sentence for each that is damaged or missing.

    Raises:
        UserError: see `versioned_files`.
    """
    cache, targets = cache_folder(), [str(target) for target in targets]
    listed = with_manifests(versioned_files(targets, cache), bool(targets))
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda path: judged(path, listed[path], cache), sorted(listed))
        shown = track(found, "comparing checksums", len(listed), transient=True, disable=not sys.stderr.isatty())
        return len(listed), [sentence for sentence in shown if sentence]


def main(
    targets: Annotated[
        list[str] | None, typer.Argument(help="stages or paths of dvc.yaml; default: all", show_default=False)
    ] = None,
    remote: Annotated[str | None, typer.Option(help="name of the DVC remote; default: the default one")] = None,
    check: Annotated[bool, typer.Option("--check", help="only compare what is here")] = False,
) -> None:
    """Pull TARGETS from the DVC remote and compare every file with its checksums; exit 1 names what is damaged."""
    with readable_errors():
        if not LOCK.exists():
            raise UserError(NOTHING)  # what `dvc pull` says instead advises to force it
        if not check and find_spec("dvc") is None:
            raise UserError("DVC is not installed: pip install dvc, or dvc-s3 or dvc-ssh for such a remote")
        pull = [sys.executable, "-m", "dvc", "pull", *(["--remote", remote] if remote else []), *(targets or [])]
        arrived = check or subprocess.run(pull, check=False).returncode == 0
        count, damage = verify(targets or [])
        for sentence in damage:
            print(f"error: {sentence}", file=sys.stderr)
        if not arrived:
            print("error: dvc pull failed, see what it says above", file=sys.stderr)
        if damage or not arrived:
            raise typer.Exit(1)
        print(f"{count} files are what dvc.lock and their manifests say")


if __name__ == "__main__":
    typer.run(main)
