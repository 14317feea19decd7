"""Signals wait for the loop, and a run has one writer."""

import signal
from types import SimpleNamespace

import pytest

import dmd2.core.interrupts
from dmd2.core.errors import UserError
from dmd2.core.interrupts import STOP, collected, single_writer


@pytest.fixture
def other(tmp_path):
    """Another writer of the run, in the middle of it."""
    writer = single_writer(tmp_path)
    writer.__enter__()
    yield writer
    writer.__exit__(None, None, None)


def test_signals_are_collected_in_order_and_then_handled_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with collected(STOP) as received:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_come_back_even_after_an_error():
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(ZeroDivisionError), collected({signal.SIGUSR2: lambda: None}):
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGUSR2) is before


def test_a_second_writer_is_told_at_once(other, tmp_path, monkeypatch):
    monkeypatch.setattr(dmd2.core.interrupts.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(UserError, match=r"another process trains this run"), single_writer(tmp_path):
        pytest.fail("two writers")


def test_a_patient_writer_waits_until_the_other_leaves(tmp_path, monkeypatch, capsys):
    other = single_writer(tmp_path)
    other.__enter__()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            other.__exit__(None, None, None)

    monkeypatch.setattr(dmd2.core.interrupts.time, "sleep", sleep)
    with single_writer(tmp_path, patience=1e6):
        assert len(waits) == 3
    assert capsys.readouterr().err.count("is locked, waiting: another process trains this run") == 1


def test_patience_ends(other, tmp_path, monkeypatch):
    waits = []
    clock = SimpleNamespace(monotonic=lambda: sum(waits), sleep=waits.append)
    monkeypatch.setattr(dmd2.core.interrupts, "time", clock)
    with pytest.raises(UserError, match="another process"), single_writer(tmp_path, patience=20):
        pytest.fail("two writers")
    assert sum(waits) == 20


def test_the_lock_is_free_again_after_a_writer_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), single_writer(tmp_path):
        1 / 0  # noqa: B018
    with single_writer(tmp_path):
        pass
