"""Families of flow-matching transformers: velocity, sign and time, tapped tokens, published sizes."""

import diffusers
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dmd2.experiment.checks.sections import problems
from dmd2.networks.condition import Condition
from dmd2.networks.flow import FlowDenoiser
from dmd2.networks.head import PatchHead
from dmd2.networks.lora import add_lora, merged_state, targets_of
from dmd2.networks.schedules import FlowSchedule, add_noise
from dmd2.networks.transformers import flux
from dmd2.networks.transformers.family import FAMILIES, family_of
from dmd2.networks.transformers.flux import image_ids, pack, unpack
from dmd2.training.build import build_head, tap_blocks
from dmd2.training.execution import blocks_of
from tests import tiny as tiny_run
from tests.tiny_transformers import TINY, texts, tiny

T = torch.tensor([1.0, 0.3, 0.75])
IMAGES = torch.randn(3, 4, 8, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request):
    return request.param


def square_of(kind):
    """SD3 and Sana of a tiny size have positions for a square only."""
    return IMAGES.repeat(1, 1, 1, 2) if kind in ("SD3Transformer2DModel", "SanaTransformer2DModel") else IMAGES


class Truth(nn.Module):
    """Stands for a network: says the velocity it is given, in the sign and time that its class has."""

    def __init__(self, config, v, sign, times):
        super().__init__()
        self.config, self.v, self.sign, self.times = config, v, sign, times
        self.transformer_blocks = self.single_transformer_blocks = self.layers = nn.ModuleList()

    def forward(self, x=None, t=None, *_, hidden_states=None, timestep=None, **__):
        told = timestep if t is None else t
        assert torch.allclose(told, self.times)
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=self.sign(self.v))


def test_sign_and_time_give_the_clean_images_back(kind):
    x0, n = IMAGES, torch.randn(IMAGES.shape)
    v, x_t = n - x0, add_noise(FlowSchedule(), IMAGES, n, T)
    towards_data = kind in ("Lumina2Transformer2DModel", "ZImageTransformer2DModel")
    times = 1 - T if towards_data else T if kind == "FluxTransformer2DModel" else 1000 * T
    said = {
        "FluxTransformer2DModel": pack,
        "Lumina2Transformer2DModel": torch.neg,
        "ZImageTransformer2DModel": lambda v: [-one[:, None] for one in v],
    }
    network = tiny(kind)
    truth = type(kind, (Truth,), {})(network.config, v, said.get(kind, lambda v: v), times)
    denoiser = FlowDenoiser(truth)
    assert torch.allclose(denoiser(x_t, T, texts(3)), x0, atol=1e-6)


def test_features_are_the_image_tokens_of_a_whole_pass(kind):
    network, x, cond = tiny(kind), square_of(kind), texts(3, kept=[6, 3, 5])
    family, heard = family_of(kind), []
    blocks, grids = family.blocks(network), []
    for tap in range(len(blocks)):
        hook = blocks[tap].register_forward_hook(lambda *given: heard.append(given[-1]))
        denoiser = FlowDenoiser(network, taps=[tap])
        denoiser(x, T, cond)
        hook.remove()
        output = heard[-1]
        hidden = output[1] if isinstance(output, tuple) else output
        grid = denoiser.features(x, T, cond)
        grids.append(grid)
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        assert grid.shape == (3, family.width(network), rows, columns)
        for i, kept in enumerate([6, 3, 5]):
            start = kept if kind == "Lumina2Transformer2DModel" else 0
            tokens = hidden[i, start : start + rows * columns]
            assert torch.allclose(grid[i].flatten(1).T, tokens, atol=1e-5)
    assert torch.equal(FlowDenoiser(network, taps=[0, 1, 2]).features(x, T, cond), torch.cat(grids, dim=1))
    assert family.blocks(network) == blocks, "the network is whole again"


@pytest.mark.parametrize(
    "kind", [kind for kind in FAMILIES if kind != "SD3Transformer2DModel"]
)  # test_execution.py has it
def test_compiled_blocks_say_the_same(kind):
    denoiser, x, cond = FlowDenoiser(tiny(kind), taps=[0, 1]), square_of(kind), texts(3, kept=[6, 3, 5])
    expected = denoiser(x, T, cond), denoiser.features(x, T, cond)
    torch._dynamo.reset()
    counters.clear()
    for block in blocks_of(denoiser):
        block.compile(backend="eager", dynamic=False)
    with torch.no_grad():
        found = denoiser(x, T, cond), denoiser.features(x, T, cond)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert counters["stats"]["unique_graphs"] > 0 and counters["graph_break"] == {}


