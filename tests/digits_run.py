"""A run of the base digits in the current folder: its inputs, its record, and its Slurm job on a fake Slurm."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import dmd2.launch.slurm
import dmd2.launch.wait
from dmd2.core.files import read_json, write_json
from dmd2.core.run import RunId
from dmd2.experiment.cluster import Cluster
from dmd2.experiment.config import TrainConfig
from dmd2.experiment.run_inputs import Inputs, goal_of
from dmd2.experiment.tables import load_experiment
from dmd2.launch.slurm import SlurmTraining
from tests.conftest import ROOT
from tests.fake_slurm import FakeSlurm

RUN = RunId("digits", "dmd2", 0)
CONFIG = load_experiment(ROOT / "workflow/tables", ROOT / "workflow/base").runs["digits", "dmd2"].training()
KINDS = ("real_data", "detector", "reference", "teacher", "pairs", "evaluate")


def changed(section: str, **values: Any) -> TrainConfig:
    """The run's config with other values in a section."""
    return CONFIG.model_copy(update={section: getattr(CONFIG, section).model_copy(update=values)})


OTHER = changed("optim", lr=1e-3)


def make_inputs() -> None:
    """Manifests of what the run reads."""
    inputs = Inputs.of(RUN, CONFIG)
    for path in (inputs.teacher, inputs.real):
        assert path is not None
        write_json(path, {"files": [{"path": "x", "sha256": path.parent.name}]})


def finish(seed: int = RUN.seed, **others: Any) -> dict[str, Any]:
    """The record of a finished training, as its job would write it."""
    record = {"key": Inputs.of(RUN, CONFIG).key(CONFIG, seed), "settings": goal_of(RUN, CONFIG).config, "files": []}
    write_json(RUN.folder / "finished.json", record | others)
    return record | others


def training(cfg: TrainConfig = CONFIG, train: dict[str, Any] | None = None, **settings: Any) -> SlurmTraining:
    jobs = {**{kind: {} for kind in KINDS}, "train": {"runtime": 60, **(train or {})}}
    return SlurmTraining(RUN, cfg, Cluster.model_validate({"launcher": "slurm", "jobs": jobs, **settings}))


def queued(fake: FakeSlurm, job: str = "7", state: str = "RUNNING") -> None:
    """Let squeue show this run's job."""
    fake.answer("squeue", f"{job}|{training().name}|{state}|None|node1")


def submitted() -> list[str]:
    """Jobs in the run's job.json."""
    return read_json(RUN.folder / "job.json")["jobs"]


def whenever_it_sleeps(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """Instead of sleeping the launcher does this; subprocess, which sleeps too, is left alone."""
    real = {name: getattr(time, name) for name in ("time", "monotonic", "strftime")}
    for module in (dmd2.launch.slurm, dmd2.launch.wait):
        monkeypatch.setattr(module, "time", SimpleNamespace(**real, sleep=lambda seconds: action()))
