"""Options and named protocols become one set of settings; what lacks or is of no use is said."""

from pathlib import Path

import pytest

from dmd2.core.errors import UserError
from dmd2.experiment.metrics import options as metric_options
from dmd2.experiment.protocols import NamedProtocol, known_protocols
from eval.score import options as module
from eval.score.options import Asked, Inputs

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
    asked = Asked.of(METRICS, "p", None, detector=None, geometry=None, images=None, classes=None)
    assert asked.metrics == ("fd", "clip-score") and asked.features == asked.compared == ("fd",)
    found = (asked.detector, asked.geometry, asked.images, asked.classes, asked.ones)
    assert found == ("quadrants", "square-crop+lanczos-8", 120, 10, 8)
    assert asked.title() == "p" and asked.overridden == {} and asked.diversity_geometry is None


def test_options_override_the_protocol_and_are_named() -> None:
    asked = Asked.of(METRICS, "p", "kid,lpips-diversity", images=2000, detector="quadrants", geometry="none")
    assert (asked.images, asked.geometry, asked.classes) == (2000, "none", 10)
    assert asked.title() == "p, but images 2000, geometry none, metrics kid,lpips-diversity"
    assert asked.diversity_geometry == "none" and asked.ones is None
    about = asked.about()
    assert about["overridden"]["images"] == 2000 and about["images"] == 120 and about["reference_is"] == "all of it"


def test_geometry_equal_to_the_protocols_still_holds_for_the_diversity() -> None:
    asked = Asked.of(METRICS, "p", "lpips-diversity", geometry="square-crop+lanczos-8")
    assert asked.diversity_geometry == "square-crop+lanczos-8" and asked.title() == "p, but metrics lpips-diversity"


def test_random_labels_are_no_classes_by_index(monkeypatch) -> None:
    random = NamedProtocol(**{**vars(PROTOCOL), "labels": "random", "covariance_init": "zeros"})
    monkeypatch.setattr(module, "named", lambda _: random)
    asked = Asked.of(METRICS, "p", None)
    assert asked.classes is None and asked.ones is None
    assert Asked.of(METRICS, "p", None, classes=10).title() == "p, but classes 10"


def test_without_a_protocol_the_defaults_hold() -> None:
    asked = Asked.of(METRICS, None, None)
    assert (asked.metrics, asked.geometry, asked.title(), asked.about()) == (("fd",), "none", None, None)


@pytest.mark.parametrize("name", known_protocols())
def test_every_named_protocol_is_usable(name) -> None:
    asked = Asked.of(METRICS, name, None)
    assert asked.detector and asked.images and asked.title() == name
    asked.check(Inputs(Path("r"), Path("p.txt"), None, 4))


def test_unknown_metrics_and_protocols_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no metric fvd: choose from fd, kid.*clip-score, lpips-diversity"):
        Asked.of(METRICS, None, "fd,fvd")
    with pytest.raises(UserError, match="no metric prdc"):
        Asked.of(PAIRED, None, "prdc")
    with pytest.raises(UserError, match=next(iter(known_protocols()))):
        Asked.of(METRICS, "nothing", None)


def test_metrics_of_a_protocol_that_cannot_be_paired_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(module, "named", lambda _: NamedProtocol(**{**vars(PROTOCOL), "metrics": ("fd", "prdc")}))
    with pytest.raises(UserError, match="no metric prdc"):
        Asked.of(PAIRED, "p", None)


@pytest.mark.parametrize(
    ("metrics", "detector", "inputs", "sentence"),
    [
        ("fd", None, Inputs(Path("r"), None, None, None), "fd: --detector is missing"),
        ("is,accuracy", None, Inputs(None, None, None, None), "is, accuracy: --detector is missing"),
        ("is,kid", "x", Inputs(None, None, None, None), "^kid: REFERENCE is missing"),
        ("clip-score", None, Inputs(None, None, None, None), "clip-score: --prompts is missing"),
        ("lpips-diversity", None, Inputs(None, None, None, None), "lpips-diversity: --per-prompt K is missing"),
    ],
)
def test_what_lacks_is_one_sentence(metrics, detector, inputs, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        Asked.of(METRICS, None, metrics, detector=detector).check(inputs)


def test_what_no_metric_uses_is_said() -> None:
    everything = Inputs(Path("r"), Path("p.txt"), Path("clip"), 4)
    options = {"detector": "x", "geometry": "none", "reference_sampled": True}
    unused = {metric: Asked.of(METRICS, None, metric).unused(everything, **options) for metric in ("fd", "is")}
    assert unused["fd"] == [
        f"{name} is not used: no metric of fd needs it" for name in ("--prompts", "--clip", "--per-prompt")
    ]
    assert any(line.startswith("REFERENCE is not used") for line in unused["is"])
    assert any(line.startswith("--reference-sampled is not used") for line in unused["is"])
    both = Asked.of(METRICS, None, "clip-score,lpips-diversity").unused(everything, **options)
    assert [line.split()[0] for line in both] == ["REFERENCE", "--detector", "--reference-sampled"]
    assert Asked.of(METRICS, None, "fd").unused(Inputs(Path("r"), None, None, None), detector="x") == []
