"""Detectors on the device: features, distances and CLIP scores of one set within 1e-3 of their SD of the CPU's."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dmd2.data.sets import TensorSet
from eval.detectors.clip import ClipScore
from eval.detectors.detectors import load_detector, train_classifier
from eval.detectors.features import extract, join
from eval.detectors.networks import DinoV2, FeatureNetwork
from eval.detectors.reading import Sampled
from eval.detectors.small_clip import SmallClip, train_clip
from eval.metrics.appearance import brightness, saturation, sharpness
from eval.metrics.frechet import FeatureStats, Reference
from eval.pixels import resize
from eval.pixels.resize import NONE, Geometry
from eval.runs.protocol import Observers
from tests.eval.test_clip import cosines as clip_cosines
from tests.eval.test_clip import write_model
from tests.eval.test_networks import folder, noise, unverified  # noqa: F401

CPU, COUNT = torch.device("cpu"), 80
TOLERANCE = 1e-3  # of the SD over images
NAMES = ["lite0-320@32", "lite0-1280@64", "lite0-112@64", "inception-pt", "inception-2015-12-05",
         "inception-2015-12-05-clean", "clip-small", "digits-classifier", "colours-clip"]  # fmt: skip


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of every detector that is not in a package, random or hardly trained."""
    root = tmp_path_factory.mktemp("weights")
    images = noise(20, 32)
    rows = {"images": images, "labels": torch.arange(20) % 4, "text": torch.randn(20, 5, 6)}
    patch = pytest.MonkeyPatch()
    patch.setattr("eval.detectors.detectors.TRAINING_STEPS", 5)
    train_classifier("digits-classifier", TensorSet(rows), root / "digits-classifier/manifest.json")
    patch.undo()
    train_clip("colours-clip", TensorSet(rows), root / "colours-clip/manifest.json", steps=2)
    write_model(root / "clip-small")
    return root


@pytest.fixture(scope="module")
def inceptions(folder: Path) -> Path:  # noqa: F811
    """Random weights of both Inceptions."""
    return folder


