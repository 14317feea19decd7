"""Agreement with `nvidia-modelopt`'s fastgen, an independent implementation of DMD2 on flows.

tests/install_packages.sh puts it beside the environment, where that can be done; else these tests skip.
"""

import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dmd2.core.rng import Draws
from dmd2.method.batches import Batch
from dmd2.method.interfaces import Models
from dmd2.method.objectives.denoising import denoising_loss
from dmd2.method.objectives.distribution_matching import distribution_matching_gradient, distribution_matching_loss
from dmd2.method.step import critic_loss, student_loss
from dmd2.method.student_input import student_input
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import guidance
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.head import Heads, PatchHead
from dmd2.networks.schedules import FlowSchedule, add_noise, logit_normal, loss_weight, shifted
from dmd2.networks.transformers.flux import pack, unpack
from tests import tiny
from tests.draws import keeping
from tests.golden.test_flow import SIGMA, E, F, R, U, Velocity, X, noise_and_score
from tests.stubs import NO_CONDITION
from tests.tiny_transformers import tiny as transformer

PACKAGES = ("", ".torch", ".torch.opt", ".torch.fastgen", ".torch.fastgen.methods", ".torch.fastgen.plugins")


@pytest.fixture(scope="module")
def theirs():
    """The modules of fastgen. The packages around them, which import all of modelopt in 14 s, are left empty."""
    places = [Path(place) for place in (f"{sys.prefix}/oracle", *sys.path)]
    root = next((place for place in places if (place / "modelopt/torch/fastgen").is_dir()), None)
    if root is None:
        pytest.skip("nvidia-modelopt is not there: run `sh tests/install_packages.sh` where PyPI can be reached")
    for name in (f"modelopt{part}" for part in PACKAGES):
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
    from modelopt.torch.fastgen import config, discriminators, flow_matching, losses, utils
    from modelopt.torch.fastgen.methods.dmd import DMDPipeline
    from modelopt.torch.fastgen.plugins import qwen_image

    found = SimpleNamespace(**{m.__name__.rpartition(".")[2]: m for m in (config, flow_matching, losses, utils)})
    found.DMDPipeline, found.qwen, found.heads = DMDPipeline, qwen_image, discriminators.Discriminator_ImageDiT
    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        del sys.modules[name]


def test_forward_process_and_conversions(theirs):
    x_t = add_noise(FlowSchedule(), X, E, SIGMA)
    torch.testing.assert_close(x_t, theirs.flow_matching.add_noise(X, E, SIGMA))
    x0 = theirs.flow_matching.pred_x0_from_flow(F, x_t, SIGMA)
    torch.testing.assert_close(Velocity(lambda *_: F.float())(x_t, SIGMA, NO_CONDITION), x0.float())
    torch.testing.assert_close(noise_and_score(x_t, x0, SIGMA)[0], theirs.flow_matching.x0_to_eps(x0, x_t, SIGMA))
    latents = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(pack(latents), theirs.qwen.pack_latents(latents))
    torch.testing.assert_close(unpack(pack(latents), latents.shape), theirs.qwen.unpack_latents(pack(latents), 4, 6))


def test_losses(theirs):
    x, guided = X.clone().requires_grad_(), guidance(torch.cat([U, R]), 3.0)
    torch.testing.assert_close(guided, theirs.utils.classifier_free_guidance(R, U, 3.0))
    for real, value in ((R, 0.6214878490), (guided, 0.6948406740)):
        mine = distribution_matching_loss(x, distribution_matching_gradient(x, real, F, normaliser_eps=1e-6))
        other = theirs.losses.vsd_loss(x, real, F)
        assert mine.item() == pytest.approx(other.item(), rel=1e-6) == pytest.approx(value, rel=1e-6)
        gradients = (torch.autograd.grad(loss, x)[0] for loss in (mine, other))
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
    x0 = add_noise(FlowSchedule(), X, E, SIGMA) - SIGMA.reshape(2, 1, 1, 1) * F
    for kind, predicted, said in (("v", F, "flow"), ("x0", x0, "x0")):
        mine = denoising_loss(x0, X, loss_weight(FlowSchedule(), SIGMA, kind))
        assert mine.item() == pytest.approx(theirs.losses.dsm_loss(said, predicted, x0=X, eps=E).item())


@pytest.mark.parametrize("kind", ["shifted", "logitnormal"])
def test_levels(theirs, kind):
    cfg = theirs.config.SampleTimestepConfig(time_dist_type=kind, min_t=0.0, max_t=1.0, p_mean=0.7, p_std=1.6)
    draw = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    found = theirs.flow_matching.sample_timesteps(99, cfg, device=torch.device("cpu"))
    if kind == "shifted":
        mine = shifted(torch.rand(99, generator=draw), 5.0)
    else:
        mine = logit_normal(torch.randn(99, generator=draw), (0.7, 1.6))
    torch.testing.assert_close(mine, found)


