"""Bases of one's own: what is found in folders of every kind, and that what is written for it can be run."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from dmd2.bases.command import main
from dmd2.bases.found import Found
from dmd2.bases.look import look
from dmd2.bases.propose import propose
from dmd2.core.errors import UserError
from dmd2.experiment.data_config import Source
from dmd2.experiment.tables import load_experiment
from tests.image_sources import CAPTIONS, LABELS, PIXELS, encoded, hub_set, write_files, write_lmdb, write_zip
from tests.unit.test_readers import edm_files

pytestmark = pytest.mark.usefixtures("own_folder")
NAMES = [f"{i}.png" for i in range(5)]
FILES = dict(zip(NAMES, map(encoded, PIXELS), strict=True))
CLASSED = {f"{'cat' if i % 2 else 'dog'}/{name}": content for i, (name, content) in enumerate(FILES.items())}
TEXTS = {f"{i}.txt": caption.encode() for i, caption in enumerate(CAPTIONS)}


def tars(place: Path) -> Path:
    place.mkdir()
    with tarfile.open(place / "0.tar", "w") as tar:
        for name in (name for i in range(5) for name in (f"{i}.png", f"{i}.txt")):
            Path(name).write_bytes(FILES[name] if name in FILES else TEXTS[name])
            tar.add(name)
    return place


def saved(kind: str, place: Path) -> Path:
    """A set of the library datasets, as save_to_disk or as parquet."""
    if kind == "captions":
        hub_set("text", CAPTIONS, datasets.Value("string")).to_parquet(place.with_suffix(".parquet"))
        return place.with_suffix(".parquet")
    hub_set("label", LABELS, datasets.ClassLabel(names=["a", "b", "c", "d"])).save_to_disk(str(place))
    return place


def lmdb(place: Path) -> Path:
    write_lmdb(place)
    return place


METADATA = "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in zip(NAMES, CAPTIONS, strict=True))
# Kind of source, number of images, channels, classes, number of captions.
SETS = {
    "class folders": (lambda p: write_files(p, CLASSED), "image-folder", 3, {"cat": 2, "dog": 3}, 0),
    "plain": (lambda p: write_files(p, FILES), "image-folder", 3, {}, 0),
    "grey": (lambda p: write_files(p, {n: encoded(i[:1]) for n, i in zip(NAMES, PIXELS, strict=True)}), "image-folder",
             1, {}, 0),
    "dataset.json": (lambda p: write_files(p, edm_files()), "image-folder", 3, {"0": 1, "1": 1, "2": 2, "3": 1}, 0),
    "zip": (lambda p: write_zip(p.with_suffix(".zip"), CLASSED), "image-folder", 3, {"cat": 2, "dog": 3}, 0),
    "texts beside": (lambda p: write_files(p, FILES | TEXTS), "image-folder", 3, {}, 5),
    "metadata": (lambda p: write_files(p, FILES | {"metadata.jsonl": METADATA.encode()}), "image-folder", 3, {}, 5),
    "tar files": (tars, "webdataset", 3, {}, 5),
    "lmdb": (lmdb, "lmdb", 3, {"0": 1, "1": 1, "2": 2, "3": 1}, 0),
    "save_to_disk": (lambda p: saved("labels", p), "hub", 3, {"a": 1, "b": 1, "c": 2, "d": 1}, 0),
    "parquet": (lambda p: saved("captions", p), "hub", 3, {}, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_what_lies_in_a_folder_is_found_and_gets_bases_that_fit(name):
    make, kind, channels, classes, captions = SETS[name]
    found = look(make(Path("set")))
    assert (found.source.kind, found.count, found.channels) == (kind, 5, channels)
    assert found.classes == classes and len(found.captions) == captions and found.side == 8
    for file, text in propose("mine", found).items():
        Path("workflow", file).parent.mkdir(parents=True, exist_ok=True)
        Path("workflow", file).write_text(text)
        assert max(map(len, text.splitlines())) <= 150
    experiment = load_experiment()
    assert {"mine", "mine-gpu", "mine-paper"} <= set(experiment.bases)
    table = "mine-table4" if captions else "mine-table3"
    assert len(experiment.rows[table]) == (4 if captions else 6)
    small = experiment.bases["mine"]
    assert small.data.classes == len(classes) and small.eval.reference == small.data.name == "mine"


@pytest.mark.parametrize(("kind", "side", "resolution"), [
    ("image-folder", 5, 8), ("image-folder", 17, 16), ("image-folder", 64, 16), ("image-folder", 500, 16),
    ("idx", 5, 8), ("idx", 28, 32), ("lmdb", 64, 64),
])  # fmt: skip
def test_images_of_any_size_get_bases_that_fit(kind, side, resolution):
    source, fixed = Source(kind=kind, path="my images, 2/#1"), kind != "image-folder"
    sides = Counter([side]) if fixed else Counter([side, side + 1])
    for file, text in propose("mine", Found(source, 2, sides, True, 1, {"a": 1, "b: c\n#": 1}, fixed=fixed)).items():
        Path("workflow", file).parent.mkdir(parents=True, exist_ok=True)
        Path("workflow", file).write_text(text)
    small = load_experiment().bases["mine"]
    assert small.data.source.path == source.path and (small.data.source.resize is None) == fixed
    assert small.data.resolution == resolution


def test_images_that_are_neither_of_a_size_nor_resized_are_refused():
    with pytest.raises(
        UserError, match="lmdb are used as they are, and 48 pixels are none of 8, 16, 32, 64: give them"
    ):
        propose("mine", Found(Source(kind="lmdb", path="x"), 2, Counter([48]), True, 1, {"a": 2}, fixed=True))


@pytest.mark.parametrize(("files", "told"), [
    ({"train/a.png": FILES["0.png"], "test/b.png": FILES["1.png"]}, "set holds test, train: give one of these folders"),
    ({f"train/{name}": content for name, content in CLASSED.items()}, "set holds train: give one of these folders"),
    ({f"all/{name}": content for name, content in CLASSED.items()}, "holds only the folder all, .*: give set/all"),
    ({**FILES, "0.txt": b"one"}, "1 of 5 images have a .txt beside them"),
    ({"a.png": b"no image"}, r"set/a.png is not a readable image \(no format of images that is known\)"),
    ({"notes.md": b"no image"}, "set holds no images"),
    ({"a.png": encoded(Image.new("RGBA", (8, 8)))}, "set/a.png is transparent: put your images on a background"),
    ({"a.png": encoded(Image.fromarray(np.zeros((8, 8), np.uint16)))}, "a.png has more than 8 bits per channel"),
])  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(files, told):
    with pytest.raises(UserError, match=told):
        look(write_files(Path("set"), files))


def called(*words: str) -> tuple[int, str]:
    app = typer.Typer(add_completion=False)
    app.command()(main)
    result = CliRunner().invoke(app, words)
    told = "" if result.exception is None or isinstance(result.exception.code, int) else result.exception.code
    return result.exit_code, result.output + str(told)


def test_an_image_beside_class_folders_is_told():
    write_files(Path("set"), {**CLASSED, "loose.png": FILES["0.png"]})
    code, text = called("pets", "set", "--dry-run")
    assert code == 0 and "taken without labels, as 1 images lie beside the folders (loose.png)" in text


def test_the_command_says_what_it_found_and_what_comes_next_and_replaces_nothing():
    write_files(Path("set"), CLASSED)
    Path("workflow").mkdir()
    code, text = called("pets", "set", "--dry-run")
    assert code == 0 and "like: digits" in text and not list(Path("workflow").rglob("*.yaml"))
    code, text = called("pets", "set")
    assert code == 0, text
    for piece in (
        "5 RGB images of 2 classes, 8x8, in set",
        "5 images are few",
        "(pets 224, pets-gpu 640, pets-paper",
        "class cat: 2",
        "next: dmd2 run pets-table3",
    ):
        assert piece in text
    small = Path("workflow/base/pets.yaml")
    small.write_text("# mine\n" + small.read_text())
    code, text = called("pets", "set")
    assert code == 1 and "there are workflow/base/pets.yaml, " in text and "--force" in text
    assert small.read_text().startswith("# mine\n")
    assert called("pets", "set", "--force")[0] == 0
    assert not small.read_text().startswith("# mine\n")
    write_files(Path("captioned"), {**FILES, **TEXTS})
    code, text = called("pets", "captioned", "--force")
    assert code == 0 and [table.stem for table in Path("workflow/tables").iterdir()] == ["pets-table4"], text
    made = {path: path.read_text() for path in Path("workflow").rglob("*.yaml")}
    write_files(Path("workflow/tables"), {"other.yaml": b"title: x"})  # is another's affair
    assert called("pets", "captioned", "--force")[0] == 0
    Path("workflow/tables/other.yaml").unlink()
    broken = Path("workflow/base/broken.yaml")
    write_files(broken.parent, {broken.name: b"title: x"})
    code, text = called("pets", "set", "--force")
    assert code == 1 and "broken.yaml" in text
    broken.unlink()
    assert {path: path.read_text() for path in Path("workflow").rglob("*.yaml")} == made
    small.write_text("like: digits\n")
    code, text = called("pets", "set", "--force")
    assert code == 1 and "workflow/base/pets.yaml: not written by new-base" in text
    assert small.read_text() == "like: digits\n"


@pytest.mark.parametrize(("words", "told"), [
    (("digits", "set"), "digits comes with dmd2: take another name"),
    (("dmd2", "set"), "dmd2-table3 comes with dmd2: take another name"),
    (("My Set", "set"), "'My Set' is no name of a base"),
    (("pets", "absent"), "absent does not exist: give the folder of your images"),
])  # fmt: skip
def test_a_call_that_cannot_be_is_one_sentence(words, told):
    write_files(Path("set"), CLASSED)
    code, text = called(*words)
    assert code == 1 and told in text
