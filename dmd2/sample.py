"""Images from seeds, a student's or the teacher's; `dmd2.quantise` makes them the uint8 that metrics see."""

import torch
from torch import Tensor

from dmd2.condition import Condition
from dmd2.config import RunConfig, Sampler, TrainConfig
from dmd2.denoisers import Denoiser
from dmd2.errors import UserError
from dmd2.rng import sample_labels, sample_noise
from dmd2.samplers import few_step, teacher_sample
from dmd2.step import image_shape
from dmd2.teachers import null_condition


def seed_condition(cfg: TrainConfig, seeds: list[int], labels: str, device: torch.device) -> Condition:
    """Conditions of sample seeds; `labels` is ``cyclic`` or ``random``.

    Raises:
        UserError: the run is conditioned on text, which has no prompts to evaluate on yet.
    """
    if cfg.data.classes == 0:
        raise UserError(f"data {cfg.data.name}: sampling by seed needs class labels; prompts are not in this version")
    return Condition(labels=sample_labels(seeds, cfg.data.classes, labels).to(device))


@torch.no_grad()
def student_sample(
    student: Denoiser,
    cfg: TrainConfig,
    seeds: list[int],
    device: torch.device,
    labels: str = "cyclic",
    cond: Condition | None = None,
) -> Tensor:
    """Student images of `seeds` in its configured number of steps, float32 ``(len(seeds), C, H, W)``.

    Conditions follow from the seeds by the rule `labels`, unless given.
    """
    shape, schedule = image_shape(cfg), student.schedule
    times = schedule.step_times(cfg.generator.steps, cfg.generator.time)
    z = sample_noise(seeds, shape, "noise", device)
    z = schedule.pure_noise(z, torch.full((len(seeds),), times[0], device=device))
    cond = cond or seed_condition(cfg, seeds, labels, device)
    return few_step(student, z, times, cond, lambda i: sample_noise(seeds, shape, f"step{i}", device))


def sample_teacher(teacher: Denoiser, cfg: RunConfig, spec: Sampler, seeds: list[int], device: torch.device) -> Tensor:
    """Teacher images of the same seeds, hence the same starting noise and labels as the students'."""
    shape = image_shape(cfg)
    null = null_condition(cfg.data, spec.guidance)
    return teacher_sample(
        teacher,
        sample_noise(seeds, shape, "noise", device),
        seed_condition(cfg, seeds, cfg.eval.labels, device),
        None if null is None else null.expand(len(seeds)).to(device),
        spec,
        lambda i: sample_noise(seeds, shape, f"step{i}", device),
    )
