"""Images without labels or captions: reading, teacher, pairs, training and export with nothing to condition on."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from dmd2.core.files import read_json
from dmd2.data.prepare import prepare_labelled
from dmd2.data.sets import load_set
from dmd2.publish.diffusers_folder import export
from dmd2.training.pairs import PairsConfig, make_shard
from dmd2.training.snapshot import find_snapshot
from tests import tiny
from tests.experiment_folder import Folder
from tests.exported import trained
from tests.image_sources import PIXELS, encoded, hub_set, labelled, write_files
from tests.unit.test_teacher_training import trained as trained_teacher

KIND = "edm-unlabelled"
GREY = PIXELS[:, :1]


@pytest.mark.usefixtures("own_folder")
def test_a_folder_of_grey_images_needs_no_classes(tmp_path):
    files = {f"{i}.png": encoded(image) for i, image in enumerate(GREY[:3])}
    write_files(tmp_path / "set", {**files, "some/3.png": encoded(GREY[3]), "others/4.png": encoded(GREY[4])})
    manifest = prepare_labelled(labelled("image-folder", tmp_path / "set", classes=0, channels=1), tmp_path / "real")
    rows = load_set(manifest).tensors
    assert set(rows) == {"images"} and rows["images"].shape == (5, 1, 8, 8)
    np.testing.assert_array_equal(rows["images"][[0, 1, 2, 4, 3]], GREY)  # sorted by path
    assert read_json(manifest)["classes"] == 0


@pytest.mark.usefixtures("own_folder")
def test_labels_of_a_source_are_left_alone(tmp_path):
    hub_set("note", ["x"] * 5, datasets.Value("string")).save_to_disk(str(tmp_path / "hub"))
    found = prepare_labelled(labelled("hub", tmp_path / "hub", classes=0), tmp_path / "real")
    assert set(load_set(found).tensors) == {"images"}


@pytest.mark.usefixtures("own_folder")
def test_a_student_trains_with_every_loss_and_is_exported(tmp_path):
    cfg = tiny.config(KIND, regression__weight=1.0)
    teacher = tiny.teacher(Path("data/teachers/tiny"), KIND, "tiny")
    pairs = Path("data/pairs") / cfg.pair_set
    spec = {"data": tiny.values(KIND)["data"], "teacher": cfg.teacher.settings()}
    config = {**spec, "regression": {"pairs": cfg.pairs.settings()}}
    make_shard(PairsConfig.model_validate(config), teacher, 0, pairs / "manifest.json")
    assert set(load_set(pairs / "manifest.json").tensors) == {"noise", "images"}
    run = trained(KIND, regression__weight=1.0)
    export(find_snapshot(run), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "An unconditional generator of images" in card and "60 samples of `sample.py`" in card
    assert (tmp_path / "out/samples.png").exists() and "--label" not in (tmp_path / "out/sample.py").read_text()


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("given", ["noised_real", "backward_simulation"])
def test_a_student_of_several_steps_takes_real_images_without_conditions(given):
    trained(KIND, 2, generator__input=given)


@pytest.mark.usefixtures("own_folder")
def test_a_teacher_is_trained_without_labels(monkeypatch):
    monkeypatch.setitem(trained_teacher.__globals__["SPEC"], "label_dropout", 0.0)
    first, again = (trained_teacher(KIND, folder, tiny.tensors(KIND, 8)) for folder in ("a", "b"))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("changes", "pieces"), [
    ({"eval__metrics": ["fd", "accuracy"]}, ["accuracy needs labels", "data.classes 0"]),
    ({"eval__detector": "tiny-classifier"}, ["tiny has no labels, so there is no classifier of it"]),
    ({"teacher__guidance": 2.0}, ["teacher.guidance", "has no condition to be guided by"]),
    ({"teacher__network": {**tiny.PIXELS, **tiny.PLAIN}}, ["num_class_embeds is 5, but data.classes is 0: leave it out"]),
])  # fmt: skip
def test_what_needs_a_condition_is_refused(tmp_path, changes, pieces):
    folder = Folder(tmp_path)
    folder.base("tiny", json.loads(json.dumps(tiny.values(KIND, **changes))))
    folder.table()
    assert folder.says(*pieces)


def test_labels_none_is_for_unlabelled_data(tmp_path):
    folder = Folder(tmp_path)
    folder.table()
    folder.base("tiny", tiny.values(KIND, eval__labels="none"))
    folder.load()
    folder.base("tiny", tiny.values("edm", eval__labels="none"))
    assert folder.says("eval.labels: none, but tiny has 4 classes")
