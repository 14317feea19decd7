"""Two processes train what one would, up to rounding; each is the same and repeats bit for bit."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dmd2.core import distributed
from dmd2.core.distributed import GradientSums
from dmd2.core.errors import UserError
from dmd2.core.files import read_json_lines
from tests import tiny, two_processes
from tests.conftest import ROOT
from tests.fork_server import torchrun

# Measured: weights differ by 1e-5 of the length of their update, log values by 1e-6 (2e-5 for a mean near 0).
WEIGHTS, LOGS = 1e-4, 1e-4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder in which two processes, and then this one, have trained."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny.teacher(folder)
    tiny.real_set(folder / "set.json")
    status, messages = torchrun(folder, "tests.two_processes")
    assert status == 0, messages[-5000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before = {name: value.clone() for name, value in two_processes.trained(two_processes.training("one")).items()}
        one = two_processes.training("one")
        one.run()
    return folder, before, two_processes.trained(one)


def weights(workspace, name):
    return load_file(workspace[0] / f"{name}.safetensors")


def log(workspace, name):
    return read_json_lines(workspace[0] / f"results/runs/tiny/{name}/seed0/log.jsonl")


@pytest.mark.parametrize("name", ["two", "cut"])
@pytest.mark.parametrize("who", ["student", "critic", "head", "ema"])
def test_two_processes_train_the_weights_of_one(workspace, who, name):
    _, before, one = workspace
    two = weights(workspace, f"{name}-0")
    names = [name for name in one if name.startswith(f"{who}.")]
    moved, off = (torch.cat([(one[n] - other[n]).flatten() for n in names]).norm() for other in (before, two))
    assert moved > 0
    assert off / moved < WEIGHTS


def test_their_log_is_that_of_one(workspace):
    one, two = log(workspace, "one"), log(workspace, "two")
    assert [line["step"] for line in two] == [2, 4, 6]
    # A deviation is taken over the rows of a process (or of a micro-batch), so it depends on how they are cut.
    compared = [name for name in one[0] if name not in ("step", "seconds") and not name.endswith("std")]
    assert {"student/dm", "student/gan", "student/regression", "critic/denoise", "critic/gan", "student/grad_norm",
            "critic/grad_norm", "gan/p_real", "probe/brightness"} <= set(compared)  # fmt: skip
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert {n: b[n] for n in compared} == pytest.approx({n: a[n] for n in compared}, rel=LOGS, abs=1e-6)


def test_gradients_are_summed_while_the_backward_pass_runs(workspace):
    for rank in (0, 1):
        sent = json.loads((workspace[0] / f"facts-{rank}.json").read_text())["sent"]
        for name in ("two", "cut", "body"):
            student, critic, *later = sent[name]
            assert student[0] == critic[0] == 0  # the first update lays the buckets out
            assert len(later) == 7 and all(early == buckets > 3 for early, buckets in later)
        assert all(early == 0 for early, _ in sent["late"])


def test_processes_hear_the_first_ones_newest_word(workspace):
    for rank in (0, 1):
        assert json.loads((workspace[0] / f"facts-{rank}.json").read_text())["heard"] == [0, 1, 0, 2]


def test_sums_are_the_same_whenever_they_are_sent(workspace):
    early, late = (weights(workspace, f"{name}-0") for name in ("two", "late"))
    assert all(torch.equal(early[n], late[n]) for n in early)


@pytest.mark.parametrize("name", ["two", "stopped", "cut", "body"])
def test_both_processes_hold_the_same_weights(workspace, name):
    first, second = (weights(workspace, f"{name}-{rank}") for rank in (0, 1))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_stopped_training_of_two_processes_ends_with_the_weights_of_an_undisturbed_one(workspace):
    whole, stopped = (weights(workspace, f"{name}-0") for name in ("two", "stopped"))
    facts = [json.loads((workspace[0] / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert [fact["resumed_at"] for fact in facts] == [two_processes.STOP] * 2
    assert all(torch.equal(whole[n], stopped[n]) for n in whole)


def test_more_processes_than_rows_are_refused_in_every_process(workspace):
    for rank in (0, 1):
        facts = json.loads((workspace[0] / f"facts-{rank}.json").read_text())
        assert facts["refused"] == "tiny/small/seed0: 2 processes cannot share a batch of 1"


def test_the_record_of_the_training_counts_both_processes(workspace):
    record = json.loads((workspace[0] / "results/runs/tiny/two/seed0/finished.json").read_text())
    assert record["processes"] == 2


ASKS_LATE = """
import time, torch
from dmd2.core import distributed

