"""The run catalogue, read from folders that real trainings left, with metrics in the form of an evaluation's."""

import doctest
import json
import shutil
from contextlib import chdir, nullcontext
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal
from typer.testing import CliRunner

import eval.catalogue
from dmd2.config import Teacher, TrainConfig
from dmd2.data import save_shard
from dmd2.errors import UserError
from dmd2.files import listing, read_json, sha256, write_json, write_text
from dmd2.inputs import Inputs
from dmd2.interrupts import single_writer
from dmd2.progress import Progress
from dmd2.run import RunId
from dmd2.teachers import adopt_teacher
from dmd2.trainer import Hardware, Training
from dmd2.wait import publish
from eval.catalogue import catalogue, training_logs
from eval.columns import LOG_SCHEMA, METRICS, SCHEMA, SUFFIXES, describe, explained, write_parquet
from eval.estimate import Estimate
from eval.protocol import KNOWN
from tests import tiny
from tests.workspace import Workspace

STEPS = 6
RUNS = [RunId("digits", row, seed) for row in ("few", "many") for seed in (0, 1)]
RUN = RUNS[0]
PROTOCOL = {"detector": "d@1", "reference": "r@2 (9 images)", "images": 8, "draws": 1, "labels": "cyclic",
            "rounding": "round", "covariance_init": "zeros"}  # fmt: skip


def measured(value: float) -> dict[str, Any]:
    found = {"fd": Estimate(value, 0.5, 8, 0.25), "accuracy": Estimate(0.5, None, 8)}
    return {**{n: e.value for n, e in found.items()}, "estimates": {n: e.as_json() for n, e in found.items()}}


