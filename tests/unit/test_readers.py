"""Sources of real images, each made here by the library that users make it with; and what a broken one is told."""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dmd2.data.__main__ import app
from dmd2.experiment.config import Data
from tests.image_sources import (
    COUNT,
    LABELS,
    PIXELS,
    RNG,
    SIZE,
    assert_read,
    encoded,
    hub_set,
    labelled,
    told,
    whole,
    write_files,
    write_lmdb,
    write_zip,
)


# LMDB, the official convention.
@pytest.mark.parametrize("shape", [b"5", b"5 1"])
def test_lmdb_rows_are_read_in_the_order_of_their_numbers(tmp_path, shape):
    assert_read(write_lmdb(tmp_path / "set", changes={"labels_shape": shape}))


def test_an_lmdb_of_one_file_is_read(tmp_path):
    assert_read(write_lmdb(tmp_path / "set.mdb", subdir=False))


def test_an_lmdb_may_be_read_only(tmp_path):
    config = write_lmdb(tmp_path / "set")
    (tmp_path / "set/lock.mdb").unlink()
    assert_read(config)
    assert not (tmp_path / "set/lock.mdb").exists()


def test_lmdb_blocks_join_without_a_gap(tmp_path, monkeypatch):
    monkeypatch.setattr("dmd2.data.lmdb_sets.BLOCK_ROWS", 2)
    assert_read(write_lmdb(tmp_path / "set"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images_shape": b"5 3 64 64"}, r"images_shape says rows of \(3, 64, 64\), but the config says \(3, 8, 8\)"),
        ({"labels_shape": b"6"}, "images_shape says 5 rows but labels_shape 6"),
        ({"labels_shape": b"5 2"}, r"labels_shape says rows of \(2,\)"),
        ({"images_shape": b"4 3 8 8", "labels_shape": b"4"}, "there is a key images_4_data although .* says 4 rows"),
        ({"images_shape": None}, "there is no key images_shape"),
        ({"labels_shape": None}, "there is no key labels_shape"),
        ({"images_shape": b"\x05\x00"}, r"images_shape is '\\x05\\x00' instead of numbers"),
        ({"images_3_data": None}, "there is no key images_3_data"),
        ({"labels_3_data": None}, "there is no key labels_3_data"),
        ({"images_3_data": bytes(191)}, "images_3_data has 191 bytes instead of 192, a row of uint8 images"),
        ({"labels_3_data": bytes(4)}, "labels_3_data has 4 bytes instead of 8, a row of int64 labels"),
    ],
)
def test_a_wrong_lmdb_names_its_key(tmp_path, changes, match):
    told(write_lmdb(tmp_path / "set", changes=changes), f"/set: {match}")


def test_an_lmdb_that_is_none_is_told(tmp_path):
    told(labelled("lmdb", tmp_path / "absent"), "absent does not exist: put the LMDB there")
    told(labelled("lmdb", tmp_path), "is not a readable LMDB")
    (tmp_path / "data.mdb").write_bytes(bytes(9000))
    told(labelled("lmdb", tmp_path), "is not a readable LMDB")


def test_a_truncated_lmdb_is_told_instead_of_killing_the_process(tmp_path):
    config = write_lmdb(tmp_path / "set", changes={"filler": bytes(4 << 20)})
    os.truncate(tmp_path / "set/data.mdb", 2 << 20)
    told(config, r"/set: data\.mdb has 2097152 bytes of \d+: it is truncated")


# Folders and zips of image files.
def edm_files(labels=LABELS):
    """The layout of EDM's dataset tool."""
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(COUNT)]
    listed = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
    return dict(zip(names, map(encoded, PIXELS), strict=True)) | {
        "dataset.json": json.dumps({"labels": listed}).encode()
    }


def test_a_folder_of_edms_tool_is_read(tmp_path):
    assert_read(labelled("image-folder", write_files(tmp_path, edm_files())))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_edms_tool_is_read(tmp_path, method):
    assert_read(labelled("image-folder", write_zip(tmp_path / "set.zip", edm_files(), method)))


