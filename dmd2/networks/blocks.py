"""The residual and attention blocks of diffusers' UNets in fewer kernels: same weights, same numbers up to rounding.

What diffusers computes besides: a division by a factor that is 1 in the networks here, in each block and once more in
its backward pass; an attention's tokens laid out anew for each of query, key and value. And its attention leaves images
in the layout of tokens (channels last), in which every group norm, sum and convolution after it reads one layout and
writes another, up to the end of the network.
"""

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F


def in_fewer_kernels(network: nn.Module) -> None:
    """Have the classes below compute the blocks that they can, in place; copies made later (`deepcopy`) keep them.

    An attention processor that is set afterwards has no effect on a `PixelAttention`.
    """
    for module in network.modules():
        if type(module) is ResnetBlock2D and module.output_scale_factor == 1 and module.time_emb_proj is not None:
            module.__class__ = ResidualBlock
        elif type(module) is Attention and _of_pixels(module):
            module.__class__ = PixelAttention


def _of_pixels(attention: Attention) -> bool:
    """Whether it is a residual self-attention without further norms, as UNets without captions have over images."""
    others = (attention.spatial_norm, attention.norm_q, attention.norm_k)
    return (
        attention.residual_connection
        and attention.rescale_output_factor == 1
        and type(attention.processor) is AttnProcessor2_0
        and not attention.is_cross_attention
        and others == (None,) * 3
    )


class ResidualBlock(ResnetBlock2D):
    """`ResnetBlock2D` without a factor on its output."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *_: Any, **__: Any) -> Tensor:
        """``(B, out, h', w')`` of images ``(B, in, h, w)`` and the embedding of their times ``(B, E)``."""
        x, hidden = input_tensor, self.nonlinearity(self.norm1(input_tensor))
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            x, hidden = resample(x), resample(hidden)
        hidden = self.conv1(hidden)
        embedding = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = embedding.chunk(2, dim=1)
            hidden = self.norm2(hidden) * (1 + scale) + shift  # addcmul takes more kernels in its backward pass
        else:
            hidden = self.norm2(hidden + embedding)
        hidden = self.conv2(self.dropout(self.nonlinearity(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class PixelAttention(Attention):
    """Residual self-attention over the pixels of images, which stay in the layout that they have."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """``(B, C, h, w)`` of images of that shape; tokens ``(B, L, C)`` and masks are left to diffusers."""
        if hidden_states.ndim != 4 or encoder_hidden_states is not None or attention_mask is not None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **options)
        images = hidden_states if self.group_norm is None else self.group_norm(hidden_states)
        tokens = images.flatten(2).transpose(1, 2).contiguous()
        q, k, v = (self._heads(layer(tokens)) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.to_out[1](self.to_out[0](mixed))
        return hidden_states + out.transpose(1, 2).reshape(hidden_states.shape)  # the sum has the layout of the first

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)
