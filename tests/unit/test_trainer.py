"""The loop around the iteration: resuming, signals, snapshots, second stages, stopping when a loss is not finite."""

import json
import signal
from pathlib import Path

import pytest
import torch

import dmd2.training.trainer
from dmd2.core.errors import UserError
from dmd2.core.interrupts import single_writer
from dmd2.core.run import Goal, RunId
from dmd2.data.sets import load_shard, save_shard
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.run_inputs import Inputs
from dmd2.launch.wait import publish
from dmd2.training.trainer import Training
from tests import tiny
from tests.waits import Waits

RUN = RunId("tiny", "full", 0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(tiny.teacher(folder), tiny.real_set(folder / "real.json"), None, None)


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(steps, **changes):
    every = {"train__snapshot_every": 2, "train__checkpoint_every": 2, "train__log_every": 2}
    return tiny.config("edm", train__steps=steps, critic__ratio=2, **{**every, **changes})


def train(inputs, steps, run=RUN, hardware=Hardware(), **changes):  # noqa: B008
    record = Training(run, config(steps, **changes), hardware, inputs).run()
    return json.loads(record.read_text()), record.parent


def last_snapshot(inputs, steps, **options):
    record, folder = train(inputs, steps, **options)
    return load_shard(folder / record["files"][-1]["path"])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_continued_run_ends_with_the_weights_of_an_undisturbed_one(inputs, ema):
    whole = last_snapshot(inputs, 6, run=RunId("tiny", "whole", 0), optim__ema=ema)
    train(inputs, 4, optim__ema=ema)
    assert equal(last_snapshot(inputs, 6, optim__ema=ema), whole)


def test_a_longer_run_continues_and_does_not_repeat(inputs, monkeypatch):
    train(inputs, 4)
    done, original = [], dmd2.training.trainer.train_step
    monkeypatch.setattr(
        dmd2.training.trainer, "train_step", lambda m, b, it, cfg: done.append(it) or original(m, b, it, cfg)
    )
    record, _ = train(inputs, 6)
    assert done == [4, 5]
    assert listed(record) == [2, 4, 6]


def test_a_changed_row_does_not_resume_the_old_weights(inputs):
    train(inputs, 4)
    changed, fresh = (
        last_snapshot(inputs, 4, run=run, optim__lr=5e-4) for run in (RUN, RunId("tiny", "other", 0))
    )  # fmt: skip
    assert equal(changed, fresh)


def test_micro_batches_are_hardware_and_resume_the_same_run(inputs):
    record, _ = train(inputs, 2)
    cut, _ = train(inputs, 4, hardware=Hardware(micro_batch=3))
    assert record["key"] == cut["key"]


def test_a_snapshot_is_the_students_network_alone(inputs):
    snapshot = last_snapshot(inputs, 2)
    assert snapshot.keys() == tiny.network("edm", 0).state_dict().keys()
    assert not equal(snapshot, tiny.weights(tiny.network("edm", 5)))


def test_ema_snapshots_are_averages_and_not_the_raw_weights(inputs):
    raw = last_snapshot(inputs, 4, run=RunId("tiny", "raw", 0))
    averaged = last_snapshot(inputs, 4, optim__ema=0.5)
    start = tiny.weights(tiny.network("edm", 5))
    name = "conv_in.weight"
    assert (averaged[name] - start[name]).norm() < (raw[name] - start[name]).norm()


def test_the_record_counts_student_updates_and_says_how_they_were_executed(inputs):
    record, _ = train(inputs, 5)
    assert (record["steps"], record["student_updates"]) == (5, 3)
    plain = {"micro_batch": 0, "shard": False, "checkpointing": False, "compiled": "none", "graphs": False}
    assert record["execution"] == plain


def test_a_second_stage_takes_student_and_critic_but_no_head_or_optimiser(inputs, monkeypatch):
    record, folder = train(inputs, 4, run=RunId("tiny", "first", 0))
    publish(Goal(RunId("tiny", "first", 0), record["key"], {}), record)
    second = Inputs(inputs.teacher, inputs.real, None, folder / "train.json")
    first = Training(RunId("tiny", "first", 0), config(4), Hardware(), inputs)
    first.resume()
    stage = Training(RUN, config(4, train__init_from="first"), Hardware(), second)
    assert equal(dict(stage.models.student.state_dict()), dict(first.models.student.state_dict()))
    assert equal(dict(stage.models.critic.state_dict()), dict(first.models.critic.state_dict()))
    assert not equal(dict(stage.models.head.state_dict()), dict(first.models.head.state_dict()))
    assert not stage.models.student_optimiser.adamw.state
    assert stage.step == 0
    teacher = tiny.weights(tiny.network("edm", 5))
    assert equal(dict(stage.models.teacher.network.state_dict()), teacher)


def test_a_loss_that_is_not_finite_stops_and_names_loss_and_step(inputs, monkeypatch):
    train(inputs, 2)
    original = dmd2.training.trainer.train_step

    def diverge(m, b, it, cfg):
        logs = original(m, b, it, cfg)
        return logs | ({"critic/denoise": torch.tensor(float("nan"))} if it == 3 else {})

    monkeypatch.setattr(dmd2.training.trainer, "train_step", diverge)
    with pytest.raises(UserError, match=r"critic/denoise is nan at step 3.*step 2 is kept"):
        train(inputs, 6)


def test_all_losses_are_looked_at_in_one_go(inputs):
    training = Training(RUN, config(9, train__log_every=9), Hardware(), inputs)
    for _ in range(3):
        training.iterate()
    assert len(training.recent) > 1 and len(training.recent[-1][1]) > 5
    with Waits(torch.device("cpu")) as waits:
        training.check_finite()
    assert len(waits.found) == 1, waits.found
    training.recent = [(3, {})]  # an iteration in which nobody is updated
    training.check_finite()


def test_the_log_has_one_line_per_interval_and_the_stability_signals(inputs):
    _, folder = train(inputs, 4)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    wanted = {"student/brightness", "student/std", "student/dm", "student/gan", "student/grad_norm", "critic/denoise",
              "critic/gan", "critic/grad_norm", "dm/g_abs", "dm/g_std", "dm/real_mean", "dm/real_std", "dm/fake_mean",
              "dm/fake_std", "gan/p_real", "gan/p_fake", "probe/brightness"}  # fmt: skip
    assert wanted <= set(lines[0])


def signal_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal in the middle of an iteration; returns the iterations that were completed."""
    completed, original = [], dmd2.training.trainer.train_step

    def interrupted(m, b, it, cfg):
        if it == step:
            signal.raise_signal(number)
        logs = original(m, b, it, cfg)
        completed.append(it)
        return logs

    monkeypatch.setattr(dmd2.training.trainer, "train_step", interrupted)
    return completed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_iteration_end_and_saves_before_it_stops(inputs, monkeypatch, number):
    completed = signal_at(monkeypatch, 2, number)
    training = Training(RUN, config(9, train__checkpoint_every=100), Hardware(), inputs)
    with pytest.raises(KeyboardInterrupt):
        training.run()
    assert completed == [0, 1, 2]
    assert training.checkpoints.newest_good() == 3
    assert not (RUN.folder / "finished.json").exists()


def test_a_training_stopped_anywhere_ends_with_the_weights_of_an_undisturbed_one(inputs, monkeypatch):
    whole = last_snapshot(inputs, 6, run=RunId("tiny", "whole", 0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signal_at(patch, 2)
        train(inputs, 6)
    assert equal(last_snapshot(inputs, 6), whole)


def test_an_action_comes_after_the_save_and_the_training_goes_on_if_it_returns(inputs, monkeypatch):
    completed, saved = signal_at(monkeypatch, 2, signal.SIGUSR2), []
    training = Training(RUN, config(4, train__checkpoint_every=100), Hardware(), inputs)
    training.run({signal.SIGUSR2: lambda: saved.append(training.checkpoints.newest_good())})
    assert saved == [3]
    assert completed == [0, 1, 2, 3]
    assert (RUN.folder / "finished.json").exists()


def test_a_finished_training_says_with_what_it_was_made(inputs):
    record, _ = train(inputs, 2, hardware=Hardware(threads=3))
    assert (record["device"], record["processes"], record["threads"], record["restarts"]) == ("cpu", 1, 3, 0)


def test_a_log_line_for_which_there_is_no_space_is_one_sentence(inputs, monkeypatch):
    training = Training(RUN, config(4), Hardware(), inputs)
    resume = training.resume
    monkeypatch.setattr(training, "resume", lambda: (resume(), setattr(training, "log_path", Path("/dev/full"))))
    with pytest.raises(UserError, match="cannot write /dev/full: the disk is full; earlier files are kept"):
        training.run()


def test_micro_batch_0_is_all_of_the_batch(inputs):
    whole, cut = (
        len(list(Training(RUN, config(2), Hardware(micro_batch=size), inputs).batches.at(0))) for size in (0, 3)
    )
    assert (whole, cut) == (1, 2)


def listed(record):
    return [int(file["path"][-19:-12]) for file in record["files"]]


def test_a_snapshot_of_weights_that_were_lost_is_not_listed(inputs, monkeypatch):
    """Killed between a snapshot and its checkpoint, and continued with another interval, by which it is not due."""

    def save_and_die(path, state):
        save_shard(path, state)
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(dmd2.training.trainer, "save_shard", save_and_die)
        train(inputs, 4, train__snapshot_every=3)
    record, _ = train(inputs, 4, train__snapshot_every=4)
    assert listed(record) == [4]


def test_a_training_shortened_to_one_of_its_checkpoints_ends_with_its_snapshot(inputs):
    whole = last_snapshot(inputs, 2, run=RunId("tiny", "short", 0))
    train(inputs, 4, train__snapshot_every=4)
    record, folder = train(inputs, 2, train__snapshot_every=4)
    assert listed(record) == [2]
    assert equal(load_shard(folder / record["files"][-1]["path"]), whole)


def test_a_second_writer_is_told(inputs):
    with single_writer(RUN.folder), pytest.raises(UserError, match="another process"):
        train(inputs, 2)


def test_a_changed_input_starts_another_run(inputs, tmp_path):
    tiny.real_set(tmp_path / "real.json", rows=tiny.tensors("edm", 32, seed=1))
    one, two = (
        Training(RUN, config(2), Hardware(), Inputs(inputs.teacher, real, None, None)).key
        for real in (inputs.real, tmp_path / "real.json")
    )
    assert one != two


@pytest.mark.parametrize("text", ["digits/dmd2", "digits/dmd2/0", "a/b/c/seed0", "digits/dmd2/seedx", ""])
def test_a_run_that_is_none_is_told(text):
    with pytest.raises(UserError, match="write base/name/seedN"):
        RunId.parse(text)


def test_a_runs_folder_is_a_function_of_its_name():
    assert str(RunId.parse("digits/dmd2/seed3").folder) == "results/runs/digits/dmd2/seed3"