def test_class_folders_are_classes_in_sorted_order(tmp_path):
    files = {f"{name}/{i}.png": encoded(PIXELS[i]) for i, name in enumerate(["n02", "n01", "n10", "n03", "n01"])}
    write_files(tmp_path, files | {"n01/.hidden.png": b"", "n01/notes.txt": b"", "__MACOSX/n01/1.png": b""})
    order = [1, 4, 0, 3, 2]
    assert_read(labelled("image-folder", tmp_path), PIXELS[order], [0, 0, 1, 2, 3])


def test_many_images_are_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("dmd2.data.decode.BLOCK_IMAGES", 2)
    assert_read(labelled("image-folder", write_files(tmp_path, edm_files())))


def one(tmp_path, content, **changes):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(content)
    return labelled("image-folder", tmp_path, classes=1, **changes)


def test_a_palette_becomes_rgb(tmp_path):
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = np.eye(3, dtype=np.uint8)[np.arange(64).reshape(8, 8) % 3].transpose(2, 0, 1) * 255
    assert_read(one(tmp_path, encoded(palette)), expected[None], [0])


def test_grey_becomes_rgb_in_a_set_of_rgb(tmp_path):
    assert_read(one(tmp_path, encoded(PIXELS[0, :1])), PIXELS[0, :1].repeat(3, 0)[None], [0])


def test_grey_stays_grey_in_a_set_of_grey(tmp_path):
    assert_read(one(tmp_path, encoded(PIXELS[0, :1]), channels=1), PIXELS[:1, :1], [0])


def test_an_opaque_alpha_channel_is_dropped(tmp_path):
    opaque = Image.fromarray(PIXELS[0].transpose(1, 2, 0)).convert("RGBA")
    assert_read(one(tmp_path, encoded(opaque)), PIXELS[:1], [0])


def test_center_crop_takes_the_central_square_and_lanczos(tmp_path):
    wide = RNG.integers(0, 256, (20, 33, 3), dtype=np.uint8)
    expected = Image.fromarray(wide[:, 6:26]).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    config = one(tmp_path, encoded(Image.fromarray(wide)), resize="center-crop")
    assert_read(config, np.asarray(expected).transpose(2, 0, 1)[None], [0])


BROKEN_IMAGES = {
    "another size": (encoded(RNG.integers(0, 256, (3, 9, 8), dtype=np.uint8)), "is 8x9 instead of 8x8: set data"),
    "cut short": (encoded(PIXELS[0])[:-30], "is not a readable image"),
    "no image": (b"hello", "is not a readable image"),
    "empty": (b"", "is not a readable image"),
    "16 bits": (encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "has more than 8 bits"),
    "floats": (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "tiff"), "has more than 8 bits"),
    "transparent": (encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 254))), "is transparent"),
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_a_broken_image_is_named(tmp_path, name):
    content, match = BROKEN_IMAGES[name]
    told(one(tmp_path, content), rf"a/1\.png {match}")


def test_rgb_in_a_grey_set_is_told(tmp_path):
    told(one(tmp_path, encoded(PIXELS[0]), channels=1), r"a/1\.png is RGB, but data.channels is 1")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"00001/img00000009.png": b""}, r"00001/img00000009\.png has no label in dataset\.json \(1 such\)"),
        ({"00002/img00000004.png": None}, r"dataset\.json lists 00002/img00000004\.png, which .* lacks \(1 such\)"),
        ({"dataset.json": b'{"labels": null}'}, r"dataset\.json is not \{\"labels\": "),
        ({"dataset.json": b"[]"}, r"dataset\.json is not"),
        ({"dataset.json": b"{"}, r"dataset\.json is not"),
        ({"dataset.json": None}, r"has no dataset\.json but 3 folders of images, and data\.classes is 4"),
        ({"dataset.json": None, "loose.png": b""}, r"/loose\.png has no label: add a dataset\.json"),
    ],
)
def test_labels_that_do_not_fit_the_files_are_told(tmp_path, changes, match):
    files = {name: content for name, content in {**edm_files(), **changes}.items() if content is not None}
    told(labelled("image-folder", write_files(tmp_path / "a", files)), match)
    told(labelled("image-folder", write_zip(tmp_path / "a.zip", files)), match)


