"""Exported students: what a script with torch and diffusers alone makes of them, what their cards say, bad input."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

import dmd2.export
from dmd2.condition import Condition
from dmd2.config import RunConfig, Teacher
from dmd2.data import load_shard, save_shard
from dmd2.errors import UserError
from dmd2.export import atomic_folder, export
from dmd2.files import listing, read_json, write_json
from dmd2.inputs import Inputs
from dmd2.run import RunId
from dmd2.sample import quantise, student_sample
from dmd2.samplers import few_step
from dmd2.snapshot import find_snapshot
from dmd2.teachers import adopt_teacher, wrap
from dmd2.trainer import Hardware, Training
from dmd2.wait import publish
from tests import tiny
from tests.workspace import Workspace

CPU, SEEDS = torch.device("cpu"), list(range(23))
# Runs the script given first, once per argument list, with our packages made impossible to import.
ALONE = """
import json, runpy, sys
sys.modules["dmd2"] = sys.modules["eval"] = None
for arguments in json.loads(sys.argv[2]):
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")
"""


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(kind: str, steps: int = 1, first: float | None = None, **changes) -> RunId:
    """A finished run of two snapshots made by the real training, in the current folder."""
    teacher, real = Path("data/teachers/tiny"), Path("data/real/tiny")
    tiny.network(kind, seed=5).save_pretrained(teacher / "unet", safe_serialization=True)
    form = tiny.KINDS[kind][0]
    adopt_teacher(Teacher(name="tiny", parameterisation=form, guidance=1.0), teacher)
    save_shard(real / "real.safetensors", tiny.tensors(kind, 32))
    write_json(real / "manifest.json", {"files": listing([real / "real.safetensors"], real)})
    first = first or (80.0 if form == "edm" else 999.0)
    generator = {"input": "noise" if steps == 1 else "backward_simulation", "steps": steps, "time": first}
    train = {"train__steps": 4, "train__snapshot_every": 2, "critic__ratio": 2}
    cfg = tiny.config(kind, generator=generator, **{**train, **changes})
    run = RunId("tiny", "student", 0)
    record = Training(run, cfg.training(), Hardware(), Inputs.of(run, cfg)).run()
    publish(run, json.loads(record.read_text()))
    return run


def student(kind: str, run: RunId, step: int = 4):
    """The denoiser of a snapshot and the run's config, read without the code under test."""
    record = read_json(run.folder / "train.json")
    entry = next(file for file in record["files"] if file["path"].endswith(f"{step:07d}.safetensors"))
    network = tiny.network(kind, seed=0)
    network.load_state_dict(load_shard(run.folder / entry["path"]))
    return wrap(network, tiny.KINDS[kind][0]).eval(), RunConfig.model_validate(
        {**record["config"], "eval": tiny.values(kind)["eval"]}
    )


def run_alone(script: Path, *argument_lists: list[str]) -> None:
    code = ALONE.replace("SCRIPT", repr(str(script)))
    command = [sys.executable, "-I", "-c", code, "-", json.dumps(argument_lists)]
    result = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("kind", "steps", "bound"), [("edm", 1, 1e-6), ("edm", 4, 1e-5), ("eps-labels", 4, 1e-5)])
def test_the_exported_script_alone_makes_our_images_at_the_same_noise(tmp_path, kind, steps, bound):
    run, out = trained(kind, steps), tmp_path / "out"
    export(find_snapshot(run), out)
    floats = ["--out", "floats.safetensors", "--batch", "7", "--seeds", *map(str, SEEDS)]
    pixels = kind == "edm"
    run_alone(out / "sample.py", floats, *([["--out", "grid.png"]] if pixels else []))
    denoiser, cfg = student(kind, run)
    ours = student_sample(denoiser, cfg, SEEDS, CPU)
    theirs = load_file(out / "floats.safetensors")["images" if pixels else "latents"]
    assert (theirs - ours).abs().max() <= bound * max(1.0, float(ours.abs().max()))
    assert not (out / "model_index.json").exists()
    if pixels:
        assert torch.equal(quantise(theirs, "round"), quantise(ours, "round"))
        seeds = [column + row * tiny.CLASSES for row in range(6) for column in range(tiny.CLASSES)]
        tiles = quantise(student_sample(denoiser, cfg, seeds, CPU), "round").reshape(6, tiny.CLASSES, 8, 8)
        grid = tiles.permute(0, 2, 1, 3).reshape(48, 8 * tiny.CLASSES).numpy()
        for png in ("grid.png", "samples.png"):
            np.testing.assert_array_equal(np.asarray(Image.open(out / png)), grid)


