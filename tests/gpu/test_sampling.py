"""Sampling on the device: every solver, pairs, a teacher's training, and an exported script, with the CPU's numbers."""

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmd2.core.rng import sample_labels, sample_noise
from dmd2.data.sets import load_shard
from dmd2.experiment.config import Data, Teacher
from dmd2.experiment.eval_config import Sampler
from dmd2.networks.quantise import RULES, quantise
from dmd2.publish.diffusers_folder import export
from dmd2.training.make_teacher import train_teacher
from dmd2.training.pairs import make_shard
from dmd2.training.sampling import sample_teacher, student_sample
from dmd2.training.snapshot import find_snapshot
from dmd2.training.teachers import load_teacher
from tests import tiny
from tests.exported import trained

CPU, SEEDS = torch.device("cpu"), list(range(6))
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # of float32 convolutions, summed in another order, through a few steps
SOLVERS = {
    "heun": ("edm", {"solver": "heun", "steps": 4}),
    "heun with churn": ("edm", {"solver": "heun", "steps": 4, "churn": 2.0}),
    "heun guided": ("edm-attention", {"solver": "heun", "steps": 3, "guidance": 2.0}),
    "ddim": ("eps-labels", {"solver": "ddim", "steps": 4, "guidance": 2.0}),
    "ddim stochastic": ("eps-text", {"solver": "ddim", "steps": 4, "eta": 1.0}),
    "pndm": ("eps-text", {"solver": "pndm", "steps": 5}),
    "euler": ("eps-sdxl", {"solver": "euler", "steps": 4}),
}


def images_on(device: torch.device, kind: str, spec: Sampler) -> torch.Tensor:
    """Images of a teacher's sampler, on the CPU."""
    teacher, cfg = tiny.denoiser(kind).eval().to(device), tiny.config(kind)
    cond = tiny.condition(kind, len(SEEDS)).to(device)
    found = sample_teacher(teacher, cfg, spec, SEEDS, device, cond)
    assert found.device == device
    return found.cpu()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_teachers_sampler_makes_the_images_of_the_cpu(name: str, device: torch.device) -> None:
    kind, spec = SOLVERS[name][0], Sampler.model_validate(SOLVERS[name][1])
    torch.testing.assert_close(images_on(device, kind, spec), images_on(CPU, kind, spec), **CLOSE)


@pytest.mark.parametrize(("kind", "first"), [("edm", 80.0), ("eps-text", 999.0)])
def test_a_students_steps_make_the_images_of_the_cpu(kind: str, first: float, device: torch.device) -> None:
    cfg = tiny.config(kind, generator={"input": "backward_simulation", "steps": 4, "time": first})

    def images(where: torch.device) -> torch.Tensor:
        cond = tiny.condition(kind, len(SEEDS)).to(where) if kind == "eps-text" else None
        return student_sample(tiny.denoiser(kind).eval().to(where), cfg, SEEDS, where, cond=cond)

    found = images(device)
    assert found.device == device
    torch.testing.assert_close(found.cpu(), images(CPU), **CLOSE)
    for rule in RULES:
        assert quantise(found, rule).device == device


def test_noise_and_labels_of_seeds_are_those_of_the_cpu(device: torch.device) -> None:
    noise = sample_noise(SEEDS, (1, 4, 4), "noise", device)
    assert noise.device == device and torch.equal(noise.cpu(), sample_noise(SEEDS, (1, 4, 4), "noise"))
    for rule in ("cyclic", "random", "cyclic-on-2-ranks"):
        assert sample_labels(SEEDS, 4, rule).device == CPU


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pairs_are_those_of_the_cpu(guidance: float, device: torch.device, place: Path) -> None:
    teacher = tiny.teacher(Path("teacher"))
    cfg = tiny.config("edm", regression__pairs__sampler={"solver": "heun", "steps": 3, "guidance": guidance})
    for name, where in (("cpu", CPU), ("device", device)):
        make_shard(cfg, teacher, 0, place / f"{name}.json", where)
    ours, theirs = (load_shard(place / f"{name}.safetensors") for name in ("device", "cpu"))
    assert torch.equal(ours["noise"], theirs["noise"]) and torch.equal(ours["labels"], theirs["labels"])
    torch.testing.assert_close(ours["images"], theirs["images"], **CLOSE)


@pytest.mark.parametrize("form", ["edm", "eps"])
def test_a_teacher_is_trained_and_resumed(form: str, device: torch.device, place: Path, monkeypatch) -> None:
    monkeypatch.setattr("dmd2.training.make_teacher.CHECKPOINT_EVERY", 2)
    monkeypatch.setattr("dmd2.training.make_teacher.pipeline_manifest", lambda data: None)
    kind = "edm" if form == "edm" else "eps-labels"
    data = Data.model_validate(tiny.values(kind)["data"])
    network = {"_class_name": tiny.KINDS[kind][1].__name__, **tiny.KINDS[kind][2]}
    train = {"steps": 4, "batch": 4, "lr": 1e-3, "warmup": 2, "ema": 0.9, "label_dropout": 0.5, "seed": 0}
    real = tiny.real_set(place / "set.json", kind, tiny.tensors(kind, 16))
    for steps in (2, 4):  # the second starts from the checkpoint of a shorter training of the same name
        spec = {"name": "t", "parameterisation": form, "guidance": 1.0, "network": network}
        teacher = Teacher.model_validate({**spec, "train": {**train, "steps": steps}})
        manifest = train_teacher(data, teacher, real, place, device)
        train_teacher(data, teacher, real, place, device)  # finished: from its last checkpoint
    weights = load_teacher(manifest, form).network.state_dict().values()
    assert all(bool(torch.isfinite(weight).all()) for weight in weights)


def test_an_exported_script_samples_on_the_device(device: torch.device, place: Path, monkeypatch) -> None:
    monkeypatch.setattr("dmd2.training.sampling.PROBES", SEEDS)
    export(find_snapshot(trained("edm", steps=4)), Path("out"))
    for where in (CPU, device):
        arguments = ["--seeds", *map(str, SEEDS), "--device", str(where), "--out", f"{where.type}.safetensors"]
        monkeypatch.setattr("sys.argv", ["sample.py", *arguments])
        runpy.run_path("out/sample.py", run_name="__main__")
    ours, theirs = (load_shard(Path(f"{where.type}.safetensors")) for where in (device, CPU))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
    monkeypatch.setattr("sys.argv", ["sample.py", "--device", str(device), "--out", "grid.png"])
    runpy.run_path("out/sample.py", run_name="__main__")
    with Image.open("grid.png") as grid:
        assert grid.size[0] > 0
