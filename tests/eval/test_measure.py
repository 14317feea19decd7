"""Metrics of feature sets: known values, degenerate sets, and refusals across protocols."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmd2.core.errors import UserError
from dmd2.experiment.metrics import METRICS, of_option
from eval.detectors.features import FeatureSet
from eval.detectors.reference import Engine, holds_moments
from eval.metrics import measures
from eval.metrics.estimate import Estimate
from eval.metrics.frechet import FeatureStats, Reference, between_samples, save_stats
from eval.metrics.measures import Sample
from eval.metrics.measures import measure as numbers_of
from eval.pixels.images import open_images
from eval.pixels.resize import NONE, Geometry
from eval.score.call import Arm
from eval.score.options import Options
from eval.score.record import provenance, verdict, warnings
from tests.eval.test_features import Quadrants, draw, features_of


class Canonical(Quadrants):
    """As `Quadrants`, posing as the network whose distance may be called FID."""

    name, label, is_fid = "inception", "FID", True


FEATURES = [m.option for m in METRICS.values() if m.option and m.sees == "detector"]
COMPARE = [name for name in FEATURES if "reference" in of_option(name).needs]


def measure(sample, reference, names, classes=None, reference_sampled=False):
    """Metrics by name of the number; of precision and recall, those of the metric named last."""
    labels = None if classes is None else torch.arange(len(sample)) % classes
    logits, detector = sample.found.get("logits"), sample.detector["name"]
    seen = {"detector": Sample(sample.features, logits, detector, reference, labels, labels, reference_sampled)}
    return {number: e for name in names for number, e in numbers_of(of_option(name), seen, {}).items()}


def compare(a, b, *args):
    theirs = measure(b, *args)
    return {name: theirs[name].minus(ours) for name, ours in measure(a, *args).items()}


def arm(features: FeatureSet) -> Arm:
    return Arm("a", features.source, features.duplicates, features, {})


def options(**changes) -> Options:
    return Options(("fd",), **changes)


@pytest.fixture
def engine(tmp_path) -> Engine:
    return Engine(Quadrants(), NONE, tmp_path / "cache")


def saved(path, seeds):
    save_file({"images": draw(list(seeds))}, path)
    return path


def sample(seeds, detector=None) -> FeatureSet:
    return features_of(draw(list(seeds)), detector=detector)


def reference(features: FeatureSet) -> Reference:
    return Reference(
        FeatureStats.of(features.features), features.features, {"path": "r", "images": len(features)}, features.detector
    )


def test_every_metric_has_a_finite_value_and_a_name(engine, tmp_path) -> None:
    ref = engine.reference(saved(tmp_path / "r.safetensors", range(500, 800)))
    found = measure(sample(range(200)), ref, FEATURES, classes=10)
    assert list(found) == ["fd", "kid", "precision", "recall", "density", "coverage", "is", "accuracy"]
    assert all(np.isfinite(e.value) and e.se is not None and e.n == 200 for e in found.values())


def test_distance_of_shifted_features_is_the_shift() -> None:
    a = sample(range(300))
    b = FeatureSet({**a.found, "features": a.features + np.float32(2)}, a.source, a.detector)
    assert measure(b, reference(a), ["fd"])["fd"].value == pytest.approx(12 * 4, rel=1e-5)
    # the paired difference of a set to itself shifted, and its opposite
    there, back = compare(a, b, reference(a), ["fd"]), compare(b, a, reference(a), ["fd"])
    assert there["fd"].value == pytest.approx(48, rel=1e-5)
    assert there["fd"].value == -back["fd"].value


@pytest.mark.parametrize("make", ["two", "fewer than dimensions", "constant", "one repeated"])
@pytest.mark.parametrize("metric", ["fd", "kid", "prdc", "pr", "is", "accuracy"])
def test_degenerate_sets_give_a_number_or_a_sentence(make, metric) -> None:
    ours = {
        "two": sample(range(2)),
        "fewer than dimensions": sample(range(8)),
        "constant": features_of(torch.full((20, 3, 8, 8), 7, dtype=torch.uint8)),
        "one repeated": features_of(draw([3] * 20)),
    }[make]
    for ref in (reference(sample(range(100, 200))), reference(ours)):
        try:
            found = measure(ours, ref, [metric], classes=10)
        except UserError as error:
            assert re.fullmatch(r"[^\n]{10,200}", str(error))
        else:
            assert found and all(np.isfinite(e.value) for e in found.values())


@pytest.mark.parametrize(("option", "function"), [("kid", "kid"), ("prdc", "prdc"), ("pr", "prdc")])
def test_kernels_and_neighbours_are_computed_on_the_device(option, function, monkeypatch) -> None:
    seen = []

    def on(*sides, **_):
        seen.extend(side.device.type for side in sides[:2])
        return dict.fromkeys(range(4))

    monkeypatch.setattr(measures, function, on)
    rows = np.random.default_rng(0).normal(size=(9, 4))
    reference = Reference(FeatureStats.of(rows), rows)
    numbers_of(of_option(option), {"detector": Sample(rows, None, "d", reference, device="meta")}, {})
    assert seen == ["meta", "meta"]


@pytest.mark.parametrize("option", ["kid", "prdc", "pr"])
def test_features_that_do_not_fit_on_the_device_are_compared_on_the_cpu(option, monkeypatch) -> None:
    def full(sample, option, sides=Sample.sides):
        if torch.device(sample.device).type != "cpu":
            raise torch.OutOfMemoryError("full")
        return sides(sample, option)

    rows = np.random.default_rng(0).normal(size=(30, 4))
    sample = Sample(rows[:15], None, "d", Reference(FeatureStats.of(rows[15:]), rows[15:]))
    expected = numbers_of(of_option(option), {"detector": sample}, {})
    monkeypatch.setattr(Sample, "sides", full)
    found = numbers_of(of_option(option), {"detector": dataclasses.replace(sample, device="cuda")}, {})
    assert {name: e.value for name, e in found.items()} == {name: e.value for name, e in expected.items()}


def test_accuracy_without_classes_or_classifier_is_refused() -> None:
    with pytest.raises(UserError, match="needs the number of classes"):
        measure(sample(range(9)), reference(sample(range(9))), ["accuracy"])
    a = sample(range(9))
    plain = FeatureSet({"features": a.features}, a.source, a.detector)
    with pytest.raises(UserError, match="quadrants does not classify"):
        measure(plain, reference(a), ["is"])


def test_what_compares_with_nothing_needs_no_reference() -> None:
    a, ref = sample(range(200)), reference(sample(range(300, 500)))
    assert measure(a, None, ["is", "accuracy"], 10) == measure(a, ref, ["is", "accuracy"], 10)
    assert compare(a, a, None, ["accuracy"], 10)["accuracy"].value == 0
    assert "dimensions" not in " ".join(warnings(arm(sample(range(20))), None, options()))
    for metric in COMPARE:
        with pytest.raises(UserError, match="compare with a reference need"):
            measure(a, None, [metric])
    for metric in ("fd", "kid"):
        with pytest.raises(UserError, match="compare with a reference need"):
            compare(a, a, None, [metric])


def test_sampling_of_the_reference_is_counted_where_it_is_a_sample() -> None:
    a, r = sample(range(200)), sample(range(300, 500))
    fixed = measure(a, reference(r), ["fd"])["fd"]
    both = measure(a, reference(r), ["fd"], reference_sampled=True)["fd"]
    assert both == between_samples(a.features, r.features)
    assert both.value == pytest.approx(fixed.value) and both.se > fixed.se and both.bias > fixed.bias
    moments = Reference(FeatureStats.of(r.features), None, {"path": "r.json", "images": 200}, r.detector)
    with pytest.raises(UserError, match="--reference-sampled needs images as its reference, but r.json holds moments"):
        measure(a, moments, ["fd"], reference_sampled=True)
    few = reference(sample(range(20)))
    assert measure(a, few, ["fd"], reference_sampled=True)["fd"].se is None
    assert "below 24 its sampling error is not known" in warnings(arm(a), few, options(reference_sampled=True))[-1]
    for sampled, words in ((False, "as fixed"), (True, "counts the sampling of the reference")):
        assert words in provenance(arm(a), reference(r), options(reference_sampled=sampled), {})["interval"]


def test_moments_saved_once_serve_as_reference(engine, tmp_path) -> None:
    path = saved(tmp_path / "r.safetensors", range(300))
    out = tmp_path / "refs/r/manifest.json"
    engine.save_moments(open_images(path), path, out)
    assert holds_moments(out) and holds_moments(out.parent) and not holds_moments(path)
    for place in (out, out.parent):
        ref = engine.reference(place)
        assert ref.stats.count == 300
        direct = measure(sample(range(900, 1000)), engine.reference(path), ["fd"])["fd"]
        assert measure(sample(range(900, 1000)), ref, ["fd"])["fd"].value == pytest.approx(direct.value)
    with pytest.raises(UserError, match="holds moments only"):
        measure(sample(range(9)), ref, ["kid"])
    with pytest.raises(UserError, match="whose weights is 000.* not comparable"):
        Engine(Quadrants("1" * 64), NONE, tmp_path).reference(out)
    with pytest.raises(UserError, match="made with geometry none, but these images with square-crop"):
        Engine(Quadrants(), Geometry("square-crop+lanczos-8"), tmp_path).reference(out)


def test_older_manifest_with_the_name_only_is_accepted_for_that_name(engine, tmp_path) -> None:
    save_stats(FeatureStats.of(sample(range(50)).features), tmp_path / "manifest.json", {"detector": "quadrants"})
    assert engine.reference(tmp_path).stats.count == 50
    with pytest.raises(UserError, match="made by quadrants, whose name is quadrants and not inception"):
        Engine(Canonical(), NONE, tmp_path).reference(tmp_path)


@pytest.mark.parametrize("extra", [{}, {"fid": 3.0}])
def test_moments_of_edm_and_clean_fid_are_read(tmp_path, extra) -> None:
    features = sample(range(200), Canonical()).features.astype(np.float64)
    np.savez(tmp_path / "ref.npz", mu=features.mean(0), sigma=np.cov(features.T), **extra)
    engine = Engine(Canonical(), NONE, tmp_path)
    ref = engine.reference(tmp_path / "ref.npz")
    ours = sample(range(200), Canonical())
    assert measure(ours, ref, ["fd"])["fd"].value == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(ref.stats.covariance, np.cov(features.T))
    assert "does not say which resize" in " ".join(warnings(arm(ours), ref, options()))


def test_features_of_clean_fid_serve_kid_too(tmp_path) -> None:
    np.savez(tmp_path / "ref.npz", feats=sample(range(200), Canonical()).features)
    ref = Engine(Canonical(), NONE, tmp_path).reference(tmp_path / "ref.npz")
    found = measure(sample(range(200), Canonical()), ref, ["fd", "kid"])
    assert found["fd"].value == pytest.approx(0, abs=1e-6) and found["kid"].value < 0


def test_foreign_moments_are_refused(engine, tmp_path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(UserError, match="not comparable with quadrants"):
        engine.reference(tmp_path / "ref.npz")
    canonical = Engine(Canonical(), NONE, tmp_path)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="12 and 2048 dimensions"):
        measure(sample(range(50), Canonical()), canonical.reference(tmp_path / "wide.npz"), ["fd"])
    for name, arrays in {
        "shape": {"mu": np.zeros(3), "sigma": np.eye(4)},
        "nan": {"mu": np.full(3, np.nan), "sigma": np.eye(3)},
        "half": {"mu": np.zeros(3)},
        "pickled": {"mu": np.array([{}], dtype=object), "sigma": np.eye(1)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match=rf"{name}\.npz"):
            canonical.reference(tmp_path / f"{name}.npz")
    data = (tmp_path / "ref.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.npz is not a readable npz"):
        canonical.reference(tmp_path / "cut.npz")


def test_too_few_images_and_unbalanced_classes_are_warned_of() -> None:
    ref = reference(sample(range(100)))
    assert "below 24 there is no standard error" in warnings(arm(sample(range(23))), ref, options())[0]
    assert "below 48 the bias estimate" in warnings(arm(sample(range(47))), ref, options())[0]
    assert warnings(arm(sample(range(50))), ref, options(classes=10)) == []
    assert "not a multiple of 10" in warnings(arm(sample(range(55))), ref, options(classes=10))[0]


def test_provenance_names_what_the_number_depends_on() -> None:
    about = provenance(
        arm(sample(range(60))), reference(sample(range(100))), options(classes=10), {"features": 1.23456}
    )
    assert about["detector"]["weights"] == "0" * 64 and about["n"] == 60 and about["labels"] == "index mod 10"
    assert about["seconds"] == {"features": 1.235}
    assert {"python", "torch", "numpy", "pillow", "commit"} <= set(about["versions"])


def test_verdict_says_what_a_paired_difference_shows() -> None:
    assert verdict(Estimate(1.0, 0.1, 1000)) == "b is higher"
    assert verdict(Estimate(-1.0, 0.1, 1000)) == "b is lower"
    assert verdict(Estimate(0.1, 0.1, 1000)) == "undecided: about 3842 images would be needed"
    assert verdict(Estimate(0.1, 0.1, 1000), margin=0.5) == "equivalent within 0.5"
    assert verdict(Estimate(0.3, 0.1, 1000), margin=0.4) == "b is higher"
    assert verdict(Estimate(0.3, None, 5)) == "undecided: no standard error"
    assert verdict(Estimate(0.0, 0.1, 1000)) == "undecided: no difference seen"
    assert verdict(Estimate(0.0, 0.0, 1000), margin=0.1) == "equivalent within 0.1"
