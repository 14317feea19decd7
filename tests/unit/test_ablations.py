"""Tables and bases as the user writes them: what they mean, and one sentence for each mistake."""

import pytest

from dmd2.experiment.dotted_keys import leaves
from dmd2.experiment.tables import apply_change, holds, load_experiment
from tests import tiny
from tests.conftest import ROOT


# What tables mean.
def test_a_row_is_its_base_with_the_change(folder):
    folder.table()
    runs = folder.load().runs
    assert (runs["tiny", "a"].critic.ratio, runs["tiny", "b"].critic.ratio) == (5, 1)


def test_a_table_can_take_the_rows_of_another_and_change_base_and_rows(folder):
    folder.base("large", tiny.values("edm", critic__ratio=10))
    folder.table("one")
    folder.table("two", rows="one", base="large", change={"optim.lr": 0.5}, row_change={"a": {"optim.batch": 9}})
    runs = folder.load().runs
    assert (runs["large", "a"].critic.ratio, runs["large", "b"].critic.ratio) == (10, 1)
    assert (runs["large", "a"].optim.lr, runs["large", "a"].optim.batch) == (0.5, 9)
    assert (runs["large", "b"].optim.lr, runs["large", "b"].optim.batch) == (0.5, 4)


def test_rows_of_a_table_of_the_same_base_are_the_same_runs(folder):
    folder.table("one", change={"optim.lr": 0.5}, row_change={"b": {"optim.batch": 9}})
    folder.table("two", rows={"from": "one", "add": [{"run": "c", "change": {"critic.ratio": 2}}]})
    folder.table("three", rows="two")
    runs = folder.load().runs
    assert (runs["tiny", "b"].optim.lr, runs["tiny", "b"].optim.batch) == (0.5, 9)
    assert (runs["tiny", "c"].optim.lr, runs["tiny", "c"].critic.ratio) == (1e-3, 2)


def test_a_table_can_extend_another_which_does_not_get_its_rows(folder):
    folder.table("one")
    folder.table("two", rows={"from": "one", "add": [{"run": "c", "change": {"critic.ratio": 9}}]}, change={"optim.lr": 0.5},
                 base="large")  # fmt: skip
    folder.base("large", tiny.values("edm"))
    folder.table("three", rows="two", base="large", change={"optim.lr": 0.5})
    experiment = folder.load()
    names = {name: [row.run for row in rows] for name, rows in experiment.rows.items()}
    assert names == {"one": ["a", "b"], "two": ["a", "b", "c"], "three": ["a", "b", "c"]}
    assert (experiment.runs["large", "c"].critic.ratio, experiment.runs["large", "c"].optim.lr) == (9, 0.5)


def test_equal_rows_of_two_tables_are_one_run(folder):
    folder.table("one")
    folder.table("two")
    assert len(folder.load().runs) == 2


@pytest.mark.parametrize(("key", "value"), [
    ("dm.normaliser_eps", 0.5), ("dm.alpha_factor", True), ("critic.shares_iteration", False), ("gan.r1_weight", 0.5),
    ("gan.r1_alpha", 0.5), ("regression.pairs.sampler.guidance", 2.0),
])  # fmt: skip
def test_a_switch_that_the_base_leaves_at_its_default_can_be_changed_by_a_row(folder, key, value):
    values = tiny.values("edm")
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section.pop(last, None)
    folder.base("tiny", values)
    folder.table(rows=[{"run": "a", "change": {key: value}}])
    assert leaves(folder.load().runs["tiny", "a"].model_dump())[key] == value


def test_ticks_are_computed_from_what_runs(folder):
    folder.table(columns={"TTUR": "critic.ratio > 1", "GAN": "gan.lambda_g > 0"})
    experiment = folder.load()
    assert experiment.ticks("one", "a") == {"TTUR": True, "GAN": True}
    assert experiment.ticks("one", "b") == {"TTUR": False, "GAN": True}


@pytest.mark.parametrize(("condition", "expected"), [
    ("critic.ratio > 4", True), ("critic.ratio > 5", False), ("critic.ratio >= 5", True), ("critic.ratio < 5", False),
    ("critic.ratio <= 5", True), ("critic.ratio == 5", True), ("critic.ratio != 5", False), ("gan.lambda_g == 3e-3", True),
    ("generator.input == noise", True), ("generator.input != noise", False), ("train.init_from == null", True),
    ("dm.alpha_factor == false", True), ("critic.shares_iteration == true", True), ("gan.noise_range == null", False),
])  # fmt: skip
def test_condition(condition, expected):
    assert holds(condition, tiny.config("edm")) is expected


# The shipped files.
def test_shipped_tables_are_valid():
    experiment = load_experiment(ROOT / "workflow/tables", ROOT / "workflow/base")
    assert {"dmd2-table3", "dmd2-table4", "dmd2-fig9", "digits-table3"} <= set(experiment.tables)


def test_ticks_of_table_3_are_those_of_the_paper():
    experiment = load_experiment(ROOT / "workflow/tables", ROOT / "workflow/base")
    names = ("DMD", "No regress.", "TTUR", "GAN")
    ticks = {row.run: "".join("x" if experiment.ticks("dmd2-table3", row.run)[n] else "." for n in names)
             for row in experiment.rows["dmd2-table3"]}  # fmt: skip
    assert ticks == {"dmd": "x...", "no-regression": "xx..", "ttur": "xxx.", "dmd2": "xxxx", "gan-only": ".x.x",
                     "gan-only-ttur": ".xxx"}  # fmt: skip


def test_apply_change_leaves_the_base_as_it_was():
    base = {"critic": {"ratio": 5}}
    assert apply_change(base, {"critic.ratio": 1}) == {"critic": {"ratio": 1}}
    assert base == {"critic": {"ratio": 5}}
