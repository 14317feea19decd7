"""Finished tiny runs, made by the real training or written down, and an exported script run without our packages."""

import json
import subprocess
from pathlib import Path

import torch

from dmd2.core.files import listing, read_json, write_json
from dmd2.core.run import Goal, RunId
from dmd2.data.sets import load_shard, save_shard
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import RunConfig, TrainConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.launch.wait import publish
from dmd2.networks.denoisers import Denoiser
from dmd2.networks.lora import snapshot_state
from dmd2.training.teachers import wrap
from dmd2.training.trainer import Training
from tests import tiny
from tests.fork_server import quick_bin

# Runs the script given first, once per argument list, with our packages made impossible to import.
ALONE = """
import json, runpy, sys
sys.modules["dmd2"] = sys.modules["eval"] = None
for arguments in json.loads(sys.argv[2]):
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")
"""


STUDENT = RunId("tiny", "student", 0)


def trained(kind: str, steps: int = 1, first: float | None = None, run: RunId = STUDENT, **changes) -> RunId:
    """A finished run, of two snapshots unless changed, made by the real training in the current folder."""
    teacher, real = Path("data/teachers/tiny"), Path("data/real/tiny")
    form = tiny.KINDS[kind][0]
    tiny.teacher(teacher, kind, "tiny")
    tiny.real_set(real / "manifest.json", kind)
    first = first or (80.0 if form == "edm" else 999.0)
    generator = {"input": "noise" if steps == 1 else "backward_simulation", "steps": steps, "time": first}
    train = {"train__steps": 4, "train__snapshot_every": 2, "critic__ratio": 2}
    cfg = tiny.config(kind, generator=generator, **{**train, **changes})
    record = Training(run, cfg.training(), Hardware(), Inputs.of(run, cfg)).run()
    finished = json.loads(record.read_text())
    publish(Goal(run, finished["key"], {}), finished)
    return run


def written(run: RunId, cfg: TrainConfig, *networks: torch.nn.Module) -> RunId:
    """A finished run in the current folder whose snapshots are `networks`, as if trained; its teacher is in place."""
    key = "0123abcd"
    for step, network in enumerate(networks, start=1):
        save_shard(run.folder / f"snapshots-{key}/{step:07d}.safetensors", snapshot_state(network))
    write_json(run.folder / "train.json", {
        "kind": "run", "run": str(run), "key": key, "steps": len(networks), "student_updates": len(networks),
        "seconds": 1.0, "device": "cpu", "processes": 1, "torch": torch.__version__, "commit": "abc",
        "config": cfg.model_dump(mode="json"), "last": {},
        "files": listing(sorted((run.folder / f"snapshots-{key}").iterdir()), run.folder),
    })  # fmt: skip
    return run


def student(kind: str, run: RunId, step: int = 4) -> tuple[Denoiser, RunConfig]:
    """The denoiser of a snapshot and the run's config, read without the code under test."""
    record = read_json(run.folder / "train.json")
    entry = next(file for file in record["files"] if file["path"].endswith(f"{step:07d}.safetensors"))
    network = tiny.network(kind, seed=0)
    network.load_state_dict(load_shard(run.folder / entry["path"]))
    return wrap(network, tiny.KINDS[kind][0]).eval(), RunConfig.model_validate(
        {**record["config"], "eval": tiny.values(kind)["eval"]}
    )


def run_alone(script: Path, *argument_lists: list[str]) -> None:
    code = ALONE.replace("SCRIPT", repr(str(script)))
    command = [str(quick_bin() / "python"), "-I", "-c", code, "-", json.dumps(argument_lists)]
    result = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr


def measured(run: RunId, values: dict[int, float], labels: str = "cyclic", rounding: str = "round") -> None:
    """Metrics of the run's snapshots in the form `eval.runs.evaluate` writes."""
    record = read_json(run.folder / "train.json")

    def estimate(value: float) -> dict:
        return {"value": value, "se": 0.5, "low": value - 2, "high": value, "bias": 1.0, "n": 60}

    write_json(run.folder / "metrics.json", {
        "protocol": {"detector": "d@1", "reference": "r@2", "labels": labels, "rounding": rounding},
        "snapshots": [{"step": s, "fd": v, "estimates": {"fd": estimate(v)}} for s, v in values.items()],
        "key": record["key"], "train_commit": record["commit"], "seconds": record["seconds"], "eval_commit": "abc",
        "config": {"eval": {"metrics": ["fd"]}},
    })  # fmt: skip
