"""The small CLIP of a captioned set: it learns what belongs together, says how well, and refuses what does not fit it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.files import read_json
from dmd2.core.rng import Draws
from dmd2.data.sets import TensorSet
from eval.detectors.detectors import load_detector
from eval.detectors.small_clip import SmallClip, augmented, pooled, train_clip


def colours(count: int = 120) -> dict[str, Tensor]:
    """Images of one colour each, and states of five tokens that say the colour; the last two tokens are padding."""
    g = torch.Generator().manual_seed(0)
    colour = torch.rand(count, 3, generator=g)
    noise = 8 * torch.randn(count, 3, 8, 8, generator=g)
    images = (255 * colour[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    text = torch.randn(count, 5, 6, generator=g) / 10
    text[:, :, :3] += colour[:, None]
    text[:, 3:] = 0
    return {"images": images, "text": text.half()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = tmp_path_factory.mktemp("weights") / "colours-clip/manifest.json"
    train_clip("colours-clip", TensorSet(colours()), manifest, steps=60)
    return manifest


def test_held_out_captions_are_found_far_above_chance(trained: Path) -> None:
    entry = read_json(trained)
    assert (entry["kind"], entry["trained_on"], entry["held_out"]["pairs"]) == ("clip", 108, 12)
    assert entry["held_out"]["caption_in_first_5"] > 0.8  # by chance 5 of 12
    assert entry["held_out"]["cosine"] > entry["held_out"]["cosine_of_others"] + 0.3


def test_training_again_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "colours-clip/manifest.json"
    torch.manual_seed(99)
    train_clip("colours-clip", TensorSet(colours()), again, steps=60)
    assert read_json(again) == read_json(trained)


def test_loaded_towers_score_own_captions_above_others(trained: Path) -> None:
    towers, rows = SmallClip.load(trained), colours()
    images, texts = towers.images(rows["images"][:64])[0], towers.texts([], rows["text"][:64])
    own = torch.cosine_similarity(images, texts).mean()
    assert own > torch.cosine_similarity(images, texts.roll(1, 0)).mean() + 0.3
    detector = load_detector("colours-clip", trained.parents[1])
    assert torch.equal(detector(rows["images"][:64])[0], images) and not detector.is_fid
    assert detector.about["weights"] == read_json(trained)["files"][0]["sha256"]


def test_what_does_not_fit_is_refused(trained: Path) -> None:
    towers = SmallClip.load(trained)
    with pytest.raises(UserError, match="trained on images of 8x8, these are 16x16"):
        towers.images(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(UserError, match="text states of 6 dimensions, these have 7"):
        towers.texts([], torch.zeros(1, 5, 7))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"images": colours()["images"]}, "no encoded captions"),
        ({**colours(), "images": torch.zeros(120, 4, 2, 2).half()}, r"latents only: set data\.text\.keep_images"),
    ],
)
def test_sets_without_captions_or_images_are_refused(rows, message, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_clip("x-clip", TensorSet(rows), tmp_path / "manifest.json", steps=1)


def test_images_beside_latents_are_what_it_sees(tmp_path: Path) -> None:
    rows = colours()
    train_clip("x-clip", TensorSet(rows), tmp_path / "a.json", steps=1)
    latents = {**rows, "pixels": rows["images"], "images": torch.zeros(120, 4, 2, 2).half()}
    train_clip("x-clip", TensorSet(latents), tmp_path / "b.json", steps=1)
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "b.json")


def test_padding_does_not_count_for_a_caption() -> None:
    states = torch.tensor([[[2.0, 4.0], [4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 3])
    assert pooled(states).tolist() == [[3.0, 2.0], [0.0, 0.0]]


def test_augmentation_moves_images_but_never_flips_them() -> None:
    half = torch.full((64, 3, 16, 16), -1.0)
    half[:, :, :, 8:] = 1.0
    moved = augmented(half, Draws(0, 0, 64, 0, 64))
    assert not torch.equal(moved[0], moved[1])
    assert (moved[:, :, :, -1] > moved[:, :, :, 0]).all()
    assert torch.equal(moved, augmented(half, Draws(0, 0, 64, 0, 64)))