def test_a_list_of_a_student(theirs):
    """Theirs ends in the 0 that ours stops before."""
    times = FlowSchedule(3.0).step_times(4, 1.0)
    drawn = theirs.flow_matching.sample_from_t_list(64, [*times, 0.0], device=torch.device("cpu"))
    assert sorted(set(drawn.tolist()), reverse=True) == pytest.approx(times)


WIDE = {"num_attention_heads": 8, "caption_projection_dim": 128}  # narrower heads group their norms in another way
TAPS = [0, 2]


class Run:
    """The same networks, images and draws for a turn of ours and of theirs: guided text, a GAN on two teacher blocks."""

    def __init__(self, theirs):
        torch.manual_seed(7)
        same = {"gan__features_from": "teacher", "gan__head": "patches", "gan__tap": TAPS, "gan__shares_noise": True}
        weights = {"gan__lambda_g": 0.03, "gan__lambda_d": 1.0, "dm__normaliser_eps": 1e-6, "dm__index_range": [0, 999]}
        self.cfg = tiny.config("flow-sd3", teacher__guidance=3.0, **same, **weights)
        networks = [transformer("SD3Transformer2DModel", seed, **WIDE) for seed in range(3)]
        student, teacher, critic = (FlowDenoiser(network, shift=3.0, taps=TAPS) for network in networks)
        teacher.requires_grad_(False)
        heads = Heads(PatchHead(128) for _ in TAPS)
        text, pooled, self.real = torch.randn(4, 6, 12), torch.ones(4, 12), torch.randn(4, 4, 8, 8)
        cond, null = Condition(text=text, pooled=pooled), Condition(text=torch.zeros(1, 6, 12), pooled=pooled[:1])
        self.m = Models(student, teacher, critic, heads, None, None, null=null)
        self.batch = keeping(Batch(Draws(0, 0, 4, 0, 4), 1.0, cond, real=(self.real, cond)))
        self.start = self.z, t = student_input(student, self.batch, self.cfg.generator, (4, 8, 8))
        self.x = student(self.z, t, cond)

        judge = theirs.heads(set(TAPS), 3, 128)
        for mine, head in zip(heads.heads, judge.cls_pred_heads, strict=True):
            head.load_state_dict(mine.state_dict())
        config = theirs.config.DMDConfig(
            guidance_scale=3.0,
            sample_t_cfg={"max_t": 1.0},
            gan_loss_weight_gen=0.03,
            fake_score_pred_type="flow",
            num_train_timesteps=1000,
        )
        self.pipeline = theirs.DMDPipeline(*deepcopy(networks), config, discriminator=judge)
        self.given = {"encoder_hidden_states": text, "pooled_projections": pooled}
        heard = self.pipeline.teacher._fastgen_captured = []
        for tap in TAPS:
            self.pipeline.teacher.transformer_blocks[tap].register_forward_hook(
                lambda *given: heard.append(given[-1][1].transpose(1, 2).unflatten(2, (4, 4)))
            )

    def theirs(self, loss, names, monkeypatch, **given):
        """A loss of their pipeline, which draws what ours drew under these names."""
        draws = self.batch.draws
        levels = iter([self.m.teacher.schedule.time(draws.levels[f"{name}/level"][2]) for name in names])
        noises = iter([draws.normals[f"{name}/noise"] for name in names])
        monkeypatch.setattr(self.pipeline, "sample_timesteps", lambda *_, **__: next(levels))
        monkeypatch.setattr(torch, "randn_like", lambda *_: next(noises))
        found = getattr(self.pipeline, f"compute_{loss}_loss")(self.real, self.z, **self.given, **given)
        monkeypatch.undo()
        return found


def gradient(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_a_whole_turn_of_each_network(theirs, monkeypatch):
    run, logs = Run(theirs), {}
    mine = student_loss(run.m, run.start, run.x, run.batch, run.cfg, logs)
    null = torch.zeros(4, 6, 12)
    other = run.theirs("student", ["dm"], monkeypatch, negative_encoder_hidden_states=null)
    assert logs["student/dm"].item() == pytest.approx(other["vsd"].item(), rel=1e-4)
    assert logs["student/gan"].item() == pytest.approx(other["gan_gen"].item(), rel=1e-5)
    near(gradient(mine, run.m.student.network), gradient(other["total"], run.pipeline.student))

    mine = critic_loss(run.m, run.start[1], run.x.detach(), run.batch, run.cfg, logs)
    other = run.theirs("fake_score", ["critic"], monkeypatch)["total"]
    assert logs["critic/denoise"].item() == pytest.approx(other.item(), rel=1e-5)
    near(gradient(mine, run.m.critic.network), gradient(other, run.pipeline.fake_score))
    other = run.theirs("discriminator", ["critic", "gan/real"], monkeypatch)["total"]
    assert logs["critic/gan"].item() == pytest.approx(other.item(), rel=1e-5)
    near(gradient(mine, run.m.head), gradient(other, run.pipeline.discriminator))


def near(mine, other):
    """Gradients of all weights: measured, 1e-6 of their length."""
    assert other.norm() > 0 and (mine - other).norm() < 1e-4 * other.norm()
