"""Sources of images with captions, each made here by the library that users make it with; and what a broken one is told."""

import io
import json
import pickle
import tarfile

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dmd2.data.readers import read
from tests.image_sources import (
    CAPTIONS,
    COUNT,
    LATENTS,
    PIXELS,
    SIZE,
    assert_read,
    captioned,
    encoded,
    hub_set,
    told,
    whole,
    write_files,
    write_lmdb,
    write_zip,
)


# WebDatasets.
def write_tar(path, files, mode="w"):
    """A tar file of names and contents, in order; None is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            tar.addfile(member, io.BytesIO(content or b""))
    return path


def samples(numbers, caption="txt", image="png"):
    """Files as img2dataset writes them."""
    for i in numbers:
        row = {"caption": CAPTIONS[i], "alt": f"alt {i}", "key": f"{i:05d}", "width": SIZE}
        yield f"{i:05d}.{image}", encoded(PIXELS[i])
        yield f"{i:05d}.json", json.dumps(row).encode()
        if caption == "txt":
            yield f"{i:05d}.txt", CAPTIONS[i].encode()


@pytest.mark.parametrize("caption", ["txt", "json"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_of_samples_is_read(tmp_path, caption, mode):
    write_tar(tmp_path / "0.tar", samples(range(COUNT), caption), mode)
    assert_read(captioned("webdataset", tmp_path))


def test_the_key_of_the_caption_may_have_another_name(tmp_path):
    write_tar(tmp_path / "0.tar", samples(range(COUNT)))
    assert_read(captioned("webdataset", tmp_path, caption="alt"), conditions=[f"alt {i}" for i in range(COUNT)])
    told(
        captioned("webdataset", tmp_path, caption="text"),
        r"00000\.png has no caption: the \.json has no text, only caption, ",
    )


def shards(tmp_path):
    for name, numbers in {"c/2.tar": [4], "a/0.tar": [0, 1], "b/1.tar": [2, 3]}.items():
        write_tar(tmp_path / name, samples(numbers))
    return captioned("webdataset", tmp_path / "*/*.tar")


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_tars_are_sorted_and_shared(tmp_path, parts):
    assert_read(shards(tmp_path), parts=parts)


def test_more_parts_than_tars_are_told(tmp_path):
    told(shards(tmp_path), r"the 3 tar files at .* cannot be shared by 4 jobs: set data\.text\.jobs to at most 3", 4)


def test_keys_end_at_the_first_dot_and_keep_their_folder(tmp_path):
    files = [
        ("./a.b/x.PNG", encoded(PIXELS[0])), ("./a.b/x.txt", b"\xef\xbb\xbf a \n"), ("./a.b/x.mask.png", b"no image"),
        ("./c/", None), ("./c/x.png", encoded(PIXELS[1])), ("./c/x.json", b'{"caption": null}'),
        ("./c/y.txt", b"of no image"), ("./c/._x.png", b"of macOS"), ("./README", b""),
    ]  # fmt: skip
    write_tar(tmp_path / "0.tar", files)
    assert_read(captioned("webdataset", tmp_path), PIXELS[:2], ["a", ""])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_pickles_are_passed_over(tmp_path):
    evil = pickle.dumps(Evil())
    with pytest.raises(SystemExit):
        pickle.loads(evil)
    files = [(f"00000.{kind}", evil) for kind in ("pyd", "pickle", "pkl", "pth", "npy", "cls")]
    write_tar(tmp_path / "0.tar", [*files, *samples(range(COUNT))])
    assert_read(captioned("webdataset", tmp_path))


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([("1.png", encoded(PIXELS[0]))], r"0\.tar/1\.png has no caption: there is no \.txt or \.json"),
        ([("1.png", encoded(PIXELS[0])), ("2.png", b""), ("1.txt", b"a")], r"1\.png has no caption: there is no \.txt"),
        ([("1.jpg", b"x"), ("1.txt", b"a")], r"0\.tar/1\.jpg is not a readable image"),
        ([("1.png", encoded(PIXELS[0])[:-30]), ("1.txt", b"a")], r"0\.tar/1\.png is not a readable image"),
        ([("1.png", encoded(PIXELS[0, :, :7])), ("1.txt", b"a")], r"0\.tar/1\.png is 8x7 instead of 8x8: set data\.source\.resize"),
        ([("1.png", b""), ("1.jpg", b""), ("1.txt", b"a")], r"0\.tar/1 has 2 images: png, jpg"),
        ([("1.png", b""), ("1.txt", b"a"), ("1.txt", b"b")], r"0\.tar/1\.txt is there twice"),
        ([("1.png", b""), ("1.txt", b"\xff")], r"1\.png has no caption: its text cannot be read \('utf-8'"),
        ([("1.png", b""), ("1.json", b"{")], r"1\.png has no caption: its text cannot be read"),
        ([("1.png", b""), ("1.json", b"[]")], r"1\.png has no caption: the \.json has no caption, only list"),
        ([("1.png", b""), ("1.json", b'{"caption": ["a"]}')], r"1\.png has no caption: has \['a'\] instead of one text"),
        ([("1.txt", b"a")], r"0\.tar holds no images"),
    ],
)  # fmt: skip
def test_a_broken_sample_is_named(tmp_path, files, match):
    write_tar(tmp_path / "0.tar", files)
    told(captioned("webdataset", tmp_path), match)


@pytest.mark.parametrize("cut", ["in a file", "before a header", "in a header", "before the end mark"])
def test_a_truncated_tar_is_told_where(tmp_path, cut):
    path = write_tar(tmp_path / "0.tar", samples(range(COUNT)))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        last, end = members[-1], tar.offset
    at = {"in a file": members[9].offset_data + 5, "before a header": last.offset, "in a header": last.offset + 100,
          "before the end mark": end}[cut]  # fmt: skip
    path.write_bytes(path.read_bytes()[:at])
    told(captioned("webdataset", tmp_path), r"0\.tar is truncated, damaged or no tar archive, in or after 0000[34]\.")


def test_a_damaged_header_is_no_end(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(range(COUNT)))
    with tarfile.open(path) as tar:
        at = tar.getmembers()[6].offset
    content = bytearray(path.read_bytes())
    content[at + 100] ^= 1
    path.write_bytes(content)
    told(captioned("webdataset", tmp_path), r"0\.tar is truncated, damaged or no tar archive, in or after 00001\.txt")


def test_no_tars_are_told(tmp_path):
    told(captioned("webdataset", tmp_path), "there are no tar files at")
    told(captioned("webdataset", tmp_path / "*.tar"), "there are no tar files at .*a pattern like")
    (tmp_path / "0.tar").write_bytes(b"hello")
    told(captioned("webdataset", tmp_path), r"0\.tar is truncated, damaged or no tar archive \(")


# What images are made into.
def one(tmp_path, image, form="png", **source):
    write_tar(tmp_path / "0.tar", [(f"1.{form}", encoded(image, form)), ("1.txt", b"a")])
    return whole(captioned("webdataset", tmp_path, **source))[0]


def test_transparent_images_are_shown_on_white(tmp_path):
    image = np.zeros((SIZE, SIZE, 4), np.uint8)
    image[:, 4:] = [255, 0, 0, 255]
    expected = np.full((SIZE, SIZE, 3), 255, np.uint8)
    expected[:, 4:] = [255, 0, 0]
    np.testing.assert_array_equal(one(tmp_path, Image.fromarray(image)), expected.transpose(2, 0, 1)[None])


def test_webp_and_jpeg_are_resized_from_their_central_square(tmp_path):
    wide = np.zeros((24, 40, 3), np.uint8)
    wide[:, 8:32] = [0, 200, 0]
    for form in ("webp", "jpeg"):
        found = one(tmp_path, Image.fromarray(wide), form, resize="center-crop").astype(int)
        assert found.shape == (1, 3, SIZE, SIZE)
        assert abs(found[0, :, :, 2:-2] - np.array([0, 200, 0])[:, None, None]).max() < 20


def test_blocks_are_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("dmd2.data.decode.BLOCK_BYTES", 3 * PIXELS[0].nbytes)
    write_tar(tmp_path / "0.tar", samples(range(COUNT)))
    assert [len(captions) for _, captions in read(captioned("webdataset", tmp_path), SIZE)] == [3, 2]
    assert_read(captioned("webdataset", tmp_path))


# Folders and zips.
def names():
    return [f"{'ab'[i // 3]}/{i}.png" for i in range(COUNT)]


def pictures(captions):
    return {**dict(zip(names(), map(encoded, PIXELS), strict=True)), **captions}


def folder(place, captions):
    return captioned("image-folder", write_files(place, pictures(captions)))


def beside():
    return {name.replace(".png", ".txt"): text.encode() for name, text in zip(names(), CAPTIONS, strict=True)}


def tables(form, column):
    """A metadata file in each of two folders, with paths from there and not in order."""
    for place in "ab":
        rows = [(n, c) for n, c in zip(names(), CAPTIONS, strict=True) if n[0] == place][::-1]
        table = pd.DataFrame({"file_name": [n[2:] for n, _ in rows], column: [c for _, c in rows], "id": 1})
        buffer = io.BytesIO()
        if form == "jsonl":
            table.to_json(buffer, orient="records", lines=True)
        elif form == "csv":
            table.to_csv(buffer, index=False)
        else:
            table.to_parquet(buffer)
        yield f"{place}/metadata.{form}", buffer.getvalue()


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_folder_with_texts_beside_its_images_is_read_and_shared(tmp_path, parts):
    assert_read(folder(tmp_path, beside() | {"a/notes.txt": b"x", "a/.0.png": b"x"}), parts=parts)


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_metadata_tables_are_read(tmp_path, form, column):
    assert_read(folder(tmp_path, dict(tables(form, column))))


def test_one_table_may_caption_all_folders(tmp_path):
    rows = [{"file_name": f"./{name}", "text": text} for name, text in zip(names(), CAPTIONS, strict=True)]
    assert_read(folder(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()}))


def test_what_the_library_datasets_reads_is_read_alike(tmp_path):
    config = folder(tmp_path, dict(tables("jsonl", "text")))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", streaming=True)
    found = sorted((row["text"], np.asarray(row["image"]).transpose(2, 0, 1).tobytes()) for row in theirs)
    images, captions = whole(config)
    assert found == sorted((text, image.tobytes()) for image, text in zip(images, captions, strict=True))


def test_a_zip_is_read(tmp_path):
    assert_read(captioned("image-folder", write_zip(tmp_path / "set.zip", pictures(beside()))), parts=2)


@pytest.mark.parametrize(
    ("captions", "match"),
    [
        ({}, r"/a/0\.png has no caption: write it, as UTF-8, in 0\.txt beside it"),
        (beside() | {"b/3.txt": None}, r"/b/3\.png has no caption"),
        (beside() | {"b/3.txt": b"\xff"}, r"/b/3\.png has no caption"),
        (dict([*tables("csv", "text")][:1]), r"/b/3\.png has no caption in a/metadata\.csv \(2 such\)"),
        ({"metadata.csv": b"file_name,text\nc.png,a\n", **dict(tables("csv", "text"))},
         r"metadata\.csv lists c\.png, which .* lacks \(1 such\)"),
        (dict(tables("jsonl", "title")), r"a/metadata\.jsonl cannot be used \(there is no column caption, only file_name, title"),
        ({"metadata.jsonl": b'{"text": "a"}'}, r"/metadata\.jsonl cannot be used \(there is no column file_name"),
        ({"metadata.jsonl": b"{"}, r"/metadata\.jsonl cannot be used"),
    ],
)  # fmt: skip
def test_captions_that_do_not_fit_the_files_are_told(tmp_path, captions, match):
    told(folder(tmp_path, captions), match)


# Hugging Face sets.
@pytest.fixture(scope="module")
def texts():
    return hub_set("text", CAPTIONS, datasets.Value("string"))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parquet_files_are_read_and_shared(texts, tmp_path, parts):
    for i, rows in enumerate([range(2), range(2, 3), range(3, 5)]):
        texts.select(rows).to_parquet(tmp_path / f"data/train-{i:05d}-of-00003.parquet")
    assert_read(captioned("hub", tmp_path), parts=parts)
    told(captioned("hub", tmp_path), "the 3 files of .* cannot be shared by 4 jobs: set data.text.jobs to at most 3", 4)


@pytest.mark.parametrize("parts", [1, 4])
def test_what_save_to_disk_wrote_is_read_and_shared(texts, tmp_path, parts):
    texts.save_to_disk(tmp_path / "set")
    assert_read(captioned("hub", tmp_path / "set"), parts=parts)


def test_columns_may_have_other_names(texts, tmp_path):
    texts.rename_columns({"image": "jpg", "text": "blip"}).to_parquet(tmp_path / "train.parquet")
    assert_read(captioned("hub", tmp_path, image="jpg", caption="blip"))
    told(captioned("hub", tmp_path, image="jpg"), r"has no column text, only jpg, blip: name .* data\.source\.caption")


def test_a_null_is_the_empty_caption_and_a_list_is_told(texts, tmp_path):
    others = texts.remove_columns("text")
    others.add_column("text", [None, *CAPTIONS[1:]]).to_parquet(tmp_path / "nulls.parquet")
    assert_read(captioned("hub", tmp_path / "nulls.parquet"), conditions=["", *CAPTIONS[1:]])
    others.add_column("text", [[caption] for caption in CAPTIONS]).to_parquet(tmp_path / "lists.parquet")
    told(captioned("hub", tmp_path / "lists.parquet"), r"lists\.parquet, row 0 has \['a cat'\] instead of one text")


# LMDB, the official convention.
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_latents_and_prompts_are_read_and_shared(tmp_path, monkeypatch, parts):
    monkeypatch.setattr("dmd2.data.lmdb_sets.BLOCK_ROWS", 2)
    assert_read(write_lmdb(tmp_path / "set", text=True), LATENTS, parts=parts)


def test_latents_can_be_made_a_tensor_without_a_copy(tmp_path):
    latents, _ = next(read(write_lmdb(tmp_path / "set", text=True), 32))
    assert latents.flags.writeable  # torch warns of memory that is not


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"latents_shape": b"5 4 64 64"}, r"latents_shape says rows of \(4, 64, 64\), but the config says \(4, 8, 8\)"),
        ({"prompts_shape": b"6"}, "latents_shape says 5 rows but prompts_shape 6"),
        ({"prompts_3_data": None}, "there is no key prompts_3_data"),
        ({"prompts_3_data": b"\xff"}, "prompts_3_data is not UTF-8"),
        ({"latents_3_data": bytes(256)}, "latents_3_data has 256 bytes instead of 512, a row of float16 latents"),
    ],
)
def test_a_wrong_lmdb_of_latents_names_its_key(tmp_path, changes, match):
    told(write_lmdb(tmp_path / "set", True, changes), f"/set: {match}")


def test_latents_are_not_for_a_run_in_pixels(tmp_path):
    write_lmdb(tmp_path / "set", text=True)
    told(captioned("lmdb", tmp_path / "set"), "an LMDB with prompts holds latents: set data.text.latents: true")


def test_a_kind_without_captions_is_told(tmp_path):
    told(captioned("cifar10", tmp_path), "source cifar10 has no captions: use webdataset, ")
