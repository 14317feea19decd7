"""Encoder and decoder of a UNet apart, so that one pass can decode some samples and stop at the bottleneck of others.

The networks are those of diffusers without what no published checkpoint here has (skip convolutions, ControlNet and
adapter inputs, attention masks), and our `SongUNet`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from dmd2.networks.condition import Condition
from dmd2.networks.song_unet import SongUNet

Network: TypeAlias = "UNet2DModel | SongUNet | UNet2DConditionModel"


class Encoded(NamedTuple):
    """A batch between encoder and decoder.

    bottleneck: ``(B, C, h, w)`` at the lowest resolution, of the last encoder block, or of the middle block of the
    `UNet2DConditionModel`. skips: what the decoder's blocks read. embedding: of times and classes. text: its states.
    """

    bottleneck: Tensor
    skips: tuple[Tensor, ...]
    embedding: Tensor
    text: Tensor | None

    def first(self, count: int) -> Encoded:
        """The first `count` samples."""
        text = None if self.text is None else self.text[:count]
        return Encoded(self.bottleneck[:count], tuple(s[:count] for s in self.skips), self.embedding[:count], text)


def labels_of(network: Network, cond: Condition) -> Tensor | None:
    """The class labels, or None for an unconditional network, which also serves on labelled data."""
    return None if network.class_embedding is None else cond.labels


def encode(network: Network, sample: Tensor, time: Tensor, cond: Condition) -> Encoded:
    """Run the encoder on ``sample`` ``(B, C, H, W)`` at network times ``(B,)``."""
    if isinstance(network, SongUNet):
        embedding, skips = network.encode(sample, time, labels_of(network, cond))
        return Encoded(skips[-1], tuple(skips), embedding, None)
    if isinstance(network, UNet2DModel):
        dtype = network.conv_in.weight.dtype  # network.dtype walks through all modules: 0.3 ms each time
        embedding = network.time_embedding(network.time_proj(time).to(dtype))
        if network.class_embedding is not None:
            embedding = embedding + network.class_embedding(cond.labels).to(dtype)
        text = None
    else:
        embedding, text = _embed_text(network, sample, time, cond)
    hidden = network.conv_in(sample)
    skips = [hidden]
    for block in network.down_blocks:
        hidden, more = block(hidden_states=hidden, temb=embedding, **_text_of(block, text))
        skips += more
    if isinstance(network, UNet2DConditionModel):
        hidden = network.mid_block(hidden, embedding, **_text_of(network.mid_block, text))
    return Encoded(hidden, tuple(skips), embedding, text)


def decode(network: Network, encoded: Encoded) -> Tensor:
    """The network's raw output ``(B, C, H, W)`` for what `encode` returned."""
    hidden, skips, embedding, text = encoded
    if isinstance(network, SongUNet):
        return network.decode(embedding, list(skips))
    if isinstance(network, UNet2DModel) and network.mid_block is not None:
        hidden = network.mid_block(hidden, embedding)
    for block in network.up_blocks:
        skips, mine = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
        states = _text_of(block, text)
        hidden = block(hidden_states=hidden, temb=embedding, res_hidden_states_tuple=mine, **states)
    if network.conv_norm_out is not None:
        hidden = network.conv_act(network.conv_norm_out(hidden))
    return network.conv_out(hidden)


def _embed_text(network: Any, sample: Tensor, time: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
    embedding = network.time_embedding(network.get_time_embed(sample, time))
    if (classes := network.get_class_embed(sample, cond.labels)) is not None:
        embedding = embedding + classes
    extra = {} if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    if (added := network.get_aug_embed(embedding, cond.text, extra)) is not None:
        embedding = embedding + added
    return embedding, network.process_encoder_hidden_states(cond.text, extra)


def _text_of(block: Any, text: Tensor | None) -> dict[str, Tensor | None]:
    """The text states, for a block that attends to them."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
