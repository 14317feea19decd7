"""The student's images of fixed noise, by which a training is followed."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd2.experiment.config import TrainConfig
from dmd2.method.batches import Batches
from dmd2.networks.denoisers import Denoiser
from dmd2.training.sampling import student_sample

SEEDS = list(range(100))
DECODED = 16  # of them where each must be decoded


@torch.no_grad()
def probe_images(
    student: Denoiser, cfg: TrainConfig, batches: Batches, to_images: Callable[[Tensor], Tensor]
) -> Tensor:
    """Images ``(100, C, H, W)`` in [-1, 1], of latents 16; a text run takes the first prompts that it is trained on."""
    prompts, size, images = batches.prompts or batches.real, batches.micro_batch, []
    chosen = SEEDS[:DECODED] if cfg.data.latents else SEEDS
    for start in range(0, len(chosen), size):  # no more at once than training has
        seeds, cond = chosen[start : start + size], None
        if cfg.data.text is not None:
            assert prompts is not None
            cond = prompts.condition(torch.tensor(seeds) % len(prompts), batches.device)
        images.append(to_images(student_sample(student, cfg, seeds, batches.device, cond=cond)))
    return torch.cat(images)
