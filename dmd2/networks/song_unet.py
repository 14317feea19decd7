"""DDPM++ and NCSN++, the CIFAR-10 networks of Song et al. (2021) as Karras et al. (2022, Table 7) train them.

diffusers' `UNet2DModel` cannot express them. It adds the class after the time embedding's MLP, here the class goes
through it; its blocks have no factor sqrt(1/2) after each residual sum, and its attention blocks attend after every
decoder layer of a resolution, here only after the last; its resampling blocks have no projection on the shortcut; and
NCSN++'s pyramid of FIR-filtered residuals has no counterpart (the ``Skip`` blocks of diffusers add RGB, not features).

Beside torch and diffusers this file imports nothing: an exported student carries a copy of it.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F

HALF = math.sqrt(0.5)  # keeps the variance of a sum of two branches


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Fourier(nn.Module):
    """Random Fourier features ``(B, 2 n)`` of times ``(B,)``: sines, then cosines, of n fixed frequencies (NCSN++)."""

    freqs: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(count))

    def forward(self, time: Tensor) -> Tensor:
        """Features of each time."""
        phase = torch.outer(time, 2 * math.pi * self.freqs)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class Filter(nn.Module):
    """The separable low-pass filter around a change of resolution, applied to each channel."""

    kernel: Tensor

    def __init__(self, taps: Sequence[int]) -> None:
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float32)
        self.padding = (len(taps) - 1) // 2
        self.register_buffer("kernel", (torch.outer(line, line) / line.sum() ** 2)[None, None], persistent=False)

    def _per_channel(self, x: Tensor) -> Tensor:
        return self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)

    def down(self, x: Tensor, padded: bool = False) -> Tensor:
        """Half the resolution; an input that is `padded` already gets no zeros around it."""
        padding = 0 if padded else self.padding
        return F.conv2d(x, self._per_channel(x), stride=2, padding=padding, groups=x.shape[1])

    def up(self, x: Tensor) -> Tensor:
        """Twice the resolution."""
        return F.conv_transpose2d(x, 4 * self._per_channel(x), stride=2, padding=self.padding, groups=x.shape[1])


class Attention(nn.Module):
    """Residual self-attention over the pixels with one head; the residual sum is the block's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)  # query, key and value of a channel lie beside each other
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """What attention adds to ``x`` ``(B, C, h, w)``."""
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], x.shape[1], 3, -1).permute(2, 0, 3, 1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Residual block, conditioned by adding a projection of the embedding; it may change the resolution and attend."""

    def __init__(
        self,
        width_in: int,
        width: int,
        embedding: int,
        taps: Sequence[int],
        resample: str = "",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width_in), _norm(width)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.projection = nn.Linear(embedding, width)
        self.shortcut = nn.Conv2d(width_in, width, 1) if resample or width_in != width else nn.Identity()
        self.attention = Attention(width) if attention else None
        self.resample, self.filter = resample, Filter(taps) if resample else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``(B, width, h, w)`` from ``(B, width_in, h, w)``, h and w halved or doubled by a resampling block."""
        hidden = F.silu(self.norm1(x))
        if self.filter is not None:
            resample = self.filter.down if self.resample == "down" else self.filter.up
            x, hidden = resample(x), resample(hidden)
        hidden = self.conv1(hidden) + self.projection(embedding)[:, :, None, None]
        x = HALF * (self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden))))
        return x if self.attention is None else HALF * (x + self.attention(x))


class PyramidLevel(nn.Module):
    """NCSN++'s residual path: a filtered convolution of the level above, added to the input of this level.

    The convolution comes first and reaches over the border as far as the filter needs (one kernel of both, in effect).
    """

    def __init__(self, width_in: int, width: int, taps: Sequence[int]) -> None:
        super().__init__()
        self.filter = Filter(taps)
        self.conv = nn.Conv2d(width_in, width, 3, padding=1 + self.filter.padding, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, above: Tensor) -> Tensor:
        """``(B, width, h, w)`` from ``x`` of that shape and ``above`` ``(B, width_in, 2h, 2w)``."""
        return HALF * (x + self.filter.down(self.conv(above), padded=True) + self.bias[:, None, None])


class Level(nn.Module):
    """The blocks of one resolution; all levels but the first begin with a resampling block."""

    resampling: Block | None
    pyramid: PyramidLevel | None
    blocks: Any  # nn.ModuleList of Block

    def __init__(self, resampling: Block | None, blocks: list[Block], pyramid: PyramidLevel | None = None) -> None:
        super().__init__()
        self.resampling, self.pyramid, self.blocks = resampling, pyramid, nn.ModuleList(blocks)