def test_samples_do_not_see_each_other_and_joined_is_apart(kind):
    denoiser, x, cond = FlowDenoiser(tiny(kind)), square_of(kind), texts(3, kept=[6, 3, 5])
    whole = denoiser(x, T, cond)
    predicted, features = denoiser.joined(x, T, cond, 1)
    first, rest = cond.parts(1)
    assert torch.allclose(whole[:1], predicted, atol=1e-5)
    assert torch.allclose(denoiser(x[1:], T[1:], rest), whole[1:], atol=1e-5)
    assert torch.allclose(denoiser.features(x, T, cond)[1:], features, atol=1e-5)


def test_padding_of_a_masked_text_changes_nothing(kind):
    if kind in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        pytest.skip("reads all states, as its pipeline does")
    denoiser, x, cond = FlowDenoiser(tiny(kind)), square_of(kind), texts(3, kept=[6, 3, 5])
    other = Condition(text=cond.text.clone(), text_mask=cond.text_mask)
    other.text[~other.text_mask] = 7.0
    assert torch.allclose(denoiser(x, T, cond), denoiser(x, T, other), atol=1e-5)


def test_classes_are_a_condition_too(kind):
    denoiser, x = FlowDenoiser(tiny(kind)), square_of(kind)
    shown = [denoiser(x, T, Condition(labels=torch.full((3,), label))) for label in (0, 11)]
    assert not torch.allclose(*shown, atol=1e-4)


@pytest.mark.parametrize("kind", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_a_text_without_a_pooled_vector_is_pooled_by_its_mean(kind):
    text, t, x = texts(2).text, torch.tensor([0.3, 0.9]), torch.randn(2, 4, 8, 8)
    denoiser = FlowDenoiser(tiny(kind))
    pooled = denoiser(x, t, Condition(text=text))
    assert torch.equal(pooled, denoiser(x, t, Condition(text=text, pooled=text.mean(1))))
    assert not torch.equal(pooled, denoiser(x, t, Condition(text=text.flip(1), pooled=text[:, 0])))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_from_features_and_from_the_prediction(kind, checkpointing):
    network, x, cond = tiny(kind).train(), square_of(kind), texts(3)
    if checkpointing:
        network.enable_gradient_checkpointing()
    denoiser = FlowDenoiser(network, taps=[0, 1])
    denoiser.features(x, T, cond).square().sum().backward()
    blocks = denoiser.family.blocks(network)
    reached = [any(p.grad is not None for p in block.parameters()) for block in blocks]
    assert reached == [True, True, False], "blocks after the middle one are not run"
    gradient = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    if checkpointing:
        network.disable_gradient_checkpointing()
        network.zero_grad()
        denoiser.features(x, T, cond).square().sum().backward()
        for mine, p in zip(gradient, network.parameters(), strict=True):
            assert (mine is None and p.grad is None) or torch.allclose(mine, p.grad, rtol=1e-4, atol=1e-6)
    denoiser(x, T, cond).sum().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    assert not [name for name in missing if not name.startswith("siglip")], missing


def test_packing_is_undone_and_positions_are_rows_and_columns():
    assert torch.equal(unpack(pack(IMAGES), IMAGES.shape), IMAGES)
    ids = image_ids(IMAGES)
    assert ids.shape == (8, 3) and ids[:3].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]] and ids[:, 0].abs().max() == 0
    token = pack(IMAGES)[0, 3]
    assert torch.equal(token, IMAGES[0, :, 2:4, 2:4].flatten()), "token 3 is row 1, column 1: channels, then 2x2"


def test_swapped_rows_and_columns_are_another_image_to_flux(monkeypatch):
    denoiser = FlowDenoiser(tiny("FluxTransformer2DModel"))
    right = denoiser(IMAGES, T, texts(3))
    monkeypatch.setattr(flux, "image_ids", lambda x: image_ids(x)[:, [0, 2, 1]])
    assert not torch.allclose(denoiser(IMAGES, T, texts(3)), right, atol=1e-4)


