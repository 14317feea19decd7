"""All rows of a base side by side: whose numbers they are, how they compare, what they cost and need."""

import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from dmd2.core.files import read_json, write_json
from dmd2.publish.table_text import difference_text
from eval.report.figures import axes_of, curve
from eval.report.methods import facts, gap, merged, render, view
from tests.browser import fake_results

ONE, THREE = Path("results/tables/demo.json"), Path("results/tables/digits-table3.json")


@pytest.fixture(scope="module")
def tables(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Two tables of one base and rows of the same names, with invented results of one seed and of three."""
    folder = tmp_path_factory.mktemp("methods")
    fake_results.workplace(folder, root)
    with chdir(folder):
        fake_results.table("demo")
        fake_results.table("digits-table3")
        yield read_json(ONE), read_json(THREE)


def test_a_row_of_several_tables_is_shown_once_with_the_most_seeds(tables) -> None:
    one, three = tables
    (group,) = merged([three, one])
    assert sorted(row["run"] for row in group["rows"]) == sorted(row["run"] for row in three["rows"])
    assert all(len(row["values"]["fd"]) == 3 for row in group["rows"] if row["kind"] == "student")
    assert group["reference_row"] == "dmd2" and group["tables"] == ["digits-table3", "demo"]
    means = [sum(row["values"]["fd"].values()) for row in group["rows"] if row["kind"] == "student"]
    assert means == sorted(means)


def test_differences_are_those_of_the_table(tables) -> None:
    three = tables[1]
    (group,) = merged([three])
    rows = {row["run"]: row for row in group["rows"]}
    for row in three["rows"]:
        expected = "" if row["run"] == "dmd2" else difference_text(row["difference"])
        assert gap(rows[row["run"]], rows["dmd2"], "fd") == expected


def test_one_seed_has_no_interval(tables) -> None:
    (group,) = merged([tables[0]])
    assert {gap(row, group["rows"][1], "fd") for row in group["rows"]} == {"", "–"}


def test_cost_and_needs_of_each_row(tables) -> None:
    page = render([ONE, THREE])
    found = {}
    for name, cells in re.findall(r"<code>([\w-]+)</code></span></th>(.*?)</tr>", page, re.DOTALL):
        found[name] = re.findall(r"<td[^>]*>(.*?)</td>", cells)
    assert found["ttur"][2:5] == ["24.0", "300", "7,195"]  # 6 + 2 for the student, 4 in each of 5 updates of the critic
    assert found["no-regression"][2:4] == ["7.99", "1500"]
    assert {name: cells[-1] for name, cells in found.items() if name in ("dmd", "dmd2", "ttur")} == {
        "dmd": "critic, teacher pairs",
        "dmd2": "critic, GAN&#39;s head, real images",
        "ttur": "critic",
    }
    assert "At equal updates of the student and at equal network passes" in page


def test_curves_reach_the_passes_of_the_whole_training(tables) -> None:
    for row in (row for row in tables[1]["rows"] if row["kind"] == "student"):
        assert row["curves"]["0"][-1]["passes"] == pytest.approx(row["passes"] * row["student_updates"])


def test_tables_of_other_code_are_shown_without_passes(tables, tmp_path: Path) -> None:
    old = tables[1] | {"rows": [{k: v for k, v in row.items() if k != "passes"} for row in tables[1]["rows"]]}
    for row in old["rows"]:
        row["config"] = row["config"] | {"unknown": 1}
    write_json(tmp_path / "digits-table3.json", old)
    page = render([tmp_path / "digits-table3.json"])
    assert "At equal updates of the student;" in page and '<td class="needs">–</td>' in page


def test_a_base_of_one_row_is_left_out_and_no_base_is_a_sentence(tables, tmp_path: Path) -> None:
    students = [row for row in tables[1]["rows"] if row["kind"] == "student"][:1]
    write_json(tmp_path / "digits-table3.json", tables[1] | {"rows": students})
    write_json(tmp_path / "foreign.json", {})
    assert "There are none yet" in render([tmp_path / "digits-table3.json", tmp_path / "foreign.json"])


def test_rows_whose_snapshot_was_selected_otherwise_stand_apart(tables) -> None:
    last, best = merged([tables[1], tables[1] | {"select": "best"}])
    assert last["rows"] == best["rows"] and last["name"] != best["name"]  # the names are ids of one page


def test_rows_measured_by_another_detector_stand_apart(tables) -> None:
    """A classifier that was trained anew, for example: its distances are on another scale."""
    other = [row | {"protocol": row["protocol"] | {"detector": "digits-classifier@other"}} for row in tables[1]["rows"]]
    first, second = merged([tables[1], tables[0] | {"rows": other, "name": "other"}])
    assert first["name"] != second["name"] and len(first["tables"]) == len(second["tables"]) == 1
    assert {"digits-classifier@other" in table["measured_by"] for table in (first, second)} == {True, False}


def test_a_training_counts_the_one_from_whose_student_it_started(tables) -> None:
    """The stages of sd15, for example: the second has an eighth of the first one's updates."""
    changed = {}
    for row in tables[1]["rows"]:
        train = row["config"].get("train")
        start = {"dmd2": "ttur", "dmd": "unknown"}.get(row["run"])
        changed[row["run"]] = row | (
            {"config": row["config"] | {"train": train | {"init_from": start}}} if start else {}
        )
    (group,) = merged([tables[1] | {"rows": [*changed.values()]}])
    rows = {row["run"]: row for row in group["rows"]}
    cells = {row["run"]: facts(row) for row in group["rows"]}
    own = {run: row["passes"] * row["student_updates"] for run, row in changed.items() if "passes" in row}
    assert rows["dmd2"]["in_all"]["student_updates"] == 600
    assert rows["dmd2"]["in_all"]["passes"] == pytest.approx(own["dmd2"] + own["ttur"])
    assert rows["dmd2"]["curves"]["0"][-1]["passes"] == pytest.approx(own["dmd2"] + own["ttur"])
    assert rows["dmd2"]["curves"]["0"][0]["student_updates"] > 300
    assert rows["dmd"]["in_all"]["passes"] == pytest.approx(own["dmd"])
    assert "the student of ttur" in cells["dmd2"][-1] and "the student of unknown" in cells["dmd"][-1]


def test_released_weights_leave_the_passes_of_the_others_on_the_page(tables) -> None:
    rows = [{k: v for k, v in row.items() if k != "passes" or row["run"] != "dmd"} for row in tables[1]["rows"]]
    for row in (row for row in rows if row["run"] == "dmd"):
        row["curves"] = {
            s: [{k: v for k, v in p.items() if k != "passes"} for p in c] for s, c in row["curves"].items()
        }
    (group,) = merged([tables[1] | {"rows": rows}])
    drawn = {row["run"]: bool(curve(row, "passes", "fd")) for row in group["rows"] if row["kind"] == "student"}
    assert "passes" in axes_of(group) and drawn.pop("dmd") is False and all(drawn.values())
    assert len(view(group)["curves"]) == 2
