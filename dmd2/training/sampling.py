"""Images from seeds, a student's or the teacher's; `dmd2.networks.quantise` makes them the uint8 that metrics see."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.rng import sample_labels, sample_noise
from dmd2.experiment.config import RunConfig, TrainConfig
from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.run_inputs import pipeline_manifest
from dmd2.method.batches import Batches
from dmd2.method.samplers import Noise, few_step, teacher_sample
from dmd2.networks.condition import Condition
from dmd2.networks.denoisers import Denoiser
from dmd2.training.teachers import null_condition

DECODED = 1 << 22  # pixels that the autoencoder decodes at once: four images of 1024 x 1024
PROBES, LATENT_PROBES = list(range(100)), 16  # seeds by which a training is followed; the first 16 of latents


def seed_condition(cfg: TrainConfig, seeds: list[int], labels: str, device: torch.device) -> Condition:
    """Class labels of sample seeds, none of unlabelled data; `labels` is ``cyclic`` or ``random``.

    Raises:
        UserError: the run is conditioned on text, so that conditions must be given (`dmd2.data.captions.EvalPrompts`).
    """
    if cfg.data.text is not None:
        raise UserError(f"data {cfg.data.name} is conditioned on text: seeds alone do not say which prompts to draw")
    if not cfg.data.labelled:
        return Condition()
    return Condition(labels=sample_labels(seeds, cfg.data.classes, labels)).to(device)


@torch.no_grad()
def student_sample(
    student: Denoiser,
    cfg: TrainConfig,
    seeds: list[int],
    device: torch.device,
    labels: str = "cyclic",
    cond: Condition | None = None,
) -> Tensor:
    """Samples of the student in its number of steps, images or latents, float32 ``(len(seeds), C, H, W)``.

    Without `cond`, classes follow from the seeds by the rule `labels`.
    """
    shape, schedule = cfg.data.shape, student.schedule
    times = schedule.step_times(cfg.generator.steps, cfg.generator.time)
    z = sample_noise(seeds, shape, "noise", device)
    z = schedule.pure_noise(z, torch.full((len(seeds),), times[0], device=device))
    cond = cond or seed_condition(cfg, seeds, labels, device)
    noise: Noise = lambda i: sample_noise(seeds, shape, f"step{i}", device)  # noqa: E731
    return few_step(student, z, times, cond, noise if cfg.generator.sampler == "renoise" else None)


@torch.no_grad()
def probe_images(
    student: Denoiser, cfg: TrainConfig, batches: Batches, to_images: Callable[[Tensor], Tensor]
) -> Tensor:
    """Images of fixed seeds in [-1, 1], ``(100, C, H, W)``, or 16 where latents are decoded.

    A text run takes the first prompts that it is trained on.
    """
    prompts, size, images = batches.prompts or batches.real, batches.micro_batch, []
    chosen = PROBES[:LATENT_PROBES] if cfg.data.latents else PROBES
    for start in range(0, len(chosen), size):  # no more at once than training has
        seeds, cond = chosen[start : start + size], None
        if cfg.data.text is not None:
            assert prompts is not None
            cond = prompts.condition(torch.tensor(seeds) % len(prompts), batches.device)
        images.append(to_images(student_sample(student, cfg, seeds, batches.device, cond=cond)))
    return torch.cat(images)


def sample_teacher(
    teacher: Denoiser,
    cfg: RunConfig,
    spec: Sampler,
    seeds: list[int],
    device: torch.device,
    cond: Condition | None = None,
) -> Tensor:
    """Samples of the teacher; equal seeds give the same starting noise and conditions as in `student_sample`."""
    shape = cfg.data.shape
    null = null_condition(cfg.data, spec.guidance, teacher.network)
    return teacher_sample(
        teacher,
        sample_noise(seeds, shape, "noise", device),
        cond or seed_condition(cfg, seeds, cfg.eval.labels, device),
        None if null is None else null.to(device).expand(len(seeds)),
        spec,
        lambda i: sample_noise(seeds, shape, f"step{i}", device),
    )


def to_images(cfg: TrainConfig, device: torch.device, decoder: str = "vae") -> Callable[[Tensor], Tensor]:
    """The function from what a run diffuses to images in [-1, 1]: the identity, or for latents the pipeline's decoder.

    Raises:
        UserError: the pipeline or its autoencoder is missing.
    """
    if not cfg.data.latents:
        return lambda images: images
    from dmd2.data.pipelines import Pipeline  # diffusers' autoencoders, which pixels need not pay for

    manifest = pipeline_manifest(cfg.data)
    assert manifest is not None
    pipeline = Pipeline.load(manifest, device)
    size = max(1, DECODED // (cfg.data.resolution * pipeline.factor) ** 2)
    return lambda latents: torch.cat([pipeline.decode(part, decoder) for part in latents.split(size)])
