"""The overview of runs: states from their folders and one look at Slurm's queue, names of runs and tables."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2.core.errors import UserError
from dmd2.core.files import write_json
from dmd2.core.provenance import sole_maker
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import Entry, job_name
from dmd2.launch import command as launch
from dmd2.launch.names import runs_named
from dmd2.launch.overview import RunLine, print_overview, run_line

RUN = RunId("digits", "dmd2", 0)
NOW = 1_000_000.0
PROGRESS = {
    "step": 300, "total": 1500, "rate": 12.345, "eta_seconds": 11100, "values": {"critic/denoise": 0.12345},
    "node": "here", "time": NOW - 5, "job": "7", "restarts": 2,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace with the real tables."""
    shutil.copytree(root / "workflow", tmp_path / "workflow")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(state: str, reason: str = "None", nodes: str = "", run: RunId = RUN) -> dict[str, Entry]:
    return {job_name(run): Entry("7", job_name(run), state, reason, nodes)}


def wrote(run: RunId = RUN, progress: dict | None = None, jobs: list[str] | None = None, *records: str) -> RunId:
    """A run's folder with these files; its last process started an hour ago."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / ".lock").touch()
    os.utime(run.folder / ".lock", (NOW - 3600, NOW - 3600))
    if progress is not None:
        write_json(run.folder / "progress.json", progress)
    if jobs is not None:
        write_json(run.folder / "job.json", {"name": "x", "config": "c", "jobs": jobs})
    for record in records:
        write_json(run.folder / record, {})
    return run


def test_a_run_without_folder_is_not_started_and_the_look_leaves_no_trace(place: Path) -> None:
    assert run_line(RUN, {}, NOW) == RunLine(RUN, "not started")
    RUN.folder.mkdir(parents=True)
    assert run_line(RUN, {}, NOW) == RunLine(RUN, "not started")
    assert list(RUN.folder.iterdir()) == []


def test_a_running_job_shows_all_its_progress(place: Path) -> None:
    row = run_line(wrote(RUN, PROGRESS, ["5", "7"]), job("RUNNING", nodes="gpu[1-2]"), NOW)
    assert row == RunLine(RUN, "running", "300/1500", "12.3", "3h 05m", "gpu[1-2]", "3", "denoise 0.123", "7")


@pytest.mark.parametrize(
    ("jobs", "state"),
    [
        (lambda: job("PENDING", "Resources"), "pending (Resources)"),
        (lambda: job("PENDING"), "pending"),
        (lambda: job("COMPLETING", "Resources"), "completing"),
        (lambda: job("CONFIGURING"), "configuring"),
        (dict, "stopped"),
        (lambda: job("RUNNING", run=RunId("digits", "dmd2", 1)), "stopped"),
        (lambda: None, "unknown"),
    ],
)
def test_only_a_running_job_has_rate_time_left_and_node(
    place: Path, jobs: Callable[[], dict[str, Entry] | None], state: str
) -> None:
    row = run_line(wrote(RUN, PROGRESS, ["5", "7"]), jobs(), NOW)
    assert row.state == state
    assert (row.step, row.rate, row.eta, row.node, row.restarts) == ("300/1500", "–", "–", "–", "3")


def test_a_job_that_its_launcher_could_not_record_is_found_by_its_name(place: Path) -> None:
    row = run_line(wrote(RUN, None, []), {job_name(RUN): Entry("9", job_name(RUN), "PENDING", "Priority", "")}, NOW)
    assert (row.state, row.job) == ("pending (Priority)", "9")


@pytest.mark.parametrize(
    ("records", "progress", "state"),
    [
        (["train.json", "finished.json"], None, "finished"),
        (["finished.json"], None, "ended"),
        (["finished.json"], {**PROGRESS, "step": 1500}, "ended"),
        (["finished.json"], PROGRESS, "stopped"),  # finished.json of an older, shorter config
        ([], PROGRESS, "stopped"),
    ],
)
@pytest.mark.parametrize("jobs", [None, ["7"]])
def test_states_without_a_live_job(
    place: Path, records: list[str], progress: dict | None, state: str, jobs: list[str] | None
) -> None:
    assert run_line(wrote(RUN, progress, jobs, *records), {}, NOW).state == state


def test_a_live_job_trains_again_what_finished_json_has_of_an_older_config(place: Path) -> None:
    assert run_line(wrote(RUN, PROGRESS, ["7"], "finished.json"), job("RUNNING"), NOW).state == "running"


def test_a_local_run_is_running_while_its_lock_is_held(place: Path) -> None:
    run = wrote(RUN, PROGRESS)
    with open(run.folder / ".lock", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        row = run_line(run, {}, NOW)
        assert (row.state, row.rate, row.eta, row.node, row.job) == ("running", "12.3", "3h 05m", "here", "–")
    assert run_line(run, {}, NOW).state == "stopped"


def test_two_overviews_at_once_do_not_take_each_other_for_a_training(place: Path) -> None:
    run = wrote(RUN, PROGRESS)
    with open(run.folder / ".lock", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert run_line(run, {}, NOW).state == "stopped"


def test_a_held_lock_is_known_even_if_slurm_is_not(place: Path) -> None:
    run = wrote(RUN, PROGRESS, ["7"])
    with open(run.folder / ".lock", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_line(run, None, NOW).state == "running"


@pytest.mark.parametrize(("seconds", "state"), [(599, "running"), (660, "running (silent for 11 min)")])
def test_a_running_job_without_news_for_ten_minutes_is_called_silent(place: Path, seconds: float, state: str) -> None:
    run = wrote(RUN, {**PROGRESS, "time": NOW - seconds}, ["7"])
    assert run_line(run, job("RUNNING"), NOW).state == state


def test_a_restarted_job_is_not_silent_and_has_no_rate_yet(place: Path) -> None:
    run = wrote(RUN, {**PROGRESS, "time": NOW - 9000}, ["7"])
    os.utime(run.folder / ".lock", (NOW - 30, NOW - 30))
    row = run_line(run, job("RUNNING"), NOW)
    assert (row.state, row.step, row.rate, row.eta) == ("running", "300/1500", "–", "–")


def test_a_job_silent_since_its_start_is_noticed_but_not_before_its_process_began(place: Path) -> None:
    assert run_line(wrote(RUN, None, ["7"]), job("RUNNING"), NOW).state == "running (silent for 60 min)"
    (RUN.folder / ".lock").unlink()
    assert run_line(RUN, job("RUNNING"), NOW).state == "running"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0m 00s"), (249, "4m 09s"), (3599, "59m 59s"), (3600, "1h 00m"), (183_600, "2d 03h")]
)
def test_time_left_in_two_units(place: Path, seconds: int, text: str) -> None:
    run = wrote(RUN, {**PROGRESS, "eta_seconds": seconds}, ["7"])
    assert run_line(run, job("RUNNING"), NOW).eta == text


def test_a_thousand_runs_ask_slurm_once_and_fill_a_thousand_whole_lines(place: Path, fake, capsys) -> None:
    runs = [wrote(RunId("digits", "a-run-with-quite-a-long-name", i), PROGRESS, [str(i)]) for i in range(1000)]
    reason = "ReqNodeNotAvail, UnavailableNodes:gpu[01-64],other[bold]"
    states = [("PENDING", reason)] * 400 + [("FAILED", "None")] * 100
    fake.answer("squeue", *(f"{i}|{job_name(runs[i])}|{'|'.join(state)}|" for i, state in enumerate(states)))
    print_overview(runs_named([]))
    out = capsys.readouterr().out.splitlines()
    assert len(fake.calls("squeue")) == 1
    assert len(out) == 1002 and out[-1] == "1000 runs: 600 stopped, 400 pending"
    assert out[0].split("  ")[0] == "run" and out[0].endswith("Slurm job")
    for run, line in zip(runs, out[1:-1], strict=True):
        assert line.startswith(f"{run}  ") and line.endswith(f" {run.seed}")
    assert f"pending ({reason})  300/1500  " in out[1]


def test_slurm_is_not_asked_about_finished_and_local_runs(place: Path, fake, capsys) -> None:
    wrote(RUN, PROGRESS, ["7"], "train.json")
    wrote(RunId("digits", "ttur", 0), PROGRESS)
    print_overview(runs_named([]))
    assert fake.calls("squeue") == []
    assert capsys.readouterr().out.endswith("\n2 runs: 1 finished, 1 stopped\n")


@pytest.mark.parametrize("note", ["Slurm refused `squeue", "there is no Slurm on this machine"])
def test_without_slurms_answer_states_are_unknown_and_one_line_says_why(place: Path, fake, capsys, note: str) -> None:
    fake.refuse("squeue", "no answer") if "refused" in note else fake.remove()
    wrote(RUN, PROGRESS, ["7"])
    wrote(RunId("digits", "ttur", 0), PROGRESS)
    print_overview(runs_named([]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[3] == "2 runs: 1 unknown, 1 stopped"
    assert lines[4].startswith(f"states are unknown: {note}")


@pytest.mark.parametrize(("name", "text", "told"), [
    ("progress.json", '{"step"', "progress.json is not valid JSON"), ("progress.json", "[]", "progress.json or job.json"),
    ("progress.json", '{"step": 1}', "progress.json or job.json"), ("job.json", '{"jobs": 3}', "progress.json or job.json"),
])  # fmt: skip
def test_a_damaged_file_of_one_run_leaves_the_others_as_they_are(
    place: Path, fake, capsys, name: str, text: str, told: str
) -> None:
    (wrote(RUN, PROGRESS, ["7"]).folder / name).write_text(text)
    wrote(RunId("digits", "ttur", 0), PROGRESS)
    launch.status([])
    lines = capsys.readouterr().out.splitlines()
    assert "damaged (" in lines[1] and told in lines[1] and " stopped " in lines[2]
    assert lines[3] == "2 runs: 1 damaged, 1 stopped"


def test_an_ended_run_says_who_publishes_it(place: Path, capsys) -> None:
    wrote(RUN, None, None, "finished.json")
    print_overview(runs_named([]))
    assert capsys.readouterr().out.splitlines()[-1] == "ended: complete, and the next `dmd2 run` publishes it"


def test_a_narrow_terminal_cuts_nothing_off(place: Path, monkeypatch, capsys) -> None:
    run = wrote(RunId("digits", "a" * 60, 0), {**PROGRESS, "values": {"critic/denoise": 0.5, "critic/gan": 0.25}})
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_overview([run])
    out = capsys.readouterr().out
    assert all(text in out for text in (str(run), "stopped", "300/1500", "denoise 0.5", "gan 0.25", "Slurm job"))


def test_status_prints_the_overview_or_a_sentence(place: Path, capsys) -> None:
    launch.status(["digits/dmd2"])
    assert capsys.readouterr().out.splitlines()[-1] == "3 runs: 3 not started"
    with pytest.raises(SystemExit, match=r"^error: no run or table is called digits/dmd3, did you mean digits/dmd\?$"):
        launch.status(["digits/dmd3"])


def test_what_trainings_wait_for_is_named_while_it_is_made(place: Path, capsys) -> None:
    with sole_maker(Path("data/teachers/digits/manifest.json")):
        print_overview([])
    assert "\ndata/teachers/digits is being made: " in capsys.readouterr().out
    print_overview([])
    assert capsys.readouterr().out == "0 runs\n"


def test_no_run_at_all_is_one_line(place: Path, capsys) -> None:
    print_overview(runs_named([]))
    assert capsys.readouterr().out == "0 runs\n"


def test_without_names_every_run_folder_is_chosen_in_order(place: Path) -> None:
    for name in ("digits/b/seed10", "digits/b/seed9", "digits/a/seed0", "digits/a/seed0-copy", "digits/a/seeds"):
        (place / "results/runs" / name).mkdir(parents=True)
    assert list(map(str, runs_named([]))) == ["digits/a/seed0", "digits/b/seed9", "digits/b/seed10"]


def test_a_table_is_all_its_rows_and_seeds_started_or_not(place: Path) -> None:
    runs = runs_named(["digits-table3"])
    assert len(runs) == len(set(runs)) == 18
    assert runs[:4] == [*(RunId("digits", "dmd", s) for s in range(3)), RunId("digits", "no-regression", 0)]


def test_a_name_without_seed_is_every_seed_of_the_tables_and_of_the_folders(place: Path) -> None:
    wrote(RunId("digits", "dmd2", 11))
    wrote(RunId("digits", "gone", 1))
    assert [run.seed for run in runs_named(["digits/dmd2"])] == [0, 1, 2, 11]
    assert runs_named(["digits/gone"]) == [RunId("digits", "gone", 1)]


def test_runs_named_twice_are_shown_once_in_the_order_of_the_names(place: Path) -> None:
    runs = runs_named(["digits/ttur/seed7", "digits/dmd2/seed0", "digits/dmd2"])
    assert [(run.name, run.seed) for run in runs] == [("ttur", 7), ("dmd2", 0), ("dmd2", 1), ("dmd2", 2)]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("digits-tabel3", "no run or table is called digits-tabel3, did you mean digits-table3?"),
        ("digits/no-regresion", "no run or table is called digits/no-regresion, did you mean digits/no-regression?"),
        ("digits/dmd2/sead0", "no run or table is called digits/dmd2/sead0, did you mean digits/dmd2/seed0?"),
        ("digits/gan/seed11", "no run or table is called digits/gan/seed11, did you mean digits/gone/seed11?"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(place: Path, name: str, sentence: str) -> None:
    wrote(RunId("digits", "gone", 11))
    with pytest.raises(UserError) as error:
        runs_named([name])
    assert str(error.value) == sentence


def test_a_name_like_no_other_gets_the_list_of_tables(place: Path) -> None:
    with pytest.raises(
        UserError, match=r"^no run or table is called \?; tables: cifar10-table3, demo, digits-multistep, "
    ):
        runs_named(["?"])
