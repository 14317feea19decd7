"""Presets: a named change for rows of any table, its place in the order, its mistakes, and the shipped one of FastGen."""

import pytest
import torch

from dmd2.experiment.config import RunConfig, digest
from dmd2.experiment.tables import Row, apply_change, load_base, load_experiment
from dmd2.experiment.yaml_file import read_yaml
from dmd2.method.step import train_step
from tests import tiny
from tests.conftest import ROOT
from tests.experiment_folder import line_of

BASES = sorted(path.stem for path in (ROOT / "workflow/base").glob("*.yaml"))
ROW = {"run": "a", "preset": "recipe"}
EXPERIMENT = load_experiment(ROOT / "workflow/tables", ROOT / "workflow/base")
FASTGEN = read_yaml(ROOT / "workflow/presets/fastgen.yaml")[0]["change"]


# What a preset means.
def test_a_preset_is_applied_to_the_row_that_names_it(folder):
    folder.preset(critic__ratio=3)
    folder.table(rows=[ROW, {"run": "b"}])
    runs = folder.load().runs
    assert (runs["tiny", "a"].critic.ratio, runs["tiny", "b"].critic.ratio) == (3, 5)


def test_order_of_changes_is_table_preset_row_row_change(folder):
    folder.preset(optim__clip=2.0, optim__lr=2.0, optim__weight_decay=2.0)
    own = {"optim.lr": 3.0, "optim.weight_decay": 3.0}
    first = {"optim.batch": 1, "optim.clip": 1.0, "optim.lr": 1.0, "optim.weight_decay": 1.0}
    folder.table(rows=[{**ROW, "change": own}], change=first, row_change={"a": {"optim.weight_decay": 4.0}})
    optim = folder.load().runs["tiny", "a"].optim
    assert (optim.batch, optim.clip, optim.lr, optim.weight_decay) == (1, 2.0, 3.0, 4.0)


def test_rows_taken_from_another_table_keep_their_preset(folder):
    folder.preset(critic__ratio=3)
    folder.base("other", tiny.values("edm"))
    folder.table("one", rows=[ROW])
    folder.table("two", rows="one", base="other")
    assert folder.load().runs["other", "a"].critic.ratio == 3


def test_a_table_shows_its_presets_so_that_an_edited_one_remakes_it_and_no_other(folder):
    folder.preset(critic__ratio=3)
    folder.table("one", rows=[ROW])
    folder.table("two", rows=[{"run": "b"}])
    before = folder.load()
    folder.preset(critic__ratio=4)
    after = folder.load()
    assert before.shown("one") != after.shown("one")
    assert before.shown("two") == after.shown("two")


def test_a_row_without_a_preset_is_recorded_as_before_presets_came():
    assert Row(run="a").settings() == {"run": "a"}
    assert "preset" in Row.model_json_schema()["properties"]


# Mistakes are one sentence with file, line and key.
def test_an_unknown_preset_is_named_with_the_nearest(folder):
    folder.preset()
    folder.table(rows=[{"run": "b"}, {"run": "a", "preset": "recipes"}])
    place = f"{folder.tables / 'one.yaml'}:{line_of(folder.tables / 'one.yaml', 'preset: recipes')}: row a: "
    assert folder.says(place, f"there is no preset {folder.presets / 'recipes.yaml'}, did you mean recipe?")


def test_an_unknown_key_is_named_in_the_presets_file(folder):
    folder.preset(critic__ratio=3, critic__weihting="x0")
    folder.table(rows=[ROW])
    place = f"{folder.presets / 'recipe.yaml'}:4: row a: "
    assert folder.says(place, "no key critic.weihting, did you mean critic.weighting?")


def test_a_wrong_value_is_named_in_the_presets_file(folder):
    folder.preset(optim__lr=1.0, critic__ratio="five")
    folder.table(rows=[{**ROW, "change": {"optim.batch": 2}}])
    assert folder.says(f"{folder.presets / 'recipe.yaml'}:4: critic.ratio: ", "'five'")


def test_a_wrong_element_of_a_list_is_named_at_its_key(folder):
    folder.preset(optim__lr=1.0, dm__index_range=[2, 1998])
    folder.table(rows=[ROW])
    assert folder.says(f"{folder.presets / 'recipe.yaml'}:4: dm.index_range.1: ", "1998")


def test_a_wrong_value_that_the_row_puts_over_the_presets_is_named_in_the_row(folder):
    folder.preset(critic__ratio=3)
    folder.table(rows=[{**ROW, "change": {"critic.ratio": "five"}}])
    path = folder.tables / "one.yaml"
    assert folder.says(f"{path}:{line_of(path, 'critic.ratio')}: critic.ratio: ", "'five'")


def test_a_preset_that_does_not_fit_the_row_is_named_at_the_row(folder):
    folder.preset(critic__shares_iteration=False)
    folder.table(rows=[{**ROW, "change": {"critic.ratio": 1}}])
    path = folder.tables / "one.yaml"
    assert folder.says(f"{path}:{line_of(path, 'change:')}: critic: ", "gives the critic no turn")


@pytest.mark.parametrize(("text", "place", "sentence"), [
    ("title: t\nchanges: {}\n", ":2: ", "no key changes, did you mean change?"),
    ("change: {}\n", ": ", "key title is missing"),
    ("title: t\nchange: [critic.ratio]\n", ":2: change: ", "critic.ratio"),
    ("title: [t\n", ":", "expected"),
    ("title: t\nchange: {optim.lr: 1.0, optim.lr: 2.0}\n", ":2: ", "given twice"),
])  # fmt: skip
def test_a_preset_file_of_another_form_is_named(folder, text, place, sentence):
    folder.preset(text=text)
    folder.table(rows=[ROW])
    assert folder.says(f"{folder.presets / 'recipe.yaml'}{place}", sentence)