@pytest.mark.parametrize("kind", ["edm", "eps-labels"])
def test_the_script_takes_noise_and_labels_from_a_file(tmp_path, kind):
    run = trained(kind, 4)
    export(find_snapshot(run), tmp_path / "out")
    plain, condition = runpy.run_path(str(tmp_path / "out/sample.py")), tiny.condition(kind, 5)
    shape = (5, tiny.channels(kind), 8, 8)
    noise = {name: torch.randn(shape) for name in ("noise", "step0", "step1", "step2")}
    save_file({**noise, "labels": condition.labels}, tmp_path / "inputs.safetensors")
    theirs = plain["sample"](*plain["load"](), load_file(tmp_path / "inputs.safetensors"))
    denoiser, cfg = student(kind, run)
    times = denoiser.schedule.step_times(4, cfg.generator.time)
    z = denoiser.schedule.pure_noise(noise["noise"], torch.full((5,), times[0]))
    with torch.no_grad():
        ours = few_step(denoiser, z, times, condition, lambda i: noise[f"step{i}"])
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize(("kind", "steps"), [("eps-text", 4), ("eps-sdxl", 4), ("eps-sdxl", 1)])
def test_a_text_student_needs_its_conditions_and_makes_our_latents(tmp_path, kind, steps):
    run = trained(kind, steps, regression__pairs={"count": 4, "sampler": {"solver": "ddim", "steps": 2}, "shards": 1})
    export(find_snapshot(run), tmp_path / "out")
    assert not (tmp_path / "out/samples.png").exists()
    plain, condition = runpy.run_path(str(tmp_path / "out/sample.py")), tiny.condition(kind, 5)
    draws = {name: torch.randn(5, 4, 8, 8) for name in ["noise", *(f"step{i}" for i in range(steps - 1))]}
    extra = {name: value for name, value in vars(condition).items() if value is not None}
    theirs = plain["sample"](*plain["load"](), {**draws, **extra})
    denoiser, _ = student(kind, run)
    with torch.no_grad():
        times = denoiser.schedule.step_times(steps, 999.0)
        ours = few_step(denoiser, draws["noise"], times, condition, lambda i: draws[f"step{i}"])
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


def test_a_text_student_samples_ours_inside_the_stock_pipeline_of_its_card(tmp_path):
    run, out = trained("eps-sdxl", 4), tmp_path / "out"
    export(find_snapshot(run), out)
    assert "StableDiffusionXLPipeline" in (out / "README.md").read_text()
    unet, scheduler = runpy.run_path(str(out / "sample.py"))["load"]()
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    pipe = StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    condition, z = tiny.condition("eps-sdxl", 1), torch.randn(1, 4, 8, 8)
    theirs = pipe(
        prompt_embeds=condition.text, pooled_prompt_embeds=condition.pooled, latents=z, height=8, width=8,
        original_size=(8, 8), target_size=(8, 8), timesteps=[999, 749, 499, 249], guidance_scale=0,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(3)]
    denoiser, _ = student("eps-sdxl", run)
    with torch.no_grad():
        ours = few_step(denoiser, z, [999, 749, 499, 249], condition, lambda i: noise[i])
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


def test_the_folder_holds_the_snapshots_weights_and_its_own_scheduler_grid(tmp_path):
    run = trained("edm")
    export(find_snapshot(run, step=2), tmp_path / "out")
    weights = UNet2DModel.from_pretrained(tmp_path / "out/unet", use_safetensors=True).state_dict()
    assert tiny.same(weights, student("edm", run, step=2)[0].network)
    assert not tiny.same(weights, student("edm", run, step=4)[0].network)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*.*")} == {"0o644"}


