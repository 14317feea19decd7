"""The digits detector and the evaluation protocol on real digits."""

import json

import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.data.prepare import prepare_labelled
from dmd2.data.sets import load_set
from dmd2.experiment.tables import load_base
from eval.detectors.detectors import load_detector, record_network, train_classifier
from eval.metrics.frechet import FeatureStats, frechet_distance


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    real = load_set(prepare_labelled(load_base("digits").data, folder / "real"))
    train_classifier("digits-classifier", real, folder / "weights/digits-classifier/manifest.json")
    return folder, real


def test_classifier_knows_held_out_digits(digits) -> None:
    manifest = json.loads((digits[0] / "weights/digits-classifier/manifest.json").read_text())
    assert manifest["held_out_accuracy"] > 0.95


def test_training_it_again_gives_the_same_weights(digits, tmp_path) -> None:
    train_classifier("digits-classifier", digits[1], tmp_path / "manifest.json")
    first = json.loads((digits[0] / "weights/digits-classifier/manifest.json").read_text())["files"]
    assert json.loads((tmp_path / "manifest.json").read_text())["files"] == first


def test_distance_orders_sets_sanely(digits) -> None:
    folder, real = digits
    detector = load_detector("digits-classifier", folder / "weights")
    reference = FeatureStats.of(detector(real.tensors["images"])[0])
    images, labels = real.tensors["images"], real.tensors["labels"]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def distance(changed: torch.Tensor) -> float:
        return frechet_distance(FeatureStats.of(detector(changed)[0]), reference)

    slightly, strongly = ((images + s * noise).clamp(0, 255).to(torch.uint8) for s in (10, 60))
    half, single = images[::2], images[labels == 3]
    assert distance(images) < 1e-6
    assert distance(half) < distance(slightly) < distance(strongly)
    assert distance(half) < distance(single)


def test_features_do_not_depend_on_the_batch(digits) -> None:
    detector = load_detector("digits-classifier", digits[0] / "weights")
    images = digits[1].tensors["images"][:64]
    pieces = torch.cat([detector(part)[0] for part in images.split(7)])
    assert torch.allclose(detector(images)[0], pieces, atol=1e-5)


def test_classifier_tells_its_provenance_and_is_no_fid(digits) -> None:
    detector = load_detector("digits-classifier", digits[0] / "weights")
    listed = json.loads((digits[0] / "weights/digits-classifier/manifest.json").read_text())["files"][0]["sha256"]
    assert detector.about["weights"] == listed and detector.about["verified"] and detector.about["features"] == 64
    assert detector.label == "FD (digits-classifier)" and not detector.is_fid


def test_network_becomes_a_manifest_and_a_reference(digits, tmp_path) -> None:
    record_network("lite0-320@32", tmp_path / "lite0-320@32/manifest.json")
    entry = json.loads((tmp_path / "lite0-320@32/manifest.json").read_text())
    assert entry["kind"] == "network" and entry["files"][0]["sha256"] == entry["weights"]
    stats = FeatureStats.of(load_detector("lite0-320@32")(digits[1].tensors["images"][:20])[0])
    assert stats.count == 20 and stats.mean.shape == (320,)


def test_missing_detector_says_where_it_should_be(tmp_path) -> None:
    with pytest.raises(UserError, match=r"nothing/manifest\.json is missing"):
        load_detector("nothing", tmp_path)
