"""One side of a comparison: a folder, the workspace, a git revision or a DVC experiment, and the rows it measured.

Copies only the requested files of a revision out of git, the DVC cache or the DVC remote.
"""

import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.files import content_digest, read_json
from dmd2.experiment.protocols import of_record

WORKSPACE = "workspace"
RUN_FILES = ("metrics.json", "train.json", "grid.png", "influence.safetensors")
PATTERNS = (
    *(f"results/runs/*/*/seed*/{name}" for name in RUN_FILES),
    *(f"results/teachers/*/*/{name}" for name in RUN_FILES),
    "results/tables/*.json",
    "results/reference/*.json",
    "data/*/*/manifest.json",
)
NOT_METRICS = ("step", "student_updates", "estimates")  # of a snapshot


@dataclass(frozen=True)
class Side:
    """One side: its name as given, what that is, and the result files it has.

    `files` are paths as in a workspace (``results/runs/...``); `fetch` gives a local copy of one of them.
    """

    name: str
    what: str
    files: frozenset[str]
    fetch: Callable[[str], Path]

    def path(self, name: str) -> Path | None:
        """A local path of the file, or None if this side does not have it."""
        return self.fetch(name) if name in self.files else None

    def json(self, name: str) -> Any:
        """Content of a JSON file; None if this side does not have it."""
        path = self.path(name)
        return None if path is None else read_json(path)

    def matching(self, pattern: str) -> list[str]:
        """Files of this side that match a pattern, sorted."""
        return sorted(name for name in self.files if PurePosixPath(name).match(pattern))


@dataclass(frozen=True)
class Evaluation:
    """What is known of a row's last snapshot with one training seed (a teacher's only one is 0).

    `errors` are standard errors of the finite sample, None where unknown; `about` maps facts of the training and the
    evaluation (commits, device) to texts; `folder` holds the evaluation's files; `key` identifies the config, inputs
    and seed of the training; `metrics` is the metrics.json, or what a table tells of it.
    """

    values: dict[str, float]
    errors: dict[str, float | None]
    step: int
    protocol: dict[str, Any]
    config: dict[str, Any]
    about: dict[str, str]
    folder: str
    key: str | None
    metrics: dict[str, Any]

    @staticmethod
    def of(metrics: dict[str, Any], train: dict[str, Any], folder: str) -> "Evaluation":
        """What metrics.json and train.json say.

        Raises:
            KeyError, IndexError, TypeError: the former lacks what an evaluation writes.
        """
        last = metrics["snapshots"][-1]
        values = numbers_of(last) | {k: metrics[k] for k in ("brightness_std",) if k in metrics}
        errors = {metric: estimate["se"] for metric, estimate in last.get("estimates", {}).items()}
        config = metrics["config"] if "config" in metrics else {"sampler": metrics["sampler"]}
        about = {
            "trained at commit": metrics.get("train_commit"),
            "evaluated at commit": metrics.get("eval_commit"),
            "trained on": metrics.get("device"),
            "trained with torch": train.get("torch"),
        }
        known = {fact: text for fact, text in about.items() if text}
        key, protocol = train.get("key"), of_record(metrics)
        return Evaluation(values, errors, last["step"], protocol, config, known, folder, key, metrics)


def numbers_of(snapshot: dict[str, Any]) -> dict[str, float]:
    """The metrics of a snapshot of a metrics.json."""
    return {name: value for name, value in snapshot.items() if name not in NOT_METRICS}


Rows = dict[tuple[str, str], dict[int, Evaluation]]  # (base, run) to training seeds


def open_side(name: str, scratch: Path) -> Side:
    """The side that `name` means; `scratch` is an empty folder for what a revision's files are copied to.

    Raises:
        UserError: neither folder nor revision, or both, or there are no results in it.
    """
    folder = Path("." if name == WORKSPACE else name)
    if folder.is_file():
        raise UserError(f"{name} is a file: give the folder that holds tables/ or results/, or a git revision")
    if folder.is_dir() and name not in (WORKSPACE, ".") and "/" not in name and _is_revision(name):
        raise UserError(f"{name} is a folder and a git revision: write ./{name} or refs/heads/{name}")
    side = _folder(name, folder) if folder.is_dir() else _revision(name, scratch)
    if not any(path.startswith("results/") and not path.endswith((".png", "train.json")) for path in side.files):
        raise UserError(
            f"{side.name} ({side.what}) has no results: neither results/runs/*/*/seed*/metrics.json nor "
            "results/teachers/*/*/metrics.json nor tables/*.json nor results/reference/*.json; "
            "make some with Snakemake, or name another side"
        )
    return side


def _is_revision(name: str) -> bool:
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _folder(name: str, folder: Path) -> Side:
    """A workspace, its results folder, or a folder of tables."""
    if any((folder / "results" / part).is_dir() for part in ("runs", "teachers", "tables", "reference")):
        roots, what = {part: folder / part for part in ("results", "data")}, "workspace"
    elif any((folder / part).is_dir() for part in ("runs", "teachers", "tables")):
        roots, what = {"results": folder}, "results"
    else:
        roots, what = {"results/tables": folder}, "tables"
    found = {
        f"{place}/{path.relative_to(root)}": path
        for place, root in roots.items()
        for pattern in PATTERNS
        if pattern.startswith(f"{place}/")
        for path in root.glob(pattern.removeprefix(f"{place}/"))
    }
    return Side(name, f"{what} in {folder.resolve()}", frozenset(found), found.__getitem__)


