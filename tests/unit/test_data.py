"""Real data and tensor sets: what is read, and what a broken source is told."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2.core.errors import UserError
from dmd2.core.files import content_of, listing, read_json, sha256, write_json
from dmd2.data.prepare import prepare_labelled
from dmd2.data.readers import read_idx
from dmd2.data.sets import ShardWriter, TensorSet, load_set, load_shard, save_shard
from dmd2.experiment.config import Data
from tests.unit.test_host_memory import anonymous_mib, in_linux

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
PIXELS = np.arange(3 * 6 * 6, dtype=np.uint8).reshape(3, 6, 6)


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def data(kind="idx", path="x", **changes):
    values = {"name": "set", "resolution": 8, "channels": 1, "classes": 10, **changes}
    return Data(source={"kind": kind, "path": path}, **values)


@pytest.fixture
def source(tmp_path):
    """A folder with three 6x6 images and their labels."""
    (tmp_path / IMAGES).write_bytes(gzip.compress(idx(PIXELS)))
    (tmp_path / LABELS).write_bytes(gzip.compress(idx(np.array([3, 1, 2], np.uint8))))
    return tmp_path


@pytest.fixture
def manifest(source, tmp_path):
    return prepare_labelled(data(path=str(source)), tmp_path / "out")


# Reading.
def test_digits_are_1797_images_of_8_by_8(tmp_path):
    real = load_set(prepare_labelled(data("sklearn-digits", None), tmp_path))
    images = real.images(torch.arange(1797))
    assert (len(real), images.shape) == (1797, (1797, 1, 8, 8))
    assert (images.min(), images.max()) == (-1, 1)
    counts = torch.bincount(real.condition(torch.arange(1797)).labels).tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_idx_images_are_padded_to_the_resolution(manifest):
    images = load_set(manifest).images(torch.tensor([2]))
    expected = np.pad(PIXELS[2], 1) / 127.5 - 1
    np.testing.assert_allclose(images[0, 0].numpy(), expected, atol=1e-6)


def test_idx_labels_stay_with_their_images(manifest):
    assert load_set(manifest).condition(torch.tensor([2, 0])).labels.tolist() == [2, 3]


def test_manifest_says_what_it_lists(manifest):
    record = json.loads(manifest.read_text())
    assert (record["kind"], record["name"], record["count"], record["shape"]) == ("real", "set", 3, [1, 8, 8])


def test_latents_keep_their_values():
    images = torch.randn(2, 4, 2, 2).half()
    assert torch.equal(TensorSet({"images": images}).images(torch.tensor([1])), images[1:].float())


def test_byte_images_map_0_to_minus_1_and_255_to_1():
    images = TensorSet({"images": torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)})
    assert images.images(torch.arange(3)).flatten().tolist() == pytest.approx([-1, -0.6, 1], abs=1e-6)


def test_shards_are_joined_in_order(tmp_path):
    for i in range(3):
        save_shard(tmp_path / f"{i}.safetensors", {"images": torch.full((2, 1, 1, 1), float(i))})
    write_json(tmp_path / "manifest.json", {"files": listing(sorted(tmp_path.glob("*.safetensors")), tmp_path)})
    assert load_set(tmp_path / "manifest.json").images(torch.arange(6)).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_content_identifies_the_data_and_not_when_or_where_it_was_made(source, tmp_path):
    one, two = (prepare_labelled(data(path=str(source), name=name), tmp_path / name) for name in ("a", "b"))
    assert content_of(one) == content_of(two)
    (source / LABELS).write_bytes(gzip.compress(idx(np.array([3, 1, 1], np.uint8))))
    assert content_of(prepare_labelled(data(path=str(source)), tmp_path / "c")) != content_of(one)


# Sets of several shards.
@pytest.fixture
def shards(source, tmp_path, monkeypatch):
    """The three images in shards of two and one."""
    monkeypatch.setattr("dmd2.data.sets.SHARD_BYTES", 2 * 64 + 63)
    return prepare_labelled(data(path=str(source)), tmp_path / "shards")


def test_shards_hold_the_images_in_order(shards, manifest):
    many, one = load_set(shards), load_set(manifest)
    assert [len(shard["images"]) for shard in many.shards] == [2, 1]
    assert [entry["path"][:11] for entry in read_json(shards)["files"]] == ["shard-00000", "shard-00001"]
    for name in ("images", "labels"):
        assert torch.equal(many.tensors[name], one.tensors[name])
    assert len(many) == 3


def test_rows_of_any_blocks_are_cut_into_equal_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("dmd2.data.sets.SHARD_BYTES", 9)
    writer = ShardWriter(tmp_path / "manifest.json", "shard", row_bytes=4)
    for rows in (torch.arange(3), torch.arange(3, 5)):
        writer.add({"images": rows})
    assert [load_shard(path)["images"].tolist() for path in writer.finish()] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("indices", [[0], [2], [2, 0, 1, 2], []])
def test_rows_are_those_of_the_whole_set(shards, manifest, indices):
    many, one, rows = load_set(shards), load_set(manifest), torch.tensor(indices, dtype=torch.long)
    assert torch.equal(many.images(rows), one.images(rows))
    assert torch.equal(many.condition(rows).labels, one.condition(rows).labels)
    assert many.images(rows).shape == (len(indices), 1, 8, 8)


@pytest.mark.parametrize("indices", [[3], [-1], [0, 3]])
def test_rows_outside_the_set_are_errors(shards, indices):
    with pytest.raises(IndexError):
        load_set(shards).images(torch.tensor(indices))


@in_linux
def test_shards_stay_on_disk(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path in paths:
        save_shard(path, {"images": torch.full((1 << 12, 3, 64, 64), 7, dtype=torch.uint8)})
    write_json(tmp_path / "manifest.json", {"files": listing(paths, tmp_path)})
    before = anonymous_mib()
    real = load_set(tmp_path / "manifest.json")
    assert real.images(torch.arange(0, len(real), 100)).mean() == pytest.approx(7 / 127.5 - 1)
    assert anonymous_mib() - before < 48  # of 192 on disk


def test_a_file_is_verified_once_per_process_and_again_when_it_changed(manifest, monkeypatch):
    read = []
    monkeypatch.setattr("dmd2.core.files.sha256", lambda path: read.append(path.name) or sha256(path))
    for _ in range(2):
        load_set(manifest)
    assert read == ["shard-00000.safetensors"]
    shard = shard_of(manifest)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match="does not match the checksum"):
        load_set(manifest)


def test_shards_of_different_tensors_are_told(tmp_path):
    save_shard(tmp_path / "0.safetensors", {"images": torch.zeros(2, 1, 8, 8)})
    save_shard(tmp_path / "1.safetensors", {"images": torch.zeros(2, 1, 4, 4)})
    write_json(tmp_path / "manifest.json", {"files": listing(sorted(tmp_path.glob("*.safetensors")), tmp_path)})
    with pytest.raises(UserError, match=r"1\.safetensors holds .*, but 0\.safetensors .*: make it again"):
        load_set(tmp_path / "manifest.json")


def test_a_set_made_anew_leaves_no_shard_of_the_earlier_one(shards, source, monkeypatch):
    monkeypatch.undo()
    prepare_labelled(data(path=str(source)), shards.parent)
    assert sorted(path.name for path in shards.parent.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert len(load_set(shards)) == 3


@pytest.mark.parametrize("wrong", [10, 255])
def test_labels_outside_the_classes_are_told_and_leave_no_manifest(shards, source, wrong):
    (source / LABELS).write_bytes(gzip.compress(idx(np.array([3, 1, wrong], np.uint8))))
    with pytest.raises(UserError, match=f"image 2 has label {wrong}, but data.classes is 10"):
        prepare_labelled(data(path=str(source)), shards.parent)


def test_a_reader_that_fails_midway_leaves_no_manifest_to_shards_of_two_sets(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("dmd2.data.decode.BLOCK_IMAGES", 2)
    (tmp_path / "pngs/a").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / f"pngs/a/{i}.png")
    config = data("image-folder", str(tmp_path / "pngs"), classes=1)
    (tmp_path / "pngs/a/2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2\.png is not a readable image"):
        prepare_labelled(config, shards.parent)
    assert not shards.exists()


def test_the_manifest_counts_classes(shards):
    assert read_json(shards)["class_counts"] == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0]


# What the config may say of a source.
def test_keys_of_few_kinds_stay_out_of_what_identifies_the_others():
    assert data("idx", "x").settings()["source"] == {"kind": "idx", "path": "x"}
    assert data("sklearn-digits", None).settings()["source"] == {"kind": "sklearn-digits"}
    named = Data(**data().model_dump(exclude={"source"}), source={"kind": "hub", "path": "a/b", "label": "fine_label"})
    assert named.settings()["source"] == {"kind": "hub", "path": "a/b", "label": "fine_label"}
    assert Data.model_validate(named.model_dump()) == named


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({"kind": "lmdb"}, "lmdb needs a path"),
        ({"kind": "lmdb", "path": "x", "split": "train"}, "split, image and label are of kind hub, not of lmdb"),
        ({"kind": "cifar10", "path": "x", "resize": "center-crop"}, "resize is of kinds image-folder, hub and webd"),
    ],
)
def test_a_source_that_makes_no_sense_is_told(source, match):
    with pytest.raises(ValueError, match=match):
        Data(name="set", source=source, resolution=8, channels=1, classes=10)


# Broken shards.
def shard_of(manifest):
    return next(manifest.parent.glob("*.safetensors"))


def test_a_truncated_or_missing_shard_is_named(manifest):
    shard = shard_of(manifest)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} has .* it is truncated"):
        load_set(manifest)
    shard.unlink()
    with pytest.raises(UserError, match="shard-00000.safetensors is missing"):
        load_set(manifest)


# Broken idx files.
@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_missing_idx_file_is_named(source, tmp_path, name):
    (source / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        prepare_labelled(data(path=str(source)), tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def corrupt(content):
    """Invalid deflate data, which zlib reports by its own kind of exception."""
    return content[:19] + bytes([content[19] ^ 0xFF]) + content[20:]


BROKEN = {
    "cut short": gzip.compress(idx(PIXELS))[:-20],
    "corrupt inside": corrupt(gzip.compress(bytes(range(200)) * 50)),
    "not gzip": idx(PIXELS),
    "empty": b"",
    "too few bytes": gzip.compress(idx(PIXELS)[:-1]),
    "too many bytes": gzip.compress(idx(PIXELS) + b"\0"),
    "header alone": gzip.compress(idx(PIXELS)[:6]),
    "another type": gzip.compress(b"\0\0\x0d" + idx(PIXELS)[3:]),
    "nothing inside": gzip.compress(b""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_idx_file_is_named(tmp_path, name):
    path = tmp_path / IMAGES
    path.write_bytes(BROKEN[name])
    with pytest.raises(UserError, match=IMAGES):
        read_idx(path)


def test_counts_that_differ_are_told(source, tmp_path):
    (source / LABELS).write_bytes(gzip.compress(idx(np.array([3, 1], np.uint8))))
    with pytest.raises(UserError, match="3 images but 2 labels"):
        prepare_labelled(data(path=str(source)), tmp_path / "out")


def test_images_of_the_right_size_are_not_padded(source, tmp_path):
    images = load_set(prepare_labelled(data(path=str(source), resolution=6), tmp_path / "out")).images(torch.arange(3))
    np.testing.assert_allclose(images[:, 0].numpy(), PIXELS / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("resolution", [4, 7])
def test_images_that_do_not_fit_the_resolution_are_told(source, tmp_path, resolution):
    with pytest.raises(UserError, match="images are"):
        prepare_labelled(data(path=str(source), resolution=resolution), tmp_path / "out")


def test_a_source_without_reader_says_where_to_put_shards(tmp_path):
    with pytest.raises(UserError, match="no reader for source latents: put safetensors shards"):
        prepare_labelled(data("latents", "x"), tmp_path / "out")