def test_a_folder_or_zip_that_is_none_is_told(tmp_path):
    told(labelled("image-folder", tmp_path / "absent"), "absent does not exist")
    told(labelled("image-folder", tmp_path), "holds no images")
    config = labelled("image-folder", write_zip(tmp_path / "set.zip", edm_files()))
    content = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(content[:-50])
    told(config, r"set\.zip is not a whole zip")
    at = content.index(encoded(PIXELS[0]))
    (tmp_path / "set.zip").write_bytes(content[: at + 60] + b"????" + content[at + 64 :])
    told(config, r"set\.zip/00000/img00000000\.png cannot be read \(Bad CRC")


# CIFAR-10.
CIFAR = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)
CLASSES = np.arange(10)[::-1]


class Python2(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings, and numpy's old module names."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_bytes


def python2(value):
    buffer = io.BytesIO()
    Python2(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def pickled(rows, dump=python2):
    return dump({"batch_label": "training batch", "labels": CLASSES[rows].tolist(), "data": CIFAR[rows]})


def binary(rows):
    return np.concatenate([CLASSES[rows, None].astype(np.uint8), CIFAR[rows]], 1).tobytes()


def batches(version, make=pickled):
    """Files of five batches of two images; and of the test images, which are not read."""
    suffix = ".bin" if version == "bin" else ""
    make = binary if version == "bin" else make
    files = {f"cifar-10-batches-{version}/data_batch_{i + 1}{suffix}": make(slice(2 * i, 2 * i + 2)) for i in range(5)}
    return files | {f"cifar-10-batches-{version}/test_batch{suffix}": b"never read"}


def cifar(place):
    return labelled("cifar10", place, resolution=32, classes=10)


def assert_cifar(place):
    assert_read(cifar(place), CIFAR.reshape(-1, 3, 32, 32), CLASSES)


def write_tar(place, files):
    with tarfile.open(place, "w:gz") as archive:
        for name in sorted(files, reverse=True):  # as published: not in the order of the batches
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))


@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar10_is_read_from_either_version_unpacked_or_not(tmp_path, version):
    write_files(tmp_path / "unpacked", batches(version))
    assert_cifar(tmp_path / "unpacked")
    assert_cifar(tmp_path / f"unpacked/cifar-10-batches-{version}")
    archive = tmp_path / f"cifar-10-{ {'bin': 'binary', 'py': 'python'}[version] }.tar.gz"
    write_tar(archive, batches(version))
    assert_cifar(tmp_path)
    assert_cifar(archive)


@pytest.mark.parametrize("protocol", [2, 4])
def test_batches_that_python_3_wrote_are_read(tmp_path, protocol):
    write_files(tmp_path, batches("py", lambda rows: pickled(rows, lambda value: pickle.dumps(value, protocol))))
    assert_cifar(tmp_path)


