"""The run catalogue, read from folders that real trainings left, with metrics in the form of an evaluation's."""

import doctest
import json
from contextlib import chdir
from pathlib import Path

import matplotlib as mpl
import nbclient
import nbformat
import pandas as pd
import pyarrow.parquet as pq
import pytest
from jupyter_client.manager import AsyncKernelManager
from pandas.testing import assert_frame_equal
from typer import Typer
from typer.testing import CliRunner

import eval.catalogue.__main__
import eval.catalogue.read
from dmd2.core.errors import UserError
from dmd2.core.files import read_json, sha256, write_text
from dmd2.core.options import WORKSPACE
from dmd2.experiment.metrics import OF_RUNS, measured
from eval.catalogue.columns import LOG_SCHEMA, METRICS, SCHEMA, SUFFIXES, describe, explained, write_parquet
from eval.catalogue.read import catalogue, training_logs
from eval.metrics.estimate import Estimate
from tests.eval.catalogue_workspace import PROTOCOL, RUN, RUNS, STEPS, edit, of
from tests.workspace import Workspace

APP = Typer()
APP.command()(eval.catalogue.__main__.main)


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


def test_calls_of_a_sampler_are_counted_again(place: Path) -> None:
    sampler = {"solver": "pndm", "steps": 50, "guidance": 3.0}
    edit(Path("results/teachers/digits/ode/metrics.json"), sampler=sampler, network_calls=50)
    assert catalogue().query("kind == 'teacher'").network_calls.tolist() == [102]


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
    assert of(RUN, table)["config.gan.noise_range"].isna().tolist() == [True] * 3
    mixed = table.dropna(subset="config.gan.features_from").drop_duplicates("config.gan.features_from")
    assert mixed["config.gan.features_from"].map(json.loads).tolist() == [3, "critic"]
    assert of(RUNS[2], table)["config.dm.weight"].tolist() == [0.0] * 3


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
    assert {*measured([*OF_RUNS])} <= METRICS.keys()
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
    code = "".join(e.source for e in doctest.DocTestParser().get_examples(eval.catalogue.read.__doc__))
    exec(code, {})
    axes = plt.gca()
    assert [line.get_label() for line in axes.lines] == ["few", "many"]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 20.5], [2, 40.5], [3, 60.5]]] * 2
    assert len(axes.collections) == 2 and axes.get_yscale() == "log"
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.x0, band.x1, band.y0, band.y1) == (1, 3, 20, 61)
    plt.close("all")


def test_the_command_writes_what_it_is_asked_for(place: Path, tmp_path: Path) -> None:
    with chdir(tmp_path):
        options = ["--root", "w", "--out", "a/c.parquet", "--csv", "a/c.csv", "--logs", "a/l.parquet"]
        result = CliRunner().invoke(APP, options)
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


def test_the_notebook_of_examples_runs_in_another_workspace(
    place: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, str(place))
    monkeypatch.setenv("PYTHONPATH", str(root))
    notebook = nbformat.read(root / "examples/catalogue.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    published = [output.output_type for cell in cells for output in cell.outputs]
    kernel = AsyncKernelManager(transport="ipc", connection_file=str(place / "kernel.json"))  # no ports to be taken
    nbclient.NotebookClient(notebook, kernel, timeout=120, resources={"metadata": {"path": str(place)}}).execute()
    assert cells[0].outputs[0].text == "13 snapshots of 4 trainings\n1 samplers of teachers\n"
    assert [output.output_type for cell in cells for output in cell.outputs] == published
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 2


def test_schema_explains_everything_without_a_workspace(tmp_path: Path) -> None:
    with chdir(tmp_path):
        result = CliRunner().invoke(APP, ["--schema"])
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
