"""Sources of images to be scored: a folder, a zip, an array file or safetensors shards; equal pixels, equal batches.

A source is a light description, paths and counts, that any number of threads may read. Nothing is converted silently:
what is not 8-bit RGB or grey is refused.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, verified
from dmd2.data.decode import BROKEN, SUFFIXES, eight_bits
from eval.pixels.resize import NONE, Geometry

KEYS = ("pixels", "images", "arr_0")  # where images are latents, pixels are what they are of
ARRAYS = (".npz", ".npy", ".safetensors")
HASHED_AT_ONCE = 1000  # images


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order, read by index.

    `id` is a digest of what they are made of and of the geometry, whatever their names, dates and place. `geometry` is
    what is done to every image. `small` counts the images found that are smaller than the patch of a patch geometry.
    """

    id: str
    count: int
    geometry: Geometry = NONE
    small: int = 0

    def __len__(self) -> int:
        return self.count

    def read(self, indices: range) -> Tensor:
        """`batch` of indices that are inside the source."""
        raise NotImplementedError

    def batch(self, indices: range) -> Tensor:
        """uint8 ``(n, C, H, W)`` on the CPU, C being 1 or 3.

        Raises:
            UserError: an unreadable image, or images of different sizes.
            IndexError: indices outside the source.
        """
        if not indices or indices[0] < 0 or indices[-1] >= len(self) or indices.step < 1:
            raise IndexError(f"{indices} is outside a source of {len(self)} images")
        return self.read(indices)


def open_images(
    path: str | Path, geometry: Geometry = NONE, first: int | None = None, images: int | None = None
) -> ImageSource:
    """Open images for scoring.

    Args:
        path: a folder (searched recursively) or zip of png/jpg/webp/bmp files, sorted by path; an npz or npy (uint8
            NHWC or NCHW, key ``images`` or ``arr_0``); a safetensors file with ``images`` (uint8 NCHW); the
            ``manifest.json`` of a tensor set, or its folder. EXIF orientation is not applied, as in clean-fid.
        geometry: what is done to every image; images of one source must then be equal in size.
        first: use this many images only, from the first on.
        images: number of images that this must give.

    Raises:
        UserError: missing, empty, unreadable, fewer images than `first`, not `images`, or not 8-bit RGB or grey.
    """
    place, kinds = Path(path), "a folder, zip, npz, npy, safetensors or manifest.json of images"
    if not place.exists():
        raise UserError(f"{place} does not exist: give {kinds}")
    manifest = place / "manifest.json" if place.is_dir() else place
    source: ImageSource
    if (place.is_dir() and not manifest.exists()) or place.suffix.lower() == ".zip":
        source = _files(place, geometry, first)
    elif place.suffix.lower() in ARRAYS:
        source = _arrays([place], place, geometry, first)
    elif manifest.suffix == ".json":
        listed = (entry for entry in read_json(manifest).get("files", []) if Path(entry["path"]).suffix in ARRAYS)
        source = _arrays([verified(manifest.parent, entry) for entry in listed], manifest, geometry, first)
    else:
        raise UserError(f"{place} is not {kinds}")
    if images is not None and len(source) != images:
        raise UserError(f"{path} holds {len(source)} images but the protocol asks for exactly {images}")
    return source


def pixel_digest(image: Tensor) -> int:
    """Digest of the pixels of a uint8 image ``(C, H, W)`` that fits int64; a grey image gives that of its replica."""
    rgb, height = image.expand(3, *image.shape[1:]).numpy().tobytes(), str(image.shape[1]).encode()
    return int.from_bytes(hashlib.blake2b(rgb, digest_size=8, person=height).digest(), "big", signed=True)


def _digest(chunks: Iterable[bytes], geometry: Geometry) -> str:
    digest = hashlib.sha256(geometry.name.encode())
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


