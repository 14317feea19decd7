"""Metrics of text runs from one pass of the sampler: patch distance, CLIP score, saturation and sharpness."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from dmd2.core.errors import UserError
from dmd2.data.captions import EvalPrompts
from dmd2.data.sets import TensorSet
from dmd2.experiment.checks.measurement import metric_problems
from eval.detectors.alignment import Alignment
from eval.detectors.clip import ClipScore
from eval.detectors.small_clip import SmallClip
from eval.metrics.appearance import brightness, saturation, sharpness
from eval.metrics.frechet import FeatureStats, Reference
from eval.pixels.resize import Geometry
from eval.report.differences import with_influences
from eval.runs.protocol import Protocol, save_influence
from tests.eval.test_features import Quadrants, draw
from tests.tiny import TEXT_WIDTH, TOKENS, config

METRICS = ["fd", "patch_fd", "clip_score", "saturation", "sharpness", "brightness"]
PATCH = {"geometry": "patch-4", "reference": "tiny"}
CAPTIONS = ["a cat", "two dogs", "a red house"]


def prompts() -> EvalPrompts:
    text = torch.randn(3, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(7)).half()
    return EvalPrompts(CAPTIONS, TensorSet({"images": torch.zeros(3, 1), "text": text}))


def towers() -> SmallClip:
    torch.manual_seed(3)
    return SmallClip("tiny-clip", 8, TEXT_WIDTH).eval().requires_grad_(False)


def reference(geometry: str = "none") -> Reference:
    seen = Geometry(geometry)(draw(list(range(1000, 1400))))
    return Reference(FeatureStats.of(Quadrants()(seen)[0]))


def protocol(detector: Quadrants, metrics: list[str] = METRICS, **changes) -> Protocol:
    """A text run's protocol over 300 images, without files."""
    spec = {"images": 300, "batch": 50, "metrics": metrics, "patch": PATCH, "clip": "tiny-clip"} | changes
    cfg = config("eps-text", **{f"eval__{key}": value for key, value in spec.items()})
    wants = set(metrics)
    patch = reference("patch-4") if "patch_fd" in wants else None
    alignment = Alignment(towers(), prompts()) if "clip_score" in wants else None
    return Protocol(cfg, detector, reference(), {}, patch, alignment)


