"""Resizers against Pillow, clean-fid and torch-fidelity; geometry against values worked out by hand."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanfid.resize import build_resizer, make_resizer
from PIL import Image
from torch import Tensor

from dmd2.core.errors import UserError
from eval.pixels.resize import Geometry, by_products, clean, pt, resize_uint8, square_crop

FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


def clean_by_products(images: Tensor, size: int) -> Tensor:
    """What a GPU computes for `clean`."""
    return by_products(images, size, "bicubic", torch.float32).clamp(0, 255)


def noise(height: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def nchw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def nhwc(images: Tensor) -> np.ndarray:
    return images[0].permute(1, 2, 0).contiguous().numpy()


@pytest.mark.parametrize("name", ["lanczos", "bicubic"])
@pytest.mark.parametrize("source", [28, 64, 299, 480])
def test_uint8_filters_give_the_bytes_of_pillow(source: int, name: str) -> None:
    checkers = np.repeat((np.indices((source, source)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    for image in (noise(source, source), checkers):
        for target in (224, 256, 299, 512):
            expected = np.asarray(Image.fromarray(image).resize((target, target), FILTERS[name]))
            np.testing.assert_array_equal(nhwc(resize_uint8(nchw(image), target, name)), expected)
            np.testing.assert_array_equal(nhwc(by_products(nchw(image), target, name, torch.uint8)), expected)


@pytest.mark.parametrize(("source", "target", "digest"), [(64, 299, "0d1b2bfea9"), (480, 256, "5e65ad06bf")])
def test_lanczos_bytes_are_those_of_pillow_9_to_13(source: int, target: int, digest: str) -> None:
    resized = nhwc(resize_uint8(nchw(noise(source, source)), target, "lanczos"))
    assert hashlib.sha256(resized.tobytes()).hexdigest()[:10] == digest


def test_images_are_resized_alike_alone_and_in_a_batch() -> None:
    images = torch.cat([nchw(noise(40, 40, seed)) for seed in range(5)])
    resizers = (resize_uint8, clean, clean_by_products)
    together = [resize(images, 32) for resize in resizers]
    apart = [torch.cat([resize(image[None], 32) for image in images]) for resize in resizers]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_large_batches_are_filtered_in_parts(monkeypatch) -> None:
    images = torch.cat([nchw(noise(40, 40, seed)) for seed in range(5)])
    whole = by_products(images, 32, "lanczos", torch.uint8)
    monkeypatch.setattr("eval.pixels.resize.AT_ONCE", 2 * 3 * 40 * 40)
    assert torch.equal(by_products(images, 32, "lanczos", torch.uint8), whole)


def test_grey_replicas_and_columns_first_are_resized_like_copies() -> None:
    grey = nchw(noise(40, 30))[:, :1]
    for view in (grey.expand(2, 3, -1, -1), grey.mT):
        assert torch.equal(clean(view, 50), clean(view.contiguous(), 50))
        square = view[..., :30, :30]
        assert torch.equal(resize_uint8(square, 50), resize_uint8(square.contiguous(), 50))


def test_equal_sizes_change_nothing() -> None:
    image = nchw(noise(64, 64))
    assert all(torch.equal(resize_uint8(image, 64, name), image) for name in ("lanczos", "bicubic"))
    assert all(torch.equal(resize(image, 64), image.float()) for resize in (pt, clean, clean_by_products))


def test_rectangles_are_refused_by_the_uint8_filters() -> None:
    with pytest.raises(UserError, match="40x60 cannot be resized to 32x32 reproducibly: crop"):
        resize_uint8(nchw(noise(40, 60)), 32)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 64), (299, 299), (512, 512), (100, 340), (700, 310)])
def test_clean_is_clean_fids_resizer(height: int, width: int) -> None:
    image = noise(height, width)
    expected = make_resizer("PIL", False, "bicubic", (299, 299))(image)
    for resized in (clean(nchw(image)), clean_by_products(nchw(image), 299), clean(nchw(image).double())):
        assert resized.dtype == torch.float32
        assert np.abs(nhwc(resized) - expected).max() < 2e-5
    plain = F.interpolate(nchw(image).float(), size=(299, 299), mode="bicubic").clamp(0, 255)
    assert (height, width) == (299, 299) or np.abs(nhwc(plain) - expected).max() > 1  # the tolerance has teeth


def test_pt_of_two_pixels() -> None:
    step = torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8)[None, None]
    assert pt(step, 4)[0, 0, 3].tolist() == [0, 63.75, 191.25, 255]


@pytest.mark.parametrize("source", [28, 64, 299, 512])
def test_pt_is_clean_fids_legacy_pytorch(source: int) -> None:
    image = noise(source, source)
    np.testing.assert_allclose(nhwc(pt(nchw(image))), build_resizer("legacy_pytorch")(image), rtol=0, atol=1e-4)


def test_square_crop_rounds_its_corner_to_even_as_torchvision_does() -> None:
    columns = torch.arange(5).expand(1, 1, 2, 5)
    assert square_crop(columns)[0, 0, 0].tolist() == [2, 3]  # (5 - 2) / 2 = 1.5 -> 2
    assert square_crop(columns[..., :3])[0, 0, 0].tolist() == [0, 1]  # 0.5 -> 0
    assert square_crop(columns.mT).shape == (1, 1, 2, 2)


def test_square_crop_and_lanczos_are_those_of_pillow() -> None:
    image = noise(50, 81)
    cropped = Image.fromarray(image).crop((16, 0, 66, 50))  # (81 - 50) / 2 = 15.5 -> 16
    expected = np.asarray(cropped.resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(nhwc(Geometry("square-crop+lanczos-32")(nchw(image))), expected)


def test_a_patch_is_the_centre_of_the_original_pixels() -> None:
    image = noise(300, 305)
    np.testing.assert_array_equal(nhwc(Geometry("patch-299")(nchw(image))), image[0:299, 3:302])
    np.testing.assert_array_equal(nhwc(Geometry("patch-16")(nchw(noise(32, 40)))), noise(32, 40)[8:24, 12:28])


def test_images_below_299_pixels_follow_the_policy() -> None:
    image = nchw(noise(298, 400))
    official = Geometry("patch-299-official")(image)
    assert official.dtype == torch.uint8 and (official - clean(image)).abs().max() <= 0.5
    assert official.shape == (1, 3, 299, 299)
    assert not Geometry("patch-298").too_small(298, 400)
    for name in ("patch-299", "patch-299-skip"):
        assert Geometry(name).too_small(298, 400)
        with pytest.raises(UserError, match="298x400 has no 299x299 patch"):
            Geometry(name)(image)


@pytest.mark.parametrize(
    "name", ["", "square", "square-crop+lanczos-0", "square-crop+bicubic-256", "patch-0", "patch-299-crop", "none "]
)
def test_other_geometries_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="there is no geometry"):
        Geometry(name)
