"""Denoisers ``D(x_t, t, cond) -> x0``: the only place that knows how a network's output is parameterised.

Teacher, student and critic are all denoisers. `Denoiser.features` gives the bottleneck for the GAN head without
running the decoder.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from dmd2.networks.condition import Condition
from dmd2.networks.schedules import SIGMA_DATA, KarrasSchedule, Schedule, VPSchedule, spread
from dmd2.networks.song_unet import SongUNet

Precision = Literal["fp32", "tf32", "bf16", "bf16-all"]
SAMPLING: dict[str, Precision] = {"fp32": "fp32", "tf32": "tf32", "bf16": "bf16-all"}  # a denoiser that only samples
Network: TypeAlias = "UNet2DModel | SongUNet | UNet2DConditionModel"


def _labels(network: Network, cond: Condition) -> Tensor | None:
    """The class labels, or None for an unconditional network, which also serves on labelled data."""
    return None if network.class_embedding is None else cond.labels


def call_network(network: Network, sample: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Run a UNet on ``sample`` ``(B, C, H, W)`` with its conditioning; returns its raw output."""
    labels = _labels(network, cond)
    if not isinstance(network, UNet2DConditionModel):
        return network(sample, time, class_labels=labels).sample
    extra = None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    return network(sample, time, encoder_hidden_states=cond.text, class_labels=labels, added_cond_kwargs=extra).sample


def encode(network: Network, sample: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Bottleneck features ``(B, C, h, w)``: last encoder block, or mid block of the `UNet2DConditionModel`."""
    if isinstance(network, SongUNet):
        return network.encode(sample, time, _labels(network, cond))
    if isinstance(network, UNet2DModel):
        emb = network.time_embedding(network.time_proj(time).to(network.dtype))
        if network.class_embedding is not None:
            emb = emb + network.class_embedding(cond.labels).to(network.dtype)
        hidden = network.conv_in(sample)
        for block in network.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=emb)
        return hidden
    emb = network.time_embedding(network.get_time_embed(sample, time))
    if (class_emb := network.get_class_embed(sample, cond.labels)) is not None:
        emb = emb + class_emb
    extra = {} if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    if (extra_emb := network.get_aug_embed(emb, cond.text, extra)) is not None:
        emb = emb + extra_emb
    text = network.process_encoder_hidden_states(cond.text, extra)
    hidden = network.conv_in(sample)
    for block in [*network.down_blocks, network.mid_block]:
        states = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        output = block(hidden, temb=emb, **states)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


class Denoiser(nn.Module):
    """A UNet seen as a denoiser.

    With a precision of ``bf16`` or ``bf16-all`` the network body runs under bfloat16 autocast, on every device;
    parameters stay float32. Whether float32 products are TF32 is `dmd2.core.precision.float32_products`' to say.
    """

    kind: type[Schedule]

    def __init__(self, network: Network, precision: Precision = "fp32") -> None:
        super().__init__()
        self.network, self.precision, self.schedule = network, precision, self.kind()

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Clean-sample prediction ``(B, C, H, W)`` for noisy ``x_t`` at times ``t`` ``(B,)``."""
        raise NotImplementedError

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Bottleneck features of the network at ``x_t``, float32 ``(B, C, h, w)``; the decoder is not run."""
        sample, time = self.network_input(x_t, t)
        with self.autocast(x_t):
            return encode(self.network, sample, time, cond.cast(sample.dtype)).float()

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled sample and time as the network wants them."""
        raise NotImplementedError

    def body(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's raw output for ``x_t``, float32."""
        sample, time = self.network_input(x_t, t)
        with self.autocast(x_t):
            return call_network(self.network, sample, time, cond.cast(sample.dtype)).float()

    @property
    def lowered(self) -> bool:
        """Whether a pass that starts now runs in bfloat16."""
        return self.precision.startswith("bf16")

    def autocast(self, x_t: Tensor) -> torch.autocast:
        """Bfloat16 where it is asked for."""
        return torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.lowered)


class EdmDenoiser(Denoiser):
    """EDM preconditioning (Karras et al. 2022, Eq. 7): ``D = c_skip x + c_out F(c_in x, ln(sigma)/4)``; t is sigma."""

    kind = KarrasSchedule

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``c_in x`` and ``ln(sigma) / 4``."""
        c_in = (SIGMA_DATA**2 + t**2).rsqrt()
        return spread(c_in, x_t) * x_t, t.log() / 4

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """``c_skip x + c_out F``, float32."""
        x_t, t = x_t.float(), t.float()
        total = SIGMA_DATA**2 + t**2
        c_skip, c_out = SIGMA_DATA**2 / total, SIGMA_DATA * t * total.rsqrt()
        return spread(c_skip, x_t) * x_t + spread(c_out, x_t) * self.body(x_t, t, cond)


class EpsDenoiser(Denoiser):
    """Noise-predicting network on the VP schedule: ``x0 = (x_t - sigma_t eps) / alpha_t``; t is the integer step.

    The division runs in float64 and x0 is returned so, since 1 / alpha is 14.6 at t = 999 and the distribution-matching
    gradient is a small difference of two such values. In ``bf16`` only passes that need a gradient are autocast, as in
    the paper's runs: the student's simulated steps, its passes of critic-only iterations and the critic's inside L_DM
    are float32. ``bf16-all`` autocasts those, too. A network whose weights are bf16 (the teacher) gets bf16 inputs.
    """

    kind = VPSchedule

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The sample in the dtype of the weights, and the step."""
        return x_t.to(self.network.dtype), t

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """``(x_t - sigma_t eps) / alpha_t``, float64."""
        alpha, sigma = self.schedule.alpha_sigma(t, torch.float64)
        return (x_t.double() - spread(sigma, x_t) * self.body(x_t, t, cond).double()) / spread(alpha, x_t)

    @property
    def lowered(self) -> bool:
        """Where a gradient is taken (its authors saw autocast and no-grad interfere), or in all passes."""
        return self.precision == "bf16-all" or (self.precision == "bf16" and torch.is_grad_enabled())


def guide(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, null: Condition | None, scale: float) -> Tensor:
    """Classifier-free guidance ``u + s (c - u)``, applied only when ``s > 1``; one doubled batch [uncond, cond].

    x0 is affine in the predicted noise, so guiding x0 equals guiding the noise (some codes use ``c + s(c-u)``).
    """
    if scale <= 1 or null is None:
        return denoiser(x_t, t, cond)
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), null.join(cond))
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)