def _count(found: int, first: int | None, path: Path) -> int:
    """Images to use of those found."""
    if not found:
        raise UserError(f"{path} holds no images (of files, only {', '.join(SUFFIXES)} count)")
    if first is not None and not 1 <= first <= found:
        raise UserError(f"{path} holds {found} images, so it cannot give exactly {first}")
    return first or found


def _listed(place: Path) -> list[str]:
    """Image files in a folder or zip, sorted by the same rule, so that their orders agree."""
    try:
        if place.is_dir():
            names = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
        else:
            with zipfile.ZipFile(place) as archive:
                names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{place} is not a readable zip or folder ({error})") from None
    found = sorted(name for name in names if name.lower().endswith(SUFFIXES) and not Path(name).name.startswith("."))
    spelt: dict[str, str] = {}
    for name in found:
        other = spelt.setdefault(name.lower(), name)
        if other is not name:
            raise UserError(f"{place}: {other} and {name} differ at most in case, so one may be a copy: rename it")
    return found


def _bytes(place: Path, names: Sequence[str]) -> Iterator[bytes]:
    """Bytes of files in a folder or zip; a zip is opened once per call."""
    name = ""
    try:
        if place.is_dir():
            for name in names:
                yield (place / name).read_bytes()
        else:
            with zipfile.ZipFile(place) as archive:
                for name in names:
                    yield archive.read(name)
    except BROKEN as error:
        raise UserError(f"{place}/{name} cannot be read ({error})") from None


def _opened(data: bytes, name: str) -> Image.Image:
    """Header of an encoded image; `UserError` unless it is of 8-bit RGB, grey or palette pixels."""
    try:
        image = eight_bits(data)
    except UserError as error:
        raise UserError(f"{name} {error}") from None
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not a readable image ({type(error).__name__})") from None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        raise UserError(f"{name} has an alpha channel: composite it on a background first")
    if image.mode not in ("RGB", "L", "P", "1"):
        raise UserError(f"{name} is {image.mode}, not RGB or grey: convert it first")
    return image


def _decoded(data: bytes, name: str) -> Tensor:
    """uint8 ``(C, H, W)``: palettes become RGB, grey stays one channel."""
    image = _opened(data, name)
    try:
        image.load()
        pixels = np.asarray(image.convert("RGB" if image.mode == "P" else "L") if image.mode in ("P", "1") else image)
    except BROKEN as error:
        raise UserError(f"{name} is truncated or damaged ({error})") from None
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())  # torch is slower at the same


def _files(place: Path, geometry: Geometry, first: int | None) -> ImageSource:
    """Source of encoded files, those without a patch refused, left out or counted as the geometry says."""
    names, tiny = _listed(place), [False]
    if geometry.is_patch:
        opened = map(_opened, _bytes(place, names), [f"{place}/{name}" for name in names])
        tiny = [geometry.too_small(image.height, image.width) for image in opened]
        if any(tiny) and not geometry.policy:
            found = f"{sum(tiny)} of {len(names)} images have a side below {geometry.side}"
            example, name = names[tiny.index(True)], geometry.name
            raise UserError(f"{place}: {found}, the first is {example}; choose {name}-skip or {name}-official")
        if geometry.policy == "skip":
            names = [name for name, out in zip(names, tiny, strict=True) if not out]
    names = names[: _count(len(names), first, place)]
    digest = _digest((hashlib.sha256(data).digest() for data in _bytes(place, names)), geometry)
    return FileImages(digest, len(names), geometry, sum(tiny), place=place, names=tuple(names))


@dataclass(frozen=True, kw_only=True)
class FileImages(ImageSource):
    """Encoded files in a folder or zip."""

    place: Path
    names: tuple[str, ...]

    def read(self, indices: range) -> Tensor:
        """See `ImageSource`; where grey and RGB meet in one batch the grey ones are replicated."""
        names = [self.names[index] for index in indices]
        pixels = map(_decoded, _bytes(self.place, names), [f"{self.place}/{name}" for name in names])
        images = [self.geometry(image[None])[0] for image in pixels]
        height, width = images[0].shape[1:]
        for name, image in zip(names, images, strict=True):
            if image.shape[1:] != (height, width):
                raise UserError(
                    f"{self.place}/{name} is {image.shape[1]}x{image.shape[2]} but {names[0]} is {height}x{width}: "
                    "choose a geometry that makes them equal, such as square-crop+lanczos-256"
                )
        channels = max(len(image) for image in images)
        return torch.stack([image.expand(channels, -1, -1) for image in images])


