"""What a table prints is so whatever its first metric: directions, gaps, calls, times, warnings."""

import json
import re
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import t

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, write_json, write_text
from dmd2.core.run import SAMPLERS, RunId
from dmd2.experiment.metrics import LABELS
from dmd2.experiment.tables import Table, load_experiment
from dmd2.publish.table_text import cells, markdown, other
from eval.report.figures import best_runs
from eval.report.page import render
from eval.report.rules import below
from eval.report.tables import build, measurements
from eval.runs.evaluate import brightness_stability
from tests.browser import fake_results

NAME = "digits-table3"


def edit(**changes: Any) -> None:
    """Change keys of the table."""
    path = Path(f"workflow/tables/{NAME}.yaml")
    write_text(path, yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def rewrite(change: Callable[[dict[str, Any]], Any], run: str = "*", seed: str = "*") -> None:
    """Apply a change to the metrics of runs."""
    for path in Path("results/runs/digits").glob(f"{run}/seed{seed}/metrics.json"):
        record = read_json(path)
        change(record)
        write_json(path, record)


def row_of(table: dict[str, Any], run: str) -> dict[str, Any]:
    return next(row for row in table["rows"] if row["run"] == run)


def test_the_best_snapshot_by_accuracy_is_the_highest(table3: Path) -> None:
    edit(metrics=["accuracy", "fd"], select="best")
    row = row_of(build(NAME), "dmd2")
    for seed, snapshots in row["curves"].items():
        assert row["values"]["accuracy"][seed] == max(snapshot["accuracy"] for snapshot in snapshots)


def test_claims_judge_the_distance_also_where_accuracy_comes_first(table3: Path) -> None:
    for run, accuracy, fd in (("dmd2", 0.99, 1.0), ("ttur", 0.90, 9.0)):
        rewrite(lambda record, a=accuracy, f=fd: record["snapshots"][-1].update(accuracy=a, fd=f), run)
    verdicts = {}
    for metrics in (["fd", "accuracy"], ["accuracy", "fd"]):
        edit(metrics=metrics)
        verdicts[metrics[0]] = next(claim for claim in build(NAME)["claims"] if claim["id"] == "C7")
    assert verdicts["accuracy"]["verdict"] == "supported" and verdicts["accuracy"] == verdicts["fd"]


def test_the_best_published_number_follows_the_direction(table3: Path) -> None:
    rows = build(NAME)["rows"]
    numbers = {"one": {"fd": 2.0, "accuracy": 0.9}, "two": {"fd": 3.0, "accuracy": 0.95, "brightness": 0.3}}
    table = Table(title="", base="digits", rows=[], metrics=["fd", "accuracy", "brightness"], published=numbers)
    best = {metric: found for (run, metric), found in measurements(table, rows).values.items() if "published" in run}
    assert best == {"fd": {0: 2.0}, "accuracy": {0: 0.95}}


def test_a_released_student_is_one_training_however_many_seeds_ask_for_it(root: Path, tmp_path: Path) -> None:
    fake_results.workplace(tmp_path, root)
    with chdir(tmp_path):
        rows = read_json(fake_results.table("released-imagenet64"))["rows"]
    for row in rows:
        row["values"] = {"fid": dict.fromkeys(range(3), row["values"]["fid"]["0"])}
        row["times"] = {}
    table = load_experiment().tables["released-imagenet64"].model_copy(update={"published": {"CTM": {"fid": 1.92}}})
    released = next(row["run"] for row in rows if row["kind"] == "student")
    m = measurements(table, rows)
    found = below(m, "fid", released, "published best")
    assert (found.verdict, "measured with 1, needs 3 seeds" in found.evidence) == ("undecided", True)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        ({"solver": "heun", "steps": 18}, 35),
        ({"solver": "ddim", "steps": 50, "guidance": 3.0}, 100),
        ({"solver": "pndm", "steps": 50, "guidance": 8.0}, 102),
        ({"solver": "euler", "steps": 30}, 30),
    ],
)
def test_calls_of_a_teacher_are_those_of_its_recorded_sampler(sampler, calls, table3: Path) -> None:
    path = SAMPLERS / "digits/ode/metrics.json"
    write_json(path, read_json(path) | {"sampler": {"guidance": 1.0, **sampler}, "network_calls": sampler["steps"]})
    head, texts = cells(build(NAME))
    shown = {line[0]: line[head.index("student updates")] for line in texts}
    assert shown["`teacher-ode`"] == f"{calls} calls"


def test_a_teacher_is_compared_with_every_seed_of_the_reference_row(table3: Path) -> None:
    table = build(NAME)
    found, base = row_of(table, "teacher-ode")["difference"], row_of(table, "dmd2")
    gaps = [7.2 - value for value in base["values"]["fd"].values()]
    half = t.ppf(0.975, 2) * np.std(gaps, ddof=1) / 3**0.5
    assert (found["value"], found["low"]) == pytest.approx((np.mean(gaps), np.mean(gaps) - half))
    assert (found["covers"], base["difference"]) == ("training seeds", None)


