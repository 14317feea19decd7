"""Equal pixels from every kind of source give equal batches; everything else is refused in one sentence."""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import listing, write_json
from dmd2.data.sets import save_shard
from eval.pixels.images import open_images
from eval.pixels.resize import Geometry

COUNT = 7
KINDS = ("folder", "zip", "npz", "npz-nchw", "npy", "npy-nchw", "safetensors", "manifest")
SMALLER = Geometry("square-crop+lanczos-5")


def pixels(channels: int = 3, count: int = COUNT) -> np.ndarray:
    """Random images (n, 8, 9, C)."""
    return np.random.default_rng(channels).integers(0, 256, (count, 8, 9, channels), dtype=np.uint8)


def chw(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def write_folder(folder: Path, images: np.ndarray) -> Path:
    for index, image in enumerate(images):
        path = folder / f"part{index // 4}" / f"{index:03d}.{'PNG' if index % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path, "png")
    (folder / "labels.txt").write_text("not an image")
    return folder


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/part0/._000.png", b"resource fork")
    return path


def write_manifest(folder: Path, images: Tensor) -> Path:
    shards = []
    for number, part in enumerate(images.split(3)):
        shards.append(folder / f"shard-{number:05d}.safetensors")
        save_shard(shards[-1], {"images": part, "labels": torch.zeros(len(part))})
    write_json(folder / "manifest.json", {"kind": "real", "files": listing(shards, folder)})
    return folder / "manifest.json"


def write(kind: str, tmp: Path, images: np.ndarray) -> Path:
    """The same images (n, H, W, C) as a source of a kind."""
    if kind in ("folder", "zip"):
        folder = write_folder(tmp / "images", images)
        return folder if kind == "folder" else write_zip(tmp / "images.zip", folder)
    if kind == "manifest":
        return write_manifest(tmp / "set", chw(images))
    if kind == "safetensors":
        save_shard(tmp / "images.safetensors", {"images": chw(images), "labels": torch.zeros(len(images))})
        return tmp / "images.safetensors"
    array = images.transpose(0, 3, 1, 2) if kind.endswith("nchw") else images
    if kind.startswith("npy"):
        np.save(tmp / "images.npy", array)
        return tmp / "images.npy"
    np.savez(tmp / "images.npz", **{"images" if kind.endswith("nchw") else "arr_0": array, "arr_1": np.zeros(3)})
    return tmp / "images.npz"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_pixels_give_equal_batches(kind: str, channels: int, tmp_path: Path) -> None:
    images = pixels(channels)
    source = open_images(str(write(kind, tmp_path, images)))
    assert len(source) == COUNT
    for indices in (range(COUNT), range(2, 6), range(6, 7), range(1, 7, 2)):
        batch = source.batch(indices)
        assert batch.dtype == torch.uint8 and batch.is_contiguous()
        assert torch.equal(batch, chw(images)[list(indices)])


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_and_limit_act_alike_on_every_kind(kind: str, tmp_path: Path) -> None:
    images = pixels()
    source = open_images(write(kind, tmp_path, images), SMALLER, first=5)
    assert len(source) == 5
    assert torch.equal(source.batch(range(1, 5)), SMALLER(chw(images)[1:5]))


def test_the_id_follows_the_content_not_the_place(tmp_path: Path) -> None:
    images = pixels()
    ids = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        ids[kind] = open_images(write(kind, tmp_path / kind, images)).id
    assert len({ids[kind] for kind in ("folder", "zip")}) == 1
    assert len({ids[kind] for kind in KINDS if kind not in ("folder", "zip")}) == 1
    images[-1, 0, 0, 0] ^= 1
    changed = {kind: write(kind, tmp_path / kind, images) for kind in KINDS}
    for kind, path in changed.items():
        assert open_images(path).id != ids[kind]
        assert len({open_images(path, first=6).id, open_images(path).id, open_images(path, SMALLER).id}) == 3


def test_a_folder_with_a_manifest_is_its_tensor_set(tmp_path: Path) -> None:
    manifest = write("manifest", tmp_path, pixels())
    assert open_images(manifest.parent).id == open_images(manifest).id


def test_files_are_taken_in_the_order_of_their_paths_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    for level, name in enumerate(("a/2.PNG", "a/10.png", "B/1.bmp", "c.webp")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / name, lossless=True)
    assert open_images(tmp_path).batch(range(4))[:, 0, 0, 0].tolist() == [2, 1, 0, 3]


def test_a_jpeg_gives_the_pixels_of_pillow(tmp_path: Path) -> None:
    Image.fromarray(pixels()[0]).save(tmp_path / "a.JPG", "jpeg")
    expected = np.asarray(Image.open(tmp_path / "a.JPG"))
    assert torch.equal(open_images(tmp_path).batch(range(1)), chw(expected[None]))


def test_a_palette_becomes_rgb_and_grey_meets_rgb_replicated(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (9, 8, 7)).quantize(2).save(tmp_path / "a.png")
    Image.new("L", (4, 4), 5).save(tmp_path / "b.png")
    source = open_images(tmp_path)
    assert source.batch(range(2))[:, :, 0, 0].tolist() == [[9, 8, 7], [5, 5, 5]]
    assert source.batch(range(1, 2)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "npy", "manifest"])