PUBLISHED = {
    "SD3.5-medium": ("SD3Transformer2DModel", 2_243_171_520, {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}),
    "SD3.5-large": ("SD3Transformer2DModel", 8_056_627_520, {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "qk_norm": "rms_norm"}),
    "FLUX.1-dev": ("FluxTransformer2DModel", 11_901_408_320, {"guidance_embeds": True}),
    "Sana-1.6B": ("SanaTransformer2DModel", 1_604_462_752, {}),
    "Z-Image": ("ZImageTransformer2DModel", 6_154_908_736, {"axes_lens": [1536, 512, 512]}),
    "Lumina-Image-2.0": ("Lumina2Transformer2DModel", 2_609_769_152, {"cap_feat_dim": 2304}),
}  # fmt: skip
FACTORS = {  # parameters of low-rank factors for each unit of rank, and modules
    "SD3.5-medium": (746_496, 243), "SD3.5-large": (1_473_792, 303), "FLUX.1-dev": (1_634_304, 266),
    "Sana-1.6B": (716_800, 160), "Z-Image": (1_044_480, 136), "Lumina-Image-2.0": (460_800, 120),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_their_adapters(name):
    kind, count, config = PUBLISHED[name]
    with torch.device("meta"):
        network = getattr(diffusers, kind).from_config(config)
    assert sum(p.numel() for p in network.parameters()) == count
    targets = [network.get_submodule(path) for path in targets_of(network)]
    assert (sum(m.in_features + m.out_features for m in targets), len(targets)) == FACTORS[name]


@pytest.mark.parametrize(("width", "count"), [(1536, 18_877_441), (3072, 75_503_617), (2304, 42_471_937)])
def test_the_head_of_patches_has_the_published_size(width, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in PatchHead(width).parameters()) == count
    small = PatchHead(8)
    features = torch.randn(2, 8, 4, 6)
    logits = small(features)
    assert logits.shape == (2, 1) and not torch.allclose(logits[0], logits[1])


def test_several_taps_have_a_head_each():
    denoiser, cfg = tiny_run.denoiser("flow-sd3"), tiny_run.config("flow-sd3", gan__tap=[1, 0])
    tap_blocks(denoiser, cfg)
    assert denoiser.taps == [0, 1]
    heads, x = build_head(denoiser, cfg, 0, torch.device("cpu")), torch.randn(3, 1, 8, 8)
    features = denoiser.features(x, T, tiny_run.condition("flow-sd3", 3))
    logits = heads(features)
    assert logits.shape == (3, 2)
    assert torch.equal(logits[:, 1:], heads.heads[1](features[:, 16:])) and not torch.equal(*logits.T)


def test_a_tap_after_the_last_block_is_told(kind):
    network = {"_class_name": kind, **TINY[kind]}
    cfg = tiny_run.config("flow-sd3", teacher__network=network, gan__tap=[0, 3])
    told = [problem for problem in problems(cfg, {}) if problem[0] == "gan.tap"]
    keys = {"FluxTransformer2DModel": "num_single_layers", "ZImageTransformer2DModel": "n_layers"}
    assert told == [("gan.tap", f"teacher.network.{keys.get(kind, 'num_layers')}", "3, but blocks are 0 to 2")]


def test_factors_merge_into_plain_weights(kind):
    plain, adapted, x, cond = tiny(kind), tiny(kind), square_of(kind), texts(3)
    add_lora(adapted, rank=2, alpha=4.0)
    for name, p in adapted.named_parameters():
        assert p.requires_grad == ("lora" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    expected = FlowDenoiser(adapted)(x, T, cond)
    plain.load_state_dict(merged_state(adapted))
    assert torch.allclose(FlowDenoiser(plain)(x, T, cond), expected, atol=1e-5)
    assert not torch.allclose(FlowDenoiser(tiny(kind))(x, T, cond), expected, atol=1e-3)


@pytest.mark.parametrize("masked_first", [True, False])
def test_joined_captions_keep_a_mask_that_only_one_of_them_has(masked_first):
    masked, whole = texts(2, kept=[2, 5]), texts(1)
    joined = masked.join(whole) if masked_first else whole.join(masked)
    counts = [2, 5, 6] if masked_first else [6, 2, 5]
    assert joined.text_mask.sum(1).tolist() == counts and len(joined.text) == 3
    assert Condition(labels=torch.zeros(1)).join(masked).text_mask is None and whole.join(whole).text_mask is None