def test_a_preset_is_a_name(folder):
    folder.table(rows=[{"run": "a", "preset": 3}])
    assert folder.says(str(folder.tables / "one.yaml"), "preset")


AFTER = {name: read_yaml(ROOT / f"workflow/presets/{name}.yaml")[0]["change"] for name in (
    "senseflow", "decoupled-dmd", "f-distill", "sid")}  # fmt: skip


@pytest.mark.parametrize("kind", ["edm", "eps-text", "flow-sd3"])
@pytest.mark.parametrize("name", AFTER)
def test_methods_after_dmd2_train_every_kind_of_network(kind, name):
    own = {"teacher.guidance": 2.0 if name == "decoupled-dmd" else 1.0}
    values = RunConfig.model_validate(tiny.values(kind)).model_dump(mode="json")
    cfg = RunConfig.model_validate(apply_change(values, AFTER[name], own))
    m, b = tiny.models(kind, cfg), tiny.batches(kind, cfg)
    before = {who: tiny.weights(getattr(m, who)) for who in ("student", "critic")}
    logs = [train_step(m, b.at(it), it, cfg) for it in range(max(2, cfg.critic.ratio))]
    assert all(torch.isfinite(value) for found in logs for value in found.values())
    assert not any(tiny.same(state, getattr(m, who)) for who, state in before.items())


@pytest.mark.parametrize("base", ["digits-flow", "emoji", "emoji-flow"])
def test_methods_after_dmd2_fit_bases(folder, base):
    values = load_base(base, ROOT / "workflow/base").model_dump(mode="json")
    for name, change in AFTER.items():
        own = {"teacher.guidance": max(2.0, values["teacher"]["guidance"])}
        folder.base("own", apply_change(values, own, change))
        folder.table(base="own", rows=[{"run": name}], metrics=["fd"])
        assert folder.load().runs["own", name].dm


# FastGen.
@pytest.mark.parametrize("base", BASES)
def test_fastgen_fits_every_base(base):
    cfg = load_base(base, ROOT / "workflow/base")
    changed = RunConfig.model_validate(apply_change(cfg.model_dump(mode="json"), FASTGEN))
    assert changed.critic.index_range == changed.dm.index_range == changed.gan.noise_range == (2, 998)
    assert (changed.gan.lambda_g, changed.optim.lr, changed.optim.batch, changed.train.steps, changed.critic.ratio) == (
        cfg.gan.lambda_g, cfg.optim.lr, cfg.optim.batch, cfg.train.steps, cfg.critic.ratio,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["edm", "eps-labels", "eps-text", "eps-sdxl"])
@pytest.mark.parametrize("steps", [1, 4])
def test_fastgen_trains_every_kind_of_network(kind, steps):
    values = apply_change(
        RunConfig.model_validate(tiny.values(kind)).model_dump(mode="json"), FASTGEN, {"generator.steps": steps}
    )
    cfg = RunConfig.model_validate(values)
    m, b = tiny.models(kind, cfg), tiny.batches(kind, cfg)
    before = {name: tiny.weights(getattr(m, name)) for name in ("student", "critic", "head")}
    logged = [train_step(m, b.at(it), it, cfg) for it in range(5)]
    assert all(torch.isfinite(value) for logs in logged for value in logs.values())
    assert [("student/dm" in logs, "critic/denoise" in logs) for logs in logged] == [(False, True)] * 4 + [
        (True, False)
    ]
    assert not any(tiny.same(state, getattr(m, name)) for name, state in before.items())


def test_fastgen_states_every_switch_of_its_recipe():
    official = load_base("imagenet64", ROOT / "workflow/base").model_dump(mode="json")
    same = {key for key, value in FASTGEN.items() if apply_change(official, {key: value}) == official}
    assert same == {"gan.r1_weight", "gan.r1_alpha"}  # optional there too
    assert FASTGEN["optim.ema"] == pytest.approx(0.9999**5, abs=1e-6)


def test_one_line_is_the_recipe_and_its_scale_alone():
    rows = {(table, row.run): row for table in ("digits-recipes", "dmd2-recipes") for row in EXPERIMENT.rows[table]}
    assert rows["dmd2-recipes", "fastgen"].model_dump(exclude={"paper"}) == {
        "run": "fastgen",
        "preset": "fastgen",
        "change": {},
    }
    assert set(rows["digits-recipes", "fastgen"].change) == {"optim.ema"}
    assert set(rows["dmd2-recipes", "fastgen-512"].change) == {"optim.batch", "train.steps", "train.precision"}


@pytest.mark.parametrize(("table", "other"), [("digits-recipes", "digits-table3"), ("dmd2-recipes", "dmd2-table3")])
def test_the_official_row_is_trained_once_for_both_tables(table, other):
    assert EXPERIMENT.tables[table].base == EXPERIMENT.tables[other].base
    assert {"dmd2"} == {row.run for row in EXPERIMENT.rows[table]} & {row.run for row in EXPERIMENT.rows[other]}
    spec = EXPERIMENT.tables[table]
    assert all(EXPERIMENT.ticks(table, "fastgen")[name] for name in spec.columns if name != "Batch 512")
    assert not any(EXPERIMENT.ticks(table, "dmd2").values())


def test_both_recipes_on_digits_have_the_same_number_of_student_updates():
    official, fastgen = (EXPERIMENT.runs["digits", run] for run in ("dmd2", "fastgen"))
    assert official.train.steps == fastgen.train.steps
    counts = {cfg.critic.student_updates(cfg.train.steps) for cfg in (official, fastgen)}
    assert counts == {300}
    assert digest(official) != digest(fastgen)
