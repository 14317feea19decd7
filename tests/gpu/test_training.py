"""Trainings on the device: every loss term, input, precision and kind of network, to their snapshots and records."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmd2.core.files import read_json, write_json
from dmd2.core.precision import deterministic_kernels
from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import Inputs
from dmd2.training.trainer import Training
from tests import tiny

STEPS = 2
EVERY = {"train__steps": STEPS, "train__snapshot_every": 1, "train__checkpoint_every": 1, "train__log_every": 2,
         "critic__ratio": 2, "regression__weight": 0.5, "gan__r1_weight": 1.0, "optim__ema": 0.9}  # fmt: skip
FOUR = {"steps": 4, "time": 80.0}


def prepared(kind: str, rows: dict[str, torch.Tensor] | None = None) -> Inputs:
    """Teacher, real set and pair set in the current folder."""
    pairs = tiny.real_set(Path("set.json"), kind, rows or tiny.tensors(kind, 32, seed=9))
    return Inputs(tiny.teacher(Path("teacher"), kind, "tiny"), pairs, pairs, None)


def trained(name: str, cfg: RunConfig, inputs: Inputs, hardware: Hardware) -> dict:
    """The record of a finished training."""
    return read_json(Training(RunId("tiny", name, 0), cfg.training(), hardware, inputs).run())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few probes; and a pretended GPU has no name."""
    monkeypatch.setattr("dmd2.training.sampling.PROBES", list(range(4)))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_kind_of_network_trains_with_every_loss_term(kind: str, device: torch.device, place: Path) -> None:
    record = trained("all", tiny.config(kind, **EVERY), prepared(kind), Hardware(str(device), micro_batch=2))
    assert (record["device"] == "cpu") == (device.type == "cpu")
    weights = load_file(next(place.rglob(f"*{STEPS:07d}.safetensors")))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert {"dm/g_abs", "student/regression", "critic/gan", "probe/brightness"} <= record["last"].keys()


LEVELS = [20, 980]
SHARED = {"gan__shares_noise": True, "gan__noise_range": LEVELS, "critic__index_range": LEVELS}
CHANGES = {
    "guided by the null label": ("edm", {"teacher__guidance": 2.0}),
    "backward simulation": ("edm", {"generator": {"input": "backward_simulation", **FOUR}}),
    "noised real images": ("edm", {"generator": {"input": "noised_real", **FOUR}}),
    "conditions of real images": ("edm", {"generator": {"input": "noise", "steps": 1, "time": 80.0, "conditions": "real"}}),
    "alpha factor and shared noise": ("eps-text", {"dm__alpha_factor": True, **SHARED}),
    "GAN without noise": ("edm", {"gan__noise_range": None}),
    "GAN on the teacher": ("edm", {"gan__features_from": "teacher"}),
    "bf16": ("edm", {"train__precision": "bf16"}),
    "bf16 of a latent network": ("eps-sdxl", {"train__precision": "bf16"}),
    "bf16 body": ("edm-attention", {"train__precision": "bf16-body"}),
    "bf16 body of a latent network": ("eps-sdxl", {"train__precision": "bf16-body"}),
    "bf16 in all passes": ("eps-text", {"train__precision": "bf16-all"}),
    "low rank": ("eps-text", {"generator": {"input": "noise", "steps": 1, "time": 999.0, "lora": {"rank": 2, "alpha": 2.0}}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_base_can_change_trains(name: str, device: torch.device, place: Path) -> None:
    kind, changes = CHANGES[name]
    hardware = Hardware(str(device), checkpointing=name == "bf16")
    record = trained("changed", tiny.config(kind, **{**EVERY, **changes}), prepared(kind), hardware)
    assert record["last"]["step"] == STEPS


def test_first_networks_may_be_those_of_another_run(device: torch.device, place: Path) -> None:
    inputs = prepared("edm")
    first = Training(RunId("tiny", "first", 0), tiny.config("edm", **EVERY).training(), Hardware(str(device)), inputs)
    write_json(place / "train.json", read_json(first.run()))
    (place / "train.json").rename(first.folder / "train.json")
    second = Inputs(inputs.teacher, inputs.real, inputs.pairs, first.folder / "train.json")
    record = trained("second", tiny.config("edm", **EVERY), second, Hardware(str(device)))
    assert record["last"]["step"] == STEPS


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_training_goes_on_from_its_checkpoint(deterministic: bool, device: torch.device, place: Path) -> None:
    """Bit for bit with deterministic kernels and on the CPU; else to 1e-3 of the length of the weights' update."""
    inputs, cfg = prepared("edm-attention"), tiny.config("edm-attention", **EVERY).training()
    hardware = Hardware(str(device), deterministic=deterministic)
    with deterministic_kernels(deterministic):
        whole, halves = (Training(RunId("tiny", name, 0), cfg, hardware, inputs) for name in ("whole", "halves"))
        before = {name: weight.cpu().clone() for name, weight in whole.models.student.state_dict().items()}
        whole.run()
        halves.folder.mkdir(parents=True)
        halves.iterate()
        halves.save()
        halves.writer.wait()
        again = Training(RunId("tiny", "halves", 0), cfg, hardware, inputs)
        again.run()
    assert [line["step"] for line in again.log] == [STEPS]
    ours, theirs = ({k: v.cpu() for k, v in t.models.student.state_dict().items()} for t in (again, whole))
    assert all(weight.device == device for weight in again.models.student.state_dict().values())
    if deterministic or device.type == "cpu":
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moved = sum(float((theirs[name] - before[name]).square().sum()) for name in ours) ** 0.5
    apart = sum(float((theirs[name] - ours[name]).square().sum()) for name in ours) ** 0.5
    assert apart < 1e-3 * moved
