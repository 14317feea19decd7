"""The losses of DMD2 as pure functions of tensors. Means run over every element of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


# Distribution matching, DMD2 Eq. 1 with the normaliser of DMD Eq. 8: g = (fake - real) / mean|x - real|.
def distribution_matching_gradient(
    x: Tensor, real: Tensor, fake: Tensor, normaliser_eps: float = 0.0, factor: Tensor | None = None
) -> Tensor:
    """Direction ``g`` by which the student output ``x`` should move, detached, in the widest dtype given.

    Args:
        x: student output ``(B, C, H, W)``. real, fake: teacher's and critic's x0 predictions of the noised ``x``.
        normaliser_eps: floor added to the per-sample normaliser. factor: optional per-sample factor (alpha_t in DMD).
    """
    x, real, fake = x.detach(), real.detach(), fake.detach()
    normaliser = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True) + normaliser_eps
    g = (fake - real) / normaliser
    if factor is not None:
        g = factor * g
    return torch.nan_to_num(g)


def distribution_matching_loss(x: Tensor, g: Tensor) -> Tensor:
    """``1/2 mean((x - sg(x - g))^2)``: its value is mean(g^2)/2 and its gradient in ``x`` exactly g / numel."""
    return 0.5 * F.mse_loss(x, (x.detach() - g).to(x.dtype))


# Critic (fake score) training, DMD2 Eq. 3 / EDM Eq. 8: mean(w (D - x)^2).
def denoising_loss(prediction: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared x0 error; ``weight`` is ``(B,)`` (see `schedules.loss_weight`)."""
    squared = (prediction - x).double() ** 2
    return (weight.reshape(-1, 1, 1, 1).double() * squared).mean().float()


# Non-saturating logistic GAN, DMD2 Eq. 4.
def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """``mean(softplus(l_fake) + softplus(-l_real))``; 2 ln 2 when the head knows nothing."""
    return (F.softplus(fake_logits) + F.softplus(-real_logits)).mean()


def generator_gan_loss(fake_logits: Tensor) -> Tensor:
    """``mean(softplus(-l_fake))``; ln 2 when the head knows nothing."""
    return F.softplus(-fake_logits).mean()
