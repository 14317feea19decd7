"""The inputs of a job of two processes are checksummed once, before a collective can time out."""

import json
import os

import pytest
import torch.distributed as dist

from dmd2.core import files
from dmd2.core.distributed import verify_first
from dmd2.core.errors import UserError
from dmd2.core.files import listing, verified
from tests import tiny
from tests.fork_server import torchrun


def job(folder, steps):
    """Files that either process read for their checksums, in order."""
    status, messages = torchrun(folder, "tests.two_verifying", str(steps))
    assert status == 0, messages[-3000:]
    return [json.loads((folder / f"read-{rank}-{steps}.json").read_text()) for rank in (0, 1)]


def test_process_0_reads_every_input_once_and_the_other_waits_longer_than_a_collective_may(tmp_path):
    tiny.teacher(tmp_path)
    tiny.real_set(tmp_path / "set.json")
    inputs = {"set.safetensors", "config.json", "diffusion_pytorch_model.safetensors"}
    first, second = job(tmp_path, 2)
    assert not inputs & set(second)
    assert sorted(inputs) == sorted(name for name in set(first[: first.index("verified")]))
    assert all(first.count(name) == 1 for name in inputs - {"set.safetensors"})
    (path,) = (tmp_path / "results/runs/tiny/job/seed0").glob("checkpoints-*/00000002.pt")
    for newest in (path, path.with_suffix(".json"), tmp_path / "results/runs/tiny/job/seed0/finished.json"):
        newest.unlink()
    first, second = job(tmp_path, 2)
    assert "00000001.pt" in first[: first.index("verified")] and "00000001.pt" not in second


def test_others_trust_what_process_0_verified_and_nothing_that_changed_since(tmp_path, monkeypatch):
    store, path = dist.HashStore(), tmp_path / "a.safetensors"
    path.write_bytes(b"1234")
    (entry,) = listing([path], tmp_path)
    monkeypatch.setattr(files, "_held", set())
    verify_first(store, 0, lambda: verified(tmp_path, entry))
    monkeypatch.setattr(files, "_held", set())  # of another process
    read, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or sha256(path))
    verify_first(store, 1, lambda: pytest.fail("process 0 alone verifies"))
    verified(tmp_path, entry)
    assert not read
    path.write_bytes(b"1235")
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="does not match the checksum"):
        verified(tmp_path, entry)


def test_others_end_when_process_0_refuses():
    store = dist.HashStore()
    with pytest.raises(UserError, match="damaged"):
        verify_first(store, 0, lambda: (_ for _ in ()).throw(UserError("set.safetensors is damaged")))
    with pytest.raises(UserError, match="process 0 of this training ended before it began"):
        verify_first(store, 1, lambda: None)
