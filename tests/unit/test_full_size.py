"""The benchmark of full-size networks, on a text network that is not: its models and batches train."""

import pytest
import torch

from benchmarks.random_runs import changed, hardware, random_training
from dmd2.planning.plan import varied
from dmd2.training.make_teacher import adopt_teacher
from tests import tiny


@pytest.mark.parametrize(("lora", "states"), [(0, "fp32"), (2, "8bit")])
def test_random_text_networks_train_as_the_benchmark_runs_them(tmp_path, lora, states):
    spec = {**tiny.KINDS["eps-sdxl"][2], "_class_name": "UNet2DConditionModel"}
    teacher = {"teacher__network": spec, "teacher__guidance": 2.0}
    cfg = varied(tiny.config("eps-sdxl", **teacher, train__precision="bf16"), lora, states)
    tiny.network("eps-sdxl", 1).save_pretrained(tmp_path / "unet")
    manifest = adopt_teacher(cfg.teacher.model_copy(update={"network": None}), tmp_path)
    training = random_training(changed(cfg, 2, "bf16"), hardware("cpu", checkpointing=True), manifest)
    for _ in range(2):
        training.iterate()
    models = training.models
    assert all(bool(torch.isfinite(value)) for _, logs in training.recent for value in logs.values())
    assert models.null is not None
    assert models.null.text.shape == (1, 77, tiny.TEXT_WIDTH)
    assert models.student.network.mid_block.gradient_checkpointing
    trained = [p.requires_grad for p in models.student.parameters()]
    assert all(trained) == (lora == 0)
