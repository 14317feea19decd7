"""What squeue says: its lines, one question for all launchers, and what a launcher makes of its job's states."""

from fcntl import LOCK_EX, flock

import pytest

import dmd2.core.slurm_queue
from dmd2.core.errors import UserError
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import Entry, Queue, slurm, squeue
from dmd2.launch.wait import RELEASES, SETTLE, Watch

RUN = RunId("digits", "dmd2", 0)
HELD = Entry("7", "name", "PENDING", "launch failed requeued held", "")


def entry(state, reason="None", nodes=""):
    return Entry("7", "name", state, reason, nodes)


# The commands.
def test_jobs_are_read_by_id_and_lines_that_are_none_are_skipped(fake):
    fake.answer("squeue", "7|a|RUNNING|None|node1", "a warning", "8|b|PENDING|(Resources)|", "9|c|PENDING|a|b|c")
    jobs = squeue()
    assert jobs["7"] == Entry("7", "a", "RUNNING", "None", "node1")
    assert jobs["8"] == Entry("8", "b", "PENDING", "(Resources)", "")
    assert set(jobs) == {"7", "8", "9"}


def test_squeue_asks_for_the_users_own_jobs_and_for_those_that_just_ended(fake):
    assert squeue("--name", "x") == {}
    assert fake.calls("squeue") == ["squeue --me --noheader --states=all --format=%i|%j|%T|%r|%N --name x"]


def test_a_command_that_fails_becomes_a_sentence_with_slurms_last_word(fake):
    fake.refuse("scontrol", "first line\nslurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(UserError, match=r"^Slurm refused `scontrol show`: .*Unable to contact slurm controller$"):
        slurm("scontrol", "show")


def test_a_command_that_does_not_answer_becomes_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match=r"Slurm did not answer `sleep 60` within 0 s"):
        slurm("sleep", "60", timeout=0.01)


# One question for all launchers.
def test_many_looks_within_the_interval_ask_once(fake, tmp_path):
    fake.answer("squeue", "7|a|RUNNING|None|node1")
    seen = [Queue(60, tmp_path).look() for _ in range(20)]
    assert len(fake.calls("squeue")) == 1
    assert {snapshot.jobs["7"].state for snapshot in seen} == {"RUNNING"}
    assert len({snapshot.time for snapshot in seen}) == 1


def test_a_stale_snapshot_is_refreshed(fake, tmp_path, monkeypatch):
    fake.answer("squeue", "7|a|PENDING|None|")
    old = Queue(60, tmp_path).look()
    fake.answer("squeue", "7|a|RUNNING|None|node1")
    monkeypatch.setattr(dmd2.core.slurm_queue.time, "time", lambda: old.time + 61)
    new = Queue(60, tmp_path).look()
    assert (old.jobs["7"].state, new.jobs["7"].state) == ("PENDING", "RUNNING")
    assert new.time == old.time + 61


def test_a_snapshot_from_the_future_is_not_believed(fake, tmp_path, monkeypatch):
    old = Queue(60, tmp_path).look()
    monkeypatch.setattr(dmd2.core.slurm_queue.time, "time", lambda: old.time - 3600)  # the clock was set back
    assert Queue(60, tmp_path).look().time == old.time - 3600


def test_none_while_the_controller_does_not_answer(fake, tmp_path):
    assert Queue(0, tmp_path).look().jobs == {}
    fake.refuse("squeue", "Unable to contact slurm controller")
    assert Queue(0, tmp_path).look() is None
    fake.answer("squeue", "7|a|RUNNING|None|node1")
    assert set(Queue(0, tmp_path).look().jobs) == {"7"}


def test_while_another_launcher_asks_the_old_snapshot_serves_and_no_one_asks_twice(fake, tmp_path):
    first = Queue(0, tmp_path).look()
    with open(tmp_path / ".queue.lock", "w", encoding="utf-8") as other:
        flock(other, LOCK_EX)
        assert Queue(0, tmp_path).look() == first
    assert len(fake.calls("squeue")) == 1


def test_the_first_question_of_another_launcher_is_no_silence_of_the_controller(fake, tmp_path):
    watch = Watch(RUN, "7")
    with open(tmp_path / ".queue.lock", "w", encoding="utf-8") as other:
        flock(other, LOCK_EX)
        snapshot = Queue(60, tmp_path).look()
    assert snapshot is not None
    assert not watch.over(snapshot.jobs.get("7"), snapshot.time)
    assert watch.ended_at is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"time": 1}', '{"time": 99999999999, "jobs": [{"id": 1}]}'])
def test_a_damaged_snapshot_is_asked_anew(fake, tmp_path, text):
    (tmp_path / ".queue.json").write_text(text)
    fake.answer("squeue", "7|a|RUNNING|None|node1")
    assert set(Queue(60, tmp_path).look().jobs) == {"7"}


# What a launcher makes of its job's states.
def verdicts(*seen):
    """`Watch.over` for (seconds after the start, entry) in turn."""
    watch = Watch(RUN, "7")
    return [watch.over(entry, watch.started + seconds) for seconds, entry in seen]


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "REQUEUED"])
def test_a_job_that_waits_or_runs_is_not_over(state):
    assert verdicts((0, entry(state)), (1e6, entry(state))) == [False, False]


@pytest.mark.parametrize(("state", "seconds"), [
    *((state, SETTLE) for state in ("CANCELLED", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")),
    *((state, 60) for state in ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "COMPLETED")),
])  # fmt: skip
def test_a_job_that_ended_is_over_once_it_stayed_so_and_after_a_minute_where_more_may_come(state, seconds):
    assert verdicts((0, entry(state)), (seconds - 1, entry(state)), (seconds, entry(state))) == [False, False, True]


def test_a_vanished_job_is_over_once_it_stayed_away():
    assert verdicts((0, entry("RUNNING")), (1, None), (SETTLE, None), (1 + SETTLE, None)) == [False] * 3 + [True]


def test_a_requeued_job_is_not_over_and_its_next_end_counts_anew():
    failed, pending = entry("NODE_FAIL"), entry("PENDING")
    assert not any(verdicts((0, failed), (50, pending), (70, failed), (100, failed)))


def test_a_snapshot_from_before_the_submission_says_nothing():
    assert verdicts((-1, None), (0, None), (SETTLE - 1, None)) == [False, False, False]


def test_a_job_held_after_a_failed_launch_is_released_three_times_then_told(fake):
    watch = Watch(RUN, "7")
    for i in range(RELEASES):
        assert not watch.over(HELD, watch.started + i)
    assert fake.calls("scontrol") == ["scontrol release 7"] * 3
    with pytest.raises(UserError, match="held after 4 failed launches"):
        watch.over(HELD, watch.started + RELEASES)


def test_a_snapshot_that_is_seen_several_times_releases_once(fake):
    watch = Watch(RUN, "7")
    for _ in range(RELEASES + 2):
        watch.over(HELD, watch.started + 1)
    assert len(fake.calls("scontrol")) == 1


@pytest.mark.parametrize("reason", ["JobHeldUser", "Resources", "Priority", "BeginTime"])
def test_a_job_that_the_user_holds_or_that_waits_is_left_alone(fake, reason):
    assert verdicts((0, entry("PENDING", reason))) == [False]
    assert fake.calls("scontrol") == []


def test_each_new_state_is_said_once_with_node_or_reason(capsys):
    pending, running = entry("PENDING", "Resources"), entry("RUNNING", "Priority", "node1")
    verdicts((0, pending), (1, pending), (2, running), (3, running), (4, None))
    said = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["job 7 PENDING (Resources)", "job 7 RUNNING on node1", "job 7 has left the queue"]
