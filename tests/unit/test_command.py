"""The command `dmd2`: where it works, what it calls, how runs are named, and that nothing of the user's breaks it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmd2.command.app import group
from dmd2.core.errors import UserError
from dmd2.core.files import write_json
from dmd2.core.options import WORKSPACE, workspace
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import job_name
from dmd2.launch.names import complete, run_named, runs_named
from tests.fake_slurm import FakeSlurm
from tests.fork_server import REPO, quick_bin

CONSOLE = Path(sys.executable).with_name("dmd2")


@pytest.fixture
def place(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with the real tables; the current folder is below it."""
    monkeypatch.setenv(WORKSPACE, "")
    shutil.copytree(root / "workflow", tmp_path / "w/workflow")
    (tmp_path / "w/notes/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "w/notes/mine")
    return tmp_path / "w"


def dmd2_(*words: str) -> int:
    """Exit status of a command line."""
    with pytest.raises(SystemExit) as ending:
        group()(list(words), prog_name="dmd2")
    if isinstance(ending.value.code, str):
        print(ending.value.code, file=sys.stderr)
        return 1
    return ending.value.code or 0


def alone(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A real process in a folder."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "PATH": f"{quick_bin()}:{os.environ['PATH']}"} | env
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_nearest_workspace_above_is_found(place: Path, tmp_path: Path, monkeypatch) -> None:
    assert workspace() == place
    monkeypatch.chdir(tmp_path)
    assert workspace() is None
    (tmp_path / "results/runs").mkdir(parents=True)  # of one whose tables lie beside the Snakefile
    assert workspace() == tmp_path
    monkeypatch.setenv(WORKSPACE, "w")
    assert workspace() == place
    monkeypatch.setenv(WORKSPACE, "nowhere")
    with pytest.raises(UserError, match=r"^the workspace nowhere \(--workspace or \$DMD2_WORKSPACE\) is no folder$"):
        workspace()


@pytest.mark.parametrize("words", [["--workspace", "w", "status"], ["status", "--workspace", "w"]])
def test_the_workspace_is_named_before_or_after_the_command(place: Path, tmp_path, monkeypatch, capsys, words) -> None:
    monkeypatch.chdir(tmp_path)
    assert dmd2_(*words, "digits/dmd2") == 0
    assert capsys.readouterr().out.endswith("3 runs: 3 not started\n") and Path.cwd() == place


def test_outside_a_workspace_one_sentence_says_what_to_do(tmp_path: Path, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("status", "plan digits", "run", "prune", "catalogue", "export digits/dmd2/seed0 out"):
        assert dmd2_(*command.split()) == 1
        assert capsys.readouterr().err.startswith(
            "error: there is no workspace here or above: go to one (a folder with"
        )
    assert dmd2_("eval", "protocols") == 0


def test_typed_paths_are_relative_to_where_the_user_stands_and_others_to_the_workspace(place: Path, capsys) -> None:
    (place / "results/runs/digits").mkdir(parents=True)
    assert dmd2_("catalogue", "--csv", "mine.csv") == 0
    assert (place / "notes/mine/mine.csv").exists() and (place / "results/catalogue.parquet").exists()
    assert "notes" not in capsys.readouterr().out.splitlines()[0]


def test_a_mistyped_command_gets_the_nearest(capsys) -> None:
    assert dmd2_("stats") == 2
    assert "Did you mean 'status'" in capsys.readouterr().err.replace("\n", " ")


def test_names_mean_runs_rows_bases_and_tables(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    assert run_named("digits/dmd2/seed0") == RunId("digits", "dmd2", 0)
    assert {run.name for run in runs_named(["digits"])} > {"dmd2", "dmd", "ttur-10", "fastgen"}
    assert runs_named(["demo"]) == [run for run in runs_named(["digits-table3"]) if run.seed == 0]
    with pytest.raises(UserError, match=r"^digits/dmd2 is 3 runs: name one of them, for example digits/dmd2/seed0$"):
        run_named("digits/dmd2")
    with pytest.raises(
        UserError, match=r"^no run or table is called digits/dmd2/sed0, did you mean digits/dmd2/seed0\?$"
    ):
        run_named("digits/dmd2/sed0")


def test_a_broken_table_stops_what_asks_for_it_and_nothing_else(place: Path, started, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    (place / "workflow/tables/demo.yaml").write_text("title: [")
    (place / "workflow/tables/more.yaml").write_text("title: t\nbase: digits\nrows: demo\n")
    assert run_named("digits/dmd2/seed1") == RunId("digits", "dmd2", 1)
    assert complete("d") and "demo" not in complete("d")
    for words in (["status", "demo"], ["run", "demo"], ["run"], ["plan", "demo"], ["print", "demo"]):
        assert dmd2_(*words) == 1
        assert capsys.readouterr().err.startswith("error: workflow/tables/demo.yaml:")
    assert dmd2_("run", "more") == 1
    assert capsys.readouterr().err == "error: workflow/tables/more.yaml:3: rows names demo, which cannot be read\n"
    assert dmd2_("run", "digits-ttur") == 0 and started[-1][-1] == "digits-ttur"


def test_run_warns_of_images_that_are_not_there(place: Path, started, capsys) -> None:
    source = "data: {source: {kind: image-folder, path: gone}, resolution: 8, channels: 1, classes: 10}"
    (place / "workflow/base/mine.yaml").write_text(f"like: digits\n{source}\n")
    (place / "workflow/tables/own.yaml").write_text("title: t\nbase: mine\nrows: digits-ttur\n")
    assert dmd2_("run", "own", "-n") == 0 and started
    assert capsys.readouterr().err == "warning: own needs what is not here: gone\n"


def test_a_shell_completes_names_part_by_part(place: Path) -> None:
    assert complete("digits-t") == ["digits-table3", "digits-ttur"]
    assert {"digits", "digits-ttur", "digits/dmd2"} <= {*complete("digits")}
    rows = ["digits/ttur", "digits/ttur-10", "digits/ttur-ida-90"]
    assert complete("digits/ttur") == [*rows, *(f"digits/ttur/seed{i}" for i in range(3))]


def test_completion_of_a_command_line_needs_no_pytorch(place: Path) -> None:
    words = {"COMP_WORDS": "dmd2 export digits/dmd2/", "COMP_CWORD": "2", "_DMD2_COMPLETE": "complete_bash"}
    code = "import sys; from dmd2.command.app import group\ntry: group()(prog_name='dmd2')\nfinally: assert 'torch' not in sys.modules"
    found = alone(place, sys.executable, "-c", code, **words)
    assert found.stdout.split() == [f"digits/dmd2/seed{i}" for i in range(3)], found.stderr


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Command lines that would have been started."""
    lines: list[list[str]] = []
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(os, "execv", lambda _, words: lines.append(words[1:]))
    monkeypatch.setattr(subprocess, "run", lambda words, **_: (lines.append(words[1:]), os_ended(0))[1])
    return lines


def os_ended(code: int) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code)


def test_run_hands_targets_and_options_to_snakemake(place: Path, started) -> None:
    (place / "workflow/Snakefile").unlink()
    group()(["run", "-n", "--config", "changed_code=retrain", "digits", "digits/dmd2"], standalone_mode=False)
    runs = [f"results/runs/digits/dmd2/seed{i}/metrics.json" for i in range(3)]
    there = ["-m", "snakemake", "--snakefile", str(REPO / "workflow/Snakefile"), "--profile", "workflow/profiles/local"]
    assert started == [[*there, "-n", "--config", "changed_code=retrain", "digits", *runs]]
    group()(["run", "digits-data", "prune", "--conda-prefix", "some/folder"], standalone_mode=False)
    assert started.pop()[-4:] == ["digits-data", "prune", "--conda-prefix", "some/folder"]
    assert Path.cwd() == place and os.environ["PYTHONSAFEPATH"] == "1"
    group()(["run", "emoji"], standalone_mode=False)
    assert "results/runs/emoji/4step/seed0/metrics.json" in started[1] and "emoji" not in started[1]


def test_run_again_trains_from_the_start_where_the_profile_says(place: Path, started, capsys) -> None:
    group()(["run", "digits/ttur/seed1", "--again", "--profile", "slurm"], standalone_mode=False)
    train = ["-m", "dmd2.launch", "train", "digits/ttur/seed1", "--again", "--cluster", "slurm"]
    make = ["-m", "snakemake", "--profile", "workflow/profiles/slurm", "results/runs/digits/ttur/seed1/metrics.json"]
    assert started == [train, make]
    assert dmd2_("run", "digits/ttur", "--again") == 1
    assert "digits/ttur is 3 runs: name one of them" in capsys.readouterr().err
    assert dmd2_("run", "--again") == 1 and len(started) == 2
    assert dmd2_("run", "digits/ttur/seed1", "--again", "-n") == 1 and len(started) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["digits/dmd3/seed0"], "no run or table is called digits/dmd3/seed0, did you mean digits/dmd/seed0?"),
        (["-n", "digits-tabel3"], "there is no table, base or rule digits-tabel3, did you mean digits-table3?"),
        (["digtis/dmd2"], "there is no base digtis, did you mean digits?"),
        (["--profile", "slrum"], "there is no profile workflow/profiles/slrum, did you mean slurm?"),
    ],
)
def test_run_refuses_what_is_mistyped_before_snakemake_starts(place: Path, started, capsys, words, sentence) -> None:
    assert dmd2_("run", *words) == 1
    assert capsys.readouterr().err == f"error: {sentence}\n" and started == []


def test_the_exit_status_of_run_is_snakemakes(place: Path) -> None:
    assert alone(place, "python", "-m", "dmd2", "run", "-n", "no-such-target").returncode == 1
    planned = alone(place / "notes", "python", "-m", "dmd2", "run", "-n", "digits/dmd2/seed0")
    assert planned.returncode == 0 and "evaluate" in planned.stdout + planned.stderr


def test_a_users_eval_py_breaks_no_score_and_features_lie_in_the_users_cache(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("raise SystemExit('mine')")
    images = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 1), np.uint8)
    np.save(tmp_path / "a.npy", images[:12])
    np.save(tmp_path / "b.npy", images[12:])
    line = ["python", "-m", "dmd2", "eval", "score", "a.npy", "b.npy", "--detector", "lite0-320@32", "--metrics", "fd"]
    scored = alone(tmp_path, *line, XDG_CACHE_HOME=str(tmp_path / "cache"), DMD2_WORKSPACE="")
    assert scored.returncode == 0 and "FD" in scored.stdout, scored.stderr
    assert list((tmp_path / "cache/dmd2/features").rglob("*.safetensors"))
    assert not (tmp_path / "data").exists() and not (tmp_path / "results").exists()


@pytest.mark.skipif(not CONSOLE.exists(), reason="the package is not installed in this environment (make demo does it)")
def test_the_installed_command_is_this_code_whatever_lies_in_the_folder(tmp_path: Path) -> None:
    for name in ("eval.py", "dmd2.py"):
        (tmp_path / name).write_text("raise SystemExit('mine')")
    assert alone(tmp_path, str(CONSOLE), "--version", PYTHONPATH="").stdout.startswith("dmd2 0.")
    assert "in64-edm" in alone(tmp_path, str(CONSOLE), "eval", "protocols", PYTHONPATH="").stdout


def test_a_side_of_a_comparison_may_be_a_folder_where_the_user_stands(place: Path, capsys) -> None:
    (place / "notes/mine/old/results").mkdir(parents=True)
    assert dmd2_("compare", "old") == 2
    assert str(place / "notes/mine/old") in capsys.readouterr().err


def test_logs_are_those_of_the_newest_slurm_job_or_of_this_machine(place: Path, started, capsys) -> None:
    assert dmd2_("logs", "digits/dmd2/seed0") == 1
    assert capsys.readouterr().err.endswith("seed0 has no log yet (logs/train/digits/dmd2/seed0.log)\n")
    here, job = Path("logs/train/digits/dmd2/seed0.log"), Path("results/runs/digits/dmd2/seed0/jobs/8_0_log.err")
    for path in (here, job):
        path.parent.mkdir(parents=True)
        path.touch()
    group()(["logs", "digits/dmd2/seed0"], standalone_mode=False)
    write_json(job.parents[1] / "job.json", {"config": "c", "jobs": ["7", "8"]})
    group()(["logs", "-f", "digits/dmd2/seed0"], standalone_mode=False)
    assert started == [["-n", "50", str(here)], ["-f", "-n", "50", str(job)]]


def test_a_row_is_cancelled_if_one_of_its_runs_is_live(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    slurm = FakeSlurm(tmp_path / "slurm", monkeypatch)
    monkeypatch.chdir(place)
    name = job_name(RunId("digits", "dmd2", 1))
    slurm.answer("squeue", f"7|{name}|RUNNING|None|node1")
    assert dmd2_("cancel", "digits/dmd2") == 0
    assert slurm.calls("scancel") == ["scancel 7"]
    assert dmd2_("cancel", "digits/dmd2/seed0", "digits/ttur") == 1
    told = "error: digits/dmd2/seed0, digits/ttur are not running and not waiting in the Slurm queue\n"
    assert capsys.readouterr().err.endswith(told) and len(slurm.calls("scancel")) == 1
    assert dmd2_("cancel", "digits/dmd3/seed0") == 1
    assert "did you mean digits/dmd/seed0?" in capsys.readouterr().err


def test_prune_takes_names_and_leaves_the_others(place: Path, capsys) -> None:
    """Of runs that are not started, too."""
    for name in ("dmd2", "ttur"):
        (place / f"results/runs/digits/{name}/seed0/checkpoints-01234567").mkdir(parents=True)
    assert dmd2_("prune", "digits/dmd2", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "results/runs/digits/dmd2/seed0 is kept: it is not finished", "0.0 MB would be freed.",
    ]  # fmt: skip
