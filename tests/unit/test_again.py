"""A training knows the code that made it, says where that changed, and is made anew without touching what it made."""

from pathlib import Path
from typing import Any

import pytest

import dmd2.core.retraining
import dmd2.training.trainer
from dmd2.core.errors import UserError
from dmd2.core.files import read_json, verified, write_json
from dmd2.core.interrupts import single_writer
from dmd2.core.retraining import (
    code_parts,
    continued,
    current_key,
    is_due,
    make_anew,
    other_code,
    trained_by_other_code,
)
from dmd2.core.run import Goal, RunId
from dmd2.experiment.cluster import Cluster, Jobs
from dmd2.experiment.run_inputs import Inputs, goal_of
from dmd2.launch import command as launch
from dmd2.launch.overview import run_line
from tests import tiny

RUN = RunId("tiny", "full", 0)
NEW = {"dmd2.method.batches": "new", "dmd2.method.step": "s"}
OLD = {"dmd2.method.batches": "old", "dmd2.method.step": "s"}
CLUSTER = Cluster(launcher="local", jobs=Jobs(**{kind: {} for kind in Jobs.model_fields}))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch) -> Path:
    """A teacher and a real set in their usual places, code OLD."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dmd2.core.retraining, "commit", lambda: "0123abcde")
    for path in ("data/teachers/t", "data/real/tiny"):
        Path(path).mkdir(parents=True)
    inputs = Inputs.of(RUN, config())
    tiny.teacher(inputs.teacher.parent)
    tiny.real_set(inputs.real)
    code(monkeypatch, OLD)
    return tmp_path


def code(monkeypatch, modules: dict[str, str]) -> None:
    """From now on this is the code of the method."""
    monkeypatch.setattr(dmd2.core.retraining, "modules_of", lambda: modules)
    monkeypatch.setattr(dmd2.training.trainer, "modules_of", lambda: modules)


def config(steps: int = 4) -> Any:
    every = {"train__snapshot_every": 2, "train__checkpoint_every": 2, "train__log_every": 2}
    return tiny.config("edm", teacher__name="t", train__steps=steps, critic__ratio=2, **every).training()


def train(steps: int = 4, when: Any = "never") -> dict[str, Any]:
    launch.train_here(RUN, config(steps), CLUSTER, when)
    return read_json(RUN.folder / "train.json")


def test_record_names_the_code_and_a_change_of_it(monkeypatch) -> None:
    assert train()["code"] == [{"step": 0, "commit": "0123abcde", "modules": OLD}]
    path = RUN.folder / "train.json"
    assert trained_by_other_code(path) is None
    code(monkeypatch, NEW)
    told = "was trained by other code (dmd2/method/batches.py changed since commit 0123abcde)"
    assert trained_by_other_code(path) == told


def test_record_of_an_earlier_version_says_nothing(monkeypatch) -> None:
    entry = train()
    del entry["code"]
    write_json(RUN.folder / "train.json", entry)
    (RUN.folder / "code.json").unlink()
    code(monkeypatch, NEW)
    assert trained_by_other_code(RUN.folder / "train.json") is None
    assert train(when="changed") == read_json(RUN.folder / "train.json")
    assert not is_due(goal_of(RUN, config()), "changed")


def test_other_code_alone_leaves_a_finished_run(monkeypatch, capsys) -> None:
    first = train()
    code(monkeypatch, NEW)
    assert train()["files"] == first["files"] and "is finished already" in capsys.readouterr().err


@pytest.mark.parametrize(("when", "modules"), [("always", OLD), ("changed", NEW)])
def test_training_anew_starts_at_0_and_leaves_the_old_one_whole(monkeypatch, capsys, when, modules) -> None:
    first = train()
    code(monkeypatch, modules)
    second = train(when=when)
    assert "resumes" not in capsys.readouterr().err
    assert second["key"] != first["key"] and second["code"] == [{"step": 0, "commit": "0123abcde", "modules": modules}]
    for entry in first["files"] + second["files"]:
        verified(RUN.folder, entry)
    assert train()["key"] == second["key"]  # and it is finished
    assert train(when="changed")["key"] == second["key"]


def test_training_anew_that_is_stopped_goes_on_and_the_old_record_stays_until_its_end(monkeypatch) -> None:
    first = train()
    with monkeypatch.context() as stopped:
        stopped.setattr(launch, "TrainingJob", Stopped)
        launch.train_here(RUN, config(), CLUSTER, "always")
    assert read_json(RUN.folder / "finished.json")["key"] == first["key"]
    assert run_line(RUN, {}, 0.0).state != "finished"
    second = train()
    assert second["key"] != first["key"]


class Stopped:
    """A training that is killed before it does anything."""

    def __init__(self, *_: Any) -> None:
        pass

    def train(self) -> None:
        pass


def test_policy_retrain_does_not_continue_a_checkpoint_of_other_code(monkeypatch, capsys) -> None:
    train(2)
    code(monkeypatch, NEW)
    assert [part["step"] for part in train(4, when="changed")["code"]] == [0]
    assert "resumes" not in capsys.readouterr().err


def test_run_that_other_code_continues_is_recorded_in_parts_and_said(monkeypatch, capsys) -> None:
    train(2)
    code(monkeypatch, NEW)
    parts = train(4)["code"]
    assert [(part["step"], part["modules"]) for part in parts] == [(0, OLD), (2, NEW)]
    assert "tiny/full/seed0 was trained in part by other code (dmd2/method/batches.py" in capsys.readouterr().err
    told = "was trained in part by other code (dmd2/method/batches.py changed since commit 0123abcde)"
    assert other_code(parts) == told


def test_code_whose_work_was_lost_is_forgotten() -> None:
    for step, modules in ((0, OLD), (2, NEW), (2, OLD)):  # NEW was killed before its first checkpoint
        parts = continued(RUN, "k", step, modules)
    assert [part["modules"] for part in parts] == [OLD] and code_parts(RUN, "k") == parts
    assert code_parts(RUN, "another") == []


def test_key_of_a_run_that_was_never_made_anew_is_as_before() -> None:
    assert current_key(RUN, "00000000") == "00000000"
    assert goal_of(RUN, config()).key == Inputs.of(RUN, config()).key(config(), 0)


def test_run_that_a_process_trains_is_not_made_anew() -> None:
    with single_writer(RUN.folder), pytest.raises(UserError, match="another process trains this run"):
        make_anew(Goal(RUN, "k", {}))
    assert not (RUN.folder / "again.json").exists()
