"""The command line: numbers, files, exit codes, and parts computed by several processes."""

import csv
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import eval.score.command as command
from eval.detectors import features
from eval.score import call as calls
from tests.eval.test_features import Quadrants, draw
from tests.eval.test_measure import Canonical
from tests.fork_server import quick_bin

ROOT = Path(__file__).parents[2]
SCORE = "score a.safetensors r.safetensors --detector quadrants"


def call(line: str, code: int = 0) -> Result:
    """Run the command line, which must end with that exit code."""
    result = CliRunner().invoke(command.app, line.split())
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def refusal(line: str) -> str:
    """The one sentence with which a call is refused."""
    (error,) = [text for text in call(line, 1).output.splitlines() if text.startswith("error: ")]
    return error


def document() -> dict:
    return json.loads(Path("out.json").read_text())


def rows(line: str) -> list[dict]:
    call(f"{line} --json out.json")
    return document()["rows"]


@pytest.fixture(autouse=True)
def sets(tmp_path, monkeypatch):
    """A folder of small sets, and detectors of tests."""
    detectors = {"quadrants": Quadrants(), "other": Quadrants("1" * 64), "inception": Canonical()}
    monkeypatch.setattr(calls, "load_detector", lambda name, *_: detectors[name])
    monkeypatch.setattr(features, "ROWS", 50)
    monkeypatch.chdir(tmp_path)
    for name, seeds in {"a": range(120), "b": range(60, 180), "r": range(200, 420), "short": range(110)}.items():
        save_file({"images": draw(list(seeds))}, f"{name}.safetensors")
    save_file({"images": draw([s % 60 for s in range(120)])}, "twice.safetensors")


def test_score_prints_a_table_and_writes_everything() -> None:
    options = "--metrics fd,kid,prdc,accuracy --classes 10 --images 120 --json out.json --csv out.csv"
    shown = call(f"{SCORE} {options}").stdout
    assert "FD (quadrants)" in shown and "coverage (k=5)" in shown
    written = document()
    assert {
        "kind", "generated", "detector", "reference", "geometry", "n", "samples", "labels", "interval", "warnings",
        "versions", "seconds", "rows",
    } <= set(written)  # fmt: skip
    assert written["generated"]["path"] == "a.safetensors" and len(written["generated"]["id"]) == 16
    assert written["reference"]["images"] == 220 and written["detector"]["weights"] == "0" * 64
    for row in written["rows"]:
        assert set(row) == {"arm", "metric", "value", "se", "low", "high", "bias", "n"}
        assert np.isfinite(row["value"]) and row["low"] <= row["high"]
    lines = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert [line["metric"] for line in lines] == [row["metric"] for row in written["rows"]]
    assert {"weights", "reference", "geometry", "commit", "seconds", "torch"} <= set(lines[0])


@pytest.mark.parametrize(
    ("detector", "distance", "score"), [("quadrants", "FD (quadrants)", "IS (quadrants)"), ("inception", "FID", "IS")]
)
def test_rows_are_named_and_canonical_features_alone_are_called_fid(detector, distance, score) -> None:
    options = f"--detector {detector} --metrics fd,kid,prdc,pr,is,accuracy --classes 10"
    assert [row["metric"] for row in rows(f"score a.safetensors r.safetensors {options}")] == [
        distance, "KID", "precision (k=5)", "recall (k=5)", "density (k=5)", "coverage (k=5)", "precision (k=3)",
        "recall (k=3)", score, "accuracy",
    ]  # fmt: skip


def test_numbers_do_not_depend_on_batch_or_parts() -> None:
    values = []
    for options, parts in (("--batch 1 --cache one", 0), ("--batch 7 --cache seven", 3), ("--cache fifty", 8)):
        for part in range(parts):
            assert f"shard {part}/{parts}: features of" in call(f"{SCORE} {options} --shard {part}/{parts}").stdout
        values.append([(row["value"], row["se"]) for row in rows(f"{SCORE} {options} --metrics fd,kid")])
    assert values[0] == values[1] == values[2]


def test_second_call_computes_no_features(monkeypatch) -> None:
    call(SCORE)
    blind = Quadrants()
    monkeypatch.setattr(calls, "load_detector", lambda *_: blind)
    call(SCORE)
    assert blind.seen == []


def test_paired_gives_both_arms_and_the_difference() -> None:
    line = "paired a.safetensors b.safetensors r.safetensors --detector quadrants --metrics fd,kid --margin 1000"
    found = rows(line)
    assert [row["arm"] for row in found] == ["a.safetensors", "b.safetensors", "b - a"] * 2
    for a, b, difference in (found[:3], found[3:]):
        assert difference["value"] == pytest.approx(b["value"] - a["value"], rel=1e-9)
        assert difference["value"] != 0
    assert found[2]["verdict"] == "equivalent within 1000" and document()["b"]["path"] == "b.safetensors"


