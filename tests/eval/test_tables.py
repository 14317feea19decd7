"""What a table and the report say about cost, from the records that evaluation leaves behind."""

import json
import math
import re
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from matplotlib.figure import Figure

from dmd2.core.code_digest import modules_of
from dmd2.core.files import read_json, write_json, write_text
from dmd2.core.run import RunId
from dmd2.experiment.tables import load_experiment
from dmd2.publish.table_text import cells, markdown, number, other, published
from eval.report import page as report
from eval.report.figures import scaled
from eval.report.tables import build, curves, means, measurements, tidy
from eval.runs import evaluate
from tests.browser import fake_results


def spend(run: str, seed: int, **cost: Any) -> None:
    path = RunId("digits", run, seed).folder / "metrics.json"
    write_json(path, {**read_json(path), "cost": cost})


def by_gpu() -> None:
    """dmd2 ran on a GPU under Slurm, gan-only on this machine's."""
    for seed, gpu_hours in enumerate((30.0, 31.0, 33.5)):
        spend("dmd2", seed, source="sacct", gpu_hours=gpu_hours, cpu_hours=8 * gpu_hours, starts=1 + seed)
        spend("gan-only", seed, source="wall clock", gpu_hours=0.01234, cpu_hours=0.09876)


def no_gpu() -> None:
    """As `fake_results` has it: minutes of a CPU."""


def for_months() -> None:
    for seed in range(3):
        spend("dmd2", seed, source="sacct", gpu_hours=12345.6, cpu_hours=1.0, starts=1)


@pytest.mark.parametrize(
    ("spent", "head", "shown"),
    [
        (no_gpu, "CPU-hours", {"dmd": "0.0333", "gan-only-ttur": "0.0347", "teacher-ode": "–", "teacher-sde": "–"}),
        (
            by_gpu,
            "GPU-hours",
            {"dmd2": "31.5", "gan-only": "0.0123", "dmd": "0", "teacher-ode": "–"},
        ),  # mean over seeds
        (for_months, "GPU-hours", {"dmd2": "12346"}),
    ],
)
def test_the_last_column_has_the_hours_of_a_gpu_if_any_row_took_one(
    spent: Callable[[], None], head: str, shown: dict[str, str], table3: Path
) -> None:
    spent()
    heads, lines = cells(build("digits-table3"))
    assert heads[-2:] == ["training time", head]
    assert {line[0].strip("`"): line[-1] for line in lines}.items() >= shown.items()


def test_markdown_and_csv_carry_the_cost_of_every_seed(table3: Path) -> None:
    by_gpu()
    table = build("digits-table3")
    text = markdown(table)
    assert " | training time | GPU-hours |" in text
    assert re.search(r"^\| `dmd2` .* \| 31\.5 \|$", text, re.MULTILINE)
    table = tidy(table)
    fd = table[table.metric == "fd"].set_index(["run", "seed"])
    assert fd.loc["dmd2", "gpu_hours"].tolist() == [30.0, 31.0, 33.5]
    assert fd.loc["dmd2", "cpu_hours"].tolist() == [240.0, 248.0, 268.0]
    assert fd.loc["teacher-ode", ["gpu_hours", "cpu_hours"]].isna().all(axis=None)


def test_the_report_has_the_column_and_in_each_row_who_counted(table3: Path) -> None:
    by_gpu()
    write_json(table3, build("digits-table3"))
    page = report.render(table3)
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', page)
    assert heads[heads.index("GPU-hours") - 1] == "training time"
    row = re.search(r'<tr class="reference">.*?</tr>', page, re.DOTALL)
    assert row and re.findall(r"<td[^>]*>(.*?)</td>", row[0])[-1] == "31.5"
    told = re.findall(r"<dt>Cost</dt><dd>(.*?)</dd>", page)
    assert len(told) == 6  # no teacher
    assert told[3] == (
        "30.0 GPU-hours and 240 CPU-hours by sacct, 1 start (seed 0), "
        "31.0 GPU-hours and 248 CPU-hours by sacct, 2 starts (seed 1), "
        "33.5 GPU-hours and 268 CPU-hours by sacct, 3 starts (seed 2)"
    )
    assert told[4] == "0.0123 GPU-hours and 0.0988 CPU-hours by wall clock"
    assert told[0].startswith("0.0333 CPU-hours by sacct, 1 start (seed 0)")