class Sampler:
    """Images in [-1, 1] that belong to their seeds, and how many were drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, seeds: list[int]) -> torch.Tensor:
        self.drawn += len(seeds)
        return draw(seeds).float() / 127.5 - 1


def test_every_metric_comes_from_the_same_single_pass(tmp_path) -> None:
    sampler = Sampler()
    found = protocol(Quadrants()).measure(sampler, {}, tmp_path)
    assert sampler.drawn == 300 and set(found) == {*METRICS}
    images, values = draw(list(range(300))), {name: e.value for name, e in found.items()}
    patches = Quadrants()(images[:, :, 2:6, 2:6])[0]
    assert values["patch_fd"] == pytest.approx(reference("patch-4").estimate(patches).value, rel=1e-5)
    assert values["patch_fd"] != pytest.approx(values["fd"], rel=0.1)
    embedded = torch.cat([towers().images(part)[0] for part in images.split(50)])
    texts = towers().texts([], prompts().condition(list(range(300))).text)
    cosines = F.cosine_similarity(embedded, texts).numpy()
    assert values["clip_score"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert found["clip_score"].se == pytest.approx(cosines.std(ddof=1) / 300**0.5, rel=1e-3)
    for name, statistic in (("saturation", saturation), ("sharpness", sharpness), ("brightness", brightness)):
        assert values[name] == pytest.approx(float(statistic(images).mean()), rel=1e-5)


def test_further_metrics_leave_the_distance_as_it_is_bit_for_bit(tmp_path) -> None:
    alone = protocol(Quadrants(), ["fd", "brightness"]).measure(Sampler(), {}, tmp_path / "a")
    beside = protocol(Quadrants()).measure(Sampler(), {}, tmp_path / "b")
    assert np.array_equal(alone["fd"].influence, beside["fd"].influence) and set(alone) == {"fd", "brightness"}
    for name in ("fd", "brightness"):
        assert alone[name] == beside[name]


def test_each_metric_keeps_its_own_influences(tmp_path) -> None:
    found = protocol(Quadrants()).measure(Sampler(), {}, tmp_path / "f")
    files = {"files": save_influence(tmp_path / "influence.safetensors", "fd", {20: found})}
    for metric in ("fd", "patch_fd", "clip_score"):
        psi = found[metric].influence.astype(np.float32)
        np.testing.assert_array_equal(with_influences(files, tmp_path, 20, metric, 0.0, None).influence, psi)
    assert load_file(tmp_path / "influence.safetensors").keys() == {"0000020", "0000020-patch_fd", "0000020-clip_score"}
    scores = found["clip_score"].influence
    assert scores.mean() == pytest.approx(0, abs=1e-7) and scores.std() > 0


def test_captions_go_round_by_sample_seed() -> None:
    texts = Alignment(towers(), prompts()).texts([5, 0, 3, 4])
    assert torch.equal(texts[1], texts[2]) and not torch.equal(texts[0], texts[3])
    # Kernels round otherwise for another number of captions: to 1e-6 of embeddings of about 1.
    assert torch.allclose(texts[0], towers().texts([], prompts().condition([2]).text)[0], atol=1e-6)


def test_captions_are_embedded_once_for_all_snapshots_and_draws(tmp_path, monkeypatch) -> None:
    embedded: list[int] = []
    monkeypatch.setattr(
        SmallClip, "texts", lambda _, captions, states: (embedded.append(len(captions)), states[:, 0])[1]
    )
    alignment = Alignment(SmallClip("tiny-clip", 8, TEXT_WIDTH), prompts())
    first = alignment.texts([0, 1, 3])
    assert torch.equal(alignment.texts(list(range(5)))[[0, 1, 3]], first)
    assert embedded == [2, 1]


def test_a_clip_with_a_text_tower_of_its_own_reads_no_states(monkeypatch) -> None:
    monkeypatch.setattr(EvalPrompts, "condition", lambda *_: pytest.fail("text states were read"))
    tower = SimpleNamespace(
        reads_states=ClipScore.reads_states, texts=lambda captions, states: torch.ones(len(captions), 2)
    )
    assert Alignment(tower, prompts()).texts([0, 4]).shape == (2, 2)


def test_references_of_other_dimensions_are_refused(tmp_path) -> None:
    of_two = replace(protocol(Quadrants(), ["fd"]), reference=Reference(FeatureStats.of(np.eye(2))))
    with pytest.raises(UserError, match="features of 12 and 2 dimensions"):
        of_two.measure(Sampler(), {}, tmp_path)


def test_saturation_is_that_of_hsv() -> None:
    red, pale, grey, black = ([255, 0, 0], [200, 100, 150], [90, 90, 90], [0, 0, 0])
    images = torch.tensor([[red, pale], [grey, black]], dtype=torch.uint8).permute(0, 2, 1)[..., None]
    assert saturation(images).tolist() == [0.75, 0.0]
    assert saturation(images[:, :1]).tolist() == [0.0, 0.0]


def test_sharpness_is_the_energy_that_a_mean_over_neighbours_takes_away() -> None:
    ramp = (torch.arange(8) * 20).to(torch.uint8).expand(1, 1, 8, 8)
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 255).to(torch.uint8)[None, None]
    assert sharpness(ramp).item() == pytest.approx(0, abs=1e-12)
    # of nine fields of a chess board five or four are white: each pixel is 4/9 away from its mean
    assert sharpness(board).item() == pytest.approx(4 / 9)
    assert sharpness(board.expand(-1, 3, -1, -1)).item() == pytest.approx(4 / 9)
    assert sharpness(F.interpolate(board.float(), scale_factor=4).byte()) < sharpness(board)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["patch_fid"], "patch": PATCH}, "patch_fid with detector .* is called patch_fd"),
        ({"metrics": ["accuracy"]}, "accuracy needs labels, and data tiny has captions"),
    ],
)
def test_metrics_that_a_text_run_cannot_have_are_refused(changes, message) -> None:
    (*_, told), *_ = metric_problems(config("eps-text", **{f"eval__{k}": v for k, v in changes.items()}), fid=False)
    assert re.search(message, told)
