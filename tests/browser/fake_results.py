"""Invented results of a table, in the files that evaluation leaves behind: real digit images, made-up curves."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dmd2.core.files import listing, write_json, write_text
from dmd2.core.run import RunId
from dmd2.data.sets import save_shard
from dmd2.experiment.config import RunConfig
from dmd2.experiment.metrics import UNSETTLED
from dmd2.experiment.tables import load_experiment
from dmd2.publish.table_text import markdown
from eval.report.tables import build

SNAPSHOTS, ROWS, COLUMNS = 20, 6, 10
PROTOCOL = {
    "detector": "digits-classifier@3f1c9a77", "reference": "digits-digits-classifier@a81e02bd (1797 images)",
    "images": 2000, "draws": 1, "labels": "cyclic", "rounding": "round", "covariance_init": "zeros",
}  # fmt: skip


def workplace(folder: Path, root: Path) -> None:
    """Make `folder` a place where the tables can be built: only the workflow, as it is."""
    shutil.copytree(root / "workflow", folder / "workflow")


def table(name: str, edit: dict[str, object] | None = None) -> Path:
    """Write invented results of a table's rows below the current folder, and the table as `eval.report.tables` does."""
    experiment = load_experiment()
    table = experiment.tables[name]
    for i, row in enumerate(experiment.rows[name]):
        for seed in table.seeds:
            _student(RunId(table.base, row.run, seed), experiment.runs[table.base, row.run], i)
    for i, sampler in enumerate(table.teachers):
        _teacher(Path("results/teachers") / table.base / sampler, 7.2 - 2.1 * i, i)
    path = Path(f"results/tables/{name}.json")
    table = build(name) | (edit or {})
    write_json(path, table)
    write_text(path.with_suffix(".md"), markdown(table))
    return path


def _student(run: RunId, cfg: RunConfig, number: int) -> None:
    rng = np.random.default_rng([number, run.seed])
    steps, ratio = cfg.train.steps, cfg.critic.ratio
    unstable = ratio == 1 and cfg.regression.weight == 0 and cfg.dm.weight > 0
    floor = 9.5 - 2.0 * (cfg.gan.lambda_g > 0) + 15.0 * (cfg.dm.weight == 0) + 1.5 * (ratio == 1)
    done = np.arange(1, SNAPSHOTS + 1) / SNAPSHOTS
    wild = 3 * rng.random(SNAPSHOTS) if unstable else 0.12 * rng.standard_normal(SNAPSHOTS)
    fd = (floor + 250 * np.exp(-done * (9 if ratio == 1 else 6))) * np.exp(wild)
    snapshots = [
        {"step": round(t * steps), "student_updates": -(-round(t * steps) // ratio), "fd": float(value),
         "fid": float(value) / 3, "accuracy": float(0.99 - 0.6 * np.exp(-4 * t) - 0.02 * rng.random()),
         "brightness": float(0.305 + 0.003 * rng.standard_normal())}
        for t, value in zip(done, fd, strict=True)
    ]  # fmt: skip
    for snapshot in snapshots:
        snapshot["estimates"] = _estimates({k: snapshot[k] for k in ("fd", "fid", "accuracy", "brightness")})
    at = np.arange(0, steps, max(1, steps // 150))
    noise = np.convolve(rng.standard_normal(len(at) + 20), np.ones(21) / 21, "valid") * (0.25 if unstable else 0.012)
    probe = 0.305 - 0.12 * np.exp(-at / steps * 14) + noise
    log = [
        json.dumps({"step": s, "probe/brightness": p, "critic/denoise": 0.2 + 9 / (s + 9), "student/dm": p * p})
        for s, p in zip(at.tolist(), probe.tolist(), strict=True)
    ]
    unknown = {} if cfg.train.released is None else {"seconds": None, "cost": {}, "device": "released"}
    if not unknown:
        write_text(run.folder / "log.jsonl", "\n".join(log) + "\n")
    _grid(run.folder / "grid.png", 0.1 + (0.8 if unstable else 0.25 * (cfg.dm.weight == 0)), number)
    write_json(run.folder / "metrics.json", {
        "kind": "metrics", "run": str(run), "row": run.name, "seed": run.seed, "protocol": PROTOCOL,
        **({} if unknown else {"brightness_std": float(probe[at >= UNSETTLED * steps].std())}), "snapshots": snapshots,
        "student_updates": -(-steps // ratio), "seconds": round(90 + 40 * rng.random(), 1), "device": "1 x CPU thread",
        "cost": {"source": "sacct", "gpu_hours": 0.0, "cpu_hours": (120 + number) / 3600, "starts": 1 + run.seed},
        "train_commit": "4be1c02d9", "eval_commit": "4be1c02d9", "config": cfg.model_dump(mode="json"),
        "eval_seconds": 12.3, **unknown, "files": _influence(run.folder, [s["step"] for s in snapshots], number),
    })  # fmt: skip


def _teacher(folder: Path, fd: float, number: int) -> None:
    sampler = {"solver": "heun", "steps": 18 + 14 * number, "guidance": 1.0, "churn": 40.0 * number}
    values = {"fd": fd, "fid": fd / 3, "accuracy": 0.985, "brightness": 0.304}
    _grid(folder / "grid.png", 0.1, number)
    write_json(folder / "metrics.json", {
        "kind": "metrics", "run": f"digits/teacher-{folder.name}", "row": f"teacher-{folder.name}", "seed": 0,
        "protocol": PROTOCOL, "network_calls": 35 + 28 * number, "sampler": sampler,
        "snapshots": [{"step": 0, "student_updates": 0, **values, "estimates": _estimates(values)}],
        "eval_commit": "4be1c02d9", "seconds": 4.0, "files": _influence(folder, [0], 99),
    })  # fmt: skip


def _estimates(values: dict[str, float]) -> dict[str, dict[str, float]]:
    return {name: {"value": v, "se": 0.02 * v, "low": 0.95 * v, "high": 1.02 * v, "bias": 0.01 * v, "n": 2000}
            for name, v in values.items()}  # fmt: skip


def _influence(folder: Path, steps: list[int], number: int) -> list[dict[str, object]]:
    """Influences of 2,000 images, in part common to all rows."""
    common, own = (np.random.default_rng(seed).standard_normal(2000) for seed in (0, number + 1))
    path = folder / "influence.safetensors"
    save_shard(path, {f"{step:07d}": torch.from_numpy((9 * common + 3 * own).astype(np.float32)) for step in steps})
    return listing([path], folder)


def _grid(path: Path, noise: float, number: int) -> None:
    """Six real digits of every class, made worse by noise."""
    digits = load_digits()
    rng = np.random.default_rng(number)
    columns = [digits.images[digits.target == c][number * 3 : number * 3 + ROWS] / 16 for c in range(COLUMNS)]
    cells = np.stack(columns, axis=1)  # rows, columns, height, width
    cells = (cells + noise * rng.standard_normal(cells.shape)).clip(0, 1)
    pixels = cells.transpose(0, 2, 1, 3).reshape(ROWS * 8, COLUMNS * 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255).astype(np.uint8)).save(path)
