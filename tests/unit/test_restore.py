"""What restore says about files, without DVC: dvc.lock, its cache and manifests are plain files."""

import json
from hashlib import md5
from pathlib import Path

import pytest
import yaml

from dmd2.core.errors import UserError
from dmd2.core.files import listing, write_json, write_text
from dmd2.core.provenance import recorded
from dmd2.publish.restore import CACHE, main, verify, versioned_files

RUNS = Path("results/runs/digits")
RUN = RUNS / "dmd2/seed0"
FILES = ("train.json", "log.jsonl", "snapshots-00000000/0000020.safetensors")


def digest(raw: bytes) -> str:
    return md5(raw, usedforsecurity=False).hexdigest()


def cached(name: str) -> Path:
    return CACHE / "files/md5" / name[:2] / name[2:]


def version(files=FILES) -> None:
    """Do what dvc commit does with files of the run and one table."""
    entries = []
    for name in files:
        raw = (RUN / name).read_bytes()
        cached(digest(raw)).parent.mkdir(parents=True, exist_ok=True)
        cached(digest(raw)).write_bytes(raw)
        entries.append({"md5": digest(raw), "relpath": f"dmd2/seed0/{name}"})
    raw = json.dumps(entries).encode()
    cached(f"{digest(raw)}.dir").parent.mkdir(parents=True, exist_ok=True)
    cached(f"{digest(raw)}.dir").write_bytes(raw)
    table = digest(Path("results/tables/demo.md").read_bytes())
    stages = {"runs@digits": {"outs": [{"path": str(RUNS), "md5": f"{digest(raw)}.dir"}]},
              "tables@demo": {"outs": [{"path": "results/tables/demo.md", "md5": table}]}}  # fmt: skip
    write_text(Path("dvc.lock"), yaml.safe_dump({"stages": stages}))


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("results/tables/demo.md"), "table")
    write_text(RUN / FILES[1], "log")
    write_text(RUN / FILES[2], "weights")
    with recorded(RUN / FILES[0], {}, []):
        write_json(RUN / FILES[0], {"kind": "run", "steps": 20, "files": listing([RUN / FILES[2]], RUN)})
    version()


def told(*targets: str) -> list[str]:
    return verify(targets)[1]


def test_whole_files_are_counted() -> None:
    assert verify() == (4, [])


@pytest.mark.parametrize("name", FILES)
def test_damaged_and_missing_files_are_named(name: str) -> None:
    raw = (RUN / name).read_bytes()
    (RUN / name).write_bytes(raw[:-1])
    assert told() == [
        f"{RUN / name} is not what dvc.lock lists: if you made it anew, run dvc repro; else delete {RUN / name} and "
        "restore again"
    ]
    (RUN / name).unlink()
    assert told() == [f"{RUN / name} is missing although dvc.lock lists it: restore again"]


def test_damaged_copy_in_the_cache_is_named_too() -> None:
    copy = cached(digest(b"weights"))
    for path in (RUN / FILES[2], copy):
        path.write_bytes(b"weighty")
    (sentence,) = told()
    assert f"delete {RUN / FILES[2]} and {copy} and restore again; if it comes back so, the remote" in sentence


def test_what_was_damaged_when_it_was_versioned_is_caught_by_its_manifest() -> None:
    (RUN / FILES[2]).write_bytes(b"weighty")
    version()
    (sentence,) = told()
    assert sentence.startswith(f"{RUN / FILES[2]} does not match the checksum in {RUN / FILES[0]}")


def test_record_that_was_edited_when_it_was_versioned_is_caught() -> None:
    path = RUN / FILES[0]
    path.write_text(path.read_text().replace('"steps": 20', '"steps": 21'))
    version()
    assert told() == [f"{path} was changed after it was made: delete it and let Snakemake make it again"]


def test_damaged_or_missing_listing_of_a_folder_is_named() -> None:
    (path,) = CACHE.rglob("*.dir")
    path.write_bytes(path.read_bytes().replace(b"log.jsonl", b"log.jsonx"))
    with pytest.raises(UserError, match=r"the list of what results/runs/digits holds, is damaged"):
        verify()
    path.unlink()
    with pytest.raises(UserError, match="is missing: dvc pull did not bring it"):
        verify()


@pytest.mark.parametrize(("target", "count"), [
    ("runs", 3), ("runs@digits", 3), (str(RUNS), 3), ("results", 4), (str(RUN / "log.jsonl"), 1), ("tables", 1),
])  # fmt: skip
def test_targets_are_stages_folders_and_files(target: str, count: int) -> None:
    assert len(versioned_files([target], CACHE)) == count


def test_what_a_partial_restore_left_out_is_no_damage() -> None:
    (RUN / FILES[2]).unlink()
    (RUN / FILES[1]).unlink()
    assert told("tables", str(RUN / FILES[0])) == [] and told("tables") == []
    assert len(told("runs")) == 2


def test_snapshot_that_was_not_versioned_is_no_damage() -> None:
    version(FILES[:2])
    (RUN / FILES[2]).unlink()
    assert verify() == (3, [])


def test_missing_file_of_a_manifest_that_is_not_versioned_is_named() -> None:
    folder = Path("data/teachers/mine")
    write_text(folder / "weights", "w")
    write_json(folder / "manifest.json", {"kind": "teacher", "files": listing([folder / "weights"], folder)})
    assert told() == []
    (folder / "weights").unlink()
    (sentence,) = told()
    assert sentence.startswith(f"{folder / 'weights'} is missing although {folder / 'manifest.json'} lists it")


def test_unknown_target_and_no_versions_are_said() -> None:
    with pytest.raises(UserError, match="rums is no stage and no versioned file"):
        verify(["rums"])
    Path("dvc.lock").unlink()
    with pytest.raises(UserError, match="dvc.lock is missing, so there is nothing to restore"):
        verify()
    with pytest.raises(SystemExit, match="error: dvc.lock is missing"):  # and no `dvc pull`, with its 120 lines
        main()
