"""Denoisers ``D(x_t, t, cond) -> x0``: the only place that knows how a network's output is parameterised.

Teacher, student and critic are all denoisers. `Denoiser.features` gives the bottleneck for the GAN head without
running the decoder, and `Denoiser.joined` predicts for some samples and gives the bottleneck of others in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dmd2.networks.blocks import in_fewer_kernels
from dmd2.networks.condition import Condition
from dmd2.networks.halves import Network, decode, encode, labels_of
from dmd2.networks.lora import own, plain_parameters
from dmd2.networks.schedules import SIGMA_DATA, KarrasSchedule, Schedule, VPSchedule, spread

Precision = Literal["fp32", "tf32", "bf16", "bf16-all", "bf16-body"]
Rescale = Literal["sample", "channels", "row"]
AXES: dict[Rescale, tuple[int, ...]] = {"sample": (1, 2, 3), "channels": (1,), "row": (3,)}
CAST_AT_ONCE = 64  # gradients that `hand_over` casts by one call
SAMPLING: dict[str, Precision] = {"fp32": "fp32", "tf32": "tf32", "bf16": "bf16-all"}  # a denoiser that only samples


def call_network(network: Network, sample: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Run a UNet on ``sample`` ``(B, C, H, W)`` with its conditioning; returns its raw output."""
    labels = labels_of(network, cond)
    if not isinstance(network, UNet2DConditionModel):
        return network(sample, time, class_labels=labels).sample
    extra = None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    return network(sample, time, encoder_hidden_states=cond.text, class_labels=labels, added_cond_kwargs=extra).sample