def test_a_source_survives_pickling_and_is_light(kind: str, tmp_path: Path) -> None:
    source = open_images(write(kind, tmp_path, pixels(count=40)))
    source.batch(range(2))
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert torch.equal(pickle.loads(data).batch(range(40)), source.batch(range(40)))


@pytest.mark.parametrize("indices", [range(0), range(5, 8), range(-1, 2), range(3, 0, -1)])
def test_indices_outside_the_source_are_an_error(indices: range, tmp_path: Path) -> None:
    for kind in ("folder", "npy"):
        with pytest.raises(IndexError):
            open_images(write(kind, tmp_path, pixels())).batch(indices)


def test_an_array_written_anew_is_read_anew(tmp_path: Path) -> None:
    images = pixels()
    first = open_images(write("npy", tmp_path, images))
    write("npy", tmp_path, images[::-1])
    assert open_images(tmp_path / "images.npy").id != first.id


def folder_of_sizes(tmp: Path, *sizes: tuple[int, int]) -> Path:
    for index, size in enumerate(sizes):
        Image.new("RGB", size, (index,) * 3).save(tmp / f"{index}.png")
    return tmp


def test_images_without_a_patch_are_counted_and_left_out_or_stretched(tmp_path: Path) -> None:
    folder = folder_of_sizes(tmp_path, (300, 310), (298, 400), (299, 299))
    with pytest.raises(UserError, match=r"1 of 3 images have a side below 299, the first is 1\.png"):
        open_images(folder, Geometry("patch-299"))
    skip, official = (open_images(folder, Geometry(f"patch-299-{policy}")) for policy in ("skip", "official"))
    assert (len(skip), skip.small, len(official), official.small) == (2, 1, 3, 1)
    assert skip.batch(range(2))[:, 0, 0, 0].tolist() == [0, 2]
    assert official.batch(range(3))[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert skip.id != official.id
    with pytest.raises(UserError, match=r"below 305, the first is 0\.png; choose patch-305-skip or patch-305-official"):
        open_images(folder, Geometry("patch-305"))


def test_a_set_of_latents_is_opened_by_the_images_it_was_made_from(tmp_path: Path) -> None:
    seen = chw(pixels())
    save_shard(tmp_path / "s.safetensors", {"images": torch.zeros(len(seen), 4, 2, 2).half(), "pixels": seen})
    (tmp_path / "captions.jsonl").write_text('{"caption": "a"}\n' * len(seen))
    paths = [tmp_path / "captions.jsonl", tmp_path / "s.safetensors"]
    write_json(tmp_path / "manifest.json", {"kind": "real", "files": listing(paths, tmp_path)})
    assert torch.equal(open_images(tmp_path).batch(range(len(seen))), seen)
    save_shard(tmp_path / "latents.safetensors", {"images": torch.zeros(2, 4, 2, 2).half()})
    with pytest.raises(UserError, match=r"float16, not uint8: .*keep_images"):
        open_images(tmp_path / "latents.safetensors")


def test_files_of_different_sizes_need_a_geometry(tmp_path: Path) -> None:
    folder = folder_of_sizes(tmp_path, (8, 9), (10, 9))
    with pytest.raises(UserError, match=r"1\.png is 9x10 but 0\.png is 9x8: choose a geometry"):
        open_images(folder).batch(range(2))
    assert open_images(folder, SMALLER).batch(range(2)).shape == (2, 3, 5, 5)


def png16(colour_type: int) -> bytes:
    """A 2x2 PNG of 16 bits per channel, grey (0) or RGB (2); Pillow itself cannot write the latter."""
    channels = {0: 1, 2: 3}[colour_type]
    rows = b"".join(b"\0" + struct.pack(f">{2 * channels}H", *[4660] * 2 * channels) for _ in range(2))
    parts = [
        (b"IHDR", struct.pack(">2I5B", 2, 2, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def whole_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels()[0].repeat(4, 0)).save(file, "png")
    return file.getvalue()


def saved(mode: str, name: str = "bad.png", **options: object) -> Callable[[Path], None]:
    return lambda folder: Image.new(mode, (4, 4)).save(folder / name, **options)


BAD_FILES = {
    "alpha": (saved("RGBA"), "has an alpha channel"),
    "grey with alpha": (saved("LA"), "has an alpha channel"),
    "transparent palette": (saved("P", transparency=0), "has an alpha channel"),
    "transparent colour": (saved("RGB", transparency=(0, 0, 0)), "has an alpha channel"),
    "16-bit grey": (lambda folder: (folder / "bad.png").write_bytes(png16(0)), "more than 8 bits"),
    "16-bit RGB": (lambda folder: (folder / "bad.png").write_bytes(png16(2)), "more than 8 bits"),
    "CMYK": (saved("CMYK", "bad.jpg"), "is CMYK, not RGB or grey"),
    "not an image": (lambda folder: (folder / "bad.png").write_bytes(b"hello"), "is not a readable image"),
    "empty file": (lambda folder: (folder / "bad.webp").write_bytes(b""), "is not a readable image"),
    "truncated": (lambda folder: (folder / "bad.png").write_bytes(whole_png()[:-200]), "is truncated or damaged"),
}


def one_sentence(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 300
    for part in parts:
        assert part in text


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("zipped", [False, True])
def test_images_that_are_not_8_bit_rgb_or_grey_are_refused_by_name(case: str, zipped: bool, tmp_path: Path) -> None:
    make, reason = BAD_FILES[case]
    folder = tmp_path / "images"
    write_folder(folder, pixels(count=2))
    make(folder)
    source = open_images(write_zip(tmp_path / "images.zip", folder) if zipped else folder)
    assert len(source) == 3
    with pytest.raises(UserError) as error:
        source.batch(range(3))
    one_sentence(error.value, "/bad.", reason)


BAD_ARRAYS = {
    "float": ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "images of float32, not uint8"),
    "NaN": ({"arr_0": np.full((2, 4, 4, 3), np.nan)}, "images of float64, not uint8"),
    "16 bits": ({"arr_0": np.zeros((2, 4, 4, 3), np.uint16)}, "images of uint16, not uint8"),
    "alpha": ({"arr_0": np.zeros((2, 5, 5, 4), np.uint8)}, "NHWC or NCHW with 1 or 3 channels"),
    "no channels": ({"arr_0": np.zeros((2, 5, 5), np.uint8)}, "NHWC or NCHW with 1 or 3 channels"),
    "either layout": ({"arr_0": np.zeros((2, 3, 5, 3), np.uint8)}, "can be read as NHWC and as NCHW"),
    "statistics": ({"mu": np.zeros(3), "sigma": np.eye(3)}, "no array images or arr_0, only mu, sigma"),
    "pickled": ({"arr_0": np.array([{}], dtype=object)}, "allow_pickle=False"),
    "empty": ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_not_uint8_rgb_or_grey_are_refused_by_name(case: str, tmp_path: Path) -> None:
    arrays, reason = BAD_ARRAYS[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError) as error:
        open_images(tmp_path / "bad.npz")
    one_sentence(error.value, "bad.npz", reason)


def test_safetensors_are_nchw_by_convention(tmp_path: Path) -> None:
    square = torch.arange(2 * 3 * 5 * 3, dtype=torch.uint8).reshape(2, 3, 5, 3)
    save_shard(tmp_path / "a.safetensors", {"images": square})
    assert torch.equal(open_images(tmp_path / "a.safetensors").batch(range(2)), square)
    for tensors, reason in (
        ({"images": torch.zeros(2, 5, 5, 3, dtype=torch.uint8)}, "is not NCHW with"),
        ({"images": torch.zeros(2, 3, 5, 5)}, "images of float32"),
        ({"features": torch.zeros(2, 5)}, "only features"),
    ):
        save_shard(tmp_path / "bad.safetensors", tensors)
        with pytest.raises(UserError) as error:
            open_images(tmp_path / "bad.safetensors")
        one_sentence(error.value, "bad.safetensors", reason)


@pytest.mark.parametrize("kind", ["zip", "npz", "npy", "safetensors", "manifest"])
def test_truncated_files_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path, pixels(count=40))
    path = path.with_name("shard-00001.safetensors") if kind == "manifest" else path
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError) as error:
        open_images(path.parent if kind == "manifest" else path)
    one_sentence(error.value, path.name)


def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    path = write("zip", tmp_path, pixels())
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        open_images(path)
    one_sentence(error.value, "images.zip/part", ".png", "cannot be read")


def test_shards_of_different_shapes_are_refused(tmp_path: Path) -> None:
    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for size, shard in enumerate(shards, 4):
        save_shard(shard, {"images": torch.zeros(2, 3, size, size, dtype=torch.uint8)})
    write_json(tmp_path / "manifest.json", {"files": listing(shards, tmp_path)})
    with pytest.raises(UserError, match=r"manifest\.json: its shards hold images of different shapes, \(3, 4, 4\) and"):
        open_images(tmp_path)


def test_missing_empty_short_and_unknown_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar").touch()
    write_json(tmp_path / "run.json", {"files": []})
    array = write("npy", tmp_path, pixels())
    for path, limit, reason in (
        (tmp_path / "none", None, "does not exist"),
        (tmp_path / "empty", None, "holds no images"),
        (tmp_path / "run.json", None, "holds no images"),
        (tmp_path / "a.tar", None, "is not a folder, zip"),
        (array, COUNT + 1, "holds 7 images, so it cannot give exactly 8"),
        (array, 0, "so it cannot give exactly 0"),
    ):
        with pytest.raises(UserError) as error:
            open_images(path, first=limit)
        one_sentence(error.value, path.name, reason)


def test_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.png", b"")
        archive.writestr("A.PNG", b"")
    with pytest.raises(UserError, match=r"twice\.zip: A\.PNG and a\.png differ at most in case"):
        open_images(tmp_path / "twice.zip")
