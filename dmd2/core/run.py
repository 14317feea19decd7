"""The name and folder of a run, when its training is finished, and the commit of this code."""

import json
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.files import read_json

RUNS, SAMPLERS = Path("results/runs"), Path("results/teachers")


@dataclass(frozen=True, order=True)
class RunId:
    """A run, which is called ``base/name/seedN``."""

    base: str
    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.base}/{self.name}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder with everything of the run."""
        return RUNS / str(self)

    @staticmethod
    def parse(text: str) -> "RunId":
        """Read ``base/name/seedN``."""
        match = re.fullmatch(r"([\w-]+)/([\w-]+)/seed(\d+)", text)
        if not match:
            raise UserError(f"{text!r} is no run: write base/name/seedN, for example digits/dmd2/seed0")
        return RunId(match[1], match[2], int(match[3]))


def run_folders(root: Path = Path()) -> tuple[dict[RunId, Path], list[Path]]:
    """Runs of a workspace with their folders, in order, and folders beside them that belong to no run."""
    runs, others = {}, []
    for path in sorted(path for path in (root / RUNS).glob("*/*/*") if path.is_dir()):
        with suppress(UserError):
            run = RunId.parse(str(path.relative_to(root / RUNS)))
            if path == root / run.folder:  # seed00 is not
                runs[run] = path
                continue
        others.append(path)
    return dict(sorted(runs.items())), others


@dataclass(frozen=True)
class Goal:
    """One training: its run, the key of its config and inputs, and the provenance that its train.json records."""

    run: RunId
    key: str
    made: dict[str, Any]

    @property
    def config(self) -> str:
        """Digest of the complete config."""
        return self.made["config"]

    def reached(self) -> dict[str, Any] | None:
        """Record of the training, or None if it is not complete.

        The job writes the record as finished.json, so that a training that ended while nobody waited is not repeated:
        Snakemake deletes its own file, train.json, before it runs the rule again. The record counts only beside its own
        log, since a training of another config may have been begun and given up since.

        Raises:
            UserError: finished.json is damaged.
        """
        path = self.run.folder / "finished.json"
        if not path.exists():
            return None
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("files"), list):
            raise UserError(f"{path} is damaged: delete it and run again; the training goes on from its checkpoint")
        same = record.get("key") == self.key and record.get("settings") == self.config
        whole = all((self.run.folder / f["path"]).exists() for f in record["files"])
        return record if same and whole and json.dumps(record.get("last", {})) == self._last_logged() else None

    def _last_logged(self) -> str:
        path = self.run.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return lines[-1] if lines else "{}"


def commit() -> str:
    """Short hash of the commit of this code, with ``+`` when tracked files differ; "unknown" outside its checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]  # the current directory may be a repository of the user's
    try:
        # Installed into an environment, the package may lie in somebody's repository without belonging to it.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        short = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return short.stdout.strip() + ("+" if changed.returncode else "")
