"""The teacher's samplers, by which pairs are made and teacher rows are drawn, against diffusers' own pipelines."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from dmd2.data.pipelines import time_ids
from dmd2.experiment.eval_config import Sampler
from dmd2.method.samplers import teacher_sample
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import EpsDenoiser
from tests import tiny_pipelines
from tests.tiny_pipelines import FACTOR, LATENTS

PROMPTS, STEPS = ["a red house", "two dogs on the beach"], 6


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(2, 4, LATENTS, LATENTS, generator=torch.Generator().manual_seed(0))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def never(step: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def test_pndm_with_guidance_is_stable_diffusions_pipeline(tmp_path: Path, z: torch.Tensor) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipelines.sd15(tmp_path), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=3.0, latents=z, output_type="latent").images
    text, null = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    spec = Sampler(solver="pndm", steps=STEPS, guidance=3.0)
    ours = teacher_sample(EpsDenoiser(pipe.unet), z, Condition(text=text), Condition(text=null), spec, never)
    close(ours, theirs)


def test_ddpm_with_guidance_is_the_stochastic_pipeline_given_its_noise(tmp_path: Path, z: torch.Tensor) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipelines.sd15(tmp_path), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)  # as SD 1.5's config says
    theirs = pipe(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=2.0, latents=z, output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    text, null = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    spec, generator = Sampler(solver="ddpm", steps=STEPS, guidance=2.0), torch.Generator().manual_seed(7)
    ours = teacher_sample(
        EpsDenoiser(pipe.unet), z, Condition(text=text), Condition(text=null), spec,
        lambda step: torch.randn(z.shape, generator=generator),
    )  # fmt: skip
    close(ours, theirs)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_euler_with_guidance_is_sdxls_pipeline(tmp_path: Path, z: torch.Tensor, spacing: str) -> None:
    """Leading is SDXL's own spacing; trailing that of the authors' script for pairs."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_pipelines.sdxl(tmp_path), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.timestep_spacing == "leading"
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    side = FACTOR * LATENTS
    theirs = pipe(
        PROMPTS, height=side, width=side, num_inference_steps=STEPS, guidance_scale=8.0, latents=z.clone(),
        output_type="latent",
    ).images  # fmt: skip
    text, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS)
    assert not null.any() and not null_pooled.any()
    sizes = time_ids(side).expand(2, 6)
    spec = Sampler(solver="euler", steps=STEPS, guidance=8.0, spacing=spacing)
    ours = teacher_sample(
        EpsDenoiser(pipe.unet), z, Condition(text=text, pooled=pooled, time_ids=sizes),
        Condition(text=null, pooled=null_pooled, time_ids=sizes), spec, never,
    )  # fmt: skip
    close(ours, theirs)
