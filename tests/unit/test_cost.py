"""What a training cost, as sacct accounts it or as the wall clock says."""

from types import SimpleNamespace

import pytest

import dmd2.launch.cost
from dmd2.core.files import read_json, write_json
from dmd2.core.run import RunId
from dmd2.launch.cost import slurm_cost, training_cost, wall_clock_cost

RECORD = {"seconds": 1800.0, "processes": 4, "threads": 8, "device": "NVIDIA H100"}


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by sleeping alone; `then` is done at the next sleep."""
    made = SimpleNamespace(now=0.0, then=lambda: None)

    def sleep(seconds):
        made.now += seconds
        made.then()

    monkeypatch.setattr(dmd2.launch.cost, "time", SimpleNamespace(monotonic=lambda: made.now, sleep=sleep))
    return made


def test_all_starts_of_all_jobs_are_added_with_their_gpus_and_cpus(fake):
    fake.answer(
        "sacct",
        "REQUEUED|3600|billing=8,cpu=8,gres/gpu:h100=2,gres/gpu=2,mem=64000M,node=1",
        "CANCELLED by 1000|1800|cpu=8,gres/gpu=2,mem=64000M",
        "COMPLETED|7200|cpu=16,gres/gpu=4,node=1",
    )
    assert slurm_cost(["7", "12"]) == {"source": "sacct", "gpu_hours": 11.0, "cpu_hours": 44.0, "starts": 3}
    (call,) = fake.calls("sacct")
    assert "--duplicates" in call and "-j 7,12 " in call


def test_a_job_without_gpus_costs_none(fake):
    fake.answer("sacct", "COMPLETED|3600|billing=1,cpu=1,mem=200M,node=1")
    assert slurm_cost(["7"]) == {"source": "sacct", "gpu_hours": 0.0, "cpu_hours": 1.0, "starts": 1}


def test_a_start_that_got_no_resources_costs_nothing(fake):
    fake.answer("sacct", "CANCELLED by 0|0|", "COMPLETED|3600|cpu=2")
    assert slurm_cost(["7"])["cpu_hours"] == 2.0


def test_without_accounting_or_slurm_there_is_no_cost(fake):
    fake.refuse("sacct", "Slurm accounting storage is disabled")
    assert slurm_cost(["7"]) is None
    fake.remove()
    assert slurm_cost(["7"]) is None


@pytest.mark.parametrize("before", [["RUNNING|3590|cpu=2"], ["COMPLETING|3590|cpu=2"], []])
def test_accounting_that_runs_behind_is_waited_for(fake, clock, before):
    fake.answer("sacct", *before)
    clock.then = lambda: fake.answer("sacct", "COMPLETED|3600|cpu=2")
    assert slurm_cost(["7"])["cpu_hours"] == 2.0
    assert clock.now == 1


def test_accounting_that_never_arrives_gives_none_after_a_while(fake, clock):
    assert slurm_cost(["7"]) is None
    assert dmd2.launch.cost.LAG < clock.now <= dmd2.launch.cost.LAG + 1


def test_a_job_that_is_submitted_while_sacct_is_asked_is_not_forgotten(fake, clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, before = RunId("digits", "dmd2", 0), {"name": "n", "config": "c", "jobs": ["7"]}
    write_json(run.folder / "job.json", before)
    fake.answer("sacct", "RUNNING|3590|cpu=2")

    def then():
        write_json(run.folder / "job.json", {**before, "jobs": ["7", "8"]})
        fake.answer("sacct", "COMPLETED|3600|cpu=2")

    clock.then = then
    assert training_cost(run, RECORD)[0]["cpu_hours"] == 2.0
    assert read_json(run.folder / "job.json")["jobs"] == ["7", "8"]
    clock.then = lambda: None
    training_cost(run, RECORD)
    assert read_json(run.folder / "job.json")["cost"]["jobs"] == ["7", "8"]


def test_the_wall_clock_counts_every_process_as_a_gpu():
    assert wall_clock_cost(RECORD) == {"source": "wall clock", "gpu_hours": 2.0, "cpu_hours": 16.0}


def test_the_wall_clock_of_a_machine_without_gpu_counts_threads_alone():
    assert wall_clock_cost({**RECORD, "device": "cpu"}) == {"source": "wall clock", "gpu_hours": 0.0, "cpu_hours": 16.0}
