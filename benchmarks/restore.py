"""What versions cost with 1,000 runs: seconds to record, push, pull, verify, and until Snakemake has nothing to do.

The records are those of a real sweep, the weights are random bytes. ``python -m benchmarks.restore [RUNS]``
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
import yaml

from dmd2.core.files import listing, write_json, write_text
from dmd2.core.provenance import made_from, recorded, signed
from dmd2.core.run import SAMPLERS, RunId
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import REAL, TEACHERS, WEIGHTS, goal_of, measured_with
from dmd2.experiment.tables import BESIDE, load_experiment
from tests.workspace import REPO, Workspace, copy_repository

RUNS, SNAPSHOTS, SIZE = 1000, 2, 20_000  # bytes of a snapshot


def timed(what: str, workspace: Workspace, *command: str) -> None:
    """Run a command that must succeed and print how long it took."""
    started = time.perf_counter()
    result = workspace.run(*command)
    assert result.returncode == 0, result.stderr + result.stdout
    said = [line for line in result.stdout.splitlines() if "fetched" in line or "pushed" in line or "Nothing" in line]
    print(f"{what}: {time.perf_counter() - started:.1f} s  {' '.join(said)}", flush=True)


def random_file(path: Path, size: int = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


def manifest(folder: Path, kind: str, config: object, inputs: list[Path]) -> Path:
    """An artefact of the data part of the DAG."""
    out = folder / "manifest.json"
    with recorded(out, config, inputs):
        write_json(out, {"kind": kind, "files": listing([random_file(folder / "x.safetensors")], folder)})
    return out


def metrics(folder: Path, cfg: RunConfig, inputs: list[Path], **about: str) -> None:
    grid = random_file(folder / "grid.png")
    with recorded(folder / "metrics.json", cfg.settings(), inputs, beside=[grid]):
        files = listing([random_file(folder / "influence.safetensors")], folder)
        write_json(
            folder / "metrics.json", {"kind": "metrics", "snapshots": [{"step": 1, "fd": 1.0}], "files": files, **about}
        )


def make_run(run: RunId, cfg: RunConfig) -> None:
    """The folder of a finished and measured run."""
    goal = goal_of(run, cfg.training())
    names = [f"snapshots-{goal.key}/{step:07d}.safetensors" for step in range(SNAPSHOTS)]
    record = {"kind": "run", "key": goal.key, "steps": SNAPSHOTS, "config": cfg.training().model_dump(mode="json"),
              "files": listing([random_file(run.folder / name) for name in names], run.folder)}  # fmt: skip
    write_text(run.folder / "log.jsonl", json.dumps({"step": SNAPSHOTS, "run": str(run)}) + "\n")
    write_json(run.folder / "finished.json", record)
    write_json(run.folder / "train.json", signed(record, goal.made))
    metrics(run.folder, cfg.measured(), [*measured_with(cfg).values(), run.folder / "train.json"], key=goal.key)


def make_sweep(count: int) -> None:
    """Everything that the target `sweep` asks for, in the current folder."""
    table = {"title": "sweep", "base": "digits", "rows": [{"run": "sweep"}], "seeds": list(range(count))}
    Path("workflow/tables/sweep.yaml").write_text(yaml.safe_dump(table))
    experiment = load_experiment()
    cfg = experiment.runs["digits", "sweep"]
    sections = cfg.settings()
    real = manifest(REAL / cfg.data.name, "real", sections["data"], [])
    detector = manifest(WEIGHTS / cfg.eval.detector, "classifier", cfg.eval.detector, [real])
    reference = measured_with(cfg)["reference"].parent
    manifest(reference, "reference", [cfg.eval.detector, cfg.eval.geometry], [detector, real])
    manifest(TEACHERS / cfg.teacher.name, "teacher", [sections["data"], sections["teacher"]], [real])
    for seed in range(count):
        make_run(RunId("digits", "sweep", seed), cfg)
    for sampler in cfg.eval.teacher_samplers:
        metrics(
            SAMPLERS / "digits" / sampler,
            experiment.bases["digits"].measured(sampler),
            list(measured_with(cfg).values()),
        )
    out = Path("results/tables/sweep.json")
    beside = [out.with_suffix(f".{suffix}") for suffix in BESIDE]
    with recorded(out, experiment.shown("sweep"), experiment.measured("sweep"), beside):
        for path in [*beside, out.parent / "metrics/sweep/sweep.yaml"]:
            write_text(path, "{}")
        write_json(out, {"name": "sweep"})
    record = {key: value for key, value in made_from(None, [out]).items() if key != "origins"}
    write_text(Path("results/report/index.html"), f"<!-- made from {json.dumps(record)} -->\n")


def stages() -> None:
    """One base without pairs, one table."""
    text = yaml.safe_load(Path("dvc.yaml").read_text())
    text["vars"] = [{**entry, **({"tables": {"sweep": "digits"}} if "tables" in entry else {}),
                     **({"page": "sweep"} if "page" in entry else {})} for entry in text["vars"]]  # fmt: skip
    for stage in text["stages"].values():
        for key in ("deps", "outs"):
            part = stage.get("do", stage).get(key, [])
            part[:] = [entry for entry in part if "data/pairs" not in str(entry)]
    Path("dvc.yaml").write_text(yaml.safe_dump(text, sort_keys=False))


def main(count: Annotated[int, typer.Argument()] = RUNS) -> None:
    with TemporaryDirectory() as folder:
        origin = copy_repository(Path(folder) / "origin")
        for path in (origin.path / "workflow/tables").glob("*.yaml"):
            path.unlink()
        os.chdir(origin.path)
        make_sweep(count)
        stages()
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
        timed("nothing to do before", origin, "snakemake", "--profile", "local", "-n", "sweep")
        origin.run("git", "init", "-q")
        origin.run("dvc", "remote", "add", "-d", "store", f"{folder}/store")
        timed("dvc commit", origin, "dvc", "commit", "-f")
        origin.run("git", "add", "-A")
        assert origin.run(*git, "commit", "-q", "-m", "sweep").returncode == 0
        timed("dvc push", origin, "dvc", "push")
        subprocess.run(["git", "clone", "-q", origin.path, f"{folder}/clone"], check=True)
        clone = Workspace(Path(folder) / "clone")
        timed("dvc pull", clone, "dvc", "pull")
        timed("python -m dmd2.publish.restore --check", clone, sys.executable, "-m", "dmd2.publish.restore", "--check")
        timed("snakemake -n", clone, "snakemake", "--profile", "local", "-n", "sweep")
        timed("python -m dmd2.publish.restore, again", clone, sys.executable, "-m", "dmd2.publish.restore")
        files = [path for path in (clone.path / "results").rglob("*") if path.is_file()]
        print(f"{count} runs: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB")
        os.chdir(REPO)


if __name__ == "__main__":
    typer.run(main)
