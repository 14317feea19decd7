"""Runs on text are evaluated from files: a real pipeline decodes, its prompts condition, captions stand in metrics.json."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2.core.errors import UserError
from dmd2.core.files import listing, read_json, write_json, write_text
from dmd2.core.run import RunId
from dmd2.data.make_pipeline import make_pipeline
from dmd2.data.prepare import encode_prompts
from dmd2.data.sets import TensorSet, save_shard
from dmd2.experiment.config import RunConfig
from dmd2.experiment.metrics import UNSETTLED
from dmd2.experiment.run_inputs import eval_prompts, measured_with, pipeline_manifest
from dmd2.networks.condition import Condition
from dmd2.networks.lora import IN_SNAPSHOT
from dmd2.networks.quantise import quantise
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.sampling import student_sample
from eval.detectors.detectors import load_detector, record_network
from eval.detectors.reference import Engine
from eval.detectors.small_clip import train_clip
from eval.pixels.images import open_images
from eval.pixels.resize import Geometry
from eval.runs import __main__ as commands
from eval.runs import evaluate
from tests import tiny, tiny_pipelines
from tests.conftest import ROOT

CAPTIONS = ["a red house", "two dog", "a photo of the beach"]
SIDE = tiny_pipelines.LATENTS * tiny_pipelines.FACTOR
DETECTOR = "lite0-320@32"
CPU = torch.device("cpu")


def config() -> RunConfig:
    return tiny.config(
        "eps-text",
        data__text={"pipeline": {"name": "tiny"}, "latents": True},
        teacher__source="data/pipelines/tiny/unet",
        eval__metrics=["fd", "patch_fd", "clip_score", "saturation", "sharpness"],
        eval__detector=DETECTOR,
        eval__clip="tiny-clip",
        eval__patch={"geometry": "patch-16", "reference": "tiny"},
        eval__prompts="captions.txt",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that an evaluation reads."""
    place = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        cfg = config()
        tiny_pipelines.sd15(Path("data/pipelines/tiny"))
        manifest = pipeline_manifest(cfg.data)
        make_pipeline(cfg.data, manifest.parent, CPU)
        write_text(Path("captions.txt"), "\n".join(CAPTIONS) + "\n")
        encode_prompts(cfg.data, manifest, Path("captions.txt"), eval_prompts(cfg), CPU)
        read = measured_with(cfg)
        read["teacher"].parent.mkdir(parents=True)  # as Snakemake does
        adopt_teacher(cfg.teacher, read["teacher"].parent)
        record_network(DETECTOR, read["detector"])
        pixels = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
        np.save("real.npy", pixels)
        for name, geometry in (("reference", "none"), ("patch_reference", "patch-16")):
            engine = Engine(load_detector(DETECTOR), Geometry(geometry), Path("cache"))
            engine.save_moments(open_images("real.npy", engine.geometry), Path("real.npy"), read[name])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        states = torch.randn(20, tiny_pipelines.TOKENS, tiny_pipelines.WIDTH)
        train_clip("tiny-clip", TensorSet({"images": images, "text": states}), read["clip"], steps=1)
    return place


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def evaluated(metrics: Path) -> dict:
    entry = read_json(metrics)
    assert entry["captions"] == CAPTIONS
    assert set(config().eval.metrics) < entry["snapshots"][0].keys()
    assert entry["protocol"]["labels"] == "by prompt" and entry["protocol"]["prompts"].endswith("(3 captions)")
    assert entry["protocol"]["patch"].startswith("patch-16, tiny-lite0")
    with Image.open(metrics.with_name("grid.png")) as grid:
        assert grid.size == (3 * SIDE, 6 * SIDE)
    return entry


def test_a_guided_teacher_is_measured_on_decoded_images(place: Path) -> None:
    cfg, out = config(), Path("results/teachers/tiny/ode/metrics.json")
    evaluate.evaluate_teacher(cfg, "ode", cfg.eval.teacher_samplers["ode"], CPU, out)
    first = evaluated(out)["snapshots"]
    guided = cfg.eval.teacher_samplers["ode"].model_copy(update={"guidance": 4.0})
    evaluate.evaluate_teacher(cfg, "ode", guided, CPU, out)
    assert evaluated(out)["snapshots"] != first


STOPS = """
import os, signal
from eval.detectors import features
from eval.runs import __main__ as commands

def write_and_stop(path, value, write=features.write_json):
    write(path, value)
    if path.name == "about.json":
        os.kill(os.getpid(), signal.SIGSTOP)

features.write_json = write_and_stop
commands.app()
"""