def test_the_schedulers_own_grid_of_four_steps_is_ours(tmp_path):
    export(find_snapshot(trained("eps-labels", 4)), tmp_path / "out")
    scheduler = LCMScheduler.from_pretrained(tmp_path / "out/scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_the_schedulers_boundary_term_is_nothing_even_at_the_first_timestep(tmp_path):
    run = trained("eps-labels", first=1.0)
    export(find_snapshot(run), tmp_path / "out")
    plain = runpy.run_path(str(tmp_path / "out/sample.py"))
    theirs = plain["sample"](*plain["load"](), plain["draw"](SEEDS))
    denoiser, cfg = student("eps-labels", run)
    torch.testing.assert_close(theirs, student_sample(denoiser, cfg, SEEDS, CPU), rtol=1e-5, atol=1e-5)


def test_other_weights_change_the_images_and_one_label_can_be_asked_for(tmp_path):
    run = trained("edm")
    for step in (2, 4):
        export(find_snapshot(run, step=step), tmp_path / f"out{step}")
    plain = {step: runpy.run_path(str(tmp_path / f"out{step}/sample.py")) for step in (2, 4)}
    draws = plain[4]["draw"](SEEDS)
    images = {step: p["sample"](*p["load"](), draws) for step, p in plain.items()}
    assert (images[2] - images[4]).abs().max() > 1e-4
    run_alone(tmp_path / "out4/sample.py", ["--label", "3", "--seeds", "5", "9", "--out", "threes.safetensors"])
    denoiser, cfg = student("edm", run)
    ours = student_sample(denoiser, cfg, [5, 9], CPU, cond=Condition(labels=torch.tensor([3, 3])))
    torch.testing.assert_close(load_file(tmp_path / "out4/threes.safetensors")["images"], ours, rtol=0, atol=1e-6)


def measured(run: RunId, values: dict[int, float], labels: str = "cyclic", rounding: str = "round") -> None:
    """Metrics of the run's snapshots in the form `eval.evaluate` writes."""
    record = read_json(run.folder / "train.json")

    def estimate(value: float) -> dict:
        return {"value": value, "se": 0.5, "low": value - 2, "high": value, "bias": 1.0, "n": 60}

    write_json(run.folder / "metrics.json", {
        "protocol": {"detector": "d@1", "reference": "r@2", "labels": labels, "rounding": rounding},
        "snapshots": [{"step": s, "fd": v, "estimates": {"fd": estimate(v)}} for s, v in values.items()],
        "train_commit": record["commit"], "seconds": record["seconds"], "eval_commit": "abc",
        "config": {"eval": {"metrics": ["fd"]}},
    })  # fmt: skip


def test_the_protocols_labels_and_rounding_are_those_of_the_script(tmp_path):
    run = trained("edm")
    measured(run, {2: 3.0, 4: 5.0}, labels="random", rounding="trunc")
    export(find_snapshot(run), tmp_path / "out")
    denoiser, cfg = student("edm", run)
    plain = runpy.run_path(str(tmp_path / "out/sample.py"))
    ours = student_sample(denoiser, cfg, plain["SEEDS"], CPU, "random")
    grid = quantise(ours, "trunc").reshape(6, tiny.CLASSES, 8, 8).permute(0, 2, 1, 3).reshape(48, 8 * tiny.CLASSES)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/samples.png")), grid.numpy())
    assert "One column a class" not in (tmp_path / "out/README.md").read_text()


def test_best_is_the_lowest_of_the_first_metric_and_the_card_says_so(tmp_path):
    run = trained("edm")
    measured(run, {2: 3.0, 4: 5.0})
    export(find_snapshot(run, select="best"), tmp_path / "best")
    text = (tmp_path / "best/README.md").read_text()
    assert "lowest fd of 2" in text and "| FD | 3 | 0.5 | 1 | [1, 3] | 60 |" in text
    assert find_snapshot(run).step == find_snapshot(run, select="last").step == 4


def test_metrics_of_an_earlier_training_are_left_out(tmp_path):
    run = trained("edm")
    measured(run, {2: 3.0, 4: 5.0})
    metrics = read_json(run.folder / "metrics.json")
    write_json(run.folder / "metrics.json", {**metrics, "seconds": metrics["seconds"] + 1})
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
    write_json(run.folder / "metrics.json", {**metrics, "config": {"eval": {"metrics": ["accuracy"]}}})
    refused("of which the lowest is not the best", select="best")
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


def test_an_existing_folder_is_replaced_only_by_force_and_only_if_it_is_an_export(tmp_path):
    run, out = trained("edm"), tmp_path / "out"
    export(find_snapshot(run, step=2), out)
    before = (out / "README.md").read_text()
    with pytest.raises(UserError, match="replace it with --force"):
        export(find_snapshot(run), out)
    assert (out / "README.md").read_text() == before
    export(find_snapshot(run), out, force=True)
    assert "step 4 of 4" in (out / "README.md").read_text()
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="is no export"):
        export(find_snapshot(run), tmp_path / "precious", force=True)
    assert (tmp_path / "precious").exists()


def test_an_interrupted_export_keeps_the_earlier_one(tmp_path):
    run, out = trained("edm"), tmp_path / "out"
    export(find_snapshot(run), out)
    before = (out / "README.md").read_bytes()
    for failure, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError("no space"), UserError)):
        with pytest.raises(seen):
            with atomic_folder(out, force=True) as folder:
                (folder / "half").write_text("x")
                raise failure
    with pytest.raises(UserError, match="cannot write"):
        with atomic_folder(out, force=True) as folder:
            folder.rmdir()  # the new folder cannot take its place once the earlier one was moved aside
    assert (out / "README.md").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "results"]


def test_a_script_that_samples_otherwise_is_not_exported(tmp_path, monkeypatch):
    run = trained("edm")
    other = dmd2.export.EDMEulerScheduler(sigma_data=0.6)
    monkeypatch.setattr(dmd2.export, "scheduler_of", lambda student: other)
    with pytest.raises(UserError, match="differ from ours by"):
        export(find_snapshot(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_real_students_card_and_script(finished: Workspace, tmp_path):
    """The demo's run, its evaluation and its table, by the command line."""
    place = Workspace(tmp_path / "place")
    shutil.copytree(finished.path, place.path, symlinks=True)
    result = place.run("python", "-m", "dmd2.export", "digits/dmd2/seed0", "out", "--teacher-licence", "mit")
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
    row = next(line for line in (place.path / "results/tables/demo.md").read_text().splitlines() if "`dmd2`" in line)
    assert row in card.text and "`dmd`" not in card.text
    assert card.data.library_name == "diffusers" and card.data.license == "mit"
    assert (card.data.pipeline_tag, card.data.model_name) == ("unconditional-image-generation", "digits-dmd2-seed0")

    unfinished = place.run("python", "-m", "dmd2.export", "digits/dmd2/seed7", "out7")
    assert unfinished.returncode == 1 and unfinished.stderr.startswith("error: digits/dmd2/seed7 is not finished")
    assert not (place.path / "out7").exists()
