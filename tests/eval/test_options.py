"""Options and named protocols become one set of settings; what lacks or is of no use is said."""

from pathlib import Path

import pytest

from dmd2.core.errors import UserError
from dmd2.experiment.metrics import options as metric_options
from dmd2.experiment.protocols import NamedProtocol, known_protocols
from eval.score import options as module
from eval.score.options import Options

METRICS, PAIRED = metric_options(), metric_options(paired=True)
PROTOCOL = NamedProtocol(
    name="p", detector="quadrants", geometry="square-crop+lanczos-8", images=120, labels="cyclic", classes=10,
    rounding="trunc", metrics=("fd", "clip-score"), covariance_init="ones-on-8-ranks", reference="r",
    reference_is="all of it",
)  # fmt: skip


@pytest.fixture(autouse=True)
def protocol(monkeypatch):
    real = module.named
    monkeypatch.setattr(module, "named", lambda name: PROTOCOL if name == "p" else real(name))


def test_protocol_fills_in_what_is_left_out() -> None:
    asked = Options.of(METRICS, "p", None, detector=None, geometry=None, images=None, classes=None)
    assert asked.metrics == ("fd", "clip-score") and asked.features == asked.compared == ("fd",)
    found = (asked.detector, asked.geometry, asked.images, asked.classes, asked.ones)
    assert found == ("quadrants", "square-crop+lanczos-8", 120, 10, 8)
    assert asked.about()["title"] == "p" and asked.overridden == {}


def test_options_override_the_protocol_and_are_named() -> None:
    asked = Options.of(METRICS, "p", "kid,lpips-diversity", images=2000, detector="quadrants", geometry="none")
    assert (asked.images, asked.geometry, asked.classes) == (2000, "none", 10)
    assert asked.about()["title"] == "p, but images 2000, geometry none, metrics kid,lpips-diversity"
    assert asked.ones == 0
    about = asked.about()
    assert about["overridden"]["images"] == 2000 and about["images"] == 120 and about["reference_is"] == "all of it"


def test_an_option_equal_to_the_protocols_is_no_difference() -> None:
    asked = Options.of(METRICS, "p", "lpips-diversity", geometry="square-crop+lanczos-8")
    assert asked.about()["title"] == "p, but metrics lpips-diversity"


def test_random_labels_are_no_classes_by_index(monkeypatch) -> None:
    random = NamedProtocol(**{**vars(PROTOCOL), "labels": "random", "covariance_init": "zeros"})
    monkeypatch.setattr(module, "named", lambda _: random)
    asked = Options.of(METRICS, "p", None)
    assert asked.classes is None and asked.ones == 0
    assert Options.of(METRICS, "p", None, classes=10).about()["title"] == "p, but classes 10"


def test_without_a_protocol_the_defaults_hold() -> None:
    asked = Options.of(METRICS, None, None)
    assert (asked.metrics, asked.geometry, asked.about()) == (("fd",), None, None)


@pytest.mark.parametrize("name", known_protocols())
def test_every_named_protocol_is_usable(name) -> None:
    asked = Options.of(METRICS, name, None, reference=Path("r"), prompts=Path("p.txt"), per_prompt=4)
    assert asked.detector and asked.images and asked.about()["title"] == name
    asked.check()


def test_unknown_metrics_and_protocols_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no metric fvd: choose from fd, kid.*clip-score, lpips-diversity"):
        Options.of(METRICS, None, "fd,fvd")
    with pytest.raises(UserError, match="no metric prdc"):
        Options.of(PAIRED, None, "prdc")
    with pytest.raises(UserError, match=next(iter(known_protocols()))):
        Options.of(METRICS, "nothing", None)


def test_metrics_of_a_protocol_that_cannot_be_paired_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(module, "named", lambda _: NamedProtocol(**{**vars(PROTOCOL), "metrics": ("fd", "prdc")}))
    with pytest.raises(UserError, match="no metric prdc"):
        Options.of(PAIRED, "p", None)


def test_what_no_metric_uses_is_said() -> None:
    given = {
        "reference": Path("r"), "prompts": Path("p.txt"), "clip": Path("clip"), "per_prompt": 4, "detector": "x",
        "geometry": "none", "reference_sampled": True,
    }  # fmt: skip
    unused = {name: Options.of(METRICS, None, name, **given).unused() for name in ("fd", "is")}
    assert unused["fd"] == [
        f"{name} is not used: no metric of fd needs it" for name in ("--prompts", "--clip", "--per-prompt")
    ]
    assert any(line.startswith("REFERENCE is not used") for line in unused["is"])
    assert any(line.startswith("--reference-sampled is not used") for line in unused["is"])
    both = Options.of(METRICS, None, "clip-score,lpips-diversity", **given).unused()
    assert [line.split()[0] for line in both] == ["REFERENCE", "--reference-sampled", "--detector"]
    assert Options.of(METRICS, None, "fd", reference=Path("r"), detector="x").unused() == []
