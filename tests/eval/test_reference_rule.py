"""What the rule `reference` writes: moments of a real set, or those of a user's npz."""

import numpy as np
import pytest

import eval.detectors.detectors as detectors_by_name
from dmd2.core.files import listing, read_json, write_json
from dmd2.data.sets import save_shard
from eval.detectors.__main__ import reference as main
from eval.detectors.reference import Engine
from eval.metrics.frechet import FeatureStats
from eval.pixels.resize import NONE
from tests.eval.test_features import Quadrants, draw
from tests.eval.test_measure import Canonical


@pytest.fixture(autouse=True)
def detectors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("q", "inception"):
        write_json(tmp_path / "data/weights" / name / "manifest.json", {"kind": "network", "files": []})
    monkeypatch.setattr(
        detectors_by_name, "load_detector", lambda name, device: {"q": Quadrants(), "inception": Canonical()}[name]
    )
    return tmp_path


def test_moments_of_a_real_set_are_those_of_all_its_images(detectors) -> None:
    images = draw(list(range(80)))
    save_shard(detectors / "real.safetensors", {"images": images})
    write_json(detectors / "manifest.json", {"files": listing([detectors / "real.safetensors"], detectors)})
    main(detectors / "manifest.json", detectors / "refs/r-q/manifest.json", "q")
    found = Engine(Quadrants(), NONE, detectors).reference(detectors / "refs/r-q/manifest.json").stats
    expected = FeatureStats.of(Quadrants()(images)[0])
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-12)
    assert found.count == 80


def test_a_users_npz_becomes_a_reference_of_unknown_size(detectors) -> None:
    d = Canonical()(draw([0, 1]))[0].shape[1]
    np.savez(detectors / "edm.npz", mu=np.arange(d) / d, sigma=np.eye(d))
    main(detectors / "edm.npz", detectors / "refs/edm-inception/manifest.json", "inception")
    found = Engine(Canonical(), NONE, detectors).reference(detectors / "refs/edm-inception/manifest.json")
    np.testing.assert_allclose(found.stats.covariance, np.eye(d))
    assert (
        found.about["images"] is None
        and read_json(detectors / "refs/edm-inception/manifest.json")["kind"] == "reference"
    )


def test_a_missing_one_says_what_to_put_where(detectors, capsys) -> None:
    with pytest.raises(SystemExit, match=r"data/refs/coco.npz is missing: put the reference statistics"):
        main(detectors.joinpath("data/refs/coco.npz").relative_to(detectors), detectors / "out.json", "q")
