"""What is counted on the meta device: against built networks, and against what PyTorch's allocator really hands out."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.full_size import allocated_peak
from dmd2.core.errors import UserError
from dmd2.experiment.tables import load_base
from dmd2.method.step import train_step
from dmd2.planning import iteration_shapes, ledger
from dmd2.planning.ledger import GpuFunctions, Ledger
from dmd2.planning.memory import META, Counted, Memory, Setup, architecture
from dmd2.planning.plan import varied
from dmd2.training.sharding import recompute_activations
from eval.report.passes import passes_by_config
from tests import tiny
from tests.tiny_transformers import TINY


def config(kind="edm", **changes):
    cfg = tiny.config(kind, **changes)
    spec = {**tiny.KINDS[kind][2], "_class_name": tiny.KINDS[kind][1].__name__}
    return cfg.model_copy(update={"teacher": cfg.teacher.model_copy(update={"network": spec})})


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_parameters_are_those_of_the_built_networks(kind):
    cfg = config(kind)
    built = tiny.models(kind, cfg)
    expected = {"student": built.student, "teacher": built.teacher, "critic": built.critic, "head": built.head}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in expected.items()}
    assert Counted(cfg).parameters == counts


def test_imagenet64_is_counted_without_its_weights():
    counted = Counted(load_base("imagenet64"))
    assert counted.parameters == {"student": 295_899_267, "teacher": 295_899_267, "critic": 295_899_267,
                                  "head": 18_879_745}  # fmt: skip
    assert all(p.is_meta for module in counted.modules.values() for p in module.parameters())


@pytest.mark.parametrize("kind", ["edm", "edm-attention", "eps-text", "eps-sdxl"])
@pytest.mark.parametrize(("count", "recomputed"), [(4, False), (16, False), (16, True)])
def test_the_peak_is_that_of_the_allocator(kind, count, recomputed, monkeypatch):
    monkeypatch.setattr(ledger, "ALLOCATION", 1)  # the CPU's allocator does not round up
    monkeypatch.setattr(iteration_shapes, "TOKENS", tiny.TOKENS)
    cfg = config(kind, optim__batch=count)
    models, batches = tiny.models(kind, cfg), tiny.batches(kind, cfg)
    for trained in (models.student, models.critic):
        if recomputed:
            recompute_activations(trained.network)
    train_step(models, batches.at(0), 0, cfg)  # makes AdamW's moments
    counted = Counted(cfg, Setup(checkpointing=recomputed))
    standing = sum(counted.weights.values()) + counted.moments
    for it in (1, 5):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train_step(models, batches.at(it), it, cfg)
        predicted = counted.iteration(count, update_student=it == 5).peak - standing
        # Of activations computed again it hangs on the order in which backward frees them.
        assert predicted == pytest.approx(allocated_peak(profiler), rel=0.15 if recomputed else 0.05)


def test_recomputed_activations_take_less_memory_and_more_arithmetic():
    cfg = config("eps-sdxl", train__precision="bf16")
    kept, recomputed = (Counted(cfg, Setup(checkpointing=on)) for on in (False, True))
    of_an_image = [counted.memory().per_image for counted in (kept, recomputed)]
    assert of_an_image[1] < 0.7 * of_an_image[0]
    assert 1.1 * kept.image_flops < recomputed.image_flops < 1.5 * kept.image_flops


def test_a_gpu_holds_its_part_of_split_networks(monkeypatch):
    monkeypatch.setattr(ledger, "ALLOCATION", 1)  # tiny tensors would not get smaller
    cfg = config("eps-sdxl")
    alone, split = Counted(cfg), Counted(cfg, Setup(parts=4))
    assert split.memory().standing == {name: -(-size // 4) for name, size in alone.memory().standing.items()}
    assert split.memory().gradients == -(-alone.gradients // 4)
    assert alone.transient == 0 < split.transient
    standing = sum(alone.weights.values()) + alone.moments
    saved = alone.iteration(1).peak - (split.iteration(1).peak - split.transient)
    # Three quarters of what stands, and of some of the gradients.
    assert 0.7 * standing < saved <= 0.75 * (standing + alone.gradients)
    assert split.iteration(1).flops == alone.iteration(1).flops


def test_8bit_moments_take_a_quarter_and_small_ones_their_float32():
    cfg = config("eps-sdxl", optim__states="8bit")
    spec = {**cfg.teacher.network, "block_out_channels": (64, 128), "norm_num_groups": 32}
    wide = cfg.model_copy(update={"teacher": cfg.teacher.model_copy(update={"network": spec})})
    full = wide.model_copy(update={"optim": cfg.optim.model_copy(update={"states": "fp32"})})
    eight, floats = Counted(wide).moments, Counted(full).moments
    assert 0.25 * floats < eight < 0.35 * floats
    assert 0.9 < Counted(cfg).moments / Counted(config("eps-sdxl")).moments <= 1  # hardly one has 4096 values


def test_a_low_rank_student_has_small_moments():
    cfg = config("eps-sdxl")
    lora = varied(cfg, 2, None)
    whole, low = Counted(cfg), Counted(lora)
    factors = low.trained["student"]
    assert 0 < factors < 0.3 * whole.trained["student"]
    assert low.parameters["student"] == whole.parameters["student"] + factors
    assert low.trained["critic"] == whole.trained["critic"]
    assert low.trained["teacher"] == 0
    gone = 8 * (whole.trained["student"] - factors)
    assert low.moments == pytest.approx(whole.moments - gone, rel=0.2)  # 512 bytes are the least of a tensor


def test_accumulation_keeps_the_gradients_of_earlier_passes():
    counted = Counted(config("edm", optim__batch=64))
    one, two = (counted.iteration(32, micro_batches=n).peak for n in (1, 2))
    assert one + 0.8 * counted.gradients < two <= one + 1.1 * counted.gradients


def test_every_term_of_the_loss_has_its_memory_and_arithmetic():
    full = Counted(config())
    no_gan = Counted(config(gan__lambda_g=0.0, gan__lambda_d=0.0))
    pairs = Counted(config(regression__weight=1.0))
    averaged = Counted(config(optim__ema=0.99))
    assert "head" not in no_gan.parameters
    assert no_gan.moments < full.moments
    assert no_gan.iteration(8).flops < full.iteration(8).flops < pairs.iteration(8).flops
    assert no_gan.iteration(32).peak < full.iteration(32).peak
    assert pairs.iteration(8, update_student=False).flops == full.iteration(8, update_student=False).flops
    assert averaged.weights == {**full.weights, "EMA": full.weights["student"]}
    assert averaged.iteration(8).peak == full.iteration(8).peak + full.weights["student"]


def test_lpips_is_counted_without_its_weights():
    counted = Counted(config("edm", regression__weight=1.0, regression__distance="lpips"))
    assert counted.parameters["LPIPS"] == 14_714_688  # of VGG16's convolutions
    assert counted.iteration(2).flops > 20 * Counted(config("edm")).iteration(2).flops


def test_arithmetic_is_linear_in_images_and_averaged_over_the_ratio():
    counted = Counted(config(critic__ratio=5))
    student, critic = counted.iteration(1).flops, counted.iteration(1, update_student=False).flops
    assert counted.iteration(6).flops == 6 * student
    assert counted.image_flops == (student + 4 * critic) / 5
    assert Counted(config(critic__ratio=1)).image_flops == student


def test_passes_of_backward_simulation_are_those_of_the_mean_iteration():
    """Of 0 to 3 simulated steps, equally often; one forward pass each."""
    one, four = (Counted(config("flow-sd3", generator__input=i, generator__steps=n))
                 for i, n in (("noise", 1), ("backward_simulation", 4)))  # fmt: skip
    assert four.passes == pytest.approx(one.passes + 1.5)
    assert four.iteration(1).flops == one.iteration(1).flops + 3 * one.forward_flops


def test_a_network_that_reads_numbers_has_no_counts():
    """Lumina 2's class reads the lengths of captions: `plan` says so, and tables do without."""
    cfg = tiny.config("flow-sd3", data__channels=4, teacher__network={"_class_name": "Lumina2Transformer2DModel",
                                                                     **TINY["Lumina2Transformer2DModel"]})  # fmt: skip
    with pytest.raises(UserError, match="what Lumina2Transformer2DModel takes cannot be counted"):
        assert Counted(cfg).passes
    assert passes_by_config()(cfg.model_dump(mode="json")) is None


