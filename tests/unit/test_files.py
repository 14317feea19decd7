"""Atomic writes and checksums: a full disk or a kill leaves what was there, a changed file is named."""

import errno
import json
import os
import resource
from contextlib import contextmanager
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch

from dmd2.core.errors import UserError, readable_errors
from dmd2.core.files import atomic, atomic_folder, listing, read_json, sha256, verified, write_json, write_text
from dmd2.data.sets import load_shard, save_shard


@contextmanager
def largest_file(size):
    """The kernel refuses to grow any file beyond `size` bytes: a real failing write, as with an exceeded quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_disk(monkeypatch):
    """Every fsync finds the disk full."""

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def test_a_write_replaces_the_file(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_writers_of_one_process_id_on_two_nodes_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    path = tmp_path / "a.txt"
    with atomic(path) as first, atomic(path) as second:
        assert first != second
        assert {first.name, second.name} == {p.name for p in (first, second) if fnmatch(p.name, ".a.txt.*.tmp")}
        first.write_text("one")
        second.write_text("two")
    assert path.read_text() == "one"
    with atomic_folder(tmp_path / "f", True, "") as ours, atomic_folder(tmp_path / "f", True, "") as theirs:
        assert ours != theirs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "f"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, full_disk):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: the disk is full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.exists()))
    write_text(path, "new")
    assert seen
    assert seen[0] is False


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_a_failure_inside_the_block_leaves_the_old_file_and_passes_on(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_a_half_written_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
    assert path.read_text() == "half"


def test_two_processes_write_to_different_temporaries(tmp_path, monkeypatch):
    with atomic(tmp_path / "a") as first:
        first.write_text("1")
        monkeypatch.setattr(os, "getpid", lambda: 999999)
        with atomic(tmp_path / "a") as second:
            second.write_text("2")
            assert first != second


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "x")


WRITERS = {
    "text": lambda path: write_text(path, "x" * 200_000),
    "torch.save": lambda path: _torch_save(path),
    "safetensors": lambda path: save_shard(path, {"images": torch.zeros(100_000)}),
}


def _torch_save(path):
    with atomic(path) as temporary:
        torch.save({"x": torch.zeros(100_000)}, temporary)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_the_kernel_refuses_is_one_sentence_and_leaves_the_old_file(tmp_path, writer):
    path = tmp_path / "a"
    path.write_text("old")
    with largest_file(10_000), pytest.raises(UserError, match="cannot write"):
        WRITERS[writer](path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", ["torch.save", "safetensors"])
def test_a_writer_with_exceptions_of_its_own_still_says_that_the_disk_is_full(tmp_path, monkeypatch, writer):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=0))
    with largest_file(10_000), pytest.raises(UserError, match="the disk is full"):
        WRITERS[writer](tmp_path / "a")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full; earlier files are kept, free some space and"),
        (errno.EDQUOT, "the quota is used up; earlier files are kept, free some space and"),
        (errno.EROFS, "the file system is read-only; earlier files are kept, have it mounted for writing and"),
        (errno.EACCES, "permission denied; earlier files are kept, get the right to write there and"),
        (errno.EPERM, "immutable, perhaps: see lsattr); earlier files are kept, allow changes and"),
    ],
)
@pytest.mark.parametrize("error", [OSError, lambda code, text: RuntimeError(f"inline_container.cc: failed: {text}")])
def test_the_advice_fits_the_reason(tmp_path, code, words, error):
    with pytest.raises(UserError) as told, atomic(tmp_path / "a"):
        raise error(code, os.strerror(code))
    assert words in str(told.value)


# JSON.
def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"b": [1, 2.5, None]}


def test_missing_json_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        read_json(tmp_path / "manifest.json")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_broken_json_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


# Checksums.
@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard.safetensors"
    save_shard(path, {"images": torch.arange(100.0)})
    return path, listing([path], tmp_path)[0]


def test_a_good_file_is_verified(shard):
    path, entry = shard
    assert verified(path.parent, entry) == path
    assert entry == {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def test_a_missing_file_is_named(shard):
    path, entry = shard
    path.unlink()
    with pytest.raises(UserError, match=r"shard\.safetensors is missing"):
        verified(path.parent, entry)


def test_a_truncated_file_is_named_with_both_sizes(shard):
    path, entry = shard
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        UserError, match=rf"shard\.safetensors has {entry['bytes'] - 5} bytes instead of {entry['bytes']}"
    ):
        verified(path.parent, entry)


def test_a_changed_file_of_the_same_size_is_named(shard):
    path, entry = shard
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard\.safetensors does not match the checksum"):
        verified(path.parent, entry)


def test_listing_paths_are_relative_to_the_manifest(tmp_path):
    write_text(tmp_path / "sub" / "a.txt", "x")
    assert listing([tmp_path / "sub" / "a.txt"], tmp_path)[0]["path"] == "sub/a.txt"


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not a shard")
    with pytest.raises(UserError, match=r"a\.safetensors is not a readable safetensors file"):
        load_shard(tmp_path / "a.safetensors")


# What the user sees.
def test_a_user_error_becomes_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as caught, readable_errors():
        raise UserError("data digits: no such file")
    assert caught.value.code == "error: data digits: no such file"


def test_ctrl_c_becomes_status_130(capsys):
    with pytest.raises(SystemExit) as caught, readable_errors():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert "continues" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), readable_errors():
        _ = 1 / 0


def test_json_is_indented_for_people(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    assert (tmp_path / "a.json").read_text() == json.dumps({"b": 1}, indent=1) + "\n"