@lru_cache(maxsize=2)
def _load(path: Path, changed: int) -> Tensor:
    """uint8 ``(n, C, H, W)`` of an array file as of a time; an npy is mapped, others are read once per process."""
    by_convention = path.suffix.lower() == ".safetensors"  # NCHW, never guessed
    try:
        if by_convention:
            with safe_open(path, "pt") as file:
                images = file.get_tensor(_key(path, file.keys()))
        else:
            images = np.load(path, mmap_mode="c")  # numpy unpickles nothing unless told to
            images = images if isinstance(images, np.ndarray) else images[_key(path, images.files)]
    except (*BROKEN, SafetensorError) as error:
        raise UserError(f"{path} is not a whole array file ({error})") from None
    dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
    if dtype != "uint8":
        raise UserError(f"{path} holds images of {dtype}, not uint8: quantise them, or set data.text.keep_images")
    last, second = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (-1, 1))
    if last and second and not by_convention:
        raise UserError(f"{path}: {shape} can be read as NHWC and as NCHW; store it as safetensors, which is NCHW")
    if not second and (by_convention or not last):
        raise UserError(f"{path}: {shape} is not {'' if by_convention else 'NHWC or '}NCHW with 1 or 3 channels")
    images = torch.as_tensor(images)
    return images if second else images.permute(0, 3, 1, 2)


def _key(path: Path, present: Iterable[str]) -> str:
    for key in KEYS:
        if key in present:
            return key
    raise UserError(f"{path} has no array {' or '.join(KEYS[1:])}, only {', '.join(present) or 'nothing'}")


def _arrays(paths: list[Path], place: Path, geometry: Geometry, first: int | None) -> ImageSource:
    """Source over array files of equal image shape, one after the other."""
    shapes = [_load(path, path.stat().st_mtime_ns).shape for path in paths]
    kinds = sorted({tuple(shape[1:]) for shape in shapes})
    if len(kinds) > 1:
        raise UserError(f"{place}: its shards hold images of different shapes, {' and '.join(map(str, kinds))}")
    found = sum(shape[0] for shape in shapes)
    small = found if found and geometry.too_small(*kinds[0][1:]) else 0
    if small and geometry.policy != "official":
        raise UserError(f"{place}: all {small} images have a side below {geometry.side}: {geometry.name} leaves none")
    count = _count(found, first, place)
    plain = ArrayImages("", count, paths=tuple(paths), lengths=tuple(shape[0] for shape in shapes))
    rows = range(count)
    batches = (plain.read(rows[start : start + HASHED_AT_ONCE]) for start in range(0, count, HASHED_AT_ONCE))
    digest = _digest(chain([str(kinds[0]).encode()], (batch.numpy().tobytes() for batch in batches)), geometry)
    return replace(plain, id=digest, geometry=geometry, small=small)


@dataclass(frozen=True, kw_only=True)
class ArrayImages(ImageSource):
    """Array files one after the other; only their names and lengths are held."""

    paths: tuple[Path, ...]
    lengths: tuple[int, ...]

    def read(self, indices: range) -> Tensor:
        """See `ImageSource`."""
        parts, offset = [], 0
        for path, length in zip(self.paths, self.lengths, strict=True):
            start, stop = max(indices[0] - offset, 0), min(indices[-1] + 1 - offset, length)
            if start < stop:
                parts.append(_load(path, path.stat().st_mtime_ns)[start:stop])
            offset += length
        return self.geometry(torch.cat(parts)[:: indices.step].contiguous())