def test_bfloat16_bodies_take_less_and_an_eps_teacher_half():
    wide, narrow = (Counted(config("edm", train__precision=p)).memory().per_image for p in ("fp32", "bf16"))
    assert 0.6 * wide < narrow < wide
    text = Counted(config("eps-text", train__precision="bf16")).weights
    assert text["teacher"] < 0.8 * text["student"]  # every tensor is rounded up to 512 bytes


def test_bfloat16_weights_are_planned_with_their_copies():
    autocast, body = (Counted(config("edm", train__precision=p)) for p in ("bf16", "bf16-body"))
    assert body.memory().per_image < autocast.memory().per_image and body.image_flops == autocast.image_flops
    standing = body.memory().standing
    assert 0.5 * standing["student"] <= standing["student in bf16"] < 0.8 * standing["student"]
    assert "critic in bf16" in standing and standing["teacher"] < 0.8 * autocast.memory().standing["teacher"]
    split = Counted(config("edm", train__precision="bf16-body"), Setup(parts=4))
    assert "student in bf16" not in split.memory().standing and split.iteration(4).peak > 0


def test_autocast_does_what_cuda_does():
    functions, conv, norm = GpuFunctions(), torch.nn.Conv2d(8, 8, 3, device=META), torch.nn.GroupNorm(2, 8, device=META)
    x = torch.empty(2, 8, 4, 4, device=META)
    with functions:
        with functions.autocast(True):
            y = conv(x)
            again = conv(x)
            assert y.dtype == torch.bfloat16
            assert norm(y).dtype == torch.float32
            assert y.grad_fn.next_functions[1][0] is again.grad_fn.next_functions[1][0]  # one copy of the weight
        assert conv(x).dtype == torch.float32
        with functions.autocast(False):
            assert conv(x).dtype == torch.float32