def of(name: str, weights: Path, inceptions: Path, device: torch.device) -> FeatureNetwork:
    if name.startswith("inception"):
        return unverified(name, inceptions, device)
    return load_detector(name, weights, device)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the root mean square SD over images."""
    return float((ours - theirs).abs().max() / theirs.std(dim=0).square().mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_cpu(name: str, weights: Path, inceptions: Path, device: torch.device) -> None:
    if name.startswith("inception-2015") and not torch.cuda.is_available() and device.type == "cuda":
        pytest.skip("TorchScript modules keep their weights where no pretended device reaches: make test-gpu")
    images = noise(5 if name.startswith(("inception", "clip")) else COUNT, 32)
    (ours, logits), (theirs, wanted) = (of(name, weights, inceptions, where)(images) for where in (device, CPU))
    assert apart(ours.cpu(), theirs) < TOLERANCE
    assert (logits is None) == (wanted is None)
    if wanted is not None:
        assert apart(logits.cpu(), wanted) < TOLERANCE


def test_distances_are_those_of_the_cpu(weights: Path, inceptions: Path, device: torch.device) -> None:
    """The whole path of an evaluation: taps of several networks and statistics, shards of features, FD."""
    made = {}
    for where in (CPU, device):
        main, tower = (of(name, weights, inceptions, where) for name in ("digits-classifier", "colours-clip"))
        others = {"clip": (tower, NONE), "patch": (main, Geometry("square-crop+lanczos-32"))}
        observers = Observers(main, NONE, others, ["saturation", "sharpness"])
        images = noise(COUNT, 32).to(where).float() / 127.5 - 1
        source = Sampled(where.type, COUNT, sample=lambda seeds, images=images: images[torch.tensor(seeds)])
        made[where.type] = join(extract(source, observers, weights / "cache", batch=32), COUNT)
    mine, wanted = made[device.type].found, made["cpu"].found
    assert np.array_equal(mine["pixels"], wanted["pixels"]) and {"clip", "patch", "sharpness"} <= mine.keys()
    numbers = [(torch.from_numpy(mine[name]), torch.from_numpy(wanted[name])) for name in mine if name != "pixels"]
    assert all(apart(ours, theirs) < TOLERANCE for ours, theirs in numbers)
    ours, theirs = (found.features.astype(np.float64) for found in (made[device.type], made["cpu"]))
    # Of some columns: an SD of all would need more images than these.
    reference = Reference(FeatureStats.of(theirs[: COUNT // 2, :8]))
    found = [reference.estimate(features[COUNT // 2 :, :8]) for features in (ours, theirs)]
    assert found[1].se is not None
    assert abs(found[0].value - found[1].value) < TOLERANCE * found[1].se


def test_clip_scores_are_those_of_the_cpu(weights: Path, device: torch.device) -> None:
    images, captions = noise(6, 48), [f"a photo of {i} dogs" for i in range(6)]
    ours, theirs = (clip_cosines(ClipScore(weights / "clip-small", where), images, captions) for where in (device, CPU))
    assert float((ours.mean() - theirs.mean()).abs()) < TOLERANCE * float(theirs.std())
    states = torch.randn(6, 5, 6)
    small = [SmallClip.load(weights / "colours-clip/manifest.json", where) for where in (device, CPU)]
    cosines = [
        torch.cosine_similarity(towers.images(noise(6, 32))[0].cpu(), towers.texts(captions, states))
        for towers in small
    ]
    assert float((cosines[0].mean() - cosines[1].mean()).abs()) < TOLERANCE * float(cosines[1].std())


RESIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": resize.clean, "pt": resize.pt,
    **{name: Geometry(name) for name in ("none", "square-crop+lanczos-24", "patch-16", "patch-64-official")},
}  # fmt: skip


@pytest.mark.parametrize("name", RESIZES)
def test_every_resize_is_that_of_the_cpu(name: str, device: torch.device) -> None:
    images = noise(3, 40)
    ours, theirs = RESIZES[name](images.to(device)), RESIZES[name](images)
    assert ours.device == device and ours.dtype == theirs.dtype
    if ours.dtype == torch.uint8 and name != "patch-64-official":  # whose float filter is rounded at the end
        assert torch.equal(ours.cpu(), theirs)
    torch.testing.assert_close(ours.float().cpu(), theirs.float(), rtol=0, atol=1.0 if "official" in name else 1e-2)


def test_dinov2_sees_what_it_sees_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    reduced = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    import timm

    net = timm.create_model("vit_large_patch14_dinov2", img_size=224, num_classes=0, **reduced)
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    where = SimpleNamespace(path=tmp_path / "dino.pth", sha256="0" * 64, verified=False)
    ours, theirs = (DinoV2("dinov2-random", where, **reduced).on(place)(noise(4, 32))[0] for place in (device, CPU))
    assert apart(ours.cpu(), theirs) < TOLERANCE


def test_detectors_of_a_set_are_trained(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.detectors.detectors.TRAINING_STEPS", 5)
    rows = {"images": noise(20, 32), "labels": torch.arange(20) % 4, "text": torch.randn(20, 5, 6)}
    train_classifier("x-classifier", TensorSet(rows), tmp_path / "x-classifier/manifest.json", device)
    train_clip("x-clip", TensorSet(rows), tmp_path / "x-clip/manifest.json", device, steps=2)
    for name in ("x-classifier", "x-clip"):
        assert torch.isfinite(load_detector(name, tmp_path, device)(noise(5, 32))[0]).all()


@pytest.mark.parametrize("statistic", [brightness, saturation, sharpness])
def test_statistics_of_images_are_those_of_the_cpu(statistic: Callable[[Tensor], Tensor], device: torch.device) -> None:
    ours, theirs = (statistic(noise(4, 24).to(where)) for where in (device, CPU))
    assert ours.device == device
    torch.testing.assert_close(ours.cpu(), theirs)
