"""One sentence, with file and line, for each mistake in a table or base."""

import pytest

from tests import tiny
from tests.experiment_folder import base_text, line_of

WRONG_TABLES = {
    "misspelled key in a row's change": (
        {"rows": [{"run": "a"}, {"run": "b", "change": {"critic.ration": 1}}]}, "critic.ration", "did you mean critic.ratio?"),
    "misspelled section in a row's change": (
        {"rows": [{"run": "a", "change": {"critik.ratio": 1}}]}, "critik.ratio", "did you mean critic.ratio?"),
    "misspelled key in a table's change": ({"change": {"gan.lamda_g": 0}}, "gan.lamda_g", "did you mean gan.lambda_g?"),
    "misspelled key in row_change": (
        {"row_change": {"a": {"optim.learning_rate": 0}}}, "optim.learning_rate", "no key optim.learning_rate"),
    "misspelled key of the table": ({"column": {}}, "column:", "did you mean columns?"),
    "misspelled key of a row": ({"rows": [{"run": "a", "chnge": {}}]}, "chnge", "did you mean change?"),
    "wrong type in a row": ({"rows": [{"run": "a", "change": {"critic.ratio": "five"}}]}, "critic.ratio", "critic.ratio"),
    "negative weight in a row": ({"rows": [{"run": "a", "change": {"dm.weight": -1}}]}, "dm.weight", "dm.weight"),
    "section replaced by a number": ({"rows": [{"run": "a", "change": {"critic": 1}}]}, "critic:", "critic"),
    "row that trains nothing": (
        {"rows": [{"run": "a", "change": {"dm.weight": 0.0, "gan.lambda_g": 0.0}}]}, "gan.lambda_g", "nothing would train"),
    "column with an unknown key": ({"columns": {"X": "critic.ration > 1"}}, "X:", "did you mean critic.ratio?"),
    "column that is no comparison": ({"columns": {"X": "critic.ratio"}}, "X:", "is not of the form"),
    "column that compares a number with a word": ({"columns": {"X": "critic.ratio > many"}}, "X:", "many"),
    "rows of an unknown table": ({"rows": "two"}, "rows:", "is no other table"),
    "rows of the table itself": ({"rows": "one"}, "rows:", "is no other table"),
    "extension of an unknown table": ({"rows": {"from": "two", "add": [{"run": "c"}]}}, "from:", "is no other table"),
    "extension of the table itself": ({"rows": {"from": "one", "add": [{"run": "c"}]}}, "from:", "is no other table"),
    "extension without rows": ({"rows": {"from": "two", "add": []}}, "add:", "at least 1"),
    "extension without its origin": ({"rows": {"add": [{"run": "c"}]}}, "rows:", "key rows.from is missing"),
    "misspelled key of an extension": ({"rows": {"form": "two", "add": [{"run": "c"}]}}, "form:", "did you mean rows.from?"),
    "misspelled key of an added row": (
        {"rows": {"from": "two", "add": [{"run": "c", "papper": {}}]}}, "papper", "did you mean paper?"),
    "negative seed": ({"seeds": [0, -1]}, "- -1", "seeds.1: Input should be greater than or equal to 0, got -1"),
    "repeated seed": ({"seeds": [0, 1, 0]}, "seeds:", "seeds: 0 is given twice"),
    "repeated metric": ({"metrics": ["fd", "fd"]}, "metrics:", "metrics: fd is given twice"),
    "no rows": ({"rows": []}, "rows:", "rows is empty"),
    "row given twice": ({"rows": [{"run": "a"}, {"run": "a"}]}, "run: a", "twice"),
    "unknown reference row": ({"reference_row": "z"}, "reference_row", "is no row"),
    "unknown table beside it": ({"beside": "one"}, "beside:", "one is no other table"),
    "unknown row in row_change": ({"row_change": {"z": {}}}, "z:", "is no row"),
    "unknown teacher sampler": ({"teachers": {"sd": {}}}, "sd:", "no sampler sd"),
    "row named like a sampler of the teacher": ({"rows": [{"run": "teacher-forced"}]}, "teacher-", "the teacher's samplers"),
    "run name with a space": ({"rows": [{"run": "a b"}]}, "a b", "a b"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_table_mistake_is_named_with_file_and_line(folder, name):
    changes, needle, sentence = WRONG_TABLES[name]
    folder.table(**changes)
    error = folder.error()
    path = folder.tables / "one.yaml"
    lines = [i for i, line in enumerate(path.read_text().splitlines(), start=1) if needle in line]
    assert sentence in error
    assert any(f"{path}:{line}:" in error for line in lines), error


WRONG_BASES = {
    "misspelled required key": ("  ratio: 5", "  ration: 5", "critic.ration", "did you mean critic.ratio?"),
    "misspelled optional key": ("  alpha_factor: false", "  alpha_facto: false", "dm.alpha_facto", "dm.alpha_factor?"),
    "misspelled section": ("critic:", "kritic:", "kritic", "did you mean critic?"),
    "wrong type": ("ratio: 5", "ratio: five", "critic.ratio", "'five'"),
    "quoted number": (r"  lr: 0.001", "  lr: '2e-6'", "optim.lr", "'2e-6'"),
    "missing key": ("  ratio: 5\n", "", "critic.ratio", "missing"),
    "out of range": ("- 980", "- 1980", "dm.index_range", "1980"),
    "infinite number": ("lr: 0.001", "lr: .inf", "optim.lr", "inf"),
}


@pytest.mark.parametrize("name", WRONG_BASES)
def test_base_mistake_is_named_with_file_and_line(folder, name):
    pattern, replacement, key, sentence = WRONG_BASES[name]
    folder.base("tiny", base_text(pattern, replacement))
    folder.table()
    path, expected = folder.bases / "tiny.yaml", "critic:" if name == "missing key" else replacement.strip()
    assert folder.says(key, sentence, f"{path}:{line_of(path, expected)}:")


def test_2e_6_is_a_number_in_a_base_and_in_a_row(folder):
    folder.base("tiny", base_text("lr: 0.001", "lr: 2e-6"))
    folder.table(text="{title: t, base: tiny, rows: [{run: a}, {run: b, change: {optim.lr: 5E-7}}]}")
    assert [folder.load().runs["tiny", run].optim.lr for run in "ab"] == [2e-6, 5e-7]


@pytest.mark.parametrize("where", ["base", "table"])
def test_a_key_given_twice_is_named_with_its_line(folder, where):
    if where == "base":
        folder.base("tiny", base_text("  ratio: 5\n", "  ratio: 5\n  ratio: 1\n"))
        folder.table()
        path, line = folder.bases / "tiny.yaml", line_of(folder.bases / "tiny.yaml", "ratio: 1")
    else:
        folder.table(text="title: t\nbase: tiny\nrows: [{run: a}]\ntitle: u\n")
        path, line = folder.tables / "one.yaml", 4
    assert folder.says(f"{path}:{line}:", "twice")


def test_contradicting_rows_of_the_same_name_name_both_tables_and_the_difference(folder):
    folder.table("one")
    folder.table("two", rows=[{"run": "b", "change": {"critic.ratio": 3}}])
    assert folder.says("two.yaml", "row b contradicts", "table one", "critic.ratio: 1 there, 3 here")


def test_rows_of_the_same_name_may_differ_between_bases(folder):
    folder.base("other", tiny.values("edm"))
    folder.table("one")
    folder.table("two", base="other", rows=[{"run": "b", "change": {"critic.ratio": 3}}])
    assert folder.load().runs["other", "b"].critic.ratio == 3


def test_an_unknown_base_is_named_with_the_nearest(folder):
    folder.table(base="tinny")
    assert folder.says("tinny", "did you mean tiny?")


def test_init_from_must_name_a_row_of_some_table(folder):
    folder.table(rows=[{"run": "a", "change": {"train.init_from": "nowhere"}}])
    assert "train.init_from names nowhere" in folder.error()


def test_init_from_may_not_lead_back(folder):
    rows = [{"run": "a", "change": {"train.init_from": "b"}}, {"run": "b", "change": {"train.init_from": "a"}}]
    folder.table(rows=rows)
    assert "train.init_from leads in a circle: a from b from a" in folder.error()


def test_an_added_row_may_not_have_the_name_of_one_that_is_taken(folder):
    folder.table("one")
    folder.table("two", rows={"from": "one", "add": [{"run": "a", "change": {"critic.ratio": 7}}]})
    at, first = (f"{folder.tables}/{place}" for place in ("two.yaml:6", "one.yaml:4"))
    assert folder.error() == f"{at}: row a appears twice in the table, the first time at {first}"


def test_init_from_may_name_a_row_of_another_table(folder):
    folder.table("one")
    folder.table("two", rows=[{"run": "c", "change": {"train.init_from": "a"}}])
    folder.load()


@pytest.mark.parametrize("text", [b"", b"- a\n", b"just words\n", b"rows: [\n", b"\x00", b"? [a]\n: b\n", b"a: \xff\n"])
def test_a_file_that_is_no_mapping_or_not_utf8_is_named(folder, text):
    (folder.tables / "one.yaml").write_bytes(text)
    assert folder.says("one.yaml")


def test_two_mistakes_are_still_one_sentence(folder):
    folder.base("tiny", base_text("ratio: 5", "ratio: five").replace("lr: 0.001", "lr: fast"))
    folder.table()
    assert folder.says("five")


@pytest.mark.parametrize(
    ("changes", "needle", "sentence"),
    [
        ({"metrics": ["brightness"], "select": "best"}, "select:", "neither the lowest nor the highest brightness"),
        ({"metrics": ["brightness", "accuracy"], "claims": ["C2", "C7"]}, "claims:", "C7 is about the paper's FID"),
        ({"metrics": ["prdc"]}, "prdc", "does not measure prdc, only fd, accuracy, brightness, precision, recall"),
    ],
)
def test_a_choice_or_claim_by_a_metric_without_a_better_direction_is_named(folder, changes, needle, sentence):
    folder.base("tiny", tiny.values("edm", eval__metrics=["fd", "accuracy", "brightness", "prdc"]))
    folder.table(**changes)
    error, path = folder.error(), folder.tables / "one.yaml"
    assert error.startswith(f"{path}:{line_of(path, needle)}") and sentence in error


def test_higher_is_better_and_parts_of_a_metric_may_stand_in_a_table(folder):
    measured = {"eval__metrics": ["fd", "accuracy", "prdc"], "eval__detector": "tiny-classifier"}
    folder.base("tiny", tiny.values("edm", **measured))
    folder.table("one", metrics=["accuracy", "fd"], select="best", claims=["C7"])
    folder.table("two", metrics=["recall"], select="best", claims=["C2"])
    assert folder.load().tables["two"].metrics == ["recall"]


@pytest.mark.parametrize(
    ("changes", "key", "sentence"),
    [
        ({"rule": "belo"}, "rule", "claims.0.rule: Input should be 'below', 'above'"),
        ({"a": "bb"}, "a", "claims: H1: bb is no row of the table, did you mean b?"),
        ({"b": "teacher"}, "b", "claims: H1: teacher is no row of the table, which has a, b"),
        ({"metric": "recall"}, "metric", "claims: H1: recall is no metric of the table, which has fd, distance, brigh"),
        ({"b": "a"}, "b", "claims: H1: a and b are both a"),
        ({"id": "C7"}, "id", "claims: C7 is the name of another claim"),
        ({"ruel": "below"}, "ruel", "no key ruel, did you mean rule?"),
        ({"rule": "faster", "metric": "brightness_std"}, "a", "H1: rule faster compares trainings at equal time"),
        ({"also": [{"metric": "fd", "a": "a", "b": "c", "rule": "below"}]}, "b", "H1: c is no row of the table"),
    ],
)
def test_what_is_wrong_with_a_claim_of_ones_own_is_named_where_it_stands(folder, changes, key, sentence):
    claim = {"id": "H1", "claim": "a is better", "metric": "fd", "a": "a", "b": "b", "rule": "below", **changes}
    rows = [{"run": "a", "change": {}}, {"run": "b", "change": {"critic.ratio": 7}}]
    folder.table(rows=rows, claims=[claim])
    error, path = folder.error(), folder.tables / "one.yaml"
    lines = path.read_text().splitlines()
    at = max(i for i, line in enumerate(lines, 1) if f" {key}: " in line)
    assert error.startswith(f"{path}:{at}: ") and sentence in error


def test_no_table_has_the_name_of_the_list_of_tables(folder):
    folder.table("index")
    assert folder.error().startswith(f"{folder.tables}/index.yaml: ") and "rename the file" in folder.error()


@pytest.mark.parametrize("name", ["my table", "demo.curves", "$HOME"])
def test_names_of_tables_can_stand_in_commands(folder, name):
    folder.table(name)
    told = "is no name: rename the file, with letters, digits, - and _ only"
    assert folder.error() == f"{folder.tables}/{name}.yaml: {name!r} {told}"