def evaluate(run: RunId) -> None:
    """Write metrics.json as `eval.evaluate` does, with made-up values."""
    record = read_json(run.folder / "train.json")
    snapshots = [{"step": s, "student_updates": -(-s // 2), **measured(10.0 * s + run.seed)} for s in (2, 4, 6)]
    write_json(run.folder / "metrics.json", {
        "kind": "metrics", "run": str(run), "row": run.name, "seed": run.seed, "protocol": PROTOCOL,
        "brightness_std": 0.01, "snapshots": snapshots,
        **{key: record[key] for key in ("student_updates", "seconds", "device", "cost")},
        "train_commit": record["commit"], "eval_commit": "abc", "eval_seconds": 1.5, "files": [],
        "config": {**record["config"], "eval": tiny.values()["eval"]},
    })  # fmt: skip


def sampler(name: str) -> None:
    write_json(Path("results/teachers/digits") / name / "metrics.json", {
        "kind": "metrics", "run": f"digits/teacher-{name}", "row": f"teacher-{name}", "seed": 0, "protocol": PROTOCOL,
        "network_calls": 7, "sampler": {"solver": "heun", "steps": 4}, "eval_commit": "abc", "seconds": 3.0,
        "snapshots": [{"step": 0, "student_updates": 0, **measured(5.0)}], "files": [],
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with four trainings, evaluated, and one sampler of their teacher."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny.network("edm", seed=5).save_pretrained(folder / "unet", safe_serialization=True)
    with chdir(folder):
        teacher = adopt_teacher(Teacher(name="t", parameterisation="edm", guidance=1.0), folder)
        save_shard(Path("real.safetensors"), tiny.tensors("edm", 32))
        write_json(Path("real.json"), {"files": listing([Path("real.safetensors")], Path())})
        for run in RUNS:
            changes = {"train__steps": STEPS, "train__snapshot_every": 2, "train__log_every": 3, "critic__ratio": 2}
            cfg = tiny.config("edm", dm__weight=1.0 if run.name == "few" else 0.0, **changes)
            cfg = TrainConfig.model_validate(cfg.model_dump(exclude={"eval"}))
            done = Training(run, cfg, Hardware(), Inputs(teacher, Path("real.json"), None, None)).run()
            publish(run, read_json(done))
            evaluate(run)
        sampler("ode")
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy of it as the current folder."""
    shutil.copytree(trained / "results", tmp_path / "w/results")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def of(run: RunId, table: pd.DataFrame | None = None) -> pd.DataFrame:
    table = catalogue() if table is None else table
    return table[table.run == str(run)]


def edit(path: Path, **changes: Any) -> None:
    write_json(path, {**read_json(path), **changes})


def test_every_snapshot_is_a_line_with_what_its_records_say(place: Path) -> None:
    table = catalogue()
    assert list(table.run.unique()) == [*map(str, RUNS), "digits/teacher-ode"]
    lines = of(RUNS[1], table)
    record, metrics = (read_json(RUNS[1].folder / f"{name}.json") for name in ("train", "metrics"))
    assert lines.step.tolist() == [2, 4, 6] and lines.student_updates.tolist() == [1, 2, 3]
    assert lines.is_last.tolist() == [False, False, True]
    assert lines.fd.tolist() == [21.0, 41.0, 61.0] and lines.fd_se.tolist() == [0.5] * 3
    assert lines.fd_low.tolist() == [s["estimates"]["fd"]["low"] for s in metrics["snapshots"]]
    assert (lines.fd_bias == 0.25).all() and (lines.accuracy_n == 8).all() and lines.accuracy_se.isna().all()
    for _, line in lines.iterrows():
        path = place / line.weights_path
        assert (line.weights_sha256, line.weights_bytes) == (sha256(path), path.stat().st_size)
        assert f"snapshots-{line.digest}/{line.step:07d}" in line.weights_path
        assert (line.digest, line.seconds, line.torch) == (record["key"], record["seconds"], record["torch"])
        assert (line.base, line.row, line.seed, line.kind, line.state) == ("digits", "few", 1, "student", "evaluated")
        assert (line.gpu_hours, line.cpu_hours) == (0, record["cost"]["cpu_hours"])
        assert (line.cost_source, line.device, line.processes, line.steps) == ("wall clock", "cpu", 1, STEPS)
        assert (line.train_commit, line.eval_commit, line.eval_seconds) == (record["commit"], "abc", 1.5)
        assert (line.protocol_detector, line.protocol_images, line.brightness_std) == ("d@1", 8, 0.01)


def test_a_teachers_sampler_is_a_line_without_seed_and_training(place: Path) -> None:
    Path("results/teachers/digits/sde").mkdir()
    ode, sde = (line for _, line in catalogue().query("kind == 'teacher'").iterrows())
    assert (ode.row, ode.state, ode.fd, ode.network_calls, ode["sampler.solver"]) == (
        "teacher-ode", "evaluated", 5.0, 7, "heun")  # fmt: skip
    assert ode.eval_seconds == 3.0 and pd.isna(ode.seconds) and pd.isna(ode.seed) and ode.is_last
    assert (sde.run, sde.state) == ("digits/teacher-sde", "trained") and pd.isna(sde.fd)


def test_the_configuration_has_the_types_of_its_values(place: Path) -> None:
    edit(RUN.folder / "metrics.json", config={**read_json(RUN.folder / "metrics.json")["config"],
                                              "gan": {"noise_range": None, "features_from": 3}})  # fmt: skip
    table = catalogue()
    kinds = {name.removeprefix("config."): str(table[name].dtype) for name in table if name.startswith("config.")}
    assert kinds["critic.shares_iteration"] == "boolean"
    assert kinds["critic.ratio"] == kinds["eval.teacher_samplers.ode.steps"] == "Int64"
    assert kinds["dm.weight"] == "float64" and kinds["critic.weighting"] == "string"
    assert kinds["optim.ema"] == "object" and table["config.optim.ema"].isna().all()
    assert json.loads(of(RUNS[1], table)["config.gan.noise_range"].iloc[0]) == [0, 999]
    assert of(RUN, table)["config.gan.noise_range"].isna().tolist() == [True] * 3 + [False]  # as its train.json has it
    mixed = table.dropna(subset="config.gan.features_from").drop_duplicates("config.gan.features_from")
    assert mixed["config.gan.features_from"].map(json.loads).tolist() == [3, "critic"]
    assert of(RUNS[2], table)["config.dm.weight"].tolist() == [0.0] * 3


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
    edit(RUN.folder / "train.json", key="0123abcd", seconds=99.0)
    lines = of(RUN)
    assert lines.state.tolist() == ["outdated"] * 3 + ["trained"]
    assert lines.digest.isna().tolist() == lines.weights_path.isna().tolist() == [True] * 3 + [False]
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
    edit(path, network_calls=1 << 70)
    edit(RUN.folder / "metrics.json", config={**read_json(RUN.folder / "metrics.json")["config"], "dm": {"x": 1 << 70}})
    table = catalogue()
    assert table.query("kind == 'teacher'").state.tolist() == ["unreadable"]
    assert f"{path} is damaged (network_calls is" in capsys.readouterr().err
    assert table["config.dm.x"].dropna().map(json.loads).tolist()[0] == 1 << 70


def test_folders_that_are_no_run_are_named(place: Path, capsys) -> None:
    for name in ("seed0-old", "seed00", "copy"):
        shutil.copytree(RUN.folder, RUN.folder.with_name(name))
    assert len(catalogue()) == 3 * len(RUNS) + 1
    told = capsys.readouterr().err
    assert all(f"few/{name} is no run folder" in told for name in ("seed0-old", "seed00", "copy"))


def test_every_column_is_described_and_survives_parquet(place: Path) -> None:
    edit(RUN.folder / "metrics.json", protocol={**PROTOCOL, "draft": [1]})
    Path("results/runs/digits/few/seed7").mkdir()
    table = catalogue()
    columns = describe(table.columns)
    assert set(table.state) == {"evaluated", "not started"}  # a column that is not described counts as damage
    assert set(columns) == set(table.columns) and all(column.meaning for column in columns.values())
    write_parquet(table, Path("out.parquet"), columns)
    assert_frame_equal(pd.read_parquet("out.parquet"), table)
    stored = pq.read_schema("out.parquet")
    for name, column in columns.items():
        about = stored.field(name).metadata
        assert (about[b"unit"].decode(), about[b"description"].decode()) == (column.unit, column.meaning), name
    assert stored.field("fd_se").metadata[b"unit"] == stored.field("fd").metadata[b"unit"] != b""


def test_a_column_nobody_described_has_no_description() -> None:
    assert describe(["fd", "fd_se", "colour", "colour_low"]).keys() == {"fd", "fd_se"}
    assert describe(["new", "new_se"])["new"].meaning == "new of eval.metrics"


def test_an_empty_workspace_has_the_documented_columns(tmp_path: Path) -> None:
    (tmp_path / "results/runs").mkdir(parents=True)
    table = catalogue(tmp_path)
    assert table.empty and list(table.columns) == list(SCHEMA)
    write_parquet(table, tmp_path / "c.parquet", SCHEMA)
    assert_frame_equal(pd.read_parquet(tmp_path / "c.parquet"), table)
    assert training_logs(tmp_path).empty


def test_every_metric_of_this_version_is_explained() -> None:
    names = {*KNOWN, "precision", "recall", "density", "coverage"} - {"prdc"}
    assert names <= METRICS.keys()
    assert set(Estimate(1.0, 1.0, 2).as_json()) - {"value"} == SUFFIXES.keys()


def test_each_record_is_read_once_and_no_weights_at_all(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in [*place.rglob("*.safetensors"), *place.rglob("*.pt")]:
        path.unlink()
    read: list[Path] = []
    original = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: read.append(self) or original(self, *a, **k))
    assert set(catalogue().state) == {"evaluated"}
    assert sorted(path.name for path in read) == ["metrics.json"] * 5 + ["train.json"] * 4
    assert len(set(read)) == len(read)


def test_logs_are_one_value_a_line(place: Path, capsys) -> None:
    logs = training_logs()
    lines = [json.loads(line) for line in (RUNS[3].folder / "log.jsonl").read_text().splitlines()]
    mine = logs[logs.run == str(RUNS[3])].pivot(index="step", columns="name", values="value")
    assert mine.index.tolist() == [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert {name: mine.loc[line["step"], name] for name in line if name != "step"} == {
            name: value for name, value in line.items() if name != "step"
        }
    write_parquet(logs, Path("logs.parquet"), LOG_SCHEMA)
    assert_frame_equal(pd.read_parquet("logs.parquet"), logs)
    with open(RUN.folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "seco')
    assert len(training_logs()) == len(logs)
    assert f"{RUN.folder / 'log.jsonl'} line 3 is damaged or half-written" in capsys.readouterr().err


def test_the_plot_of_the_docstring_draws_every_row_with_its_band(place: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    code = "".join(e.source for e in doctest.DocTestParser().get_examples(eval.catalogue.__doc__))
    exec(code, {})
    axes = plt.gca()
    assert [line.get_label() for line in axes.lines] == ["few", "many"]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 20.5], [2, 40.5], [3, 60.5]]] * 2
    assert len(axes.collections) == 2 and axes.get_yscale() == "log"
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.x0, band.x1, band.y0, band.y1) == (1, 3, 20, 61)
    plt.close("all")


def app() -> Any:
    import typer

    made = typer.Typer()
    made.command()(eval.catalogue.main)
    return made


def test_the_command_writes_what_it_is_asked_for(place: Path, tmp_path: Path) -> None:
    with chdir(tmp_path):
        options = ["--root", "w", "--out", "a/c.parquet", "--csv", "a/c.csv", "--logs", "a/l.parquet"]
        result = CliRunner().invoke(app(), options)
        assert result.exit_code == 0, result.output
        assert "a/c.parquet: 13 lines" in result.output and "5 evaluated" in result.output
        assert_frame_equal(pd.read_parquet("a/c.parquet"), catalogue("w"))
        assert_frame_equal(pd.read_parquet("a/l.parquet"), training_logs(tmp_path / "w"))
        assert pd.read_csv("a/c.csv").fd.tolist() == catalogue("w").fd.tolist()
        assert sorted(path.name for path in Path("a").iterdir()) == ["c.csv", "c.parquet", "l.parquet"]


def test_a_file_is_replaced_as_a_whole_and_never_written_into(place: Path) -> None:
    out = Path("c.parquet")
    write_text(out, "earlier")
    with open(out, encoding="utf-8") as reader:
        write_parquet(catalogue(), out, describe(catalogue().columns))
        assert reader.read() == "earlier"
    assert len(pd.read_parquet(out)) == 13 and [p.name for p in Path().iterdir() if p.is_file()] == ["c.parquet"]


def test_schema_explains_everything_without_a_workspace(tmp_path: Path) -> None:
    with chdir(tmp_path):
        result = CliRunner().invoke(app(), ["--schema"])
    assert result.exit_code == 0 and result.output.strip() == explained()
    shown = {line.split()[0] for line in explained().splitlines()}
    assert {*SCHEMA, *LOG_SCHEMA, "config.NAME", "NAME_se"} <= shown


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder of a workspace"):
        catalogue(tmp_path)


def test_the_demo_that_snakemake_ran_is_all_there(finished: Workspace, capsys) -> None:
    table = catalogue(finished.path)
    assert capsys.readouterr().err == ""
    assert set(table.state) == {"evaluated"}
    assert set(table.row) == {"dmd", "dmd2", "teacher-ode", "teacher-sde"}
    published = pd.read_csv(finished.path / "results/tables/demo.csv").query("metric == 'fd'").set_index("run").value
    final = table[table.is_last].set_index("row")
    assert final.fd.to_dict() == pytest.approx(published.to_dict(), rel=1e-12)
    assert set(describe(table.columns)) == set(table.columns)
    assert all((finished.path / path).exists() for path in table.weights_path.dropna())
    assert table.query("kind == 'student'").weights_path.notna().all()