def test_two_processes_do_not_evaluate_the_same_at_once(place: Path) -> None:
    """The one that came second leaves at once, and the features that the first is about to read stay."""
    out = Path("results/teachers/tiny/twice/metrics.json")
    samplers = {"twice": config().eval.teacher_samplers["ode"]}
    cfg = config().model_copy(update={"eval": config().eval.model_copy(update={"teacher_samplers": samplers})})
    words, path = ["twice", str(out), "--config", cfg.model_dump_json()], {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STOPS, "teacher", *words]
    with subprocess.Popen(command, env=os.environ | path, stderr=subprocess.PIPE, text=True) as first:
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            with pytest.raises(
                SystemExit, match=r"another process makes metrics.json \(process \d+ on .*\); wait for it or stop it"
            ):
                commands.teacher("twice", out, cfg.model_dump_json())
        finally:
            first.send_signal(signal.SIGCONT)
            _, told = first.communicate()
    assert first.returncode == 0, told
    evaluated(out)


def test_a_snapshot_with_factors_is_measured_by_its_plain_weights(place: Path) -> None:
    cfg, run = config(), RunId("tiny", "dmd2", 0)
    weights = dict(evaluate.teacher_of(cfg, cfg.eval.teacher_samplers["ode"], CPU).network.network.state_dict())
    save_shard(run.folder / "0000020.safetensors", {**weights, f"{IN_SNAPSHOT}x.alpha": torch.tensor(1.0)})
    write_text(run.folder / "log.jsonl", '{"step": 20, "probe/brightness": 0.5}\n')
    write_json(run.folder / "train.json", {
        "files": listing([run.folder / "0000020.safetensors"], run.folder), "key": "k", "steps": 20, "cost": {},
        "student_updates": 4, "seconds": 1.0, "device": "cpu", "commit": "abc",
    })  # fmt: skip
    evaluate.evaluate_run(run, cfg, CPU, run.folder / "metrics.json")
    students = evaluate.student_of(run, cfg, CPU)
    assert len(list(students.snapshots())) == 1
    corner = quantise(students([3 + 1]), cfg.eval.rounding)[0].permute(1, 2, 0).numpy()  # row 1, caption 1
    with Image.open(run.folder / "grid.png") as grid:
        assert np.abs(np.asarray(grid)[SIDE : 2 * SIDE, SIDE : 2 * SIDE].astype(int) - corner).max() <= 1
    other = students.prompts.condition([0])
    drawn = student_sample(students.network, cfg, [4], CPU, cond=other)
    assert not torch.allclose(students.images(drawn), students([4]), atol=1e-3)
    assert evaluated(run.folder / "metrics.json")["snapshots"][0]["step"] == 20


def test_stability_is_that_of_the_training_that_train_json_records(place: Path) -> None:
    run, values = RunId("tiny", "log", 0), [0.1, 0.2, 0.3, 0.4, 9.0]
    lines = [{"step": step, "probe/brightness": value} for step, value in enumerate(values, start=1)]
    write_text(run.folder / "log.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))  # a longer one goes on
    found = evaluate.brightness_stability(run, {"steps": 4, "last": lines[3]})
    assert found == {"brightness_std": pytest.approx(np.std([v for v in values[:4] if v * 10 >= UNSETTLED * 4]))}
    with pytest.raises(UserError, match=r"log\.jsonl is of another training than train\.json"):
        evaluate.brightness_stability(run, {"steps": 4, "last": {"step": 4, "probe/brightness": 0.5}})


def test_an_image_depends_on_the_caption_of_its_seed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    sample = evaluate.teacher_of(cfg, cfg.eval.teacher_samplers["ode"], CPU)
    images = sample([0, 1])
    assert images.shape == (2, 3, SIDE, SIDE)
    swapped = evaluate.EvalPrompts.of(cfg).condition([1, 1])
    monkeypatch.setattr(
        evaluate.EvalPrompts, "condition", lambda self, seeds, device="cpu": Condition(text=swapped.text)
    )
    other = evaluate.teacher_of(cfg, cfg.eval.teacher_samplers["ode"], CPU)
    assert not torch.allclose(other([0, 1])[0], images[0]) and torch.allclose(other([0, 1])[1], images[1], atol=1e-5)


def test_images_of_other_levels_are_those_of_another_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that were killed leave features, and the next ones take those of the same identity."""
    write_json(tmp_path / "manifest.json", {"files": []})
    monkeypatch.setattr(evaluate, "_teacher", lambda cfg, device: None)
    monkeypatch.setattr(evaluate, "measured_with", lambda cfg: {"teacher": tmp_path / "manifest.json"})
    cfg = tiny.config("flow-sd3")
    spec, found = cfg.eval.teacher_samplers["ode"], []
    for changes in ({}, {"shift": 3.0}, {"guidance_embed": 2.0}, {"rescale": "row"}):
        other = cfg.model_copy(update={"teacher": cfg.teacher.model_copy(update=changes)})
        found += [identity for _, identity in evaluate.teacher_of(other, spec, CPU).snapshots()]
    assert len({json.dumps(identity, sort_keys=True) for identity in found}) == 4
