"""``train.precision: bf16-body``: passes in bfloat16 weights, float32 weights and gradients for the optimiser."""

from pathlib import Path

import pytest
import torch

from dmd2.core.run import RunId
from dmd2.experiment.cluster import Hardware
from dmd2.experiment.run_inputs import Inputs
from dmd2.method.step import train_step
from dmd2.networks.condition import Condition
from dmd2.networks.song_unet import SongUNet
from dmd2.training.build import build_models, in_bfloat16
from dmd2.training.optimiser import Optimiser
from dmd2.training.sharding import materialise
from dmd2.training.teachers import wrap
from dmd2.training.trainer import Training
from tests import tiny

BODY = {"train__precision": "bf16-body", "critic__ratio": 2, "regression__weight": 0.5, "optim__batch": 8}
LORA = {"generator": {"input": "noise", "steps": 1, "time": 999.0, "lora": {"rank": 2, "alpha": 2.0}}}


def models_of(kind: str, place: Path, **changes):
    cfg = tiny.config(kind, **{**BODY, **changes})
    return cfg, build_models(cfg, 0, Inputs(tiny.teacher(place, kind, "tiny"), None, None, None), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["edm-attention", "eps-text", "eps-sdxl"])
def test_losses_and_updates_are_near_those_of_float32(kind, tmp_path):
    logs, moved = {}, {}
    for precision in ("fp32", "bf16-body"):
        cfg, m = models_of(kind, tmp_path, train__precision=precision, optim__warmup=0)
        before = [p.detach().clone() for p in m.critic.parameters()]
        logs[precision] = train_step(m, tiny.batches(kind, cfg).at(0), 0, cfg)
        moved[precision] = torch.cat([(p - q).flatten() for p, q in zip(m.critic.parameters(), before, strict=True)])
    for name in ("student/regression", "critic/denoise", "critic/gan", "critic/grad_norm", "student/grad_norm"):
        torch.testing.assert_close(logs["bf16-body"][name], logs["fp32"][name], rtol=0.05, atol=0)
    signs = moved["bf16-body"].sign() == moved["fp32"].sign()  # AdamW's first update is the sign of the gradient
    assert 0.9 < signs.float().mean() < 1  # below 1: it was not float32 that ran


@pytest.mark.parametrize("early", [False, True])
def test_passes_run_in_bfloat16_and_the_optimiser_sees_float32(tmp_path, early):
    _, m = models_of("edm", tmp_path)
    if early:
        m.student.hand_over_early()
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), Condition(labels=torch.tensor([0, 1]))
    seen = []
    norm = next(module for module in m.student.running.modules() if isinstance(module, torch.nn.GroupNorm))
    norm.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, module.weight.dtype, out.dtype)))
    once = []
    for _ in range(2):
        m.student(x, t, cond).square().mean().backward()
        assert once or early == (m.student_optimiser.parameters[0].grad is not None)
        m.student.hand_over()
        grads = [p.grad for p in m.student_optimiser.parameters]
        once = once or [g.clone() for g in grads]
    assert seen == [(torch.bfloat16,) * 3] * 2
    assert {g.dtype for g in grads} == {torch.float32} and all(p.grad is None for p in m.student.running.parameters())
    assert all(torch.equal(g, 2 * first) for g, first in zip(grads, once, strict=True)) and any(g.any() for g in grads)


def test_copies_follow_the_optimiser_and_are_no_weights_of_their_own(tmp_path):
    cfg, m = models_of("edm", tmp_path, optim__warmup=0)
    names = set(m.student.state_dict())
    assert names == {f"network.{name}" for name in tiny.network("edm", 0).state_dict()}
    train_step(m, tiny.batches("edm", cfg).at(0), 0, cfg)
    for denoiser in (m.student, m.critic):
        for weight, copy in zip(denoiser.network.parameters(), denoiser.running.parameters(), strict=True):
            assert weight.dtype == torch.float32 and torch.equal(weight.bfloat16(), copy)
    assert m.teacher.network.dtype == torch.bfloat16 and m.teacher.running is m.teacher.network


def test_micro_batches_add_up_in_float32(tmp_path, monkeypatch):
    real = tiny.real_set(tmp_path / "set.json", "edm", tiny.tensors("edm", 32, seed=9))
    inputs, sums = Inputs(tiny.teacher(tmp_path, "edm", "tiny"), real, real, None), []
    joint_norm = Optimiser._joint_norm

    def kept(self):
        sums.append(torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]))
        return joint_norm(self)

    monkeypatch.setattr(Optimiser, "_joint_norm", kept)
    alone = []
    for size in (0, 2):
        cfg = tiny.config("edm", **BODY).training()
        training = Training(RunId("tiny", "a", 0), cfg, Hardware(micro_batch=size), inputs)
        for p in training.models.critic.running.parameters() if size else ():
            p.register_post_accumulate_grad_hook(lambda p: alone.append(p.grad is None))
        training.iterate()
    assert all(alone) and len(alone) % 4 == 0 and alone  # of each of four passes, none is added to another in bfloat16
    for whole, parts in zip(sums[:2], sums[2:], strict=True):
        assert whole.dtype == parts.dtype == torch.float32
        assert (whole - parts).norm() < 0.02 * whole.norm()


def test_low_rank_student_stays_in_autocast(tmp_path):
    cfg, m = models_of("eps-text", tmp_path, **LORA)
    assert in_bfloat16(cfg) == {"teacher", "critic"}
    assert m.student.running is m.student.network and m.student.lowered and not m.critic.lowered


def test_fourier_frequencies_keep_their_precision():
    spec = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "block_out_channels": (8, 16)}
    network = SongUNet(**spec, layers_per_block=1, embedding_type="fourier", num_class_embeds=3)
    frequencies = network.time_proj.freqs.clone()
    held = wrap(network, "edm", "bf16-body")
    held.hold_lowered()
    materialise(network, torch.device("cpu"), torch.bfloat16)
    for body in (network, held.running):
        assert torch.equal(body.time_proj.freqs, frequencies) and body.conv_in.weight.dtype == torch.bfloat16
    out = held(torch.randn(2, 1, 8, 8), torch.tensor([0.1, 40.0]), Condition(labels=torch.tensor([0, 2])))
    assert out.dtype == torch.float32 and bool(torch.isfinite(out).all())


def test_resumed_training_ends_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dmd2.training.sampling.PROBES", [0, 1])
    real = tiny.real_set(Path("set.json"), "edm", tiny.tensors("edm", 32, seed=9))
    inputs = Inputs(tiny.teacher(Path("teacher"), "edm", "tiny"), real, real, None)
    every = {"train__snapshot_every": 4, "train__checkpoint_every": 2, "train__log_every": 4, "optim__ema": 0.9}

    def training(name: str, steps: int) -> Training:
        cfg = tiny.config("edm", **BODY, **every, train__steps=steps, optim__warmup=0)
        return Training(RunId("tiny", name, 0), cfg.training(), Hardware(), inputs)

    whole, cut = training("whole", 4), training("cut", 2)
    whole.run()
    cut.run()
    cut = training("cut", 4)
    cut.run()
    for name, module in whole.trained.items():
        for (key, a), b in zip(module.state_dict().items(), cut.trained[name].state_dict().values(), strict=True):
            assert torch.equal(a, b), (name, key)
