"""LPIPS against a float64 formula written out here, with random VGG weights in temporary files."""

import pytest
import torch
import torch.nn.functional as F

from dmd2.core.errors import UserError
from dmd2.networks.lpips import LINEAR_FILE, NAME, VGG_FILE, Lpips, _prepare
from eval.detectors.weights import registry

# Output channels of VGG16's convolutions, "pool" between its blocks, "tap" after the fifth of LPIPS's layers 1_2 ... 5_3.
PLAN = [64, 64, "tap", "pool", 128, 128, "tap", "pool", 256, 256, 256, "tap", "pool", 512, 512, 512, "tap", "pool",
        512, 512, 512, "tap"]  # fmt: skip
MEAN, STD = (torch.tensor(v).double().reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def vgg_state():
    """A full torchvision VGG16 state; the classifier's 124M weights are one zero, expanded."""
    g, state, index, width = torch.Generator().manual_seed(0), {}, 0, 3
    for step in PLAN:
        if step == "pool":
            index += 1
        elif step != "tap":
            scale = (2 / (9 * width)) ** 0.5
            state[f"features.{index}.weight"] = scale * torch.randn(step, width, 3, 3, generator=g)
            state[f"features.{index}.bias"] = 0.1 * torch.randn(step, generator=g)
            index, width = index + 2, step
    for layer, shape in ((0, (4096, 25088)), (3, (4096, 4096)), (6, (1000, 4096))):
        state[f"classifier.{layer}.weight"] = torch.zeros(1, 1).expand(shape)
        state[f"classifier.{layer}.bias"] = torch.zeros(1).expand(shape[0])
    return state


def linear_weights():
    """Larger for the deep layers, whose random features differ less, so that every layer counts."""
    g = torch.Generator().manual_seed(1)
    sizes = zip((64, 128, 256, 512, 512), (1, 6, 50, 500, 3000), strict=True)
    return [scale * torch.rand(1, width, 1, 1, generator=g) for width, scale in sizes]


def write_weights(folder):
    (folder / NAME).mkdir(parents=True)
    torch.save(vgg_state(), folder / NAME / VGG_FILE)
    torch.save(linear_weights(), folder / NAME / LINEAR_FILE)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def lpips(files):
    return Lpips(files)


def taps(images, state):
    """Channel-normalised activations of the five layers, float64; images in [0, 1]."""
    x, index, found = (images.double() - MEAN) / STD, 0, []
    for step in PLAN:
        if step == "pool":
            x, index = F.avg_pool2d(x, 2), index + 1
        elif step == "tap":
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        else:
            weight, bias = (state[f"features.{index}.{kind}"].double() for kind in ("weight", "bias"))
            x, index = F.relu(F.conv2d(x, weight, bias, padding=1)), index + 2
    return found


def layer_distances(a, b):
    """Each layer's part of the LPIPS of images in [0, 1], (layers, images)."""
    state = vgg_state()
    pairs = zip(taps(a, state), taps(b, state), linear_weights(), strict=True)
    return torch.stack([((x - y).square() * weight.double()).sum(1).mean((1, 2)) for x, y, weight in pairs])


def distance(a, b):
    """LPIPS of images in [0, 1], mean over images."""
    return layer_distances(a, b).sum(0).mean().item()


def pictures(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def upsampled(images):
    return F.interpolate(images.double(), size=(224, 224), mode="bilinear", align_corners=False)


def test_the_random_weights_let_every_layer_count():
    parts = layer_distances(pictures(0, 1, 3, 32, 32) / 2 + 0.5, pictures(1, 1, 3, 32, 32) / 2 + 0.5)
    assert (parts / parts.sum()).min() > 0.03


def test_core_equals_the_formula_on_images_in_0_1(lpips):
    a, b = pictures(2, 3, 3, 32, 32) / 2 + 0.5, pictures(3, 3, 3, 32, 32) / 2 + 0.5
    assert lpips.loss(a, b).item() == pytest.approx(distance(a, b), rel=1e-4)


def test_small_colour_images_are_rescaled_and_upsampled_to_224(lpips):
    a, b = pictures(4, 1, 3, 32, 32), pictures(5, 1, 3, 32, 32)
    expected = distance(upsampled(a) / 2 + 0.5, upsampled(b) / 2 + 0.5)
    assert lpips(a, b).item() == pytest.approx(expected, rel=1e-3)


def test_preparation_repeats_grey_and_keeps_large_images():
    grey, large = pictures(6, 2, 1, 8, 8), pictures(7, 1, 3, 256, 256)
    assert _prepare(grey).shape == (2, 3, 224, 224)
    torch.testing.assert_close(_prepare(grey)[:, 2].double(), upsampled(grey)[:, 0] / 2 + 0.5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(_prepare(large), large / 2 + 0.5)


@pytest.fixture(scope="module")
def small(lpips):
    """The distance without the costly upsampling."""
    return lambda a, b: lpips.loss(a / 2 + 0.5, b / 2 + 0.5)


def test_distance_of_an_image_to_itself_is_zero(small):
    a = pictures(8, 1, 3, 32, 32)
    assert small(a, a.clone()).item() == 0


def test_gradient_flows_into_the_image_and_no_weight_is_trained(lpips, small):
    a = pictures(9, 1, 3, 32, 32).requires_grad_()
    small(a, pictures(10, 1, 3, 32, 32)).backward()
    assert a.grad.abs().max() > 0
    assert not any(p.requires_grad for p in lpips.parameters())


@pytest.mark.parametrize("missing", [VGG_FILE, LINEAR_FILE])
def test_a_missing_weight_file_is_named_with_place_and_command(files, tmp_path, missing):
    (tmp_path / NAME).mkdir()
    for name in (VGG_FILE, LINEAR_FILE):
        if name != missing:
            (tmp_path / NAME / name).symlink_to(files / NAME / name)
    with pytest.raises(UserError) as error:
        Lpips(tmp_path)
    assert f"{tmp_path}/lpips-vgg16/{missing}" in str(error.value)
    assert str(error.value).endswith("dmd2 eval weights lpips-vgg16")


def test_weights_of_another_network_or_damaged_ones_are_named(files, tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / LINEAR_FILE).symlink_to(files / NAME / LINEAR_FILE)
    vgg = tmp_path / NAME / VGG_FILE
    vgg.write_bytes((files / NAME / VGG_FILE).read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{VGG_FILE} is not a readable weight file"):
        Lpips(tmp_path)
    torch.save({"features.0.weight": torch.zeros(1)}, vgg)
    with pytest.raises(UserError, match=rf"{VGG_FILE} holds another network"):
        Lpips(tmp_path)


def test_the_listed_weights_are_the_files_that_are_read():
    assert [file.file for file in registry()[NAME].files] == [VGG_FILE, LINEAR_FILE]
    assert registry()[NAME].files[0].sha256.startswith("397923af")  # torch.hub's prefix in the file's name