class Denoiser(nn.Module):
    """A UNet seen as a denoiser.

    With a precision of ``bf16`` or ``bf16-all`` the network body runs under bfloat16 autocast, on every device;
    parameters stay float32. With ``bf16-body`` it runs with bfloat16 weights and norms, as in EDM's official ImageNet
    network: those of a network that was cast, of a copy that `hold_lowered` makes, or of FSDP; without them, under
    autocast. Whether float32 products are TF32 is `dmd2.core.precision.float32_products`' to say.
    """

    kind: type[Schedule]
    rescale: Rescale | None = None  # of guided velocities, see `guidance`
    _call, _encode, _decode = staticmethod(call_network), staticmethod(encode), staticmethod(decode)

    def __init__(self, network: Network, precision: Precision = "fp32") -> None:
        super().__init__()
        in_fewer_kernels(network)
        self.network, self.precision, self.schedule = network, precision, self.kind()
        self._copy: list[Network] = []  # in a list, so that its weights are none of this module's
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # each weight with the copy's

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Clean-sample prediction ``(B, C, H, W)`` for noisy ``x_t`` at times ``t`` ``(B,)``."""
        return self.prediction(x_t, t, self.body(x_t, t, cond))

    def body(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's raw output for ``x_t``, float32."""
        sample, time = self.network_input(x_t, t)
        with self.autocast(x_t):
            return self._call(self.running, sample, time, cond.cast(sample.dtype)).float()

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Bottleneck features of the network at ``x_t``, float32 ``(B, C, h, w)``; the decoder is not run."""
        sample, time = self.network_input(x_t, t)
        with self.autocast(x_t):
            return self._encode(self.running, sample, time, cond.cast(sample.dtype)).bottleneck.float()

    def bottleneck(self, resolution: int) -> tuple[int, int]:
        """Width and side of the `features` of images of this side: those of the network's last level."""
        widths = self.network.config["block_out_channels"]
        return widths[-1], resolution // 2 ** (len(widths) - 1)

    def joined(self, x_t: Tensor, t: Tensor, cond: Condition, predicted: int) -> tuple[Tensor, Tensor]:
        """`forward` of the first `predicted` samples and `features` of the others, in one pass."""
        sample, time = self.network_input(x_t, t)
        with self.autocast(x_t):
            encoded = self._encode(self.running, sample, time, cond.cast(sample.dtype))
            raw = self._decode(self.running, encoded.first(predicted))
        prediction = self.prediction(x_t[:predicted], t[:predicted], raw.float())
        return prediction, encoded.bottleneck[predicted:].float()

    def prediction(self, x_t: Tensor, t: Tensor, raw: Tensor) -> Tensor:
        """Clean-sample prediction from the network's float32 output."""
        raise NotImplementedError

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled sample, in the dtype of the weights, and time as the network wants them."""
        raise NotImplementedError

    @property
    def running(self) -> Network:
        """The network that passes run: the bfloat16 copy, if there is one."""
        return self._copy[0] if self._copy else self.network

    def hold_lowered(self) -> None:
        """Keep a copy of the network with bfloat16 weights, in which passes run from now on.

        Its gradients must be handed over before `network` is updated, and `refresh` must follow every change of the
        weights.
        """
        memo: dict[int, Any] = {id(buffer): buffer for buffer in self.network.buffers()}
        for p in self.network.parameters():
            memo[id(p)] = nn.Parameter(p.detach().to(torch.bfloat16), p.requires_grad)
        self._copy = [deepcopy(self.network, memo)]
        self._pairs = [(p, memo[id(p)]) for p in self.network.parameters()]

    def hand_over(self) -> None:
        """Add the gradients of the bfloat16 copy, if there is one, to those of `network`, in float32."""
        _hand_over(self._pairs)

    def hand_over_early(self) -> list[RemovableHandle]:
        """Hand each gradient over as soon as a backward pass has completed it, until the handles are removed.

        The passes of several micro-batches thus add up in float32, and gradients are sent while others are still
        computed, for the price of a kernel and a call of Python for each parameter. Hooks that read the gradients of
        `network` must be registered after this.
        """
        return [
            lowered.register_post_accumulate_grad_hook(lambda lowered, p=p: _hand_over([(p, lowered)]))
            for p, lowered in self._pairs
            if p.requires_grad
        ]

    def compile_passes(self, **options: Any) -> None:
        """Have ``torch.compile`` compile the network as passes run it; `options` are handed to it."""
        compiled: Any = [torch.compile(function, **options) for function in (call_network, encode, decode)]
        self._call, self._encode, self._decode = compiled

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights over into the bfloat16 copy, if there is one."""
        if self._pairs:
            torch._foreach_copy_([lowered for _, lowered in self._pairs], [p for p, _ in self._pairs])

    @torch.no_grad()
    def approach(self, other: Denoiser, share: float) -> None:
        """Move the weights by a share of the way to those of another denoiser of the same architecture.

        Implicit distribution alignment, ``phi <- lambda phi + (1 - lambda) theta`` (SenseFlow, arXiv 2506.00523). A
        low-rank student counts as what it computes, ``W + scale up down``. Of sharded weights each process moves its
        own.
        """
        mine = dict(self.network.named_parameters())
        for name, theirs in plain_parameters(other.network):
            own(mine[name]).lerp_(theirs, share)
        self.refresh()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that a pass runs in. (The answer of diffusers is a walk through all modules.)"""
        return next((p.dtype for p in self.running.parameters()), torch.float32)

    @property
    def lowered(self) -> bool:
        """Whether a pass that starts now runs under bfloat16 autocast."""
        if self.precision == "bf16-body":
            return self.dtype != torch.bfloat16
        return self.precision in ("bf16", "bf16-all")

    def autocast(self, x_t: Tensor) -> torch.autocast:
        """Bfloat16 where it is asked for."""
        return torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.lowered)


class EdmDenoiser(Denoiser):
    """EDM preconditioning (Karras et al. 2022, Eq. 7): ``D = c_skip x + c_out F(c_in x, ln(sigma)/4)``; t is sigma."""

    kind = KarrasSchedule
    schedule: KarrasSchedule

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``c_in x`` and ``ln(sigma) / 4``, computed in float32."""
        x_t, t = x_t.float(), t.float()
        c_in = (SIGMA_DATA**2 + t**2).rsqrt()
        return (spread(c_in, x_t) * x_t).to(self.dtype), t.log() / 4

    def prediction(self, x_t: Tensor, t: Tensor, raw: Tensor) -> Tensor:
        """``c_skip x + c_out F``, float32."""
        x_t, t = x_t.float(), t.float()
        total = SIGMA_DATA**2 + t**2
        c_skip, c_out = SIGMA_DATA**2 / total, SIGMA_DATA * t * total.rsqrt()
        return spread(c_skip, x_t) * x_t + spread(c_out, x_t) * raw


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
        return x_t.to(self.dtype), t

    def prediction(self, x_t: Tensor, t: Tensor, raw: Tensor) -> Tensor:
        """``(x_t - sigma_t eps) / alpha_t``, float64."""
        alpha, sigma = self.schedule.alpha_sigma(t, torch.float64)
        return (x_t.double() - spread(sigma, x_t) * raw.double()) / spread(alpha, x_t)

    @property
    def lowered(self) -> bool:
        """Where a gradient is taken (its authors saw autocast and no-grad interfere), or in all passes."""
        return super().lowered and (self.precision != "bf16" or torch.is_grad_enabled())


