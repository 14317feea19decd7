"""CLIP score and LPIPS diversity from the command line: values by hand, pairs, the cache, protocols, refusals."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval.score.command as command
from dmd2.core.files import sha256
from dmd2.experiment.protocols import NamedProtocol, known_protocols
from dmd2.networks.lpips import Lpips
from eval.detectors import features
from eval.detectors.clip import ClipImages, ClipScore
from eval.detectors.weights import Weights, locate
from eval.metrics.estimate import Estimate, mean
from eval.pixels.resize import Geometry
from eval.score import call as calls
from eval.score import options as options_module
from eval.score import prompted
from eval.score.call import Call
from eval.score.options import Options
from tests.eval.test_cli import call, document, refusal
from tests.eval.test_clip import cosines as clip_cosines
from tests.eval.test_clip import write_model
from tests.eval.test_features import Quadrants, draw
from tests.unit.test_lpips import write_weights


def unverified(name: str, folder: Path, file: str) -> Weights:
    """A file that is there, whatever it is."""
    path = folder / name / file
    return Weights(path, sha256(path), verified=False) if path.exists() else locate(name, folder, file)


COUNT = 12
CAPTIONS = [f"a {thing} {place}" for thing in ("cat", "red car", "tree") for place in ("", "at night", "in snow", "x")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random CLIP and LPIPS networks of the real architectures."""
    root = tmp_path_factory.mktemp("weights")
    write_model(root / "clip-small")
    return write_weights(root)


