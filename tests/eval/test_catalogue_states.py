"""What the run catalogue says of runs that are not evaluated, evaluated before they changed, or damaged."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from dmd2.core.files import read_json, write_json
from dmd2.core.interrupts import single_writer
from dmd2.core.progress import Progress
from dmd2.launch.overview import run_line
from eval.catalogue.read import catalogue
from tests.eval.catalogue_workspace import RUN, RUNS, STEPS, edit, of


@pytest.mark.parametrize(
    ("kept", "step", "live", "state"),
    [
        (["train.json"], None, False, "trained"),
        (["finished.json"], STEPS, False, "ended"),
        (["finished.json"], 4, False, "stopped"),
        ([], 4, False, "stopped"),
        (["job.json"], None, False, "stopped"),
        ([], 4, True, "running"),
        (["finished.json"], None, True, "running"),
        ([], None, False, "not started"),
    ],
)
def test_a_run_without_metrics_is_one_line_with_its_state(
    place: Path, kept: list[str], step: int | None, live: bool, state: str
) -> None:
    record = read_json(RUN.folder / "train.json")
    write_json(RUN.folder / "job.json", {"name": "x", "jobs": ["7"], "config": "0"})
    for path in RUN.folder.iterdir():
        if path.is_dir() and step is None and state == "not started":
            shutil.rmtree(path)
        elif path.is_file() and path.name not in kept:
            path.unlink()
    if step is not None:
        Progress("x", STEPS, folder=RUN.folder).update(step, {})
    with single_writer(RUN.folder) if live else nullcontext():
        lines = of(RUN)
    assert lines.state.tolist() == [state]
    line = lines.iloc[0]
    assert pd.isna(line.fd) and pd.isna(line.protocol_detector)
    complete = state in ("trained", "ended")
    assert line.is_last == complete
    if complete:
        assert (line.step, line.student_updates, line.weights_sha256) == (STEPS, 3, record["files"][-1]["sha256"])
        assert line["config.critic.ratio"] == 2 and pd.isna(line.cpu_hours) == (state == "ended")
    elif step:
        assert (line.step, line.steps) == (step, STEPS)
    assert line.digest == record["key"] if state != "not started" else pd.isna(line.digest)


def test_metrics_of_an_earlier_training_are_outdated_and_borrow_nothing_from_the_new_one(place: Path) -> None:
    old = read_json(RUN.folder / "metrics.json")["key"]
    edit(RUN.folder / "train.json", key="0123abcd", seconds=99.0)
    lines = of(RUN)
    assert lines.state.tolist() == ["outdated"] * 3 + ["trained"]
    assert lines.digest.tolist() == [old] * 3 + ["0123abcd"]
    assert lines.weights_path.isna().tolist() == [True] * 3 + [False]
    assert lines.fd.isna().tolist() == [False] * 3 + [True]


def test_a_training_begun_after_the_metrics_makes_them_outdated(place: Path) -> None:
    (RUN.folder / "train.json").unlink()
    assert of(RUN).state.tolist() == ["evaluated"] * 3  # Snakemake runs the rule again, finished.json is still there
    Progress("x", STEPS, folder=RUN.folder).update(2, {})
    assert of(RUN).state.tolist() == ["outdated"] * 3 + ["stopped"]
    with single_writer(RUN.folder):
        assert of(RUN).state.tolist() == ["outdated"] * 3 + ["running"]


@pytest.mark.parametrize("text", ['{"kind": "ru', "[]", '{"kind": "x"}', "\x00", '{"config": 1, "snapshots": 2}'])
@pytest.mark.parametrize("name", ["train.json", "metrics.json"])
def test_a_damaged_record_is_named_and_leaves_the_rest_as_it_is(place: Path, capsys, name: str, text: str) -> None:
    before = catalogue()
    (RUN.folder / name).write_text(text)
    table = catalogue()
    assert set(of(RUN, table).state) == {"unreadable"}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("warning: ") and str(RUN.folder / name) in told[0]
    if name == "metrics.json":
        assert of(RUN, table).weights_sha256.notna().all() and of(RUN, table).fd.isna().all()
    else:
        assert of(RUN, table).fd.tolist() == [20.0, 40.0, 60.0]
    rest = [frame[frame.run != str(RUN)].reset_index(drop=True) for frame in (before, table)]
    assert_frame_equal(*rest)


@pytest.mark.parametrize(("key", "value"), [("seconds", "long"), ("brightness_std", True), ("eval_seconds", [1])])
def test_a_value_of_the_wrong_type_is_damage(place: Path, capsys, key: str, value: Any) -> None:
    edit(RUN.folder / "metrics.json", **{key: value})
    assert "unreadable" in set(of(RUN).state)
    assert f"{key} is {value!r}, not float64" in capsys.readouterr().err


def test_a_damaged_sampler_and_a_number_beyond_64_bits_do_not_stop_the_others(place: Path, capsys) -> None:
    path = Path("results/teachers/digits/ode/metrics.json")
    edit(path, seconds=1 << 70)
    edit(RUN.folder / "metrics.json", config={**read_json(RUN.folder / "metrics.json")["config"], "dm": {"x": 1 << 70}})
    table = catalogue()
    assert table.query("kind == 'teacher'").state.tolist() == ["unreadable"]
    assert f"{path} is damaged (eval_seconds is" in capsys.readouterr().err
    assert table["config.dm.x"].dropna().map(json.loads).tolist()[0] == 1 << 70


def test_folders_that_are_no_run_are_named(place: Path, capsys) -> None:
    for name in ("seed0-old", "seed00", "copy"):
        shutil.copytree(RUN.folder, RUN.folder.with_name(name))
    assert len(catalogue()) == 3 * len(RUNS) + 1
    told = capsys.readouterr().err
    assert all(f"few/{name} is no run folder" in told for name in ("seed0-old", "seed00", "copy"))


def test_a_training_made_anew_is_in_the_state_that_status_shows(place: Path) -> None:
    write_json(RUN.folder / "again.json", {read_json(RUN.folder / "train.json")["key"]: "0123abcd"})
    Progress("x", STEPS, folder=RUN.folder).update(2, {})
    assert of(RUN).state.tolist() == ["outdated"] * 3 + ["stopped"] == ["outdated"] * 3 + [run_line(RUN, {}, 0).state]
