"""Exported students: what a script with torch and diffusers alone makes of them, and how the folder is written."""

import runpy

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import dmd2.publish.diffusers_folder
from dmd2.core.errors import UserError
from dmd2.method.samplers import few_step
from dmd2.networks.condition import Condition
from dmd2.networks.quantise import quantise
from dmd2.publish.diffusers_folder import export, export_folder
from dmd2.training.sampling import student_sample
from dmd2.training.snapshot import find_snapshot
from tests import tiny
from tests.exported import measured, run_alone, student, trained

CPU, SEEDS = torch.device("cpu"), list(range(23))
pytestmark = pytest.mark.usefixtures("own_folder")


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
    card = (out / "README.md").read_text()
    assert f"At export, {6 * tiny.CLASSES} samples of `sample.py` were compared" in card
    if pixels:
        assert f", 0 of {6 * tiny.CLASSES * ours[0].numel()} 8-bit values differ (torch {torch.__version__}, " in card
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
            with export_folder(out, force=True) as folder:
                (folder / "half").write_text("x")
                raise failure
    with pytest.raises(UserError, match="cannot write"):
        with export_folder(out, force=True) as folder:
            folder.rmdir()  # the new folder cannot take its place once the earlier one was moved aside
    assert (out / "README.md").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "results"]


def test_a_script_that_samples_otherwise_is_not_exported(tmp_path, monkeypatch):
    run = trained("edm")
    other = dmd2.publish.diffusers_folder.EDMEulerScheduler(sigma_data=0.6)
    monkeypatch.setattr(dmd2.publish.diffusers_folder, "scheduler_of", lambda student, steps: other)
    with pytest.raises(UserError, match="differ from ours by"):
        export(find_snapshot(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()
