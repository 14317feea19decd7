"""All rows of a base side by side: whose numbers they are, how they compare, what they cost and need."""

import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from dmd2.core.files import read_json, write_json
from dmd2.publish.table_text import difference_text
from eval.report.methods import gap, merged, render
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