def test_evaluation_hands_on_what_train_json_says(tmp_path: Path, root: Path, monkeypatch) -> None:
    cfg = load_experiment(root / "workflow/tables", root / "workflow/base").runs["digits", "dmd2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.Protocol, "of", lambda cfg, device: evaluate.Protocol(cfg, Mock(), Mock(), {}))
    monkeypatch.setattr(evaluate, "load_teacher", Mock())
    monkeypatch.setattr(evaluate, "_save_grid", Mock(return_value={}))
    run, cost = RunId("digits", "dmd2", 0), {"source": "sacct", "gpu_hours": 1.5, "cpu_hours": 6.0, "starts": 2}
    write_json(run.folder / "train.json", {"files": [], "key": "k", "steps": 10, "student_updates": 2, "seconds": 9.0,
                                           "device": "cpu", "commit": "abc", "cost": cost})  # fmt: skip
    write_text(run.folder / "log.jsonl", '{"step": 10, "probe/brightness": 0.5}\n')
    evaluate.evaluate_run(run, cfg, torch.device("cpu"), run.folder / "metrics.json")
    assert read_json(run.folder / "metrics.json")["cost"] == cost


def trained_by(run: str, *modules: dict[str, str]) -> None:
    """All seeds of a run were trained by this code, one after the other."""
    parts = [{"step": 10 * i, "commit": "c", "modules": found} for i, found in enumerate(modules)]
    for seed in range(3):
        path = RunId("digits", run, seed).folder / "metrics.json"
        write_json(path, {**read_json(path), "train_code": parts})


def test_table_and_report_tell_by_which_code_rows_were_trained(table3: Path) -> None:
    present, old = modules_of(), {**modules_of(), "dmd2.method.batches": "old"}
    trained_by("dmd2", present)
    assert not any("code" in warning for warning in build("digits-table3")["warnings"])
    path = RunId("digits", "dmd2", 0).folder / "metrics.json"
    write_json(path, {**read_json(path), "train_commit": "another"})
    commits = "rows were trained at different commits"
    assert any(commits in warning for warning in build("digits-table3")["warnings"])
    for run in [row["run"] for row in build("digits-table3")["rows"] if row["kind"] == "student"]:
        trained_by(run, present)
    assert not any(commits in warning for warning in build("digits-table3")["warnings"])  # they tell their code
    trained_by("dmd", old)
    trained_by("gan-only", old, present)
    table = build("digits-table3")
    told = [
        "not all of this was trained by the same code: dmd2/method/batches.py differ",
        "other code went on with half-trained runs: gan-only",
        "trained by other code than the table was made with: dmd, gan-only",
    ]
    assert table["warnings"][-3:] == told and all(f"**Warning:** {text}." in markdown(table) for text in told)
    write_json(table3, table)
    assert all(text in report.render(table3) for text in told)


def test_what_dvc_compares_are_means_over_seeds_and_points_of_curves(table3: Path) -> None:
    by_gpu()
    table = build("digits-table3")
    row = next(row for row in table["rows"] if row["run"] == "dmd2")
    values = row["values"]["fd"]
    assert means(table)["dmd2"]["fd"] == pytest.approx(sum(values.values()) / len(values))
    assert set(means(table)) == {row["run"] for row in table["rows"]}
    points = curves(table)
    mine = points[(points["run"] == "dmd2") & (points["seed"] == 0)]
    assert list(points.columns) == ["run", "seed", "step", "value"]
    assert list(mine["value"]) == [point["fd"] for point in row["curves"][0]]


def test_a_table_read_back_gives_the_same_text(table3: Path) -> None:
    by_gpu()
    table = build("digits-table3")
    assert markdown(json.loads(json.dumps(table))) == markdown(table)


def test_a_released_student_has_no_training_of_ours(root: Path, tmp_path: Path) -> None:
    fake_results.workplace(tmp_path, root)
    with chdir(tmp_path):
        path = fake_results.table("released-imagenet64")
        header, lines = cells(read_json(path))
        shown = dict(zip(header, lines[1], strict=True))
        assert (shown["run"], shown["training time"], shown["Brightness SD"]) == ("`released-dmd2`", "–", "–")
        assert (shown["student updates"], shown["paper's FID"]) == ("38700", "1.51")
        assert report.render(path).count("released-dmd2") > 3


def test_published_numbers_stand_below_the_table(table3: Path) -> None:
    others = {"published": {"CTM": {"fd": 1.92}, "BOOT": {"fd": 16.3}, "unmeasured": {"accuracy": 1.0}}}
    write_json(table3, read_json(table3) | others)
    sentence = "Published FD of other methods: CTM 1.92, BOOT 16.30."
    assert sentence in markdown(read_json(table3)) and sentence in report.render(table3)


def test_further_metrics_stand_beside_the_papers() -> None:
    row = {"values": {"patch_fd": {0: 30.0}, "clip_score": {0: 0.3}}, "paper": {"patch_fid": 20.86}}
    assert [other(row, m) for m in ("patch_fd", "clip_score", "saturation")] == ["30.0 (paper 20.86)", "0.300", "–"]


@pytest.mark.parametrize(
    ("metrics", "others", "text"),
    [
        (["fid", "patch_fid", "clip_score"], {"LCM (1 step)": {"fid": 81.62, "clip_score": 0.275}, "Turbo": {"fid": 24.57}},
         "Published FID / CLIP of other methods: Turbo 24.57 / –, LCM (1 step) 81.62 / 0.275."),
        (["accuracy"], {"one": {"fd": 2.0, "accuracy": 0.9}, "two": {"accuracy": 0.95}},
         "Published Class accuracy of other methods: two 0.950, one 0.900."),
        (["fd", "accuracy"], {"js": {"fid": 2.0}, "kl": {"fid": 1.92}, "SiD": {"is": 10.0}},
         "Published FID of other methods on their own data: kl 1.92, js 2.00."),
    ],
)  # fmt: skip
def test_published_numbers_begin_with_the_best_of_the_first_metric(metrics, others, text) -> None:
    assert published({"metrics": metrics, "published": others}) == text


@pytest.mark.parametrize(("drawn", "guidances", "expected"), [
    (None, [8.0, 6.0], 0.1), (None, [6.0, 8.0], 0.2), (None, [5.0, 6.0], 0.2), ([2.0, 5.0], [5.0, 8.0], 0.1),
])  # fmt: skip
def test_the_teacher_of_a_claim_is_its_sampler_at_the_distilled_guidance(drawn, guidances, expected) -> None:
    student = {"run": "4step", "kind": "student", "values": {}, "seconds": {0: None}, "curves": {},
               "config": {"teacher": {"guidance": 8.0}, "dm": {"guidance": drawn, "weight": 1.0}, "train": {"released": None}}}  # fmt: skip
    teachers = [{"run": f"teacher-{i}", "kind": "teacher", "values": {"saturation": {0: (i + 1) / 10}},
                 "config": {"guidance": g}} for i, g in enumerate(guidances)]  # fmt: skip
    table = load_experiment().tables["dmd2-table4"]
    assert measurements(table, [student, *teachers]).values["teacher", "saturation"] == {0: expected}


def test_a_table_without_numbers_of_the_paper_does_not_speak_of_it(table3: Path) -> None:
    table = read_json(table3)
    table["claims"] = [{**table["claims"][0], "id": "H1", "paper": ""}]
    for row in table["rows"]:
        row["paper"] = {"fd": None}
    write_json(table3, table | {"title": "Mine", "notes": ""})
    said = markdown(read_json(table3)) + report.render(table3).replace('class="paper"', "")
    assert "H1: " in said and "H1. " in said
    assert not re.findall(r".{20}[Pp]aper.{20}", re.sub(r"<style>.*?</style>", "", said, flags=re.S))
    assert cells(table)[0][5:7] == ["FD", "gap to `dmd2`"]


def test_rows_of_another_table_stand_beside_those_of_the_same_names(table3: Path) -> None:
    name, beside = "digits-table3", "digits-ttur"
    written = Path(f"workflow/tables/{name}.yaml")
    write_text(written, written.read_text() + f"beside: {beside}\n")
    before = load_experiment().shown(name)
    assert f"FD in `{beside}`" not in cells(build(name))[0]  # it is not made
    rows = [{**row, "values": {"fd": {"0": 7.0, "1": 8.0, "2": 9.0}}} for row in read_json(table3)["rows"][:2]]
    write_json(Path(f"results/reference/{beside}.json"), {"rows": rows})
    table = build(name)
    heads, lines = cells(table)
    assert [line[heads.index(f"FD in `{beside}`")] for line in lines[:3]] == ["8.00 ± 1.0", "8.00 ± 1.0", "–"]
    assert load_experiment().shown(name) != before  # so that the table is made anew
    assert not any(beside in warning for warning in table["warnings"])
    for row in rows:
        row["protocol"] |= {"detector": "another"}
    write_json(Path(f"results/tables/{beside}.json"), {"rows": rows})  # made here, which comes before what is shipped
    assert f"{beside} was measured with another" in " ".join(build(name)["warnings"])


def test_texts_of_several_lines_and_zeros_and_no_numbers_keep_the_table_whole(table3: Path) -> None:
    table = read_json(table3)
    heads = cells(table)[0]
    table["claims"][0] |= {"claim": "a | b\nis lower\n"}
    reference = next(row for row in table["rows"] if row["run"] == table["reference_row"])
    reference["values"]["fd"] = dict.fromkeys(reference["values"]["fd"], 0.0)
    table["rows"][0]["difference"] |= {"value": math.nan, "low": math.nan, "high": math.nan}
    said = markdown(table)
    assert f"| {table['claims'][0]['id']}: a \\| b is lower | " in said
    assert cells(table)[0] == [head for head in heads if not head.startswith("gap")]


def test_an_axis_is_scaled_by_the_finite_values() -> None:
    axes = Figure().add_subplot()
    assert scaled(axes, "y", [math.nan, 1.0, 2.0, math.inf], 10.0) == ""
    assert scaled(axes, "y", [math.nan, 1.0, 20.0, -math.inf], 10.0) == ", log scale"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(3.7387, 3, "3.74"), (0.95, 3, "0.950"), (9.996, 3, "10.0"), (2208.7, 3, "2209"), (0.0011, 2, "0.0011"), (0.0, 3, "0"),
     (math.nan, 3, "nan"), (None, 3, "–"), (-2.5e-12, 3, "-2.50e-12")],
)  # fmt: skip
def test_numbers_have_the_same_significant_digits(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text
