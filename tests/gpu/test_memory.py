"""Peak memory of an iteration on the device against what `plan` counts: digits, and ImageNet-64 and SDXL on a GPU."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.full_size import allocated_peak, standing
from benchmarks.random_runs import changed, hardware, random_training
from dmd2.experiment.config import RunConfig
from dmd2.experiment.tables import load_base
from dmd2.planning.memory import Counted, Setup, architecture
from dmd2.planning.plan import varied
from dmd2.training.make_teacher import adopt_teacher
from dmd2.training.teachers import build_network

GB = 1e9
# Base, batch, setup, LoRA rank, AdamW's states, GB that the card must have, and how far the measured peak may be off:
# digits is small beside the workspaces of the convolutions, which are not counted.
SIZES = {
    "digits": ("digits", 64, Setup(), 0, None, 0, (0.6, 2.0)),
    "imagenet64": ("imagenet64", 8, Setup(), 0, None, 30, (0.9, 1.1)),
    "sdxl": ("sdxl", 1, Setup(checkpointing=True), 64, "8bit", 70, (0.9, 1.1)),
}


def teacher(cfg: RunConfig, folder: Path) -> Path:
    """A teacher of that architecture whose weights are all one small number: to draw them would take minutes."""
    with torch.device("meta"):
        network = build_network(architecture(cfg), 0)
    network = network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(1e-3)
    network.save_pretrained(folder / "unet")
    return adopt_teacher(cfg.teacher, folder)


@pytest.mark.parametrize("name", SIZES)
def test_the_peak_of_an_iteration_is_what_plan_counts(name: str, real_device: torch.device, tmp_path: Path) -> None:
    base, batch, setup, lora, states, card, (low, high) = SIZES[name]
    on_gpu = real_device.type == "cuda"
    has = torch.cuda.get_device_properties(real_device).total_memory / GB if on_gpu else 0
    if has < card:
        pytest.skip(f"{base} needs a GPU of {card} GB, this device has {has:.0f}")
    cfg = load_base(base)
    cfg = changed(varied(cfg, lora, states), batch, "bf16" if card else "fp32")
    place = hardware(str(real_device), checkpointing=setup.checkpointing)
    training = random_training(cfg, place, teacher(cfg, tmp_path))
    training.iterate()  # makes AdamW's moments
    training.step = cfg.critic.ratio
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - standing(training.models)  # of other tests
        training.iterate()
        measured = torch.cuda.max_memory_allocated() - max(before, 0)
    else:
        weights = standing(training.models)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            training.iterate()
        measured = weights + allocated_peak(profiler)
    counted = Counted(cfg, setup).iteration(batch).peak
    print(f"{name}: measured {measured / GB:.2f} GB, counted {counted / GB:.2f} GB, {measured / counted:.2f}")
    assert low < measured / counted < high
