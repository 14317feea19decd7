"""The model card of an exported student, which snapshot it is of, and what bad input says."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from dmd2.core.errors import UserError
from dmd2.core.files import read_json, write_json
from dmd2.experiment.config import Teacher
from dmd2.publish.diffusers_folder import export
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.snapshot import find_snapshot
from tests.exported import measured, run_alone, trained
from tests.workspace import Workspace

pytestmark = pytest.mark.usefixtures("own_folder")


def test_best_is_the_lowest_of_the_first_metric_and_the_card_says_so(tmp_path):
    run = trained("edm")
    measured(run, {2: 3.0, 4: 5.0})
    export(find_snapshot(run, select="best"), tmp_path / "best")
    text = (tmp_path / "best/README.md").read_text()
    assert "lowest fd of 2" in text and "| FD | 3.00 | 0.500 | 1.00 | [1.00, 3.00] | 60 |" in text
    assert find_snapshot(run).step == find_snapshot(run, select="last").step == 4


def test_best_of_accuracy_is_the_highest():
    run = trained("edm")
    measured(run, {2: 3.0, 4: 5.0})
    path = run.folder / "metrics.json"
    metrics = read_json(path)
    values = {2: 0.99, 4: 0.9}
    lines = [line | {"accuracy": values[line["step"]]} for line in metrics["snapshots"]]
    lines.append({**lines[0], "step": 3, "accuracy": float("nan")})
    write_json(path, {**metrics, "snapshots": lines, "config": {"eval": {"metrics": ["accuracy", "fd"]}}})
    found = find_snapshot(run, select="best")
    assert found.step == 2 and found.selection.startswith("the snapshot with the highest accuracy of 3")


def test_metrics_of_an_earlier_training_are_left_out(tmp_path):
    run = trained("edm")
    measured(run, {2: 3.0, 4: 5.0})
    metrics = read_json(run.folder / "metrics.json")
    write_json(run.folder / "metrics.json", {**metrics, "key": "of an earlier training"})
    export(find_snapshot(run), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.eval_results is None and "not known: the run has no evaluation" in card.text


@pytest.mark.parametrize(
    ("licence", "known", "name", "sentence"),
    [
        ("apache-2.0", "apache-2.0", None, "as stated by who exported this: apache-2.0"),
        ("NVIDIA non-commercial", "other", "NVIDIA non-commercial", "exported this: NVIDIA non-commercial"),
        (None, "unknown", None, "**No licence has been stated: whoever publishes this folder must state one.**"),
    ],
)
def test_the_card_states_the_teachers_licence_or_that_nobody_did(tmp_path, licence, known, name, sentence):
    export(find_snapshot(trained("edm")), tmp_path / "out", licence)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.license_name) == (known, name)
    assert sentence in card.text and "teacher's licence carries over" in card.text
    assert "| run | `tiny/student/seed0` |" in card.text and "compared with those of the training code" in card.text


def test_bad_input_is_one_sentence_and_leaves_no_folder(tmp_path):
    run = trained("edm")

    def refused(sentence: str, **selection) -> None:
        with pytest.raises(UserError, match=sentence):
            export(find_snapshot(run, **selection), tmp_path / "out/deep")
        assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out/deep").exists()

    refused("no snapshot of step 3; it has 2, 4", step=3)
    refused("either --step or --select", step=2, select="last")
    refused("none of its snapshots is known to be the best", select="best")
    measured(run, {2: 3.0, 4: 5.0})
    metrics = read_json(run.folder / "metrics.json")
    write_json(run.folder / "metrics.json", {**metrics, "config": {"eval": {"metrics": ["brightness"]}}})
    refused("seed0/metrics.json: eval.metrics begins with brightness, of which neither the lowest nor", select="best")
    snapshot = run.folder / find_snapshot(run).entry["path"]
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:-1] + b"?")
    refused("does not match the checksum")
    snapshot.write_bytes(whole[:-5])
    refused("it is truncated")
    snapshot.unlink()
    refused("is missing although its manifest lists it")
    snapshot.write_bytes(whole)
    config = Path("data/teachers/tiny/unet/config.json")
    kept = config.read_text()
    config.unlink()
    refused("unet/config.json is missing")
    other = json.loads(kept) | {"block_out_channels": [16, 32]}
    config.write_text(json.dumps(other))
    adopt_teacher(Teacher(name="tiny", parameterisation="edm", guidance=1.0), config.parents[1])
    refused("put back the teacher this run was trained with")
    Path("data/teachers/tiny/manifest.json").unlink()
    refused("put the folder of teacher tiny there")
    write_json(run.folder / "train.json", {**read_json(run.folder / "train.json"), "config": {}})
    refused("of another version of this code")
    (run.folder / "train.json").unlink()
    refused("tiny/student/seed0 is not finished")


def test_a_real_students_card_and_script(finished: Workspace, tmp_path):
    """The demo's run, its evaluation and its table, by the command line."""
    place = Workspace(tmp_path / "place")
    shutil.copytree(finished.path, place.path, symlinks=True)
    result = place.run("python", "-m", "dmd2.publish.export", "digits/dmd2/seed0", "out", "--teacher-licence", "mit")
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    out, run = place.path / "out", "digits/dmd2/seed0"
    run_alone(out / "sample.py", ["--out", "again.png"])
    grid = np.asarray(Image.open(out / "again.png"))
    np.testing.assert_array_equal(grid, np.asarray(Image.open(out / "samples.png")))
    np.testing.assert_array_equal(grid, np.asarray(Image.open(place.path / "results/runs" / run / "grid.png")))
    assert (out / "sample.py").read_text() in (out / "README.md").read_text()

    card = ModelCard.load(out / "README.md")
    estimates = read_json(place.path / "results/runs" / run / "metrics.json")["snapshots"][-1]["estimates"]
    results = {r.metric_type: (r.metric_value, r.metric_name) for r in card.data.eval_results}
    assert results.keys() == {"fd", "accuracy"} and results["fd"][0] == estimates["fd"]["value"]
    assert "FID" not in results["fd"][1] and "| FID |" not in card.text and "it is not FID" in card.text
    assert re.search(rf"^\| FD \| {estimates['fd']['value']:.4g} \|", card.text, re.M)
    lines = (place.path / "results/tables/demo.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| `dmd2` |"))
    said = next(line for line in lines if line.startswith("One seed; the last snapshot;"))
    assert "\n".join([*lines[2:4], row]) in card.text and said in card.text and "`dmd`" not in card.text
    assert "its seeds are 0 and this student is seed 0:\n" in card.text
    assert card.data.library_name == "diffusers" and card.data.license == "mit"
    assert (card.data.pipeline_tag, card.data.model_name) == ("unconditional-image-generation", "digits-dmd2-seed0")

    unfinished = place.run("python", "-m", "dmd2.publish.export", "digits/dmd2/seed7", "out7")
    assert unfinished.returncode == 1 and unfinished.stderr.startswith("error: digits/dmd2/seed7 is not finished")
    assert not (place.path / "out7").exists()
