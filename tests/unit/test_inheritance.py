"""Bases that say only what differs from another one, bases without a table, missing keys, and pairs that no row needs."""

import pytest
import yaml

from dmd2.experiment.config import RunConfig
from dmd2.experiment.inheritance import for_editors
from dmd2.experiment.tables import load_base
from tests import tiny
from tests.conftest import ROOT
from tests.experiment_folder import Folder, line_of

SHIPPED = ROOT / "workflow/base"
OWN = """\
like: digits
data:
  source: {kind: image-folder, path: my/digits}
  resolution: 16
teacher:
  network: {sample_size: 16, in_channels: 1, out_channels: 1, block_out_channels: [16, 32], norm_num_groups: 8,
    down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D], num_class_embeds: 10}
critic: {ratio: 7}
"""


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def shipped(folder, *names):
    for name in names:
        folder.base(name, (SHIPPED / f"{name}.yaml").read_text())


def test_a_base_of_ones_own_is_ten_lines(folder):
    shipped(folder, "digits")
    folder.base("mine", OWN)
    mine, digits = (load_base(name, folder.bases) for name in ("mine", "digits"))
    assert (mine.data.name, mine.teacher.name, mine.eval.reference, mine.eval.detector) == (
        "mine", "mine", "mine", "mine-classifier"
    )  # fmt: skip
    assert mine.data.source.path == "my/digits" and mine.data.classes == 10 and mine.critic.ratio == 7
    assert "layers_per_block" not in mine.teacher.network, "a network is replaced as a whole"
    assert mine.optim == digits.optim and mine.teacher.train == digits.teacher.train


def test_what_is_not_changed_is_shared_by_its_name(folder):
    shipped(folder, "digits")
    folder.base("slow", "like: digits\ncritic: {ratio: 9}\nteacher: {guidance: 1.0}\n")
    slow, digits = (load_base(name, folder.bases) for name in ("slow", "digits"))
    assert slow.data == digits.data and slow.teacher == digits.teacher and slow.eval == digits.eval


def test_names_that_are_written_stay(folder):
    shipped(folder, "digits")
    folder.base("mine", OWN.replace("data:\n", "data:\n  name: a\n").replace("teacher:\n", "teacher:\n  name: b\n"))
    cfg = load_base("mine", folder.bases)
    assert (cfg.data.name, cfg.teacher.name, cfg.eval.reference) == ("a", "b", "a")


def test_a_pipeline_that_is_made_here_follows_and_one_that_is_brought_stays(folder):
    shipped(folder, "emoji", "sd15")
    folder.base("own", "like: emoji\ndata: {source: {kind: image-folder, path: pictures}}\n")
    folder.base("photos", "like: sd15\ndata: {source: {kind: webdataset, path: tars}}\n")
    own, photos = (load_base(name, folder.bases) for name in ("own", "photos"))
    assert own.data.text.pipeline.name == own.eval.patch.reference == "own" and own.eval.clip == "own-clip"
    assert (photos.data.name, photos.data.text.pipeline.name, photos.teacher.name) == ("photos", "sd15", "sd15")


def test_a_chain_is_followed_and_an_error_names_the_file_that_holds_the_value(folder):
    folder.base("mid", "like: tiny\noptim:\n  lr: 0.5\n")
    folder.base("leaf", "like: mid\n\ncritic: {ratio: 3}\n")
    cfg = load_base("leaf", folder.bases)
    assert (cfg.optim.lr, cfg.critic.ratio, cfg.dm.weight) == (0.5, 3, 1.0)
    for name, text, key in (
        ("mid", "like: tiny\noptim:\n  lr: fast\n", "lr: fast"),
        ("leaf", "like: mid\n\ngan: 3\n", "gan"),
    ):
        folder.base(name, text)
        assert folder.says(f"{folder.bases / name}.yaml:{line_of(folder.bases / f'{name}.yaml', key)}: ")
        folder.base(name, "like: tiny\n")
    folder.base("tiny", {**tiny.values("edm"), "dm": {"weight": -1.0, "index_range": [20, 980]}})
    assert folder.says(f"{folder.bases / 'tiny.yaml'}:", "dm.weight")


