"""Network sizes of algorithm.md 2.3.2 and 6.6, built without memory on the meta device."""

import pytest
import torch

from dmd2.networks.condition import Condition
from dmd2.networks.halves import encode
from dmd2.networks.head import Head
from dmd2.training.teachers import build_network

EDM_64 = {
    "sample_size": 64, "in_channels": 3, "out_channels": 3, "block_out_channels": [192, 384, 576, 768],
    "layers_per_block": 3, "downsample_type": "resnet", "upsample_type": "resnet",
    "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 64, "add_attention": True,
    "num_class_embeds": 1000, "norm_num_groups": 32, "attn_norm_num_groups": 32, "norm_eps": 1e-5,
    "freq_shift": 0, "flip_sin_to_cos": True,
}  # fmt: skip
HEADS = {
    "edm": (768, 8, 18_879_745, [0, 1, 3, 4, 6]),
    "sd15": (1280, 8, 52_437_761, [0, 1, 3, 4, 6]),
    "sdxl": (1280, 32, 104_874_241, [0, 1, 3, 4, 6, 7, 9, 10, 12]),
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(params=HEADS)
def head_case(request):
    width, resolution, count, indices = HEADS[request.param]
    with torch.device("meta"):
        return Head(width, resolution), width, resolution, count, indices


def test_head_has_the_listed_number_of_parameters(head_case):
    head, _, _, count, _ = head_case
    assert parameters(head) == count


def test_head_state_dict_has_the_listed_indices(head_case):
    head, _, _, _, indices = head_case
    assert set(head.state_dict()) == {f"{i}.{kind}" for i in indices for kind in ("weight", "bias")}


def test_head_gives_one_logit_per_sample(head_case):
    head, width, resolution, _, _ = head_case
    assert head(torch.empty(3, width, resolution, resolution, device="meta")).shape == (3, 1)


def test_head_normalises_in_32_groups_with_eps_1e_5(head_case):
    norms = [layer for layer in head_case[0] if isinstance(layer, torch.nn.GroupNorm)]
    assert norms
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-5)}


def test_head_activates_with_silu_after_each_normalisation(head_case):
    kinds = [type(layer).__name__ for layer in head_case[0]]
    assert kinds == ["Conv2d", "GroupNorm", "SiLU"] * (len(kinds) // 3) + ["Conv2d"]


def test_head_of_a_narrow_network_still_gives_one_logit():
    for resolution in (4, 8, 16):
        assert Head(16, resolution)(torch.zeros(2, 16, resolution, resolution)).shape == (2, 1)


def test_head_reads_bfloat16_features_in_float32():
    assert Head(16, 4)(torch.zeros(2, 16, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_imagenet_unet_has_295_899_267_parameters_in_629_tensors():
    with torch.device("meta"):
        network = build_network(EDM_64, seed=0)
    assert parameters(network) == 295_899_267
    assert len(network.state_dict()) == 629


def test_imagenet_bottleneck_is_768_by_8_by_8():
    with torch.device("meta"):
        network = build_network(EDM_64, seed=0)
        labels = Condition(labels=torch.zeros(2, dtype=torch.long))
        features = encode(network, torch.zeros(2, 3, 64, 64), torch.ones(2), labels).bottleneck
    assert features.shape == (2, 768, 8, 8)