def test_stats_makes_a_reference_that_gives_the_same_distance() -> None:
    call("stats r.safetensors refs/r/manifest.json --detector quadrants --shard 0/2")
    told = call("stats r.safetensors refs/r/manifest.json --detector quadrants").stdout
    assert "moments of 220 images, 12 dimensions, by quadrants" in told
    references = ("r.safetensors", "refs/r/manifest.json")
    values = [rows(f"score a.safetensors {name} --detector quadrants")[0]["value"] for name in references]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_part_with_a_reference_of_moments_needs_no_images_of_it() -> None:
    x = Canonical()(draw(list(range(90))))[0].numpy().astype(float)
    np.savez("ref.npz", mu=x.mean(0), sigma=np.cov(x.T))
    call("score a.safetensors ref.npz --detector inception --shard 0/1")
    result = call("score a.safetensors ref.npz --detector inception")
    assert "FID" in result.stdout and "does not say which resize" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{SCORE} --images 121", "holds 120 images but the protocol asks for exactly 121"),
        (f"{SCORE} --images 119", "holds 120 images but the protocol asks for exactly 119"),
        (f"{SCORE} --metrics fvd", "no metric fvd"),
        (f"{SCORE} --metrics accuracy", "needs the number of classes"),
        (f"{SCORE} --geometry squash", "no geometry squash"),
        (f"{SCORE} --shard 2/2", "no shard 2/2"),
        *((f"{SCORE} --shard {text}", f"'{text}' is no shard") for text in ("half", "2", "1/2/3", "-1/4")),
        (f"{SCORE} --device cuda:7", "no device cuda:7"),
        ("score twice.safetensors r.safetensors --detector quadrants", "60 of 120 images repeat an earlier one"),
        ("score nowhere r.safetensors --detector quadrants", "nowhere does not exist"),
        ("score a.safetensors nowhere.npz --detector inception", "nowhere.npz"),
        ("paired a.safetensors short.safetensors r.safetensors --detector quadrants", "differ in number of images"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(line, message, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in refusal(line)


def test_reference_of_another_detector_is_refused() -> None:
    call("stats r.safetensors refs/r/manifest.json --detector other")
    assert "not comparable" in refusal("score a.safetensors refs/r/manifest.json --detector quadrants")


def test_repeated_images_that_are_meant_are_a_warning() -> None:
    result = call("score twice.safetensors r.safetensors --detector quadrants --allow-duplicates")
    assert "60 generated images repeat" in result.stderr


def test_what_often_goes_wrong_is_said() -> None:
    fid = refusal("score a.safetensors r.safetensors --detector quadrants --metrics fid")
    assert "there is no metric fid" in fid and "fd is called with --detector inception-2015-12-05" in fid
    itself = call("score a.safetensors a.safetensors --detector quadrants --metrics fd,kid")
    assert "are those of the reference" in itself.stderr and "KID is not multiplied" in itself.stdout
    other = call("score a.safetensors r.safetensors --detector quadrants --metrics prdc")
    assert "prdc of 120 generated and 220 reference images" in other.stderr and "those of the" not in other.stderr
    save_file({"images": draw(list(range(60)))[:, :1].contiguous()}, "grey.safetensors")
    assert "are grey" in call("score grey.safetensors r.safetensors --detector quadrants").stderr
    assert "grey" not in other.stderr
    assert "give --first 110" in refusal("paired a.safetensors short.safetensors r.safetensors --detector quadrants")


def test_first_images_only() -> None:
    assert rows(f"{SCORE} --first 50 --images 50")[0]["n"] == document()["n"] == 50


def test_wrong_usage_is_exit_code_2() -> None:
    for line in ("score", f"{SCORE} --batch 0", f"{SCORE} --nonsense", f"{SCORE} --per-prompt 1"):
        call(line, 2)


def test_interrupt_is_exit_code_130(monkeypatch) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calls, "measure", interrupted)
    call(SCORE, 130)


def test_real_network_scores_real_images_in_a_process_of_its_own(tmp_path) -> None:
    for name, seeds in {"generated": range(40), "real": range(100, 150)}.items():
        (tmp_path / name).mkdir()
        for seed, image in zip(seeds, draw(list(seeds)), strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{seed:05d}.png")
    line = "-m eval score generated real --detector lite0-320@32 --metrics fd,kid,prdc --json out.json --threads 1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [str(quick_bin() / "python"), *line.split()]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "FD (lite0-320@32)" in result.stdout
    assert "warning: 40 images for 320 dimensions: below 640 there is no standard error" in result.stderr
    found = document()["rows"]
    assert found[0]["se"] is None and found[0]["value"] > 0 and 0 <= found[2]["value"] <= 1
