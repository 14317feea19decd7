"""Corners of a real cluster: lost answers, frozen controllers, jobs that never end, copies of a workspace, full disks."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fcntl import LOCK_EX, flock
from pathlib import Path
from types import SimpleNamespace

import pytest

import dmd2.core.interrupts
import dmd2.core.slurm_queue
import dmd2.launch.job
import dmd2.launch.slurm
import dmd2.launch.wait
from dmd2.core.errors import UserError
from dmd2.core.files import read_json, write_json
from dmd2.core.interrupts import single_writer
from dmd2.core.provenance import sole_maker
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import Queue, job_name
from dmd2.experiment.run_inputs import goal_of
from dmd2.launch import command as launch
from dmd2.launch.job import TrainingJob
from dmd2.launch.wait import Watch, publish, wait
from tests.conftest import ROOT
from tests.digits_run import CONFIG, RUN, finish, queued, training, whenever_it_sleeps
from tests.fake_slurm import FakeSlurm

pytestmark = pytest.mark.usefixtures("digits", "fake")
FROZEN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
RECORD = {"seconds": 3600.0, "processes": 1, "threads": 2, "device": "cpu"}
LAUNCHER = """
import sys
from tests.digits_run import training
print(training().submit_or_attach())
"""


def command_of(script: str) -> list[str]:
    """The words after ``python`` in the batch script's last command."""
    words = shlex.split(script.strip().splitlines()[-1])
    return words[words.index("-m") :]


# What a job needs.
def test_a_job_has_all_it_needs_on_its_command_line(fake):
    training().submit_or_attach()
    _, module, text = command_of((RUN.folder / "jobs/submission.sh").read_text())
    assert module == "dmd2.launch.job"
    assert TrainingJob.read(text) == TrainingJob(RUN, CONFIG, training().cluster.hardware)


def test_a_job_starts_whose_answer_was_lost_and_whose_folder_was_deleted(fake):
    fake.refuse("sbatch", "killed here")
    with pytest.raises(UserError):
        training().submit_or_attach()
    script = training().script()
    finish()
    shutil.rmtree(RUN.folder / "jobs")
    task = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
            "SUBMITIT_EXECUTOR": "slurm", "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run([sys.executable, *command_of(script)], env=os.environ | task, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "digits/dmd2/seed0 is finished already\n")


