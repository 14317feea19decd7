"""What lies in the source of a set is part of the set's record: files that come, go or change make it out of date."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmd2.core import sources
from dmd2.core.files import content_of, read_json, write_json
from dmd2.core.provenance import Artefact, outdated, recorded
from dmd2.core.sources import source_listing
from dmd2.data.__main__ import real

CONFIG = {
    "name": "pictures", "source": {"kind": "image-folder", "path": "pictures"}, "resolution": 4, "channels": 1,
    "classes": 2,
}  # fmt: skip
SET = "data/real/pictures/manifest.json"


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


@pytest.fixture
def prepared(tmp_path, monkeypatch) -> Path:
    """A set made of four pictures, and something made from it."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        picture(tmp_path / f"pictures/{i % 2}/{i}.png", i)
    real(json.dumps(CONFIG), Path(SET))
    with recorded(tmp_path / "below.json", {}, [SET]):
        write_json(tmp_path / "below.json", {"kind": "run"})
    return tmp_path


def reasons() -> dict[str, str]:
    return outdated([Artefact([SET], CONFIG, []), Artefact(["below.json"], {}, [SET])])


OTHER = {SET: "was made from another listing of pictures"}


def test_picture_that_comes_or_goes_makes_the_set_out_of_date(prepared) -> None:
    assert reasons() == {}
    picture(prepared / "pictures/1/new.png", 9)
    assert reasons() == OTHER
    (prepared / "pictures/1/new.png").unlink()
    assert reasons() == {}
    (prepared / "pictures/1/1.png").unlink()
    assert reasons() == OTHER


def test_picture_of_another_size_makes_the_set_out_of_date(prepared) -> None:
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(prepared / "pictures/1/1.png")
    assert reasons() == OTHER


def test_copy_with_other_times_and_hidden_files_are_the_same_source(prepared) -> None:
    for path in prepared.rglob("*.png"):
        os.utime(path, (1, 1))
    (prepared / "pictures/.DS_Store").write_text("x")
    (prepared / "pictures/lock.mdb").write_text("x")
    assert reasons() == {}


@pytest.mark.parametrize("left", [False, True])
def test_source_that_is_gone_or_not_mounted_leaves_the_set(prepared, left) -> None:
    shutil.rmtree(prepared / "pictures")
    if left:
        (prepared / "pictures/0").mkdir(parents=True)
    assert reasons() == {}


def test_set_remade_with_equal_content_changes_nothing_below_it(prepared) -> None:
    (prepared / "pictures/README.txt").write_text("no picture")
    assert reasons() == OTHER
    before = content_of(Path(SET))
    real(json.dumps(CONFIG), Path(SET))
    assert content_of(Path(SET)) == before
    assert reasons() == {}


def test_set_of_an_earlier_version_records_no_source_and_stays(prepared) -> None:
    entry = read_json(Path(SET))
    del entry["made_from"]["sources"]
    write_json(Path(SET), entry)
    picture(prepared / "pictures/1/new.png", 9)
    assert reasons() == {}


def test_files_and_patterns_are_listed_like_folders(prepared) -> None:
    for place in ("pictures/0/0.png", "pictures/*/*.png"):
        before = source_listing(place)
        assert before is not None
        (prepared / "pictures/0/0.png").write_bytes((prepared / "pictures/0/0.png").read_bytes() + b"more")
        assert source_listing(place) != before
    assert source_listing("name/on-the-hub") is None


def test_of_many_files_only_names_count(prepared, monkeypatch) -> None:
    with_sizes = source_listing("pictures")
    monkeypatch.setattr(sources, "WITH_SIZES", 3)
    before = source_listing("pictures")
    assert before not in (None, with_sizes)
    (prepared / "pictures/0/0.png").write_bytes(b"")
    assert source_listing("pictures") == before
    picture(prepared / "pictures/1/new.png", 9)
    assert source_listing("pictures") != before


def test_thousands_of_files_take_milliseconds(tmp_path) -> None:
    for folder in range(10):
        (tmp_path / str(folder)).mkdir()
        for number in range(200):
            (tmp_path / str(folder) / f"{number}.png").touch()
    started = time.process_time()
    assert source_listing(str(tmp_path)) is not None
    assert time.process_time() - started < 1