class Evil:
    """Runs a command when a plain unpickler reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_batch_that_asks_for_anything_else_runs_nothing(tmp_path, protocol):
    files = batches("py") | {"cifar-10-batches-py/data_batch_2": pickle.dumps(Evil(tmp_path / "made"), protocol)}
    write_files(tmp_path, files)
    told(cifar(tmp_path), r"data_batch_2: it would run posix\.mkdir, which no batch of CIFAR-10 needs")
    assert not (tmp_path / "made").exists()


BROKEN_BATCHES = {
    "cut short": pickled(slice(2, 4))[:-100],
    "no pickle": b"hello",
    "empty": b"",
    "no data": python2({"labels": [1, 2]}),
    "no labels": python2({"data": CIFAR[:2]}),
    "no dict": python2([1, 2]),
    "labels that are none": python2({"labels": ["a", "b"], "data": CIFAR[:2]}),
    "too few labels": python2({"labels": [1], "data": CIFAR[:2]}),
    "floats": python2({"labels": [1, 2], "data": CIFAR[:2].astype(np.float32)}),
    "signed bytes": python2({"labels": [1, 2], "data": CIFAR[:2].astype(np.int8)}),
    "another size": python2({"labels": [1, 2], "data": CIFAR[:2, :48]}),
}


@pytest.mark.parametrize("name", BROKEN_BATCHES)
def test_a_broken_batch_is_named(tmp_path, name):
    write_files(tmp_path, batches("py") | {"cifar-10-batches-py/data_batch_2": BROKEN_BATCHES[name]})
    told(cifar(tmp_path), "data_batch_2: it is no whole batch of data")


def test_broken_files_of_cifar10_are_told(tmp_path):
    told(cifar(tmp_path), "there is no CIFAR-10 at .*: put cifar-10-binary.tar.gz or cifar-10-python.tar.gz there")
    write_files(tmp_path / "cut", batches("bin") | {"cifar-10-batches-bin/data_batch_5.bin": binary(slice(2))[:-1]})
    told(cifar(tmp_path / "cut"), r"data_batch_5\.bin: 6145 bytes are not rows of 3073")
    (tmp_path / "cut/cifar-10-batches-bin/data_batch_3.bin").unlink()
    told(cifar(tmp_path / "cut"), r"data_batch_3\.bin is missing beside the other batches")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_tar(archive, {name: content for name, content in batches("bin").items() if "4" not in name})
    told(cifar(tmp_path), r"tar\.gz has no data_batch_4")
    write_tar(archive, batches("bin"))
    archive.write_bytes(archive.read_bytes()[:9000])
    told(cifar(tmp_path), r"tar\.gz is truncated or no tar archive")


# Hugging Face sets.
@pytest.fixture(scope="module")
def numbers():
    return hub_set("label", LABELS, datasets.ClassLabel(num_classes=4))


def test_parquet_files_are_read(numbers, tmp_path):
    for i, rows in enumerate([range(3), range(3, 5)]):
        numbers.select(rows).to_parquet(tmp_path / f"data/train-{i:05d}-of-00002.parquet")
    numbers.select([1]).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    assert_read(labelled("hub", tmp_path))
    assert_read(labelled("hub", tmp_path, split="test"), PIXELS[1:2], LABELS[1:2])
    assert_read(labelled("hub", tmp_path / "data/train-00001-of-00002.parquet"), PIXELS[3:], LABELS[3:])


def test_columns_may_have_other_names(numbers, tmp_path):
    numbers.rename_columns({"image": "img", "label": "fine_label"}).to_parquet(tmp_path / "train.parquet")
    assert_read(labelled("hub", tmp_path, image="img", label="fine_label"))
    told(
        labelled("hub", tmp_path, image="img"), "has no column label, only img, fine_label: name them with data.source"
    )


def test_what_save_to_disk_wrote_is_read(numbers, tmp_path):
    numbers.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=numbers).save_to_disk(tmp_path / "parts")
    assert_read(labelled("hub", tmp_path / "one"))
    assert_read(labelled("hub", tmp_path / "parts"))
    told(labelled("hub", tmp_path / "parts", split="dev"), r"cannot be read \(it has no split dev, only train\)")


def test_class_folders_are_a_numbers_too(tmp_path):
    write_files(tmp_path, {f"{'abcd'[label]}/{i}.png": encoded(PIXELS[i]) for i, label in enumerate(LABELS)})
    order = np.argsort(LABELS, kind="stable")
    assert_read(labelled("hub", tmp_path), PIXELS[order], sorted(LABELS))


def test_a_numbers_is_resized_and_checked_like_a_folder(numbers, tmp_path):
    numbers.to_parquet(tmp_path / "train.parquet")
    told(labelled("hub", tmp_path, resolution=4), r"row 0 is 8x8 instead of 4x4")
    assert whole(labelled("hub", tmp_path, resolution=4, resize="center-crop"))[0].shape == (COUNT, 3, 4, 4)


def test_labels_that_are_no_numbers_are_told(numbers, tmp_path):
    named = numbers.remove_columns("label").add_column("label", ["a", None, "b", "b", "c"])
    named.to_parquet(tmp_path / "train.parquet")
    told(labelled("hub", tmp_path), "row 0 has no whole-number label: 'a'")


def test_a_column_that_holds_no_images_is_told(numbers, tmp_path):
    numbers.to_parquet(tmp_path / "train.parquet")
    told(labelled("hub", tmp_path, image="label", label="image"), r"cannot be read \(.*\); check data\.source")


def test_a_broken_parquet_file_is_told(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    told(labelled("hub", tmp_path / "train.parquet"), r"cannot be read \(.*\); check data\.source, or fetch it again")
    (tmp_path / "set.csv").write_text("image,label\n")
    told(labelled("hub", tmp_path / "set.csv"), r"a file has to be \.parquet or \.arrow")


def prepared(path, cache, out, **environment):
    """The command of the rule, in a process of its own: the hub's libraries read the environment when imported."""
    config = json.dumps(labelled("hub", path).model_dump())
    command = [sys.executable, "-m", "dmd2.data", "real", "--config", config, str(out)]
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**keep, "HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])