def test_a_job_asks_a_restarting_controller_again_to_requeue_it(fake, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job, now, sleeps = TrainingJob(RUN, CONFIG, training().cluster.hardware), [0.0], []

    def sleep(seconds):
        now[0] += seconds
        sleeps.append(seconds)
        if len(sleeps) == 2:
            fake.answer("scontrol")

    monkeypatch.setattr(dmd2.launch.job, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    RUN.folder.mkdir(parents=True)
    fake.refuse("scontrol", FROZEN)
    with pytest.raises(SystemExit) as left:
        job.requeue()
    assert left.value.code == 1 and fake.calls("scontrol") == ["scontrol requeue 7"] * 3
    fake.refuse("scontrol", "Requested operation is presently disabled")
    job.requeue()
    assert "job 7 could not be requeued and goes on" in capsys.readouterr().err and len(sleeps) == 2
    fake.refuse("scontrol", FROZEN)
    job.requeue()
    assert now[0] >= dmd2.launch.job.REQUEUE_PATIENCE


def test_the_processes_of_a_job_meet_at_a_port_that_no_connection_can_have(monkeypatch):
    from submitit.helpers import TorchDistributedEnvironment

    task = {"SLURM_JOB_ID": "4000123", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
            "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1", "SUBMITIT_EXECUTOR": "slurm"}  # fmt: skip
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setattr(TrainingJob, "train", lambda self, actions: None)
    monkeypatch.setattr(TorchDistributedEnvironment, "__init__", lambda self: None)
    monkeypatch.setattr(TorchDistributedEnvironment, "export", lambda self, **options: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    TrainingJob(RUN, CONFIG, training().cluster.hardware).in_slurm()
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 10_000 <= int(os.environ["MASTER_PORT"]) == 10_000 + 4000123 % 7000 < lowest


def test_a_waiting_launcher_keeps_the_folder_of_the_logs_without_which_slurm_starts_no_job(fake, monkeypatch):
    queued(fake)
    RUN.folder.mkdir(parents=True)
    whenever_it_sleeps(monkeypatch, finish)
    assert wait(goal_of(RUN, CONFIG), "7", 15)["settings"] == goal_of(RUN, CONFIG).config
    assert (RUN.folder / "jobs").is_dir()


# Sent once.
def slow_sbatch(fake: FakeSlurm) -> None:
    """sbatch makes its job only once the file `go` is there."""
    name, folder = training().name, fake.folder
    (folder / "bin/sbatch").write_text(
        f'#!/bin/sh\necho "sbatch $*" >>{folder}/calls\nwhile [ ! -e {folder}/go ]; do /bin/sleep 0.1; done\n'
        f'echo "7|{name}|PENDING|None|" >{folder}/squeue.out\necho "Submitted batch job 7"\n'
    )


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_launcher_killed_while_sbatch_is_slow_leaves_one_job_to_the_next(fake):
    slow_sbatch(fake)
    start = {"args": [sys.executable, "-c", LAUNCHER], "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    first = subprocess.Popen(**start)
    until(lambda: fake.calls("sbatch"))
    first.kill()
    first.wait()
    second = subprocess.Popen(**start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "is submitting this run: waiting for it" in second.stderr.readline()
    (fake.folder / "go").touch()
    output, _ = second.communicate(timeout=60)
    assert output == "7\n" and len(fake.calls("sbatch")) == 1


def test_a_sbatch_that_hangs_is_given_up_and_its_job_found(fake, monkeypatch, capsys):
    monkeypatch.setattr(dmd2.launch.slurm, "PATIENCE", 3.0)
    slow_sbatch(fake)
    whenever_it_sleeps(monkeypatch, lambda: queued(fake, job="41"))
    assert training().submit_or_attach() == "41"
    told = capsys.readouterr().err
    assert told.count("Slurm did not answer `sbatch") == 1 and len(fake.calls("sbatch")) == 1


def test_a_frozen_controller_is_said_once_and_waited_for_before_submitting(fake, monkeypatch, capsys):
    fake.refuse("squeue", FROZEN)
    sleeps = []

    def sleep():
        sleeps.append(1)
        if len(sleeps) == 3:
            fake.answer("squeue")

    whenever_it_sleeps(monkeypatch, sleep)
    assert training().submit_or_attach() == "7"
    assert capsys.readouterr().err.count("Unable to contact slurm controller") == 1


@pytest.mark.parametrize(("command", "said"), [("scontrol", "JobId=7 JobState=RUNNING Reason=None"),
                                               ("sacct", "RUNNING")])  # fmt: skip
def test_an_empty_queue_is_not_believed_while_slurm_knows_the_job(fake, capsys, command, said):
    training().submit_or_attach()
    fake.answer("squeue")
    fake.answer(command, said)
    assert training().submit_or_attach() == "7"
    watch = Watch(RUN, "7")
    assert not any(watch.over(None, watch.started + seconds) for seconds in range(0, 600, 5))
    assert len(fake.calls("sbatch")) == 1
    assert capsys.readouterr().err.count("is not shown by squeue, but it is RUNNING") == 1


@pytest.mark.parametrize("said", ["JobState=COMPLETED", "JobState=CANCELLED", "JobState=COMPLETING"])
def test_a_job_that_the_controller_calls_ended_is_gone(fake, said):
    training().submit_or_attach()
    fake.answer("scontrol", said)
    fake.answer("sbatch", "Submitted batch job 8")
    assert training().submit_or_attach() == "8"


def test_a_job_forgotten_by_the_controller_is_gone_although_its_end_was_never_accounted(fake):
    training().submit_or_attach()
    fake.refuse("scontrol", "slurm_load_jobs error: Invalid job id specified")
    fake.answer("sacct", "RUNNING")
    assert dmd2.core.slurm_queue.state_of("7") == ""


def test_the_job_that_runs_is_waited_for_when_the_own_one_leaves(fake, monkeypatch, capsys):
    monkeypatch.setattr(dmd2.launch.wait, "SETTLE", 0.0)
    fake.answer("squeue", f"8|{training().name}|FAILED|None|", f"7|{training().name}|RUNNING|None|node1")
    whenever_it_sleeps(monkeypatch, finish)
    assert wait(goal_of(RUN, CONFIG), "8", 15)["settings"] == goal_of(RUN, CONFIG).config
    assert "job 8 has ended, but job 7 of this run lives: waiting for that one" in capsys.readouterr().err


# COMPLETING without end.
def completing(fake, monkeypatch):
    training().submit_or_attach()
    queued(fake, state="COMPLETING")
    fake.answer("sbatch", "Submitted batch job 8")
    monkeypatch.setattr(dmd2.launch.slurm, "STUCK", 0.0)


def test_a_job_that_is_completing_without_end_is_replaced_once_its_processes_are_gone(fake, monkeypatch, capsys):
    completing(fake, monkeypatch)
    assert training().submit_or_attach() == "8"
    assert capsys.readouterr().err.count("is COMPLETING on node1; waiting") == 1


def test_a_job_that_is_completing_without_end_and_holds_the_run_is_told(fake, monkeypatch):
    completing(fake, monkeypatch)
    with single_writer(RUN.folder), pytest.raises(UserError, match="has been COMPLETING for 0 min and still holds the"):
        training().submit_or_attach()


def test_a_finished_run_does_not_wait_for_what_slurm_clears_away(fake, monkeypatch):
    completing(fake, monkeypatch)
    finish()
    assert training().submit_or_attach() is None


def test_a_waiting_launcher_gives_up_a_job_that_is_completing_without_end():
    watch, entry = Watch(RUN, "7"), dmd2.core.slurm_queue.Entry("7", "x", "COMPLETING", "None", "node1")
    assert not watch.over(entry, watch.started) and not watch.over(entry, watch.started + 299)
    assert watch.over(entry, watch.started + 301)


# One writer.
@pytest.fixture
def held(monkeypatch):
    """Job 7 holds the run; this process is of job 8, and waiting fails."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    writer = single_writer(RUN.folder)
    writer.__enter__()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    yield writer
    writer.__exit__(None, None, None)


def sleeping(monkeypatch, action):
    """What a process that waits for the lock does instead of sleeping."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=action)
    monkeypatch.setattr(dmd2.core.interrupts, "time", clock)


def test_a_job_leaves_the_run_to_another_job_that_lives_at_once(fake, held, monkeypatch):
    fake.answer("scontrol", "JobId=7 JobState=RUNNING")
    sleeping(monkeypatch, lambda _: pytest.fail("it waits"))
    alone = "Slurm job 7 trains this run already; job 8 leaves it alone and ends"
    with pytest.raises(UserError, match=alone), single_writer(RUN.folder, 120):
        pytest.fail("two writers")


@pytest.mark.parametrize(("own", "state"), [("7", "RUNNING"), ("8", "COMPLETING"), ("8", "FAILED")])
def test_a_job_waits_for_its_own_predecessor_and_for_one_that_is_dying(fake, held, monkeypatch, capsys, own, state):
    monkeypatch.setenv("SLURM_JOB_ID", own)
    fake.answer("scontrol", f"JobId=7 JobState={state}")
    sleeping(monkeypatch, lambda _: held.__exit__(None, None, None))
    with single_writer(RUN.folder, 120):
        assert "(Slurm job 7, process" in capsys.readouterr().err


def test_temporary_files_of_killed_saves_are_deleted_by_the_next_writer():
    left = [RUN.folder / name for name in (".finished.json.12.tmp", "checkpoints-0123abcd/.00000010.pt.n1-12-ab.tmp",
            "checkpoints-0123abcd/00000010/.part-0.12.tmp", "snapshots-0123abcd/.0000010.safetensors.12.tmp")]  # fmt: skip
    kept = [RUN.folder / ".job.json.12.tmp", RUN.folder / "checkpoints-0123abcd/00000010.pt"]  # the first: a launcher's
    for path in left + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with single_writer(RUN.folder):
        assert [path for path in left + kept if path.exists()] == kept


def test_the_temporary_files_of_a_training_are_left_alone_by_an_evaluation_of_the_run():
    saving = RUN.folder / "checkpoints-0123abcd/.00000010.pt.n1-12-ab.tmp"
    with single_writer(RUN.folder):
        saving.parent.mkdir()
        saving.touch()
        with sole_maker(RUN.folder / "metrics.json"):
            assert saving.exists()


# Cancelling.
def test_cancel_goes_on_after_a_run_that_is_idle_and_names_it(fake):
    runs = [RunId("digits", name, 0) for name in ("a", "b", "c", "d")]
    for run in (runs[0], runs[2]):
        run.folder.mkdir(parents=True)
    fake.answer("squeue", *(f"{i}|{job_name(run)}|RUNNING|None|n" for i, run in enumerate(runs) if i in (1, 3)))
    idle = r"^error: digits/a/seed0, digits/c/seed0 are not running and not waiting in the Slurm queue$"
    with pytest.raises(SystemExit, match=idle):
        launch.cancel([str(run) for run in runs])
    assert fake.calls("scancel") == ["scancel 1", "scancel 3"]


def test_a_copy_of_the_workspace_has_no_part_in_the_originals_job(fake, tmp_path, monkeypatch):
    training().submit_or_attach()
    queued(fake)
    fake.answer("scontrol", "JobId=7 JobState=RUNNING")
    shutil.copytree(tmp_path / "results", tmp_path / "copy/results")
    shutil.copytree(tmp_path / "data", tmp_path / "copy/data")
    monkeypatch.chdir(tmp_path / "copy")
    with pytest.raises(SystemExit, match="digits/dmd2/seed0 is not running"):
        launch.cancel([str(RUN)])
    assert fake.calls("scancel") == []
    fake.answer("sbatch", "Submitted batch job 8")
    assert training().submit_or_attach() == "8"


# What cannot be written.
@pytest.fixture
def read_only():
    """Make a folder of the workspace one that nobody, root included, can write to."""
    mounted = []

    def mount(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["/bin/mount", "--bind", "-o", "ro", folder, folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a read-only file system needs a mount: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["/bin/umount", folder], check=True)


def test_a_launcher_on_read_only_results_says_so_in_one_sentence(fake, read_only):
    read_only(Path("results"))
    with pytest.raises(UserError) as told:
        launch.train_on_slurm(training())
    assert str(told.value) == (
        "digits/dmd2/seed0: cannot write results/runs/digits/dmd2/seed0/.submit.lock: the file system is read-only; "
        "earlier files are kept, have it mounted for writing and run the same command again; a Slurm job of it that "
        "lives is left to run"
    )
    assert fake.calls("sbatch") == []


def test_a_job_that_was_sent_and_cannot_be_recorded_is_named(fake, monkeypatch):
    def full(training, jobs):
        if jobs:
            raise dmd2.core.files.refused(RUN.folder / "job.json", OSError(errno.ENOSPC, "full"))

    monkeypatch.setattr(dmd2.launch.slurm.SlurmTraining, "_record", full)
    with pytest.raises(UserError, match=r"^digits/dmd2/seed0: Slurm job 7 was submitted and is left to run, .*is full"):
        training().submit_or_attach()


def test_launchers_wait_on_read_only_results_too(fake, read_only):
    fake.answer("squeue", "7|a|RUNNING|None|node1")
    read_only(Path("results/runs"))
    queue = Queue(60)
    assert [set(queue.look().jobs) for _ in range(5)] == [{"7"}] * 5
    assert len(fake.calls("squeue")) == 1


def test_a_run_that_is_trained_but_cannot_be_published_is_told_so(fake, read_only):
    finish(**RECORD)
    goal = goal_of(RUN, CONFIG)
    read_only(RUN.folder)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=r"^error: digits/dmd2/seed0 is trained, but cannot write .*is read-only; "):
        dmd2.launch.wait.main(str(RUN), "7", goal.key, json.dumps(goal.made), "15")
    signal.signal(signal.SIGTERM, before)


# The cost.
@pytest.mark.parametrize("deleted", ["train.json", "job.json"])
def test_a_cost_that_sacct_told_once_is_kept_when_it_fails_later(fake, capsys, deleted):
    training().submit_or_attach()
    goal = goal_of(RUN, CONFIG)
    fake.answer("sacct", "COMPLETED|7200|cpu=4")
    publish(goal, RECORD)
    before = read_json(RUN.folder / "train.json")["cost"]
    assert before["source"] == "sacct" and capsys.readouterr().err.count("sacct") == 0
    if deleted == "train.json":  # as Snakemake does before it runs the rule again
        (RUN.folder / "train.json").unlink()
    else:
        write_json(RUN.folder / "job.json", {"name": "x", "config": "y", "jobs": ["7"]})
    fake.refuse("sacct", "Connection refused")
    publish(goal, RECORD)
    assert read_json(RUN.folder / "train.json")["cost"] == before
    assert "sacct does not say what the jobs cost" in capsys.readouterr().err


def test_a_cost_by_the_wall_clock_is_said_to_be_one(fake, capsys):
    training().submit_or_attach()
    fake.refuse("sacct", "Connection refused")
    publish(goal_of(RUN, CONFIG), RECORD)
    assert "sacct does not say what the jobs cost; train.json has hours by the wall clock" in capsys.readouterr().err


def test_a_launcher_that_waits_for_the_submission_lock_says_so(fake, monkeypatch, capsys):
    RUN.folder.mkdir(parents=True)
    with open(RUN.folder / ".submit.lock", "w") as other:
        flock(other, LOCK_EX)
        monkeypatch.setattr(dmd2.launch.slurm, "say", lambda run, text: (print(text), flock(other, 8)))
        assert training().submit_or_attach() == "7"
    assert "is submitting this run: waiting for it" in capsys.readouterr().out
