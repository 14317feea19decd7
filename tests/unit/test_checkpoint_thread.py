"""Checkpoints that a thread writes while training goes on: what is in them, what waits for them, what goes wrong."""

import errno
import os
import signal
import threading

import pytest
import torch

import dmd2.training.checkpoints.thread
from dmd2.core.errors import UserError
from dmd2.experiment.cluster import Hardware
from dmd2.training.checkpoints.checkpoint import Checkpoints
from dmd2.training.checkpoints.thread import CheckpointThread, host_copy
from dmd2.training.trainer import Training
from tests.unit.test_trainer import RUN, config, inputs, signal_at, workspace  # noqa: F401


class Held(Checkpoints):
    """Every write waits until it is let go."""

    def __init__(self, folder):
        super().__init__(folder)
        self.begun, self.go = threading.Event(), threading.Event()

    def save(self, step, state, spans=None):
        self.begun.set()
        assert self.go.wait(20)
        super().save(step, state, spans)


def state(value=1.0):
    return {"step": 7, "net": {"w": torch.full((4, 2), value)}, "opt": {"state": {}}, "log": [{"step": 5}]}


def test_training_goes_on_and_the_checkpoint_holds_what_was_there_when_it_was_due(tmp_path):
    checkpoints, live = Held(tmp_path), state()
    with CheckpointThread(checkpoints) as writer:
        writer.save(7, live)
        assert checkpoints.begun.wait(20)
        live["net"]["w"].fill_(2.0)
        live["log"].append({"step": 10})
        writer.check()  # nothing has gone wrong so far
        assert checkpoints.newest_step() == 0
        checkpoints.go.set()
    saved = checkpoints.load(7)
    assert torch.equal(saved["net"]["w"], torch.ones(4, 2)) and saved["log"] == [{"step": 5}]
    assert saved["opt"] == {"state": {}}


def test_a_second_checkpoint_waits_for_the_first(tmp_path):
    checkpoints = Held(tmp_path)
    with CheckpointThread(checkpoints) as writer:
        writer.save(7, state())
        threading.Timer(0.2, checkpoints.go.set).start()
        writer.save(8, state())
        assert checkpoints.newest_step() in (7, 8)  # 7 is whole
    assert [checkpoints.newest_good(7), checkpoints.newest_good()] == [7, 8]


def test_a_state_that_might_not_fit_twice_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dmd2.training.checkpoints.thread, "LARGEST", 31)  # bytes; it has 32
    writer = CheckpointThread(Checkpoints(tmp_path))
    writer.save(7, state())
    assert writer.writing is None and writer.checkpoints.newest_good() == 7


def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