def test_a_set_in_the_hubs_cache_is_read_without_a_network(numbers, tmp_path):
    numbers.to_parquet(tmp_path / "train.parquet")
    made = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train",
                                 cache_dir=tmp_path / "made")  # fmt: skip
    (folder,) = (tmp_path / "made/parquet").glob("default-*")
    cached = tmp_path / "cache/acme___tiny"
    cached.mkdir(parents=True)
    del made
    folder.rename(cached / "default")
    (arrow,) = cached.rglob("*.arrow")
    arrow.rename(arrow.with_name("tiny-train.arrow"))
    result = prepared("acme/tiny", tmp_path / "cache", tmp_path / "out/manifest.json")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out/manifest.json").read_text())["class_counts"] == [1, 1, 2, 1]


def test_nothing_is_downloaded_unless_asked(tmp_path):
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = prepared("acme/tiny", tmp_path, tmp_path / "out/manifest.json", **nowhere)
    assert result.returncode == 1 and "OfflineModeIsEnabled" in result.stderr and "Traceback" not in result.stderr
    assert "nothing is downloaded unless asked" in result.stderr.splitlines()[-1]


def test_who_asks_in_the_environment_is_not_overruled(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    digits = Data(name="d", source={"kind": "sklearn-digits"}, resolution=8, channels=1, classes=10)
    result = CliRunner().invoke(app, ["real", "--config", digits.model_dump_json(), str(tmp_path / "manifest.json")])
    assert result.exit_code == 0
    assert os.environ["HF_HUB_OFFLINE"] == "0"


# idx, as Debian and torchvision lay it out.
GREY = PIXELS[:3, :1, :6, :6]


@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("folder", ["", "raw", "FashionMNIST/raw", "MNIST/raw"])
def test_idx_files_are_found_where_torchvision_puts_them(tmp_path, folder, pack):
    suffix = ".gz" if pack is gzip.compress else ""
    for name, array in {"images-idx3": GREY[:, 0], "labels-idx1": np.array([3, 1, 2], np.uint8)}.items():
        header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
        path = tmp_path / folder / f"train-{name}-ubyte{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(header + array.tobytes()))
    assert_read(labelled("idx", tmp_path, channels=1), np.pad(GREY, ((0, 0), (0, 0), (1, 1), (1, 1))), [3, 1, 2])