def _revision(name: str, scratch: Path) -> Side:
    try:
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexError
    except ImportError:
        raise UserError(f"{name} is no folder here; to read git revisions, pip install 'dmd2-workbench[dvc]'") from None
    try:
        fs = DVCFileSystem(".", rev=name)
        commit = fs.repo.get_rev()  # the repository is opened only here
    except DvcException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is neither a folder nor a git revision nor a DVC experiment here: {reason}") from None
    hint = "run dvc push where they were made, and name that remote here (dvc remote list)"

    def listed(place: str) -> list[str]:
        try:
            found = fs.find(place, detail=True) if fs.isdir(place) else {}
            return [path for path, about in found.items() if _recorded(about)]
        except (DataIndexError, DvcException, OSError) as error:
            if place != "results":
                return []  # data only tells which inputs changed
            raise UserError(f"{place} of {name}: neither in the DVC cache nor a remote ({error}): {hint}") from None

    @cache
    def fetch(path: str) -> Path:
        out = scratch / path
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            fs.get_file(path, str(out))
        except (DvcException, OSError):
            raise UserError(f"{path} of {name}: neither in git, the DVC cache nor a remote: {hint}") from None
        return out

    files = {p for place in ("results", "data") for p in listed(place) if any(map(PurePosixPath(p).match, PATTERNS))}
    return Side(name, f"revision {commit[:9]}", frozenset(files), fetch)


def _recorded(about: dict[str, Any]) -> bool:
    """Whether a file of a revision is in git or in dvc.lock, and not only an output that dvc.yaml names."""
    entry = about.get("dvc_info", {}).get("entry")
    return entry is None or bool(entry.hash_info)


def read_tables(side: Side, folder: str = "tables") -> dict[str, dict[str, Any]]:
    """The tables below ``results/FOLDER`` as `eval.report.tables` wrote them, by name; skips other JSON."""
    found = map(side.json, side.matching(f"results/{folder}/*.json"))
    return {each["name"]: each for each in found if isinstance(each, dict) and {"name", "base", "rows"} <= each.keys()}


def read_rows(side: Side, tables: Iterable[dict[str, Any]]) -> Rows:
    """All rows of a side as their evaluations wrote them; of bases without any evaluation, as tables have them.

    Raises:
        UserError: a file lacks what an evaluation writes.
    """
    rows: Rows = {}
    for pattern in ("results/runs/*/*/seed*/metrics.json", "results/teachers/*/*/metrics.json"):
        for name in side.matching(pattern):
            folder = name.removesuffix("/metrics.json")
            _, _, base, run, *seed = folder.split("/")
            number = seed[0].removeprefix("seed") if seed else "0"
            if number.isdecimal():  # not a copy that someone laid aside
                train = side.json(f"{folder}/train.json") or {}
                try:
                    found = Evaluation.of(side.json(name), train, folder)
                except (KeyError, IndexError, TypeError) as missing:
                    told = f"{name} of {side.name} has no {missing}: evaluate the run again with Snakemake"
                    raise UserError(told) from None
                rows.setdefault((base, run if seed else f"teacher-{run}"), {})[int(number)] = found
    evaluated = {base for base, _ in rows}
    for table in tables:
        for row in table["rows"]:
            if table["base"] not in evaluated and (table["base"], row["run"]) not in rows:
                try:
                    rows[table["base"], row["run"]] = _tabulated(row)
                except (KeyError, TypeError) as missing:
                    place = f"table {table['name']} of {side.name}, row {row.get('run')}"
                    raise UserError(f"{place}, has no {missing}: make the table again with Snakemake") from None
    return rows


def _tabulated(row: dict[str, Any]) -> dict[int, Evaluation]:
    """A row of a table: its reported values, or the last snapshot where the table chose the best one."""
    found, teacher = {}, row["kind"] == "teacher"
    for seed, commit in row["commits"].items():
        last = row["curves"][seed][-1] if row["curves"] else {"step": row["step"][seed]}
        values = {metric: numbers[seed] for metric, numbers in row["values"].items()}
        metrics = {
            "snapshots": [{**values, "estimates": row["estimates"][seed], **last}],
            "protocol": row["protocol"],
            "sampler" if teacher and row["config"] else "config": row["config"],
            "eval_commit" if teacher else "train_commit": commit,
            "device": row["device"],
        }
        found[int(seed)] = Evaluation.of(metrics, {}, str(PurePosixPath(row["grid"][seed]).parent))
    return found


def inputs(side: Side, config: dict[str, Any]) -> dict[str, str]:
    """Content of the data and the teacher that a config names, by their manifests; only those that this side has."""
    kinds = {"data": "real", "teacher": "teachers"}
    names = {part: config.get(part, {}).get("name") for part in kinds}
    manifests = {f"{part} {name}": f"data/{kinds[part]}/{name}/manifest.json" for part, name in names.items() if name}
    found = {}
    for what, path in manifests.items():
        with suppress(UserError):  # a revision whose data is not fetched
            if (manifest := side.json(path)) is not None:
                found[what] = content_digest(manifest["files"])
    return found
