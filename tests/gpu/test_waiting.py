"""An iteration never makes the GPU and the CPU wait for each other."""

from pathlib import Path

import pytest
import torch

from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.yaml_file import read_yaml
from dmd2.networks.lpips import Lpips
from dmd2.networks.transformers.family import FAMILIES
from dmd2.training.trainer import Training
from tests import tiny
from tests.conftest import ROOT
from tests.gpu.test_training import EVERY, FOUR, prepared
from tests.transformer_runs import LOW, prepare, training
from tests.waits import nothing_waits

ONE_HOT = "PyTorch checks the labels of one_hot on a CPU alone"
LONG = {**EVERY, "train__steps": 50, "train__log_every": 50}
SIMULATED = {"generator": {"input": "backward_simulation", **FOUR}}
WITHIN = {"generator": {"input": "noised_real", "steps": 4, "time": 1.0, "isg": 0.5, "isg_guidance": [2.0, 4.0]}}
FASTGEN = {**read_yaml(ROOT / "workflow/presets/fastgen.yaml")[0]["change"], "critic.ratio": 2}
CASES = {
    "every term": ("edm", LONG),
    "guided text": ("eps-text", {**LONG, "teacher__guidance": 2.0, "gan__r1_weight": 0.0}),
    "SDXL in bf16": ("eps-sdxl", {**LONG, "train__precision": "bf16"}),
    "backward simulation": ("edm", {**LONG, **SIMULATED}),
    "SenseFlow": ("flow-sd3", {**LONG, **WITHIN, "critic__ida": 0.97, "gan__level_weight": True, "gan__loss": "hinge"}),
    "decoupled": ("flow-sd3", {**LONG, "dm__objective": "decoupled", "dm__renoise": "hybrid", "dm__guidance": [2.0, 8.0]}),
    "divergence": ("edm", {**LONG, "dm__divergence": "js"}),
    "SiD, moments": ("eps-text", {**LONG, "dm__objective": "sid", "dm__moments_kl": 1.0, "dm__moments": [0.0, 1.0]}),
    "FastGen": ("edm", {"train__steps": 50, "train__log_every": 50, **{k.replace(".", "__"): v for k, v in FASTGEN.items()}}),
    "FastGen, several steps": ("edm", {**LONG, "generator": {"input": "noised_real", "conditions": "real", **FOUR}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_no_iteration_waits(name: str, device: torch.device, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu" and name == "backward simulation":
        pytest.skip("its step is drawn on the CPU")
    kind, changes = CASES[name]
    if device.type == "cpu" and kind == "flow-sd3":
        pytest.skip(ONE_HOT)
    monkeypatch.setattr(
        "dmd2.training.build.null_condition", lambda _, guidance, __: tiny.null(kind) if guidance > 1 else None
    )
    cfg = tiny.config(kind, **changes).training()
    size = None if "dm__divergence" in changes else 2  # its weights are means over the batch
    training = Training(RunId("tiny", "waits", 0), cfg, Hardware(str(device), micro_batch=size), prepared(kind))
    for _ in range(2):  # schedules are uploaded, AdamW's moments are made
        training.iterate()
    before = {name: p.detach().clone() for name, p in training.models.student.named_parameters()}
    with nothing_waits(device):
        for _ in range(4):
            training.iterate()
    assert any(not torch.equal(p.cpu(), before[name].cpu()) for name, p in training.models.student.named_parameters())


def test_the_distance_of_the_regression_does_not_wait(device: torch.device) -> None:
    distance, images = Lpips(None).to(device), torch.zeros(2, 3, 32, 32, device=device)
    with nothing_waits(device):
        distance(images, images)


PLAIN = sorted(set(FAMILIES) - {"Lumina2Transformer2DModel"})  # diffusers reads the lengths of its captions back


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "fp32") for kind in PLAIN), ("SD3Transformer2DModel", LOW)])
def test_no_transformer_waits(
    kind: str, mode: str, device: torch.device, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        pytest.skip(ONE_HOT)
    prepare(place, [kind])
    one = training(place, kind, mode, Hardware(str(device)))
    for _ in range(2):
        one.iterate()
    with nothing_waits(device):
        one.iterate()
    assert all(bool(torch.isfinite(value.cpu()).all()) for value in one.models.student.state_dict().values())


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: float(x[0]), lambda x: bool(x[0] > 0),
    lambda x: x.unique(), lambda x: x.cpu() if x.is_cuda else x[0].item(),
])  # fmt: skip
def test_waiting_is_found(wait, device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with pytest.raises((AssertionError, RuntimeError)), nothing_waits(device):
        wait(x)


def test_an_upload_of_a_list_is_found(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("there is nothing to upload to")
    with pytest.raises((AssertionError, RuntimeError)), nothing_waits(device):
        torch.tensor([1.0, 2.0], device=device)