def failed(folder, monkeypatch):
    """A writer whose write has failed, as nobody knows yet."""
    writer = CheckpointThread(Checkpoints(folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        writer.save(7, state())
        assert writer.writing.exception(20) is not None
    return writer


@pytest.mark.parametrize("call", [CheckpointThread.check, CheckpointThread.wait, lambda w: w.save(8, state())])
def test_what_went_wrong_is_raised_once_by_the_next_call(tmp_path, monkeypatch, call):
    writer = failed(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="the disk is full; earlier files are kept"):
        call(writer)
    writer.save(9, state())
    writer.wait()
    assert writer.checkpoints.newest_good() == 9


def test_at_the_end_it_is_raised_and_beside_another_error_it_is_printed(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="the disk is full"), failed(tmp_path, monkeypatch):
        pass
    with pytest.raises(ZeroDivisionError), failed(tmp_path, monkeypatch):
        1 / 0  # noqa: B018
    assert "the disk is full" in capsys.readouterr().err


def test_the_thread_ends_with_its_training(tmp_path):
    with CheckpointThread(Checkpoints(tmp_path)) as writer:
        writer.save(7, state())
        (thread,) = writer.pool._threads
    del writer
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_a_copy_keeps_kinds_and_layout_and_shares_nothing(kind):
    value = torch.arange(24).reshape(1, 2, 3, 4).to(kind).contiguous(memory_format=torch.channels_last)
    copied = host_copy({"a": {0: value, "scalar": torch.tensor(3.0)}, "n": 3})
    assert torch.equal(copied["a"][0], value) and copied["a"][0].stride() == value.stride() and copied["n"] == 3
    value.zero_()
    assert copied["a"][0].any() and copied["a"][0].dtype == kind


# In a training.
def hold(monkeypatch, step):
    """The thread's write of a step waits for the event that is returned."""
    go, save = threading.Event(), Checkpoints.save

    def held(self, now, *rest):
        assert now != step or threading.current_thread() is threading.main_thread() or go.wait(20)
        return save(self, now, *rest)

    monkeypatch.setattr(Checkpoints, "save", held)
    return go


def test_iterations_go_on_while_a_checkpoint_is_written(inputs, monkeypatch):  # noqa: F811
    go, training, seen = (
        hold(monkeypatch, 2),
        Training(RUN, config(6, train__checkpoint_every=2), Hardware(), inputs),
        [],
    )
    iterate = training.iterate

    def step():
        iterate()
        if training.step == 6:
            training.writer.wait()  # for 4, which the thread was given two iterations ago
        seen.append((training.step, training.checkpoints.newest_step()))
        if training.step == 3:
            go.set()

    monkeypatch.setattr(training, "iterate", step)
    training.run()
    assert seen[2] == (3, 0) and seen[-1] == (6, 4)
    assert training.checkpoints.newest_good() == 6


def test_a_full_disk_ends_the_training_in_the_same_sentence(inputs, monkeypatch):  # noqa: F811
    training = Training(RUN, config(9, train__checkpoint_every=2, train__snapshot_every=100), Hardware(), inputs)
    fsync = os.fsync
    main = threading.main_thread()
    monkeypatch.setattr(os, "fsync", lambda file: (fsync if threading.current_thread() is main else full)(file))
    with pytest.raises(UserError, match=r"cannot write .*00000002\.pt: the disk is full; earlier files are kept"):
        training.run()
    assert training.step in range(3, 5)
    assert not list(training.folder.rglob("*.tmp"))


def test_a_signal_waits_for_the_checkpoint_that_is_being_written(inputs, monkeypatch):  # noqa: F811
    go, training = hold(monkeypatch, 2), Training(RUN, config(9), Hardware(), inputs)
    signal_at(monkeypatch, 2, signal.SIGTERM)
    threading.Timer(0.3, go.set).start()
    with pytest.raises(KeyboardInterrupt):
        training.run()
    assert [training.checkpoints.newest_good(2), training.checkpoints.newest_good()] == [2, 3]


@pytest.mark.parametrize("every", [2, 100])  # the state is being saved by the thread, or is not due
def test_a_signal_while_a_state_is_saved_stops_when_the_next_one_lies_on_the_disk(inputs, monkeypatch, every):  # noqa: F811
    training = Training(RUN, config(9, train__checkpoint_every=every), Hardware(), inputs)
    save, good = training.save, []

    def signalled(force=False):
        save(force)
        if training.step == 2:
            signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(training, "save", signalled)
    training.run({signal.SIGUSR2: lambda: good.append((training.step, training.checkpoints.newest_step()))})
    assert good == [(3, 3)]


def test_a_loss_that_is_not_finite_names_the_checkpoint_that_was_being_written(inputs, monkeypatch):  # noqa: F811
    go, training = hold(monkeypatch, 2), Training(RUN, config(9), Hardware(), inputs)
    iterate = training.iterate

    def diverge():
        training.recent.append((training.step, {"critic/gan": torch.tensor(float("nan") if training.step == 3 else 0)}))
        iterate()

    monkeypatch.setattr(training, "iterate", diverge)
    threading.Timer(0.3, go.set).start()
    with pytest.raises(UserError, match="nan at step 3; the checkpoint of step 2 is kept"):
        training.run()