def test_fused_attention_keeps_no_matrix_of_weights():
    query = torch.empty(1, 1, 4096, 8, device=META, requires_grad=True)
    with Ledger([query]) as counted, GpuFunctions():
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert counted.peak < 4096 * 4096
    assert counted.flops == 7 * 2 * 4096 * 4096 * 8  # two products forward, five backward


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 8}])
def test_backward_of_a_convolution_is_twice_its_forward(options):
    x, conv = (
        torch.empty(2, 16, 8, 8, device=META, requires_grad=True),
        torch.nn.Conv2d(16, 32, 3, **options, device=META),
    )
    with Ledger([x]) as counted:
        y = conv(x)
        forward = counted.flops
        y.sum().backward()
    assert forward == 2 * y.numel() * conv.weight[0].numel() and counted.flops == 3 * forward


def test_the_ledger_counts_a_storage_once_and_forgets_it_when_it_goes():
    x = torch.empty(256, 4, device=META)
    with Ledger([x]) as counted:
        y = x.view(4, 256).t()
        assert counted.live == 4096
        z = y @ x.view(4, 256)
        assert (counted.live, counted.flops) == (4096 + 256 * 256 * 4, 2 * 256 * 256 * 4)
        z.add_(1)
        del z
        assert (counted.live, counted.peak) == (4096, 4096 + 256 * 256 * 4)


def test_memory_between_and_beyond_what_was_counted():
    law = Memory({}, gradients=5, points=((1, 100), (11, 200), (21, 400)))
    assert [law.at(n) for n in (1, 6, 11, 16, 31)] == [100, 150, 200, 300, 600]
    assert law.at(11, accumulated=True) == 205
    assert law.largest(600, share=31) == 31
    assert law.largest(599, share=31) == 30  # 580 and the gradients of earlier passes
    assert law.largest(99, share=31) == 0


@pytest.mark.parametrize("kind", ["edm-attention", "eps-sdxl"])
def test_the_law_holds_at_a_micro_batch_that_was_not_counted(kind):
    counted = Counted(config(kind))
    assert counted.memory().at(40) == pytest.approx(counted.iteration(40).peak, rel=0.02)


def test_several_steps_and_guidance_are_counted():
    one = Counted(config("eps-labels"))
    guided = Counted(config("eps-labels", teacher__guidance=2.0))
    several = Counted(config("eps-labels", generator__input="backward_simulation", generator__steps=4))
    karras = Counted(config("edm", generator__input="backward_simulation", generator__steps=4))
    forward = one.forward_flops
    assert guided.iteration(2).flops == one.iteration(2).flops + 2 * forward
    assert several.iteration(2).flops == one.iteration(2).flops + 2 * 3 * forward
    assert karras.iteration(1).flops == Counted(config("edm")).iteration(1).flops + 3 * karras.forward_flops


def test_an_unknown_network_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no teacher\.network and .*tiny/manifest\.json does not exist"):
        architecture(tiny.config("edm"))
    cfg = config("edm")
    cfg.teacher.network["_class_name"] = "Transformer2DModel"
    with pytest.raises(UserError, match="no network class Transformer2DModel"):
        Counted(cfg)


def test_the_teacher_in_its_place_says_what_the_network_is(tmp_path, monkeypatch):
    from dmd2.training.make_teacher import adopt_teacher

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/teachers/tiny"
    tiny.network("eps-text", 0).save_pretrained(folder / "unet")
    cfg = tiny.config("eps-text")
    adopt_teacher(cfg.teacher, folder)
    assert Counted(cfg).parameters == Counted(config("eps-text")).parameters
