"""A copy of the repository with the digits base shrunk to seconds, in which the real DAG can run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.fork_server import quick_bin

REPO = Path(__file__).parents[1]
SHRUNK = {
    "teacher.train": {"steps": 30, "batch": 32},
    "regression.pairs": {"count": 40, "shards": 2},
    "optim": {"batch": 16, "warmup": 5},
    "train": {"steps": 20, "snapshot_every": 10, "checkpoint_every": 5, "log_every": 5},
    "eval": {"images": 60, "batch": 30},
}
ROWS = ["dmd", "dmd2"]


class Workspace:
    """A working copy in which snakemake and the module command lines can be run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str, timeout: int = 1800) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy with one thread per process; ``python`` is that of `tests.fork_server`."""
        path = os.pathsep.join([str(quick_bin()), str(Path(sys.executable).parent), os.environ["PATH"]])
        env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=self.path, env=env, capture_output=True, text=True, timeout=timeout)

    def snakemake(self, *args: str) -> subprocess.CompletedProcess[str]:
        """``snakemake --profile local``."""
        return self.run("snakemake", "--profile", "local", "--cores", "2", *args)

    def plan(self, *targets: str) -> tuple[dict[str, int], str]:
        """Jobs a dry run would start, by rule, and its messages."""
        result = self.snakemake("-n", *targets)
        assert result.returncode == 0, result.stderr + result.stdout
        lines = re.findall(r"^([\w-]+) +(\d+)$", (result.stdout + result.stderr).split("Job stats:")[-1], re.M)
        return {rule: int(count) for rule, count in lines if rule not in ("total", "count")}, result.stderr

    def planned(self, *targets: str) -> dict[str, int]:
        """Jobs a dry run would start, by rule."""
        return self.plan(*targets)[0]

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace text in a file of the copy; the text must be there."""
        text = (self.path / file).read_text()
        assert old in text, f"{old!r} not in {file}"
        (self.path / file).write_text(text.replace(old, new, 1))


def copied_files(target: Path) -> list[str]:
    """Copy the files that git would commit; returns their names."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True)
    names = [name for name in listed.stdout.splitlines() or _without_git() if (REPO / name).exists()]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target / name, follow_symlinks=False)
    return names


def copy_repository(target: Path) -> Workspace:
    """The files git would commit, with the digits base shrunk and the demo cut to two rows."""
    copied_files(target)
    base_file = target / "workflow/base/digits.yaml"
    base = yaml.safe_load(base_file.read_text())
    for section, values in SHRUNK.items():
        part = base
        for key in section.split("."):
            part = part[key]
        part.update(values)
    for sampler in base["eval"]["teacher_samplers"].values():
        sampler["steps"] = 4
    base_file.write_text(yaml.safe_dump(base, sort_keys=False))
    cluster = target / "workflow/cluster/local.yaml"  # numbers are compared bit for bit, so not on a GPU that is here
    cluster.write_text(cluster.read_text().replace("{threads: 1}", "{threads: 1, device: cpu}"))
    demo_file, rows_file = target / "workflow/tables/demo.yaml", target / "workflow/tables/dmd2-table3.yaml"
    demo, rows = yaml.safe_load(demo_file.read_text()), yaml.safe_load(rows_file.read_text())["rows"]
    demo["rows"] = [row for row in rows if row["run"] in ROWS]
    demo_file.write_text("# a comment\n" + yaml.safe_dump(demo, sort_keys=False))
    return Workspace(target)


def _without_git() -> list[str]:
    """Files of a copy of the repository that has no history, without what installations and runs put there."""
    made = {".git", ".venv", ".snakemake", "__pycache__", "results", ".site", ".whl"}
    files = (path.relative_to(REPO) for path in REPO.rglob("*") if path.is_file() or path.is_symlink())
    return [str(path) for path in files if not made & set(path.parts)]
