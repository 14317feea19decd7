"""Networks against their peers: clean-fid for both Inceptions, the raw state dict for EfficientNet-lite0."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from cleanfid import features as cleanfid_features
from cleanfid import inception_pytorch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from safetensors.torch import save_file
from torch import nn

from dmd2.core.errors import UserError
from dmd2.core.files import sha256
from dmd2.core.precision import GPU_PRODUCTS
from eval.detectors import detectors, networks
from eval.detectors.detectors import load_detector
from eval.detectors.features import account
from eval.detectors.networks import NETWORKS, DinoV2, inception_2015, position_embedding
from eval.detectors.weights import Weights, load_state, locate, registry
from eval.pixels import resize

LITE = [name for name in NETWORKS if name.startswith("lite0")]


def unverified(name: str, folder: Path, device: torch.device | str = "cpu") -> networks.FeatureNetwork:
    """A network with the weights that lie in `folder`, whatever they are."""
    entry, build = NETWORKS[name]
    path = folder / entry / registry()[entry].files[0].file
    return build(name, Weights(path, sha256(path), verified=False)).on(device)


def noise(n: int, size: int, channels: int = 3) -> torch.Tensor:
    """Images with structure at all scales, uint8."""
    rng = np.random.default_rng(size)
    coarse = torch.from_numpy(rng.integers(0, 256, (n, channels, 4, 4)).astype(np.float32))
    fine = torch.from_numpy(rng.normal(0, 25, (n, channels, size, size)).astype(np.float32))
    return (F.interpolate(coarse, size=(size, size), mode="bilinear") + fine).clamp(0, 255).to(torch.uint8)


class FakeInception(nn.Module):
    """The call interface of inception-2015-12-05.pt with three random convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 7, stride=4), nn.ReLU(), nn.Conv2d(8, 2048, 5, stride=8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.output = nn.Linear(2048, 1008)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        height, width = img.shape[2], img.shape[3]
        theta = torch.eye(2, 3, device=img.device)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        grid = F.affine_grid(theta.unsqueeze(0).repeat(img.shape[0], 1, 1), [img.shape[0], 3, 299, 299], False)
        x = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights of both Inceptions where the canonical ones would lie."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    script = root / "inception-2015-12-05/inception-2015-12-05.pt"
    script.parent.mkdir()
    torch.jit.script(FakeInception().eval()).save(str(script))
    state = root / "inception-pt" / registry()["inception-pt"].files[0].file
    state.parent.mkdir()
    net = inception_2015()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # else the features shrink to 1e-9
    torch.save(net.state_dict(), state)
    return root


def close_to(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the spread of the features over images."""
    assert ours.shape == theirs.shape and float(theirs.std(dim=0).mean()) > 0
    assert float((ours - theirs).abs().max() / theirs.std(dim=0).square().mean().sqrt()) < 1e-5


def through_cleanfid(mode: str, images: torch.Tensor) -> torch.Tensor:
    resizer = build_resizer(mode)
    arrays = [resizer(image.permute(1, 2, 0).numpy()) for image in images]
    batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        return cleanfid_features.build_feature_extractor(mode, torch.device("cpu"), use_dataparallel=False)(batch)


@pytest.mark.parametrize("size", [64, 299, 512])
@pytest.mark.parametrize(
    ("mode", "name"),
    [("clean", "inception-2015-12-05-clean"), ("legacy_tensorflow", "inception-2015-12-05")],
)
def test_torchscript_inception_gives_cleanfids_features(folder, monkeypatch, mode, name, size) -> None:
    place = str(folder / "inception-2015-12-05")
    monkeypatch.setattr(
        cleanfid_features, "InceptionV3W",
        lambda _path, download, resize_inside: InceptionV3W(place, download=False, resize_inside=resize_inside),
    )  # fmt: skip
    images = noise(4, size)
    close_to(unverified(name, folder)(images)[0], through_cleanfid(mode, images))


def test_torchscript_logits_leave_out_the_bias(folder) -> None:
    images = noise(3, 64)
    detector = unverified("inception-2015-12-05", folder)
    probabilities = detector.base(images.float(), no_output_bias=True)
    assert torch.allclose(detector(images)[1].softmax(dim=1), probabilities, atol=1e-7)
    assert not torch.allclose(probabilities, detector.base(images.float()), atol=1e-6)


def test_ported_inception_gives_cleanfids_features(folder, monkeypatch) -> None:
    monkeypatch.setattr(
        inception_pytorch, "load_state_dict_from_url",
        lambda _url, **_: load_state(folder / "inception-pt" / registry()["inception-pt"].files[0].file),
    )  # fmt: skip
    monkeypatch.setattr(networks.PortedInception, "BATCH", 4)  # the same kernels as clean-fid's batch
    # Of equal contrast a random network can hardly tell images apart, and the spread is the unit of the tolerance.
    contrast = torch.tensor([0.1, 0.4, 0.7, 1.0])[:, None, None, None]
    images = (noise(4, 64) * contrast).to(torch.uint8)
    features, logits = unverified("inception-pt", folder)(images)
    close_to(features, through_cleanfid("legacy_pytorch", images))
    assert logits.shape == (4, 1008)


@pytest.mark.parametrize("name", ["inception-2015-12-05", "inception-2015-12-05-clean", "inception-pt"])
def test_weights_that_are_not_verified_are_never_called_fid(folder, name) -> None:
    detector = unverified(name, folder)
    assert detector.label == f"FD ({name})"
    assert not detector.is_fid and not detector.about["verified"]


def test_verified_inception_is_called_fid_and_nothing_else_is(folder, monkeypatch) -> None:
    path = folder / "inception-2015-12-05/inception-2015-12-05.pt"
    weights = Weights(path, registry()["inception-2015-12-05"].files[0].sha256, verified=True)
    monkeypatch.setattr(detectors, "locate", lambda *_args, **_kwargs: weights)
    assert load_detector("inception-2015-12-05", folder).label == "FID"
    assert load_detector("inception-2015-12-05-clean", folder).is_fid
    monkeypatch.undo()
    assert load_detector("lite0-320@32").label == "FD (lite0-320@32)"


class Seen(networks.FeatureNetwork):
    """Records how products would be computed while it looks at images."""

    def extract(self, images):
        self.seen = [place.fp32_precision for place in GPU_PRODUCTS], images.float().new_ones(2, 2) @ torch.ones(2, 2)
        return images.float().mean(dim=(2, 3)), None


def test_a_detector_is_strict_float32_in_a_process_that_allows_tf32_and_autocast(loose_process, monkeypatch) -> None:
    monkeypatch.setattr(networks.FeatureNetwork, "to", lambda self, *_args: self)
    on_cpu, on_gpu = (Seen("seen", {"verified": False}).on(device) for device in ("cpu", "cuda"))
    assert account(on_cpu) == account(on_gpu)  # so a reference of a CPU node and an evaluation of a GPU node agree
    with torch.autocast("cpu", torch.bfloat16):
        on_cpu(noise(3, 8))
    assert set(on_cpu.seen[0]) == {"ieee"} and on_cpu.seen[1].dtype == torch.float32


def tf_conv(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """Convolution with TensorFlow's asymmetric SAME padding; depthwise where the kernel has one input channel."""
    kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
    return F.conv2d(F.pad(x, [total // 2, total - total // 2] * 2), weight, stride=stride, groups=groups)


def lite0_by_hand(state: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Logits of EfficientNet-lite0 written from its definition, consuming the tensors in file order."""
    rest = iter(state)

    def conv_norm(x: torch.Tensor, stride: int = 1, *, relu: bool = True) -> torch.Tensor:
        x = tf_conv(x, next(rest), stride)
        weight, bias, mean, variance, _ = (next(rest) for _ in range(5))
        x = F.batch_norm(x, mean, variance, weight, bias, eps=1e-3)
        return F.relu6(x) if relu else x

    x = conv_norm(x, 2)
    for stage, (stride, depth) in enumerate([(1, 1), (2, 2), (2, 2), (2, 3), (1, 3), (2, 4), (1, 1)]):
        for block in range(depth):
            before, expanded = x, conv_norm(x) if stage else x
            x = conv_norm(conv_norm(expanded, stride if block == 0 else 1), relu=False)
            x = x + before if block else x
    x = conv_norm(x).mean(dim=(2, 3))
    return F.linear(x, next(rest), next(rest))


def test_lite0_equals_its_definition_on_the_packaged_tensors() -> None:
    state = list(load_state(locate("efficientnet-lite0").path).values())
    assert len(state) == 296
    images = noise(4, 64)
    by_hand = lite0_by_hand(state, images.float() / 127.5 - 1)
    logits = load_detector("lite0-1280@64")(images)[1]
    assert float(by_hand.std()) > 0.3
    assert torch.allclose(logits, by_hand, atol=1e-4)


def test_lite0_taps_equal_timms_own_forward() -> None:
    images = noise(3, 48)
    net = load_detector("lite0-1280@64").net
    x = resize.clean(images, 64) / 127.5 - 1
    with torch.no_grad():
        last, stages = net.forward_intermediates(x, extra_blocks=True)
        means = {channels.shape[1]: channels.mean(dim=(2, 3)) for channels in [*stages, last]}
        logits = net(x)
    for name, d in (("lite0-112@64", 112), ("lite0-320@64", 320), ("lite0-1280@64", 1280)):
        assert torch.allclose(load_detector(name)(images)[0], means[d], atol=1e-4)
    assert torch.allclose(load_detector("lite0-1280@64")(images)[1], logits, atol=1e-4)


@pytest.mark.parametrize("name", [*LITE, "inception-2015-12-05"])
def test_features_do_not_depend_on_the_batch(name, folder) -> None:
    detector = load_detector(name) if name in LITE else unverified(name, folder)
    images = noise(64 if name in LITE else 21, 28)
    whole = detector(images)[0]
    for size, count in ((1, 3), (7, 21)):
        assert torch.equal(torch.cat([detector(part)[0] for part in images[:count].split(size)]), whole[:count])


def test_grey_images_equal_their_replication() -> None:
    detector, grey = load_detector("lite0-320@32"), noise(3, 28, channels=1)
    assert torch.equal(detector(grey)[0], detector(grey.repeat(1, 3, 1, 1))[0])


@pytest.mark.parametrize("name", LITE)
def test_about_names_everything_a_number_depends_on(name) -> None:
    detector = load_detector(name)
    features, logits = detector(noise(2, 28))
    about = detector.about
    assert features.dtype == torch.float32 and features.shape == (2, about["features"])
    assert about["input"] == int(name.rpartition("@")[2]) and f"-{about['features']}@" in name
    assert about["weights"] == registry()["efficientnet-lite0"].files[0].sha256 and about["verified"]
    assert (logits is None) == (about["classes"] is None)


def test_float_images_and_an_alpha_channel_are_refused() -> None:
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 8, 8, dtype=torch.uint8)):
        with pytest.raises(UserError, match=rf"takes uint8 images .* of shape \(1, {images.shape[1]}, 8, 8\)"):
            load_detector("lite0-320@32")(images)


REDUCED = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """Small random DINOv2 in the layout of the published file: 37 x 37 positions and a mask token."""
    torch.manual_seed(0)
    net = timm.create_model("vit_large_patch14_dinov2", img_size=518, num_classes=0, **REDUCED)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("dino") / "dinov2.safetensors"
    save_file({**net.state_dict(), "mask_token": torch.zeros(1, 32)}, path)
    return path, net


def test_dinov2_class_token_from_local_weights(dino) -> None:
    path, net = dino
    detector = DinoV2("dinov2-random", Weights(path, "0" * 64, verified=False), **REDUCED).on("cpu")
    images = noise(2, 224)
    x = images.float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        tokens = net.patch_embed.proj(x).flatten(2).mT
        tokens = torch.cat([net.cls_token.expand(2, -1, -1), tokens], 1) + position_embedding(net.pos_embed, 16)
        expected = net.norm(net.blocks(tokens))[:, 0]
    features = detector(images)[0]
    assert features.shape == (2, 32) and not detector.is_fid
    assert torch.allclose(features, expected, atol=1e-5)


def test_position_embedding_samples_at_dinov2s_scale() -> None:
    embedding = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    positions = ((torch.arange(16.0) + 0.5) * 37 / 16.1) * 2 / 37 - 1
    grid = torch.stack(torch.meshgrid(positions, positions, indexing="xy"), dim=-1)[None]
    square = embedding[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    expected = F.grid_sample(square, grid, mode="bicubic", padding_mode="border", align_corners=False)
    resampled = position_embedding(embedding, 16)
    assert torch.equal(resampled[:, 0], embedding[:, 0])
    assert torch.allclose(resampled[:, 1:], expected.flatten(2).mT, atol=1e-4)


def test_state_dict_of_another_network_is_named(dino) -> None:
    with pytest.raises(UserError, match=r"dinov2\.safetensors does not fit this network: .*"):
        DinoV2("other", Weights(dino[0], "", verified=False), **{**REDUCED, "depth": 3})
    with pytest.raises(UserError, match="does not hold the 296 tensors of this network"):
        networks.Lite0("other", Weights(dino[0], "", verified=False), 320, 32)
