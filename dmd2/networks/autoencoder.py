"""A small AutoencoderKL trained here, for sets whose latents no published autoencoder was made for."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dmd2.core.errors import UserError
from dmd2.core.progress import Progress
from dmd2.core.rng import Draws, stream
from dmd2.experiment.data_config import Autoencoder


def train_autoencoder(spec: Autoencoder, images: Tensor, folder: Path, device: torch.device) -> dict[str, Any]:
    """Train on uint8 ``images`` ``(N, 3, H, W)`` and save to `folder`; returns seconds and the final errors.

    L1 plus ``kl`` times the KL divergence per pixel; the rate falls to zero along a cosine. The scaling factor of its
    config makes latents of these images unit in standard deviation, as Stable Diffusion's does (Rombach et al. 2022).

    Raises:
        UserError: the training diverged.
    """
    train, started = spec.train, time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(f"{train.seed}/autoencoder").initial_seed())
        vae = AutoencoderKL.from_config({"_class_name": "AutoencoderKL", **spec.network}).to(device)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=train.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, train.lr, total_steps=train.steps, pct_start=0.05, cycle_momentum=False
    )
    progress, error = Progress("autoencoder", train.steps), torch.zeros(())
    for it in range(train.steps):
        draws = Draws(train.seed, it, train.batch, 0, train.batch, device)
        x = images[draws.shuffled("autoencoder/images", len(images))].to(device).float().div(127.5).sub(1)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * draws.normal("autoencoder/noise", tuple(posterior.mean.shape[1:]))
        error = (vae.decode(z).sample - x).abs().mean()
        (error + train.kl * posterior.kl().mean() / x[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        progress.update(it + 1, {"L1": error.detach()})
    vae.eval()
    with torch.no_grad():
        parts = [vae.encode(part.to(device).float().div(127.5).sub(1)).latent_dist.mean for part in images.split(256)]
    deviation = float(torch.cat(parts).std())
    if not math.isfinite(deviation):
        raise UserError(f"the autoencoder diverged, its latents deviate by {deviation}: lower autoencoder.train.lr")
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))
    vae.cpu().save_pretrained(folder, safe_serialization=True)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "steps": train.steps,
        "l1": round(float(error.detach()), 4),
    }
