"""Blocks of diffusers in fewer kernels compute what diffusers' own do, and leave images in their layout."""

from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch.utils._python_dispatch import TorchDispatchMode

from dmd2.networks.blocks import PixelAttention, ResidualBlock, in_fewer_kernels
from tests import tiny

EDM = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
       "attention_head_dim": 8, "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
       "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "downsample_type": "resnet",
       "upsample_type": "resnet"}  # fmt: skip
SHIFT = {**EDM, "resnet_time_scale_shift": "scale_shift"}


def networks(**spec):
    torch.manual_seed(0)
    plain = UNet2DModel(in_channels=3, out_channels=3, **spec)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.1)
    fewer = deepcopy(plain)
    in_fewer_kernels(fewer)
    return plain, fewer


def results(network, dtype=torch.float64):
    """The output and the gradients of weights and input."""
    torch.manual_seed(1)
    network, x = network.to(dtype), torch.randn(3, 3, 8, 8, dtype=dtype, requires_grad=True)
    out = network(x, torch.tensor([1, 50, 900])).sample
    out.square().sum().backward()
    return [out, x.grad, *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("spec", [EDM, SHIFT])
def test_output_and_gradients_are_those_of_diffusers(spec):
    plain, fewer = networks(**spec)
    kinds = [type(module) for module in fewer.modules()]
    assert ResidualBlock in kinds and PixelAttention in kinds and ResnetBlock2D not in kinds and Attention not in kinds
    for ours, theirs in zip(results(fewer), results(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", [EDM, SHIFT])
def test_without_attention_they_are_equal_bit_for_bit(spec):
    blocks = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    plain = {"down_block_types": blocks[0], "up_block_types": blocks[1], "add_attention": False}
    ours, theirs = (results(network, torch.float32) for network in networks(**spec | plain)[::-1])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Launched(TorchDispatchMode):
    """Counts operations that are no views, and keeps those whose images lie in another layout than (B, C, h, w)."""

    def __init__(self):
        super().__init__()
        self.count, self.strided = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        images = [a for a in args if isinstance(a, torch.Tensor) and a.ndim == 4 and min(a.shape[1:3]) > 1]
        if not func.is_view and not all(a.is_contiguous() for a in images):
            self.strided.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_images_keep_their_layout_and_fewer_kernels_are_launched():
    counts = []
    for network in networks(**SHIFT):
        with Launched() as forward:
            out = network(torch.ones(2, 3, 8, 8), torch.tensor([1, 2])).sample
        with Launched() as backward:
            out.sum().backward()
        counts.append((forward, backward))
    (plain, plain_backward), (fewer, fewer_backward) = counts
    assert fewer.count < 0.92 * plain.count and fewer_backward.count < 0.92 * plain_backward.count
    assert {"native_group_norm", "convolution"} <= plain.strided  # what images in the layout of tokens lead to
    assert not {"native_group_norm", "convolution", "silu", "mul"} & fewer.strided


def test_attention_to_others_and_over_tokens_is_that_of_diffusers():
    torch.manual_seed(0)
    options = {"query_dim": 16, "heads": 2, "dim_head": 8, "residual_connection": True}
    crossing, over_tokens = Attention(**options, cross_attention_dim=16), Attention(**options)
    tokens = torch.randn(2, 5, 16)
    before = over_tokens(tokens)
    for attention in (crossing, over_tokens):
        in_fewer_kernels(attention)
    assert type(crossing) is Attention and type(over_tokens) is PixelAttention
    assert torch.equal(over_tokens(tokens), before)


def test_a_mask_is_not_ignored():
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8, residual_connection=True)
    images, mask = torch.randn(2, 16, 2, 2), torch.tensor([0.0, 0.0, 0.0, -1e4]).expand(2, 1, 4)
    plain = attention(images, attention_mask=mask)
    in_fewer_kernels(attention)
    assert torch.equal(attention(images, attention_mask=mask), plain)
    torch.testing.assert_close(attention(images, attention_mask=mask * 0), attention(images))


def test_blocks_with_a_factor_of_their_own_and_attention_to_text_stay():
    text = UNet2DConditionModel(**tiny.KINDS["eps-text"][2])
    before = [type(module) for module in text.modules() if isinstance(module, Attention)]
    in_fewer_kernels(text)
    assert before == [type(module) for module in text.modules() if isinstance(module, Attention)] != []
    _, halved = networks(**EDM, mid_block_scale_factor=2**0.5)
    assert type(halved.mid_block.resnets[0]) is ResnetBlock2D and type(halved.mid_block.attentions[0]) is Attention
    assert type(halved.down_blocks[0].resnets[0]) is ResidualBlock


def test_denoisers_run_such_blocks():
    kinds = {type(m) for m in tiny.denoiser("edm-attention").modules() if isinstance(m, ResnetBlock2D | Attention)}
    assert kinds == {ResidualBlock, PixelAttention}