def reached(module: nn.Module) -> nn.Module:
    """The module whose parameters a backward pass reaches: of a denoiser the network that its passes run."""
    return module.running if isinstance(module, Denoiser) else module


@torch.no_grad()
def _hand_over(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Add the gradients of bfloat16 copies (second) to the float32 ones of their weights (first), and clear them.

    Kernels cast many at once, but not all: no more than those are there in both forms.
    """
    new: list[tuple[nn.Parameter, nn.Parameter]] = []
    for p, lowered in pairs:
        if lowered.grad is not None and p.grad is not None:
            p.grad.add_(lowered.grad)
            lowered.grad = None
        elif lowered.grad is not None:
            new.append((p, lowered))
    for start in range(0, len(new), CAST_AT_ONCE):
        group = new[start : start + CAST_AT_ONCE]
        values = [torch.empty_like(p) for p, _ in group]
        torch._foreach_copy_(values, [lowered.grad for _, lowered in group])  # type: ignore[misc]
        for (p, lowered), value in zip(group, values, strict=True):
            p.grad, lowered.grad = value, None


Inputs = tuple[Tensor, Tensor, Condition]


def with_unconditional(x_t: Tensor, t: Tensor, cond: Condition, null: Condition) -> Inputs:
    """A batch twice: first with the condition `null`, then with its own."""
    return torch.cat([x_t, x_t]), torch.cat([t, t]), null.join(cond)


def guidance(both: Tensor, scale: float | Tensor, x_t: Tensor | None = None, rescale: Rescale | None = None) -> Tensor:
    """``u + s (c - u)`` of predictions for `with_unconditional` at ``x_t``.

    x0 is affine in the predicted noise or velocity, so guiding x0 equals guiding these (some codes use ``c + s(c-u)``).
    With `rescale` the guided velocity is then scaled to the norm of c's: over a whole sample, over the channels of a
    place, or over a row of latents (Lumina2's pipeline). ``x_t - x0`` is sigma v, and sigma cancels in the ratio.
    """
    unconditional, conditional = both.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if rescale is None or x_t is None:
        return guided
    norms = [torch.linalg.vector_norm(x_t - x0, dim=AXES[rescale], keepdim=True) for x0 in (conditional, guided)]
    return x_t - (x_t - guided) * (norms[0] / norms[1])


def guide(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, null: Condition | None, scale: float) -> Tensor:
    """The prediction with classifier-free guidance, which is applied only when ``s > 1``."""
    if scale <= 1 or null is None:
        return denoiser(x_t, t, cond)
    return guidance(denoiser(*with_unconditional(x_t, t, cond, null)), scale, x_t, denoiser.rescale)
