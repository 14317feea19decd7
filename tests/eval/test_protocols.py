"""Named protocols: complete, taken over by a base, and said to be changed where one changes them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dmd2.core.errors import UserError
from dmd2.core.rng import sample_labels
from dmd2.experiment.metrics import OF_RUNS, options
from dmd2.experiment.protocols import known_protocols, named, ranks_of
from dmd2.experiment.tables import BASES, load_base, load_experiment
from eval.detectors import features
from eval.detectors.networks import NETWORKS
from eval.detectors.weights import registry
from eval.metrics.frechet import FeatureStats, Reference, frechet_distance, ones_initialised
from eval.pixels.resize import Geometry
from eval.runs.protocol import Protocol, spoken
from tests.eval.test_features import Quadrants, draw
from tests.tiny import config

PAPER_BASES = {"imagenet64": "in64-dmd2", "sd15": "coco30k", "sdxl": "coco10k"}


@pytest.mark.parametrize("name", known_protocols())
def test_protocol_names_things_that_exist(name) -> None:
    protocol = named(name)
    assert protocol.detector in NETWORKS and Geometry(protocol.geometry).name == protocol.geometry
    assert set(protocol.metrics) <= {*options()}
    assert (protocol.classes is None) == (protocol.labels is None)
    assert registry()[NETWORKS[protocol.detector][0]].fid  # published values are FID


def test_values_of_the_papers_protocols() -> None:
    dmd2, edm, patch = named("in64-dmd2"), named("in64-edm"), named("coco10k-patch")
    assert (dmd2.images, dmd2.labels, dmd2.rounding, dmd2.ranks) == (50_000, "cyclic", "trunc", 0)
    assert (edm.labels, edm.rounding) == ("random", "round")
    assert named("in64-dmd2-official").ranks == 1
    assert (named("coco30k").images, named("coco30k").geometry) == (30_000, "square-crop+lanczos-256")
    assert (named("coco10k").images, named("coco10k").geometry) == (10_000, "square-crop+lanczos-512")
    assert patch.geometry == "patch-299-skip"


@pytest.mark.parametrize(("base", "name"), PAPER_BASES.items())
def test_base_takes_the_values_of_its_protocol(base, name) -> None:
    cfg = load_base(base)
    assert spoken(cfg.eval) == name
    assert cfg.eval.images == named(name).images and cfg.eval.detector == named(name).detector


def test_key_beside_the_name_replaces_the_protocols_and_is_said(tmp_path) -> None:
    text = (BASES / "imagenet64.yaml").read_text().replace("protocol: in64-dmd2", "protocol: in64-dmd2\n  images: 2000")
    (tmp_path / "b.yaml").write_text(text)
    assert spoken(load_base("b", tmp_path).eval) == "in64-dmd2, but images 2000"


def test_unknown_protocol_in_a_base_is_named_with_its_line(tmp_path) -> None:
    (tmp_path / "b.yaml").write_text((BASES / "sdxl.yaml").read_text().replace("coco10k", "coco10"))
    with pytest.raises(UserError, match=r"b\.yaml:\d+: eval\.protocol: there is no protocol coco10"):
        load_base("b", tmp_path)


def test_row_cannot_be_measured_by_another_protocol_than_its_table(tmp_path) -> None:
    row = "- {run: a, change: {eval.protocol: in64-edm}}"
    (tmp_path / "t.yaml").write_text(f"title: t\nbase: imagenet64\nmetrics: [fid]\nrows:\n{row}\n")
    with pytest.raises(UserError, match=r"t\.yaml:5: row a: eval\.protocol belongs to the base"):
        load_experiment(tmp_path)


@pytest.mark.parametrize("wrong", ["cyclic-on-0-ranks", "ones", "balanced"])
def test_rule_that_does_not_exist_is_refused(wrong) -> None:
    key = "covariance_init" if wrong == "ones" else "labels"
    with pytest.raises(ValueError, match="String should match pattern"):
        config(**{f"eval__{key}": wrong})


@pytest.mark.parametrize(("ranks", "lowest", "highest"), [(1, 50, 50), (2, 49, 51), (4, 48, 52), (8, 48, 56)])
def test_official_labels_are_repeated_on_every_process(ranks, lowest, highest) -> None:
    counts = Counter(sample_labels(list(range(50_000)), 1000, f"cyclic-on-{ranks}-ranks").tolist())
    assert (min(counts.values()), max(counts.values()), len(counts)) == (lowest, highest, 1000)


def test_ranks_of_a_rule() -> None:
    assert [ranks_of(rule) for rule in ("zeros", "ones-on-8-ranks", "cyclic-on-12-ranks")] == [0, 8, 12]


def test_metrics_of_every_base_are_known() -> None:
    for path in Path(BASES).glob("*.yaml"):
        assert set(load_base(path.stem).eval.metrics) <= {*OF_RUNS}


def test_every_detector_knows_where_its_weights_are_listed() -> None:
    users: dict[str, set[str]] = {}
    for detector, (entry, _) in NETWORKS.items():
        users.setdefault(entry, set()).add(detector)
    for name, entry in registry().items():
        if not entry.package and name in users:
            assert users[name] == {name, *entry.detectors}


def protocol(detector: Quadrants, **changes) -> Protocol:
    """A run's protocol over 300 images, without files."""
    spec = {"images": 300, "batch": 50, "draws": 2, "metrics": ["fd", "brightness"]}
    cfg = config(**{f"eval__{key}": value for key, value in spec.items()} | changes)
    reference = Reference(FeatureStats.of(Quadrants()(draw(list(range(1000, 1400))))[0]))
    return Protocol(cfg, detector, reference, {})


def sampled(seeds: list[int]) -> torch.Tensor:
    return draw(seeds).float() / 127.5 - 1


def test_features_filled_by_several_jobs_are_those_of_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(features, "ROWS", 100)
    alone = protocol(Quadrants()).measure(sampled, {}, tmp_path / "one")
    for part in (2, 0, 1):
        protocol(filling := Quadrants(), eval__shards=3).fill(sampled, {}, tmp_path / "three", part)
        assert sum(filling.seen) == 2 * 100  # both draws, a third of each
    joined = protocol(joining := Quadrants(), eval__shards=3).measure(sampled, {}, tmp_path / "three")
    assert joining.seen == []
    assert joined == alone and np.array_equal(joined["fd"].influence, alone["fd"].influence)


def test_quirk_of_the_covariance_is_that_of_the_processes_named(tmp_path) -> None:
    found = protocol(Quadrants(), eval__covariance_init="ones-on-8-ranks").measure(sampled, {}, tmp_path)
    reference = protocol(Quadrants()).reference.stats
    sets = [FeatureStats.of(Quadrants()(draw(list(range(first, first + 300))))[0]) for first in (0, 300)]
    expected = np.mean([frechet_distance(ones_initialised(stats, 8), reference) for stats in sets])
    assert found["fd"].value == pytest.approx(expected, rel=1e-6)
    assert found["fd"].value != pytest.approx(np.mean([frechet_distance(s, reference) for s in sets]), rel=1e-4)


def test_generated_images_pass_through_the_geometry_of_the_protocol(tmp_path) -> None:
    seen = []

    class Sizes(Quadrants):
        def __call__(self, images):
            seen.append(tuple(images.shape[1:]))
            return super().__call__(images)

    protocol(Sizes(), eval__geometry="square-crop+lanczos-4").measure(sampled, {}, tmp_path)
    assert set(seen) == {(3, 4, 4)}