class SongUNet(ModelMixin, ConfigMixin):
    """Raw output F ``(B, out_channels, h, w)`` of DDPM++ (``encoder_type="standard"``) or NCSN++ (``"residual"``).

    It is called as a `UNet2DModel`: scaled images, times ``ln(sigma) / 4`` and integer class labels. There is no
    dropout, and no layer for augmentation labels: without such labels, as when sampling, that layer adds nothing.

    Args:
        sample_size: resolution of the images.
        in_channels: channels of the images.
        out_channels: channels of F.
        model_channels: width of the first convolution.
        block_out_channels: width of each level, highest resolution first.
        layers_per_block: residual blocks of a level in the encoder; the decoder has one more.
        attention_resolutions: resolutions with attention (after every encoder block, after the last decoder block).
        num_class_embeds: number of classes, None for an unconditional network.
        embedding_type: ``positional`` (DDPM++) or ``fourier`` (NCSN++).
        noise_channels: width of that embedding.
        embedding_channels: width of the MLP behind it.
        encoder_type: ``standard`` (DDPM++) or ``residual`` (NCSN++).
        resample_filter: taps of the low-pass filter, (1, 1) or (1, 3, 3, 1).
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        model_channels: int = 128,
        block_out_channels: Sequence[int] = (256, 256, 256),
        layers_per_block: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        num_class_embeds: int | None = None,
        embedding_type: str = "positional",
        noise_channels: int = 128,
        embedding_channels: int = 512,
        encoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        positional = embedding_type == "positional"
        self.time_proj = Timesteps(noise_channels, False, 1) if positional else Fourier(noise_channels // 2)
        self.class_embedding = nn.Linear(num_class_embeds, noise_channels) if num_class_embeds else None
        first, second = (nn.Linear(width, embedding_channels) for width in (noise_channels, embedding_channels))
        self.embedding = nn.Sequential(first, nn.SiLU(), second, nn.SiLU())
        common = (embedding_channels, tuple(resample_filter))
        self.conv_in = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.encoder: Any = nn.ModuleList()  # of Level
        self.decoder: Any = nn.ModuleList()
        width, above, skips = model_channels, in_channels, [model_channels]
        for level, width_out in enumerate(block_out_channels):
            attend = sample_size >> level in attention_resolutions
            down = Block(width, width, *common, "down") if level else None
            pyramid = PyramidLevel(above, width, common[1]) if level and encoder_type == "residual" else None
            above = width if level else above
            widths = [width, *[width_out] * layers_per_block]
            blocks = [Block(a, b, *common, attention=attend) for a, b in pairwise(widths)]
            self.encoder.append(Level(down, blocks, pyramid))
            skips += widths if level else widths[1:]
            width = width_out
        self.middle = nn.ModuleList([Block(width, width, *common, attention=a) for a in (True, False)])
        for level, width_out in reversed(list(enumerate(block_out_channels))):
            attend = sample_size >> level in attention_resolutions
            up = None if level == len(block_out_channels) - 1 else Block(width, width, *common, "up")
            blocks = []
            for i in range(layers_per_block + 1):
                blocks.append(
                    Block(width + skips.pop(), width_out, *common, attention=attend and i == layers_per_block)
                )
                width = width_out
            self.decoder.append(Level(up, blocks))
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        """Uniform Xavier weights and zero biases; what ends a residual branch or the network starts near zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                last = name.rpartition(".")[2]
                gain = {"conv2": 1e-5, "out": 1e-5, "conv_out": 1e-5, "qkv": math.sqrt(0.2)}.get(last, 1.0)
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _embed(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """Embedding ``(B, embedding_channels)`` of times (one, or one a sample) and classes."""
        embedding = self.time_proj(timestep.expand(sample.shape[0])).to(sample.dtype)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("a class-conditional SongUNet needs class_labels")
            classes = self.class_embedding.in_features
            embedding = embedding + self.class_embedding(F.one_hot(class_labels, classes).to(sample) * classes**0.5)
        return self.embedding(embedding)

    def encode(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Embedding of times and classes, and outputs of the first convolution and of every encoder block.

        The last one, ``(B, block_out_channels[-1], r, r)`` at the lowest resolution r, is the bottleneck.
        """
        embedding = self._embed(sample, timestep, class_labels)
        x, above = self.conv_in(sample), sample
        skips = [x]
        for level in self.encoder:
            if level.resampling is not None:
                x = level.resampling(x, embedding)
                if level.pyramid is not None:
                    x = above = level.pyramid(x, above)
                skips.append(x)
            for block in level.blocks:
                x = block(x, embedding)
                skips.append(x)
        return embedding, skips

    def decode(self, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """F, given what `encode` returned; the list is emptied."""
        x = skips[-1]
        for block in self.middle:
            x = block(x, embedding)
        for level in self.decoder:
            if level.resampling is not None:
                x = level.resampling(x, embedding)
            for block in level.blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.conv_out(F.silu(self.norm_out(x)))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        """F of ``sample`` ``(B, in_channels, h, w)`` at `timestep` ``(B,)`` or ``()`` for classes ``(B,)``."""
        return UNet2DOutput(sample=self.decode(*self.encode(sample, timestep, class_labels)))
