"""Workspaces with invented numbers in the files that evaluation leaves behind, and the command that compares two."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from dmd2.core.files import listing, write_json
from dmd2.data.sets import save_shard
from dmd2.experiment.dotted_keys import apply_change
from dmd2.experiment.tables import load_experiment
from eval.compare.__main__ import main

ROOT = Path(__file__).parents[2]
APP = Typer()
APP.command()(main)
THREE = {0: 9.0, 1: 9.5, 2: 8.5}  # a Frechet distance by training seed
CONFIG = load_experiment(ROOT / "workflow/tables", ROOT / "workflow/base").runs["digits", "dmd2"]
PROTOCOL = {
    "detector": "digits-classifier@3f1c9a77", "reference": "digits-digits-classifier@a81e02bd (1797 images)",
    "images": 200, "draws": 1, "labels": "cyclic", "rounding": "round", "covariance_init": "zeros",
}  # fmt: skip
COMMON = np.random.default_rng(0).standard_normal(200)  # what the images of one index share, whoever made them


def run(*arguments: str) -> Result:
    """Call ``dmd2 compare``."""
    return CliRunner().invoke(APP, list(arguments))


def student(
    place: Path, name: str, fd: dict[int, float], change: dict[str, Any] | None = None,
    protocol: dict[str, Any] | None = None, own: float = 0.1, **facts: Any,
) -> None:  # fmt: skip
    """Evaluations of the row digits/`name`: `fd` by training seed, `own` the spread that is not COMMON's."""
    config = apply_change(CONFIG.model_dump(mode="json"), change or {})
    for seed, value in fd.items():
        folder = place / f"results/runs/digits/{name}/seed{seed}"
        values = {"fd": value, "accuracy": 1 - value / 100, "brightness": 0.3}
        record = _record(folder, values, seed, own, facts.get("se", 0.2)) | {
            "run": f"digits/{name}/seed{seed}", "row": name, "seed": seed, "protocol": PROTOCOL | (protocol or {}),
            "brightness_std": 0.01, "student_updates": 300, "seconds": 90.0, "device": facts.get("device", "cpu"),
            "cost": {"source": "wall clock", "gpu_hours": 0.0, "cpu_hours": 0.03}, "eval_seconds": 3.0,
            "train_commit": facts.get("commit", "4be1c02d9"), "eval_commit": "4be1c02d9", "config": config,
        }  # fmt: skip
        if "code" in facts:
            record["train_code"] = [{"step": 0, "commit": "c", "modules": facts["code"]}]
        write_json(folder / "metrics.json", record)
        write_json(folder / "train.json", {"kind": "run", "key": facts.get("key", "k") + str(seed), "torch": "2.11"})


def teacher(place: Path, name: str, fd: float) -> None:
    """Evaluation of one sampler of the teacher."""
    folder = place / f"results/teachers/digits/{name}"
    record = _record(folder, {"fd": fd, "accuracy": 0.98, "brightness": 0.3}, 0, 0.1, 0.2)
    sampler = {"solver": "heun", "steps": 18}
    about = {"row": f"teacher-{name}", "seed": 0, "protocol": PROTOCOL, "sampler": sampler, "eval_commit": "4be1c02d9"}
    write_json(folder / "metrics.json", record | about | {"seconds": 4.0, "network_calls": 35})


def psi(seed: int, fd: float, own: float) -> np.ndarray:
    """The influences that `student` writes."""
    draws = np.random.default_rng([seed, round(1000 * fd)]).standard_normal(200)
    return (COMMON + own * draws).astype(np.float32)


def _record(folder: Path, values: dict[str, float], seed: int, own: float, se: float | None) -> dict[str, Any]:
    shard = folder / "influence.safetensors"
    save_shard(shard, {"0001500": torch.from_numpy(psi(seed, values["fd"], own)),
                       "0000000": torch.from_numpy(psi(seed, values["fd"], own))})  # fmt: skip
    shade = min(255, int(10 * abs(values["fd"])) if values["fd"] == values["fd"] else 0)
    Image.new("L", (80, 48), shade).save(folder / "grid.png")
    estimates = {m: {"value": v, "se": se, "low": v, "high": v, "bias": 0.0, "n": 200} for m, v in values.items()}
    early = {"step": 150, "student_updates": 30, "fd": 99.0, "accuracy": 0.1, "brightness": 0.3}
    last = {"step": 0 if "teachers" in folder.parts else 1500, "student_updates": 300, **values}
    return {"kind": "metrics", "snapshots": [early | {"estimates": estimates}, last | {"estimates": estimates}],
            "files": listing([shard], folder)}  # fmt: skip