def test_seconds_until_a_snapshot_are_those_that_the_log_has(table3: Path) -> None:
    """A run that went on elsewhere after half of its steps, three times as slow."""
    run = RunId("digits", "ttur", 0).folder
    steps = [snapshot["step"] for snapshot in read_json(run / "metrics.json")["snapshots"]]
    half = steps[-1] // 2
    log = [{"step": s, "seconds": s + 2.0 * max(0, s - half), "probe/brightness": 0.3} for s in steps]
    write_text(run / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    rows = build(NAME)["rows"]
    table = load_experiment().tables[NAME]
    times = [seconds for seconds, _ in measurements(table, rows).curves["ttur", "fd"][0]]
    assert times == [line["seconds"] for line in log]


def test_a_log_that_ends_before_the_snapshots_tells_no_times(table3: Path) -> None:
    run = RunId("digits", "ttur", 0).folder
    write_text(run / "log.jsonl", '{"step": 10, "seconds": 5000.0, "probe/brightness": 0.3}\n')
    times = row_of(build(NAME), "ttur")["times"][0]
    assert times[-1] == read_json(run / "metrics.json")["seconds"]


def test_claims_at_equal_time_warn_of_different_devices(table3: Path) -> None:
    rewrite(lambda record: record.update(device="NVIDIA H200"), "ttur", "1")
    assert not any("devices" in warning for warning in build(NAME)["warnings"])
    edit(claims=["C2", "C4"])
    [warning] = [warning for warning in build(NAME)["warnings"] if "devices" in warning]
    assert warning.startswith("C4: rows are compared at equal training time") and "NVIDIA H200" in warning


def test_a_seed_of_another_protocol_is_warned_of(table3: Path) -> None:
    other_protocol = fake_results.PROTOCOL | {"rounding": "trunc"}
    rewrite(lambda record: record.update(protocol=other_protocol), "dmd2", "2")
    assert "rows were measured with different protocols and must not be compared" in build(NAME)["warnings"]


def test_brightness_of_one_line_has_no_sd(table3: Path) -> None:
    run = RunId("digits", "dmd2", 0)
    write_text(run.folder / "log.jsonl", '{"step": 10, "probe/brightness": 0.3}\n')
    assert brightness_stability(run, {"steps": 10}) == {}
    rewrite(lambda record: record.pop("brightness_std"), "dmd2")
    row = row_of(build(NAME), "dmd2")
    assert other(row, "brightness_std") == "–"


def test_a_missing_log_is_one_sentence(table3: Path) -> None:
    run = RunId("digits", "dmd2", 0)
    (run.folder / "log.jsonl").unlink()
    with pytest.raises(UserError, match=r"dmd2/seed0/log.jsonl is missing"):
        build(NAME)
    write_text(run.folder / "log.jsonl", '{"step": 1')
    with pytest.raises(UserError, match=r"log.jsonl, line 1, is not valid JSON"):
        build(NAME)


def first_metric(metric: str, values: dict[str, float], paper: dict[str, float | None]) -> dict[str, Any]:
    """The table as if the table's first metric were this one, with values of the rows dmd and dmd2."""
    table = build(NAME)
    table["metrics"] = [metric, "fd"]
    table["rows"] = [row_of(table, run) for run in ("dmd", "dmd2")]
    for row in table["rows"]:
        row["values"][metric] = dict.fromkeys(range(3), values[row["run"]])
        row["paper"] = {metric: paper[row["run"]]} if paper[row["run"]] is not None else {}
    return table


@pytest.mark.parametrize("metric", ["kid", "is", "recall", "clip_score", "saturation"])
def test_any_metric_may_come_first(metric: str, table3: Path) -> None:
    table = first_metric(metric, {"dmd": 0.2, "dmd2": 0.3}, {"dmd": None, "dmd2": None})
    text = markdown(table)
    assert "| gap to `dmd2` |" in text and "| ×0.667 |" in text and "paper" not in text.split("\n\n")[1]
    assert "FD is the Fréchet distance in this detector's features: it is not FID." in text


def test_the_gap_is_to_the_paper_where_it_has_the_metric_and_to_one_thing_only(table3: Path) -> None:
    head, (dmd, dmd2) = cells(first_metric("clip_score", {"dmd": 0.3, "dmd2": 0.34}, {"dmd": None, "dmd2": 0.332}))
    gap, paper = head.index("gap to the paper"), head.index("paper's CLIP")
    assert (dmd[gap], dmd[paper], dmd2[gap], dmd2[paper]) == ("–", "–", "+0.008", "0.332")


@pytest.mark.parametrize(
    ("metric", "best", "better"),
    [("kid", "dmd", "lower"), ("recall", "dmd2", "higher"), ("is", "dmd2", "higher"), ("brightness", None, "")],
)
def test_bold_and_arrows_follow_the_direction(metric: str, best: str | None, better: str, table3: Path) -> None:
    table = first_metric(metric, {"dmd": 0.2, "dmd2": 0.3}, {"dmd": None, "dmd2": None})
    write_json(table3, table)
    main = re.search(r'<table class="main">.*?</table>', render(table3), re.S)[0]
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', main)
    at = next(i for i, head in enumerate(heads) if re.split("&nbsp;", head)[0] == LABELS[metric])
    assert (f"({better} is better)" in heads[at]) == bool(better) and ("↑" in heads[at]) == (better == "higher")
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in main.split("<tr")[2:]]
    assert ["<strong>" in cells[at - 1] for cells in rows] == [best == "dmd", best == "dmd2"]
    assert best is None or best_runs(table, metric) == [best]


def test_the_draws_behind_a_number_are_said(table3: Path) -> None:
    rewrite(lambda record: record["protocol"].update(draws=3))
    assert "2000 images per number, mean of 3 draws, labels" in markdown(build(NAME))


def test_the_report_says_the_rule_against_one_value_and_that_fd_is_not_fid(table3: Path) -> None:
    edit(metrics=["accuracy", "fd"])
    write_json(table3, build(NAME))
    page = render(table3)
    assert "which has one value, twice that of the row that has seeds" in page
    assert "FD is the Fréchet distance in this detector&#39;s features: it is not FID, and the paper" in page
