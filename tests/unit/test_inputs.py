"""When a training counts as finished: exactly this config, exactly these inputs, all files there."""

import pytest

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, write_json, write_text
from dmd2.core.run import Goal, RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.run_inputs import Inputs, goal_of
from dmd2.launch.job import TrainingJob
from tests.digits_run import CONFIG, OTHER, RUN, changed, finish

LONGER = changed("train", steps=1)


@pytest.fixture(autouse=True)
def finished(digits):
    """The record of a finished training with one file."""
    write_text(RUN.folder / "weights", "")
    finish(files=[{"path": "weights"}])


def key(cfg=CONFIG, seed=0):
    return Inputs.of(RUN, cfg).key(cfg, seed)


def test_the_same_config_on_the_same_inputs_is_finished():
    assert goal_of(RUN, CONFIG).reached()["files"] == [{"path": "weights"}]


def test_another_length_config_or_seed_is_not():
    assert key(LONGER) == key()  # it continues from the same checkpoints
    assert goal_of(RUN, LONGER).reached() is None
    assert goal_of(RUN, OTHER).reached() is None
    assert Goal(RUN, key(seed=1), goal_of(RUN, CONFIG).made).reached() is None


def test_changed_inputs_are_not():
    write_json(Inputs.of(RUN, CONFIG).real, {"files": [{"path": "x", "sha256": "other images"}]})
    assert goal_of(RUN, CONFIG).reached() is None


def test_a_record_whose_files_are_gone_does_not_count():
    (RUN.folder / "weights").unlink()
    assert goal_of(RUN, CONFIG).reached() is None


def test_a_record_beside_the_log_of_another_training_does_not_count():
    record = read_json(RUN.folder / "finished.json") | {"last": {"step": 2, "loss": 0.5}}
    write_json(RUN.folder / "finished.json", record)
    log = RUN.folder / "log.jsonl"
    for text, reached in (
        ('{"step": 1}\n{"step": 2, "loss": 0.5}\n', True), ('{"step": 1}\n', False), ('{"step": 2, "lo', False),
    ):  # fmt: skip
        log.write_text(text)
        assert (goal_of(RUN, CONFIG).reached() is not None) == reached
    log.unlink()
    assert goal_of(RUN, CONFIG).reached() is None


def test_a_run_that_never_ran_is_not():
    assert goal_of(RunId("digits", "dmd2", 3), CONFIG).reached() is None


def test_a_damaged_record_is_named():
    (RUN.folder / "finished.json").write_text("{")
    with pytest.raises(UserError, match=r"finished\.json is not valid JSON"):
        goal_of(RUN, CONFIG).reached()


def test_a_missing_input_is_named():
    Inputs.of(RUN, CONFIG).teacher.unlink()
    with pytest.raises(UserError, match=r"data/teachers/.*manifest\.json is missing"):
        key()


def test_inputs_lie_where_the_config_says_and_are_those_it_reads():
    second = changed("train", init_from="first")
    inputs = Inputs.of(RunId("digits", "dmd2", 4), second)
    assert str(inputs.init) == "results/runs/digits/first/seed4/train.json"
    assert (inputs.pairs, Inputs.of(RUN, CONFIG).init) == (None, None)
    regression = changed("regression", weight=1.0)
    assert str(Inputs.of(RUN, regression).pairs) == f"data/pairs/{CONFIG.pair_set}/manifest.json"


def test_a_restarted_job_whose_training_is_finished_does_nothing(capsys):
    TrainingJob(RUN, CONFIG, Hardware("cuda")).train()
    assert "digits/dmd2/seed0 is finished already" in capsys.readouterr().err
