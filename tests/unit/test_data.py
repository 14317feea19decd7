"""Real data and tensor sets: what is read, and what a broken source is told."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch

from dmd2.config import Data
from dmd2.data import TensorSet, load_set, prepare, save_shard
from dmd2.errors import UserError
from dmd2.files import content_of, listing, write_json
from dmd2.readers import read_idx

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
PIXELS = np.arange(3 * 6 * 6, dtype=np.uint8).reshape(3, 6, 6)


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def data(kind="idx", path=None, **changes):
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
    return prepare(data(path=str(source)), tmp_path / "out")


# Reading.
def test_digits_are_1797_images_of_8_by_8(tmp_path):
    real = load_set(prepare(data("sklearn-digits"), tmp_path))
    images = real.images(torch.arange(1797))
    assert (len(real), images.shape) == (1797, (1797, 1, 8, 8))
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.bincount(real.condition(torch.arange(1797)).labels).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]


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
    one, two = (prepare(data(path=str(source), name=name), tmp_path / name) for name in ("a", "b"))
    assert content_of(one) == content_of(two)
    (source / LABELS).write_bytes(gzip.compress(idx(np.array([3, 1, 1], np.uint8))))
    assert content_of(prepare(data(path=str(source)), tmp_path / "c")) != content_of(one)


# Broken shards.
def shard_of(manifest):
    return next(manifest.parent.glob("*.safetensors"))


def test_a_truncated_shard_is_named(manifest):
    shard = shard_of(manifest)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} has .* it is truncated"):
        load_set(manifest)


def test_a_changed_shard_is_named(manifest):
    shard = shard_of(manifest)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=rf"{shard.name} does not match the checksum"):
        load_set(manifest)


def test_a_missing_shard_is_named(manifest):
    shard_of(manifest).unlink()
    with pytest.raises(UserError, match="shard-00000.safetensors is missing"):
        load_set(manifest)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing: run the Snakemake target"):
        load_set(tmp_path / "manifest.json")


# Broken idx files.
@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_missing_idx_file_is_named(source, tmp_path, name):
    (source / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        prepare(data(path=str(source)), tmp_path / "out")


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
        read_idx(path, "set")


def test_counts_that_differ_are_told(source, tmp_path):
    (source / LABELS).write_bytes(gzip.compress(idx(np.array([3, 1], np.uint8))))
    with pytest.raises(UserError, match="3 images but 2 labels"):
        prepare(data(path=str(source)), tmp_path / "out")


def test_images_of_the_right_size_are_not_padded(source, tmp_path):
    images = load_set(prepare(data(path=str(source), resolution=6), tmp_path / "out")).images(torch.arange(3))
    np.testing.assert_allclose(images[:, 0].numpy(), PIXELS / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("resolution", [4, 7])
def test_images_that_do_not_fit_the_resolution_are_told(source, tmp_path, resolution):
    with pytest.raises(UserError, match="images are"):
        prepare(data(path=str(source), resolution=resolution), tmp_path / "out")


def test_a_source_without_reader_says_where_to_put_shards(tmp_path):
    with pytest.raises(UserError, match="put safetensors shards"):
        prepare(data("latents", "x"), tmp_path / "out")


def test_a_failed_preparation_leaves_no_manifest(source, tmp_path):
    (source / LABELS).unlink()
    with pytest.raises(UserError):
        prepare(data(path=str(source)), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