@pytest.mark.parametrize(("texts", "pieces"), [
    ({"a": "like: b\n", "b": "\nlike: a\n"}, ["b.yaml:2", "like leads in a circle: a like b like a"]),
    ({"a": "like: a\n"}, ["a.yaml:1", "circle: a like a"]),
    ({"a": "dm: {weight: 1.0}\nlike: tinny\n"}, ["a.yaml:2", "there is no base", "did you mean tiny"]),
    ({"a": "like: [tiny]\n"}, ["a.yaml:1", "like: give the name of one base"]),
    ({"a": "like: tiny\ncritic: {ration: 3}\n"}, ["a.yaml:2", "no key critic.ration, did you mean critic.ratio"]),
])  # fmt: skip
def test_what_like_refuses(folder, texts, pieces):
    for name, text in texts.items():
        folder.base(name, text)
    assert folder.says(*pieces)


def test_a_source_of_another_kind_and_a_sampler_of_another_solver_keep_nothing_of_the_old_one(folder):
    values = tiny.values("edm", data__source={"kind": "hub", "path": "x", "split": "test"})
    folder.base("tiny", values)
    folder.base("mine", "like: tiny\ndata: {source: {kind: image-folder, path: y}}\n")
    folder.base("same", "like: tiny\ndata: {source: {path: z}}\n")
    mine, same = (load_base(name, folder.bases) for name in ("mine", "same"))
    assert mine.data.source.split is None and (same.data.source.split, same.data.source.path) == ("test", "z")


def test_all_missing_keys_are_told_at_once(folder):
    values = tiny.values("edm")
    del values["data"]["classes"], values["optim"]["clip"], values["eval"]
    folder.base("tiny", values)
    assert folder.says("keys data.classes, optim.clip, eval are missing; `like: digits` takes")


def test_a_base_without_a_table_is_read_and_checked(folder):
    folder.table()
    folder.base("alone", "like: tiny\ndata: {resolution: 16}\n")
    experiment = folder.load()
    assert set(experiment.bases) == {"tiny", "alone"} and experiment.bases["alone"].data.name == "alone"
    folder.base("alone", "like: tiny\ndata: {resolution: 16, name: tiny}\n")
    assert folder.says("alone.yaml:2", "data tiny is defined as another one")


def test_pairs_are_needed_only_by_rows_that_use_them(folder):
    values = tiny.values("edm")
    del values["regression"]["pairs"]
    folder.base("tiny", values)
    folder.table()
    folder.load()
    folder.table(rows=[{"run": "a"}, {"run": "b", "change": {"regression.weight": 0.5}}])
    line = line_of(folder.tables / "one.yaml", "regression.weight")
    assert folder.says(f"one.yaml:{line}: row b: regression.weight: 0.5, but there are no regression.pairs: give")
    folder.table(rows=[{"run": "b", "change": {"regression.weight": 0.5, "regression.pairs": {
        "count": 4, "shards": 1, "sampler": {"solver": "heun", "steps": 4}}}}])  # fmt: skip
    assert folder.load().config_of("tiny", "b").pair_set.startswith("tiny/heun4-4-")


def test_the_schema_asks_for_no_key_where_like_is_there():
    jsonschema = pytest.importorskip("jsonschema")
    schema = RunConfig.model_json_schema()
    whole, part = yaml.safe_load((SHIPPED / "digits.yaml").read_text()), yaml.safe_load(OWN)
    jsonschema.validate(whole, schema)
    jsonschema.validate(part, schema)
    del whole["critic"]["ratio"]
    for wrong in (whole, {**part, "critic": {"ration": 1}}, {k: v for k, v in part.items() if k != "like"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    assert "required" not in for_editors(super(RunConfig, RunConfig).model_json_schema())["$defs"]["Eval"]