@pytest.fixture
def run(tmp_path, monkeypatch, weights):
    """Call the command line in a folder of small sets; returns the result."""
    plain = calls.load_detector
    monkeypatch.setattr(
        calls, "load_detector", lambda name, *args: Quadrants() if name == "quadrants" else plain(name, *args)
    )
    monkeypatch.setattr(prompted, "locate", unverified)
    monkeypatch.setattr(features, "ROWS", 5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(weights)
    for name, seeds in {"a": range(COUNT), "b": range(50, 50 + COUNT), "r": range(200, 260), "odd": range(7)}.items():
        save_file({"images": draw(list(seeds))}, f"{name}.safetensors")
    Path("prompts.txt").write_text("\n".join(CAPTIONS) + "\n")

    return call


CLIP = "--metrics clip-score --prompts prompts.txt --clip weights/clip-small"
LPIPS = "--metrics lpips-diversity --per-prompt 2 --weights weights --geometry square-crop+lanczos-16"


def images(name: str) -> torch.Tensor:
    return load_file(f"{name}.safetensors")["images"]


def same(row: dict, expected: Estimate) -> bool:
    got, wanted = ([part["value"], part["se"]] for part in (row, expected.as_json()))
    return row["n"] == expected.n and got == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def test_clip_score_is_the_mean_cosine_and_needs_neither_detector_nor_reference(run, weights) -> None:
    result = run(f"score a.safetensors {CLIP} --json out.json --csv out.csv")
    cosines = clip_cosines(ClipScore(weights / "clip-small"), images("a"), CAPTIONS)
    (row,) = document()["rows"]
    assert row["metric"] == "CLIP score (clip-small)" and float(cosines.std()) > 1e-3
    assert same(row, mean(cosines)) and row["low"] < row["value"] < row["high"]
    about = document()["clip-score"]
    assert (about["prefix"], about["geometry"]) == ("A photo depicts ", "square-crop+lanczos-256")
    assert document()["detector"] is None and document()["reference"] is None and len(about["prompts_sha256"]) == 64
    assert "mean cosine: no factor, no clamp, geometry square-crop+lanczos-256, n = 12" in result.stdout
    (line,) = csv.DictReader(Path("out.csv").read_text().splitlines())
    assert line["clip"] == about["weights"] and line["prompts"] == about["prompts_sha256"]


def test_clip_score_beside_a_distance_keeps_its_own_geometry(run, weights) -> None:
    metrics = CLIP.replace("clip-score", "fd,clip-score")
    run(
        f"score a.safetensors r.safetensors --detector quadrants {metrics} --geometry square-crop+lanczos-4 --json out.json"
    )
    distance, cosine = document()["rows"]
    assert distance["metric"] == "FD (quadrants)" and document()["geometry"] == "square-crop+lanczos-4"
    assert same(cosine, mean(clip_cosines(ClipScore(weights / "clip-small"), images("a"), CAPTIONS)))


def test_image_embeddings_come_from_the_cache_that_parts_fill(run, monkeypatch) -> None:
    for part in range(2):
        assert f"shard {part}/2: features of" in run(f"score a.safetensors {CLIP} --shard {part}/2").stdout
    monkeypatch.setattr(ClipImages, "extract", None)  # no image can be embedded any more
    run(f"score a.safetensors {CLIP} --json out.json")
    assert document()["rows"][0]["n"] == COUNT


def test_first_images_have_the_first_captions(run, weights) -> None:
    run(f"score a.safetensors {CLIP} --first 5 --json out.json")
    cosines = clip_cosines(ClipScore(weights / "clip-small"), images("a")[:5], CAPTIONS[:5])
    assert same(document()["rows"][0], mean(cosines))


def test_paired_clip_score_is_the_mean_difference_of_cosines(run, weights) -> None:
    run(f"paired a.safetensors b.safetensors {CLIP} --json out.json")
    score = ClipScore(weights / "clip-small")
    ours, theirs = (clip_cosines(score, images(name), CAPTIONS) for name in "ab")
    first, second, difference = document()["rows"]
    assert same(first, mean(ours)) and same(second, mean(theirs))
    assert difference["arm"] == "b - a" and same(difference, mean(theirs - ours)) and difference["value"] != 0


def test_detector_that_is_the_clip_model_is_loaded_once(run, weights) -> None:
    Path("prompts.txt").write_text("a cat")
    given = {"prompts": Path("prompts.txt"), "clip": weights / ".." / weights.name / "clip-small", "weights": weights}
    call = Call(Options(("is", "clip-score"), "clip-small", **given))
    assert call.prompted["clip_score"].score.model is call.engine.detector.model


def test_diversity_is_the_distance_within_a_prompt_and_compared_prompt_by_prompt(run, weights) -> None:
    result = run(f"score a.safetensors {LPIPS} --first 4 --json out.json --csv out.csv")
    (alone,) = document()["rows"]
    about = document()["lpips-diversity"]
    assert about["per_prompt"] == 2 and not about["files"]["vgg16-397923af.pth"]["verified"]
    assert len({file["sha256"] for file in about["files"].values()}) == 2
    assert document()["geometry"] == about["geometry"] == "square-crop+lanczos-16"
    assert "geometry square-crop+lanczos-16, n = 4, 2 images of each prompt" in result.stdout
    (line,) = csv.DictReader(Path("out.csv").read_text().splitlines())
    assert line["per_prompt"] == "2" and line["metric"] == "LPIPS diversity"
    run(f"paired a.safetensors b.safetensors {LPIPS} --first 4 --json out.json")
    first, second, difference = document()["rows"]
    lpips, square = Lpips(weights), Geometry("square-crop+lanczos-16")
    ours, theirs = (
        np.array([float(lpips(*(pair / 127.5 - 1).split(1))) for pair in square(images(name)[:4]).float().split(2)])
        for name in "ab"
    )
    assert same(alone, mean(ours)) and same(first, mean(ours)) and same(second, mean(theirs))
    assert alone["n"] == 2 and same(difference, mean(theirs - ours)) and difference["value"] != 0


def test_diversity_keeps_the_papers_geometry_unless_another_is_asked_for() -> None:
    for given, expected in (({}, "square-crop+lanczos-512"), ({"geometry": "none"}, "none")):
        call = Call(Options.of(command.SCORED, None, "lpips-diversity", per_prompt=4, **given))
        assert call.prompted["lpips_diversity"].geometry.name == expected


def test_classes_are_strata_of_cosines(run, weights) -> None:
    run(f"score a.safetensors {CLIP} --classes 3 --json out.json")
    cosines = clip_cosines(ClipScore(weights / "clip-small"), images("a"), CAPTIONS)
    assert same(document()["rows"][0], mean(cosines, np.arange(COUNT) % 3))


def test_captions_are_counted_before_clip_is_loaded(run, monkeypatch) -> None:
    monkeypatch.setattr("eval.score.call.ClipScore", lambda *_: pytest.fail("CLIP was loaded"))
    assert "12 captions but odd.safetensors 7 images" in refusal(f"score odd.safetensors {CLIP}")


def test_classes_are_no_strata_of_prompts() -> None:
    call = Call(Options(("lpips-diversity",), classes=2, per_prompt=4))
    values = np.array([0.1, 0.9, 0.2, 0.8, 0.15, 0.85])
    arm = calls.Arm(Path("a"), {"images": 24}, 0, None, {"lpips_diversity": values})
    assert call.results(arm, None)["LPIPS diversity"] == mean(values)


PROTOCOL = NamedProtocol(
    name="tiny", detector="quadrants", geometry="square-crop+lanczos-4", images=COUNT, labels="cyclic", classes=4, rounding="trunc",
    metrics=("fd",), covariance_init="ones-on-8-ranks", reference="r", reference_is="the sixty of r",
)  # fmt: skip


def test_protocol_sets_what_is_left_out_and_says_what_was_overridden(run, monkeypatch) -> None:
    monkeypatch.setattr(options_module, "named", lambda _: PROTOCOL)
    result = run("score a.safetensors r.safetensors --protocol tiny --json out.json --csv out.csv")
    right, quirk = document()["rows"]
    assert quirk["metric"] == "FD (quadrants), covariance from ones x 8"
    assert right["metric"] == "FD (quadrants)" and right["value"] != quirk["value"] and quirk["se"] is None
    plain = document()["labels"], document()["geometry"], document()["protocol"]["title"]
    assert plain == ("index mod 4", "square-crop+lanczos-4", "tiny") and "protocol tiny\n" in result.stdout
    assert "images quantised by trunc, reference the sixty of r" in result.stdout
    result = run("score a.safetensors r.safetensors --protocol tiny --first 8 --images 8 --json out.json --csv out.csv")
    title = "tiny, but images 8"
    assert f"protocol {title}\n" in result.stdout and document()["protocol"]["title"] == title
    assert {line["protocol"] for line in csv.DictReader(Path("out.csv").read_text().splitlines())} == {title}
    error = run("score odd.safetensors r.safetensors --protocol tiny", 1).output
    assert "holds 7 images but the protocol asks for exactly 12" in error


def test_paired_of_a_protocol_gives_the_quirk_of_both_arms_and_their_difference(run, monkeypatch) -> None:
    monkeypatch.setattr(options_module, "named", lambda _: PROTOCOL)
    run("paired a.safetensors b.safetensors r.safetensors --protocol tiny --json out.json")
    rows = document()["rows"]
    assert [row["metric"].endswith("ones x 8") for row in rows] == [False] * 3 + [True] * 3
    assert rows[5]["value"] == pytest.approx(rows[4]["value"] - rows[3]["value"])


def test_stats_of_a_protocol_makes_its_reference(run, monkeypatch) -> None:
    monkeypatch.setattr(options_module, "named", lambda _: PROTOCOL)
    assert "by quadrants" in run("stats r.safetensors refs/r/manifest.json --protocol tiny").stdout
    run("score a.safetensors refs/r/manifest.json --protocol tiny")


def test_protocols_are_listed(run) -> None:
    shown = run("protocols").stdout
    assert all(name in shown for name in known_protocols()) and "reference" in shown


def test_sampling_of_the_reference_widens_the_interval(run) -> None:
    line = "score r.safetensors {} --detector quadrants --json out.json"
    save_file({"images": draw(list(range(500, 560)))}, "s.safetensors")
    run(line.format("s.safetensors"))
    fixed = document()
    run(line.format("s.safetensors") + " --reference-sampled")
    both = document()
    assert both["rows"][0]["se"] > fixed["rows"][0]["se"] > 0
    assert "FD takes the reference as fixed" in fixed["interval"] and "counts the sampling" in both["interval"]
    run("stats s.safetensors refs/s/manifest.json --detector quadrants")
    error = run(line.format("refs/s/manifest.json") + " --reference-sampled --cache new", 1).output
    assert not Path("new").exists()  # refused before any feature
    assert "--reference-sampled needs images as its reference" in error


def test_scores_of_logits_need_no_reference(run) -> None:
    result = run("score a.safetensors --detector quadrants --metrics is,accuracy --classes 10 --json out.json")
    assert [row["metric"] for row in document()["rows"]] == ["FD (quadrants)".replace("FD", "IS"), "accuracy"]
    assert document()["reference"] is None and "REFERENCE" not in result.stderr
    result = run("score a.safetensors r.safetensors --detector quadrants --metrics is --json out.json")
    assert "warning: REFERENCE is not used" in result.stderr and document()["reference"] is None
    run("paired a.safetensors b.safetensors --detector quadrants --metrics accuracy --classes 10")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("score a.safetensors", "fd: --detector is missing"),
        ("score a.safetensors --metrics is,accuracy", "is, accuracy: --detector is missing"),
        ("score a.safetensors --detector quadrants --metrics is,kid", "error: kid: REFERENCE is missing"),
        ("paired a.safetensors b.safetensors --detector quadrants", "fd: REFERENCE is missing"),
        ("stats a.safetensors out/manifest.json", "--detector is missing"),
        ("score a.safetensors --metrics clip-score", "--prompts is missing"),
        ("score a.safetensors --metrics lpips-diversity", "--per-prompt K is missing"),
        (f"score odd.safetensors {CLIP}", "prompts.txt holds 12 captions but odd.safetensors 7 images"),
        (f"paired a.safetensors odd.safetensors {CLIP}", "12 captions but odd.safetensors 7 images"),
        (f"score a.safetensors {CLIP.replace('prompts.txt', 'none.txt')}", "none.txt is not a readable UTF-8 text"),
        (f"score a.safetensors {CLIP.replace('clip-small', 'clip-none')}", "open_clip_config.json"),
        (
            "score a.safetensors --metrics clip-score --prompts prompts.txt --weights w",
            "dmd2 eval weights clip-ViT-g-14",
        ),
        (f"score odd.safetensors {LPIPS}", "7 images are not a multiple of --per-prompt 2"),
        (f"score a.safetensors {LPIPS} --shard 0/2", "has no features to compute in parts"),
        (
            f"score a.safetensors {LPIPS.replace('--weights weights', '--weights w')}",
            "dmd2 eval weights lpips-vgg16",
        ),
        (f"paired a.safetensors odd.safetensors {LPIPS}", "7 images are not a multiple"),
        ("score a.safetensors --protocol nothing", "nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(run, line, message) -> None:
    assert message in refusal(line)


def test_weights_of_lpips_that_are_not_the_listed_ones_are_refused(run, monkeypatch) -> None:
    monkeypatch.setattr(prompted, "locate", locate)
    assert "vgg16-397923af.pth has SHA-256" in run(f"score a.safetensors {LPIPS}", 1).output


def test_repeated_images_are_refused_whatever_the_metric(run) -> None:
    save_file({"images": draw([s % 2 for s in range(COUNT)])}, "twice.safetensors")
    for options in (f"{CLIP} --first 4", f"{LPIPS} --first 4"):
        assert "2 of 4 images repeat an earlier one" in run(f"score twice.safetensors {options}", 1).output
    assert "10 generated images repeat" in run(f"score twice.safetensors {CLIP} --allow-duplicates").stderr
