"""Guidance of flow teachers: numbers computed in float64 NumPy, and the images of diffusers' own pipelines."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dmd2.experiment.eval_config import Sampler
from dmd2.method.passes import Pass, Turn, run_passes
from dmd2.method.samplers import teacher_sample
from dmd2.networks.denoisers import AXES, guidance, guide
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.schedules import shift_of_tokens
from dmd2.networks.transformers.family import FAMILIES
from tests import tiny as tiny_run
from tests.tiny_flow_pipelines import SHAPE, condition, kept_of, latents_of, pipeline_of, prompts
from tests.tiny_transformers import tiny

N = torch.arange(24, dtype=torch.float64)
X, R, U, E = (v.reshape(2, 3, 2, 2) for v in (N.sin(), N.cos(), (N / 2).cos(), (N + 0.5).sin()))
SIGMA = torch.tensor([0.9, 0.25], dtype=torch.float64).reshape(2, 1, 1, 1)
X_T = (1 - SIGMA) * X + SIGMA * E


def guided_velocity(scale, rescale=None):
    """Of velocities R, conditional, and U: guidance is given clean images, as everywhere."""
    both = torch.cat([X_T - SIGMA * v for v in (U, R)])
    return (X_T - guidance(both, scale, X_T, rescale)) / SIGMA


def test_the_velocity_is_guided_by_the_rule_of_most_families_and_z_images_scale_is_one_less():
    assert guided_velocity(3.0).flatten()[:3].tolist() == pytest.approx([1, -0.1342582062, -2.3290451214])
    assert (R + 3 * (R - U)).flatten()[:3].tolist() == pytest.approx([1, -0.4715384622, -3.2854942638])
    torch.testing.assert_close(guided_velocity(4.0), R + 3 * (R - U))


def test_a_rescaled_velocity_has_the_norm_of_the_conditional_one():
    factor = guided_velocity(3.0, "sample") / guided_velocity(3.0)
    assert factor[:, 0, 0, 0].tolist() == pytest.approx([0.2709255045, 0.2779036424])
    torch.testing.assert_close(factor, factor[:, :1, :1, :1].expand_as(factor))


@pytest.mark.parametrize("rescale", AXES)
def test_the_norm_is_taken_over_the_axes_that_are_named(rescale):
    found = guided_velocity(3.0, rescale)
    norm = torch.linalg.vector_norm
    torch.testing.assert_close(norm(found, dim=AXES[rescale]), norm(R, dim=AXES[rescale]))
    others = [axes for name, axes in AXES.items() if name != rescale and len(axes) < 3]
    assert not any(torch.allclose(norm(found, dim=axes), norm(R, dim=axes)) for axes in others)


GUIDED = {  # family: what its pipeline calls our scale of 3, and what else it is told
    "SD3Transformer2DModel": {"guidance_scale": 3.0},
    "FluxTransformer2DModel": {"true_cfg_scale": 3.0, "guidance_scale": 2.5},
    "SanaTransformer2DModel": {"guidance_scale": 3.0},
    "Lumina2Transformer2DModel": {"guidance_scale": 3.0},
    "ZImageTransformer2DModel": {"guidance_scale": 2.0},
}


def test_every_family_is_compared():
    assert GUIDED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", GUIDED)
def test_teacher_samples_are_those_of_the_familys_own_pipeline(kind, scale):
    network, z = tiny(kind), torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    kept = kept_of(kind) or (None, None)
    cond, null = (condition(seed, some) for seed, some in zip((1, 2), kept, strict=True))
    flux = kind == "FluxTransformer2DModel"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=flux)
    options = dict(GUIDED[kind])
    if scale == 1:
        options |= {"guidance_scale": 0.0 if kind == "ZImageTransformer2DModel" else 1.0}
        options |= {"guidance_scale": 2.5, "true_cfg_scale": 1.0} if flux else {}
    theirs = latents_of(
        kind, pipeline_of(kind, network, scheduler), z, sigmas=[1.0, 0.75, 0.5, 0.25],
        **prompts(kind, cond), **prompts(kind, null, "negative_"), **options,
    )  # fmt: skip
    rescale = "row" if kind == "Lumina2Transformer2DModel" else None
    shift = shift_of_tokens(16) if flux else 3.0
    denoiser = FlowDenoiser(network, shift=shift, rescale=rescale, guidance_embed=2.5)
    spec = Sampler(solver="euler", steps=4, guidance=scale)
    ours = teacher_sample(denoiser, z, cond, null, spec, lambda i: z)
    assert theirs.std() > 0.5 and (theirs - ours).abs().max() < 1e-4 * theirs.abs().max()
    plain = FlowDenoiser(network, shift=shift)  # told another guidance, and not rescaled
    if flux or (rescale and scale > 1):
        assert (theirs - teacher_sample(plain, z, cond, null, spec, lambda i: z)).abs().max() > 1e-3


def test_the_step_guides_as_samplers_do():
    cfg = tiny_run.config("flow-sd3", teacher__guidance=3.0, teacher__rescale="row")
    m, batch = tiny_run.models("flow-sd3", cfg), tiny_run.one_batch("flow-sd3", cfg)
    turn = Turn(m, batch.real[0], batch, cfg, tiny_run.GIVEN[1])
    x_t, t = turn.noised(turn.x, "dm", (20, 980))
    found = []
    for rescale in (None, "row"):
        m.teacher.rescale = rescale
        (real,) = run_passes(turn, [Pass("teacher", x_t, t, batch.cond, gradient=False, guidance=turn.guidance())])
        torch.testing.assert_close(real, guide(m.teacher, x_t, t, batch.cond, m.null.expand(len(t)), 3.0))
        found.append(real)
    assert not torch.allclose(*found, atol=1e-3)