with distributed.process_group(torch.device("cpu")):
    if distributed.rank() == 1:
        time.sleep(1)
    print(distributed.agreed(7 + distributed.rank()))
"""


def test_process_0_whose_store_the_others_ask_ends_last():
    """As in a job of Slurm, where it has no agent of torchrun to hold the store."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(10_000 + os.getpid() % 7_000)}
    started = [
        subprocess.Popen([sys.executable, "-c", ASKS_LATE], env={**os.environ, **group, "RANK": rank, "PYTHONPATH": str(ROOT)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in started]
    assert [out for out, _ in ended] == ["7\n"] * 2, ended


# One process at a time.
@pytest.mark.parametrize(("total", "size"), [(7, 2), (8, 2), (7, 3), (280, 64), (5, 5), (40, 1)])
def test_every_row_belongs_to_one_process_and_sizes_differ_by_at_most_one(monkeypatch, total, size):
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: size)
        shares.append(distributed.rows(total))
    assert [row for share in shares for row in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_summed_and_no_group_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with distributed.process_group(torch.device("cpu")):
        GradientSums([p]).finish()
        assert p.grad.tolist() == [1, 1]
        assert distributed.agreed(7) == 7
        assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.local_device("auto", "pairs") == distributed.local_device("cpu", "pairs") == torch.device("cpu")
    with pytest.raises(
        UserError, match="jobs.pairs.device is cuda, but this process sees no GPU: check jobs.pairs.gpu"
    ):
        distributed.local_device("cuda", "pairs")


TAKES = """
import os, sys, time, torch
from dmd2.core import distributed

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
torch.cuda.set_device = lambda device: print("current", device.index)
assert distributed.local_device("auto", "train") == distributed.local_device("cuda", "train")
print(distributed.local_device("auto", "train").index, flush=True)
sys.stdin.read()
"""


def test_jobs_side_by_side_take_gpus_of_their_own_until_they_end(tmp_path):
    outside = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "SLURM_JOB_ID")}
    env = {**outside, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "3,5"}

    def job():
        process = subprocess.Popen([sys.executable, "-c", TAKES], env=env, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        lines = []
        while not lines or lines[-1].startswith("current"):
            lines.append(process.stdout.readline())
        assert lines[0] == f"current {lines[-1]}"
        return process, int(lines[-1])

    (first, one), (second, other), (third, any_of_them) = job(), job(), job()
    assert (one, other) == (0, 1) and any_of_them in (0, 1)
    first.communicate()
    fourth, again = job()
    assert again == 0
    for process in (second, third, fourth):
        process.communicate()
    assert sorted(path.name for path in tmp_path.glob("*.lock")) == [
        f"dmd2-{os.getuid()}-gpu-{name}.lock" for name in (3, 5)
    ]


@pytest.mark.parametrize(("kind", "ends"), [("cuda", "aborted"), ("cpu", "destroyed")])
def test_an_error_of_one_process_waits_for_no_sum_of_the_others(monkeypatch, kind, ends):
    """NCCL destroys a communicator once its kernels have ended, which wait for this process."""
    told, store = [], SimpleNamespace(set_timeout=lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda *_: store)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: told.append("joined"))
    monkeypatch.setattr(dist, "is_initialized", lambda: told == ["joined"])
    monkeypatch.setattr(dist, "destroy_process_group", lambda: told.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: told.append("aborted"))
    with pytest.raises(UserError, match="the disk is full"), distributed.process_group(torch.device(kind)):
        raise UserError("the disk is full")
    assert told == ["joined", ends]


def test_each_process_of_a_node_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert distributed.local_device("auto", "train") == torch.device("cuda", rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # where Slurm shows each process its GPU alone
    assert distributed.local_device("cuda", "train") == torch.device("cuda", 0)
