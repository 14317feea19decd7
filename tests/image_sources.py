"""Five pictures with labels or captions, written as every kind of source; and what reading such a source gives."""

import io
import zipfile

import datasets
import lmdb
import numpy as np
import pytest
from PIL import Image

from dmd2.core.errors import UserError
from dmd2.data.readers import read
from dmd2.experiment.config import Data

SIZE, COUNT = 8, 5
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
LABELS = [3, 0, 2, 2, 1]
CAPTIONS = ["a cat", "caf\u00e9 at night", "NA", "two\nlines", "\u732b"]
LATENTS = RNG.standard_normal((COUNT, 4, SIZE, SIZE)).astype(np.float16)


def labelled(kind, path, **changes):
    source = {key: changes.pop(key) for key in ("split", "image", "label", "resize") if key in changes}
    values = {"name": "set", "resolution": SIZE, "channels": 3, "classes": 4, **changes}
    return Data(source={"kind": kind, "path": str(path), **source}, **values)


def captioned(kind, path, latents=False, channels=3, **source):
    text = {"pipeline": {"name": "p"}, "latents": latents}
    source = {"kind": kind, "path": str(path), **source}
    return Data(name="set", source=source, resolution=SIZE, channels=channels, classes=0, text=text)


def whole(config, parts=1):
    """All images of a source and their labels or captions, part after part."""
    blocks = [block for part in range(parts) for block in read(config, None, part, parts)]
    assert all(len(images) == len(conditions) for images, conditions in blocks)
    return np.concatenate([images for images, _ in blocks]), [value for _, values in blocks for value in values]


def assert_read(config, images=PIXELS, conditions=None, parts=1):
    found, values = whole(config, parts)
    assert found.dtype == images.dtype
    np.testing.assert_array_equal(found, images)
    assert values == list((CAPTIONS if config.text else LABELS) if conditions is None else conditions)
    assert {type(value) for value in values} == {str if config.text else int}


def told(config, match, parts=1):
    with pytest.raises(UserError, match=match) as raised:
        whole(config, parts)
    assert str(raised.value).startswith("data set: ") and "\n" not in str(raised.value)


def encoded(image, form="png"):
    """An image, or pixels CHW, in a format of files."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.transpose(1, 2, 0).squeeze())
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def write_files(place, files):
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (place / name).write_bytes(content)
    return place


def write_zip(place, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(place, "w", method) as archive:
        for name in reversed(files):
            archive.writestr(name, files[name])
    return place


def write_lmdb(place, text=False, changes=None, **options):
    """The official convention; a change of None leaves a key out."""
    arrays = {"latents": LATENTS, "prompts": CAPTIONS} if text else {"images": PIXELS, "labels": np.array(LABELS)}
    rows = {f"{array}_shape": b"5" for array in arrays}
    rows |= {"latents_shape": b"5 4 8 8"} if text else {"images_shape": b"5 3 8 8"}
    for array, values in arrays.items():
        rows |= {f"{array}_{i}_data": v.encode() if array == "prompts" else v.tobytes() for i, v in enumerate(values)}
    with (
        lmdb.open(str(place), map_size=1 << 26, **options) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in {**rows, **(changes or {})}.items():
            if value is not None:
                transaction.put(key.encode(), value)
    return captioned("lmdb", place, latents=True, channels=4) if text else labelled("lmdb", place)


def hub_set(column, values, kind):
    """A set of the library datasets with that column beside the images."""
    features = datasets.Features({"image": datasets.Image(), column: kind})
    images = [Image.fromarray(image.transpose(1, 2, 0)) for image in PIXELS]
    return datasets.Dataset.from_dict({"image": images, column: values}, features=features)
