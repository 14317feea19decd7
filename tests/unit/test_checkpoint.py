"""Checkpoints: the newest good one wins, and each one passed over is named."""

import errno
import os

import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.training.checkpoints.checkpoint import Checkpoints


def saved(folder, *steps, keep=2):
    checkpoints = Checkpoints(folder / "checkpoints", keep)
    for step in steps:
        checkpoints.save(step, {"step": step, "weights": torch.full((10,), float(step))})
    return checkpoints


def newest(checkpoints):
    state = checkpoints.load_latest()
    return None if state is None else state["step"]


def test_the_newest_is_loaded_whole(tmp_path):
    state = saved(tmp_path, 10, 20).load_latest()
    assert state["step"] == 20
    assert torch.equal(state["weights"], torch.full((10,), 20.0))


def test_steps_are_ordered_as_numbers(tmp_path):
    assert newest(saved(tmp_path, 9, 10, 100)) == 100


def test_nothing_saved_is_none(tmp_path):
    assert saved(tmp_path).load_latest() is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    checkpoints = saved(tmp_path, 1, 2, 3, 4, keep=keep)
    names = sorted(p.name for p in checkpoints.folder.iterdir())
    steps = range(5 - keep, 5)
    assert names == sorted(f"{step:08d}.{kind}" for step in steps for kind in ("pt", "json"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "missing"]
)
def test_a_damaged_newest_falls_back_to_the_older_and_says_so(tmp_path, capsys, damage):
    checkpoints = saved(tmp_path, 10, 20)
    damage(checkpoints.folder / "00000020.pt")
    assert newest(checkpoints) == 10
    message = capsys.readouterr().err
    assert "checkpoint passed over" in message
    assert "00000020.pt" in message


def test_a_damaged_manifest_falls_back_too(tmp_path, capsys):
    checkpoints = saved(tmp_path, 10, 20)
    (checkpoints.folder / "00000020.json").write_text('{"step"')
    assert newest(checkpoints) == 10
    assert "00000020.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"step": 20}', "[]", '{"files": [{"path": "x"}, 3]}', '{"files": 3}'])
def test_a_manifest_that_is_json_but_lists_no_files_is_passed_over_in_a_sentence(tmp_path, capsys, text):
    checkpoints = saved(tmp_path, 10, 20)
    (checkpoints.folder / "00000020.json").write_text(text)
    (checkpoints.folder / "notes.json").write_text("{}")
    assert newest(checkpoints) == 10 and checkpoints.newest_step() == 20
    message = capsys.readouterr().err
    assert message.startswith("checkpoint passed over: ") and message.count("\n") == 1


def test_all_damaged_is_none_and_names_each(tmp_path, capsys):
    checkpoints = saved(tmp_path, 10, 20)
    for path in checkpoints.folder.glob("*.pt"):
        flip(path)
    assert newest(checkpoints) is None
    assert capsys.readouterr().err.count("checkpoint passed over") == 2


def test_a_state_without_its_checksum_does_not_count(tmp_path):
    checkpoints = saved(tmp_path, 10, 20)
    (checkpoints.folder / "00000020.json").unlink()  # killed between the two writes
    assert newest(checkpoints) == 10


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 10, 20)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full"):
        patch.setattr(os, "fsync", full)
        saved(tmp_path, 30)
    assert newest(checkpoints) == 20
    assert sorted(p.name for p in checkpoints.folder.glob("*.pt")) == ["00000010.pt", "00000020.pt"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    checkpoints = saved(tmp_path, 10)
    checkpoints.save(10, {"step": 10, "weights": torch.zeros(1)})
    assert checkpoints.load_latest()["weights"].tolist() == [0]


def test_loading_runs_no_code_from_the_file(tmp_path):
    checkpoints = saved(tmp_path)
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        checkpoints.save(10, {"step": 10, "evil": Checkpoints(tmp_path)})
        checkpoints.load_latest()
