"""CLIP score: published token ids, the protocol's image path, and a real architecture scored by hand."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from dmd2.core.errors import UserError
from eval.detectors.clip import PREFIX, ClipScore
from eval.detectors.detectors import load_detector

MODEL = open_clip.get_model_config("ViT-S-32-alt")  # the smallest of open_clip's: 43 M parameters, 224 px
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
START, END, PREFIX_IDS = 49406, 49407, [320, 1125, 29340]
EDGE_CASES = [
    "",
    "word " * 100,
    "  leading and trailing  ",
    "caf\u00e9 &amp; cr\u00e8me",
    "\u732b\u306e\u5199\u771f",
    "A CAT!?",
]


def write_model(root: Path) -> Path:
    """An open_clip folder of that architecture with random weights."""
    root.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**MODEL)
    save_file(model.state_dict(), root / "open_clip_model.safetensors")
    settings = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (root / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": settings}))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("weights") / "clip-small")


@pytest.fixture(scope="module")
def score(folder) -> ClipScore:
    return ClipScore(folder)


def cosines(score: ClipScore, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Of every image with its caption; a CLIP score is their mean."""
    return F.cosine_similarity(score.images(score.geometry(images))[0].cpu(), score.texts(captions))


def photographs(n: int, height: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(height)
    return torch.from_numpy(rng.integers(0, 256, (n, 3, height, width), dtype=np.uint8))


def test_token_ids_of_a_photo_of_a_cat() -> None:
    ids = open_clip.get_tokenizer("ViT-g-14")("a photo of a cat")[0]
    assert ids[:8].tolist() == [START, 320, 1125, 539, 320, 2368, END, 0]


def test_prefix_has_the_published_ids(score) -> None:
    assert score.tokens([""])[0, :5].tolist() == [START, *PREFIX_IDS, END]


def test_concatenation_equals_the_official_insertion_of_the_prefix(score) -> None:
    plain = open_clip.get_tokenizer("ViT-g-14")(EDGE_CASES)
    inserted = torch.cat([plain[:, :1], torch.tensor(PREFIX_IDS).expand(len(plain), -1), plain[:, 1:]], dim=1)[:, :77]
    cut = inserted[:, -1] != 0
    inserted[cut, -1] = END
    assert cut.tolist().count(True) == 1
    assert torch.equal(score.tokens(EDGE_CASES), inserted)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (256, 256), (64, 48)])
def test_score_equals_a_cosine_written_by_hand(folder, score, height, width) -> None:
    images, captions = photographs(3, height, width), ["a cat", "two dogs on a beach ", ""]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer("ViT-g-14")([PREFIX + caption for caption in captions])
    pixels = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        side = min(height, width)
        left, top = round((width - side) / 2), round((height - side) / 2)
        square = picture.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.LANCZOS)
        pixels.append(transform(square))
    with torch.no_grad():
        u, v = model.eval().encode_image(torch.stack(pixels)), model.encode_text(tokens)
    by_hand = (u * v).sum(dim=1) / (u.norm(dim=1) * v.norm(dim=1))
    ours = cosines(score, images, captions)
    assert float(by_hand.std()) > 1e-2
    assert torch.allclose(ours, by_hand, atol=1e-6)
    assert abs(float(ours.mean() - by_hand.mean())) < 1e-6


def test_the_printed_transform_of_open_clip_is_the_protocols(folder) -> None:
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    printed = str(transform)
    assert "Resize(size=224, interpolation=bicubic" in printed and "CenterCrop(size=(224, 224))" in printed
    assert all(str(value) in printed for value in MEAN + STD)


def test_negative_cosines_are_kept(score, monkeypatch) -> None:
    images, captions = photographs(2, 64, 64), ["a cat", "a dog"]
    encode = score.model.encode_image
    positive = cosines(score, images, captions)
    monkeypatch.setattr(score.model, "encode_image", lambda x: -encode(x), raising=False)
    assert torch.allclose(cosines(score, images, captions), -positive)


def test_cosines_do_not_depend_on_the_batch(score) -> None:
    images, captions = photographs(3, 80, 80), [f"caption {i}" for i in range(3)]
    single = torch.cat([cosines(score, images[i : i + 1], captions[i : i + 1]) for i in range(3)])
    assert torch.allclose(cosines(score, images, captions), single, atol=1e-5)


def test_texts_are_embedded_in_batches_and_a_repeated_one_once(score, monkeypatch) -> None:
    seen, encode = [], score.model.encode_text
    monkeypatch.setattr(score.model, "encode_text", lambda x: (seen.append(len(x)), encode(x))[1], raising=False)
    monkeypatch.setattr(ClipScore, "TEXTS_AT_ONCE", 2)
    captions = ["a cat", "a dog", "a cat", "a house", "a cat"]
    rows = score.texts(captions)
    assert seen == [2, 1] and torch.equal(rows[0], rows[2]) and torch.equal(rows[0], rows[4])
    for row, caption in zip(rows, captions, strict=True):
        assert torch.allclose(row, score.texts([caption])[0], atol=1e-5)


def test_provenance_states_scale_prefix_and_checksum(score) -> None:
    about = score.about
    assert about["prefix"] == "A photo depicts " and "no factor" in about["scale"] and "256" in about["geometry"]
    assert len(about["weights"]) == 64 and not about["verified"]


def test_image_tower_is_a_detector(folder) -> None:
    detector = load_detector("clip-small", folder.parent)
    images = photographs(2, 224, 224)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        expected = model.eval().encode_image(pixels)
    features, logits = detector(images)
    assert torch.allclose(features, expected, atol=1e-5) and logits is None
    assert detector.about["features"] == 256 and detector.label == "FD (clip-small)"


def test_folder_without_weights_is_never_run_with_random_ones(folder, tmp_path) -> None:
    config = (folder / "open_clip_config.json").read_text()
    (tmp_path / "clip-ViT-g-14").mkdir()
    (tmp_path / "clip-ViT-g-14/open_clip_config.json").write_text(config)
    with pytest.raises(UserError, match=r"open_clip_pytorch_model\.bin .*clip-ViT-g-14/ or run: dmd2 eval weights"):
        load_detector("clip-ViT-g-14", tmp_path)


def test_truncated_weights_are_named(folder, tmp_path) -> None:
    broken = tmp_path / "clip-broken"
    broken.mkdir()
    (broken / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    (broken / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="clip-broken is not a readable open_clip model"):
        ClipScore(broken)
