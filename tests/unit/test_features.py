"""The bottleneck that the GAN head reads (2.3.1): same tensor as a hook on the whole network, without its decoder."""

import pytest
import torch

from tests import tiny

UNETS = [kind for kind in tiny.KINDS if not kind.startswith("flow")]


def inputs(kind):
    x_t = torch.randn(3, tiny.channels(kind), 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.02, 1.0, 70.0]) if kind.startswith("edm") else torch.tensor([3, 500, 999])
    return x_t, t, tiny.condition(kind, 3)


def hooked(denoiser, kind, arguments):
    seen = []
    network = denoiser.network
    block = network.down_blocks[-1] if kind.startswith("edm") else network.mid_block
    handle = block.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    denoiser(*arguments)
    handle.remove()
    return seen[0].detach()


@pytest.mark.parametrize("kind", UNETS)
def test_features_equal_a_hook_on_the_whole_network(kind):
    denoiser, arguments = tiny.denoiser(kind), inputs(kind)
    torch.testing.assert_close(
        denoiser.features(*arguments).detach(), hooked(denoiser, kind, arguments), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", UNETS)
def test_features_do_not_run_the_decoder(kind):
    denoiser, ran = tiny.denoiser(kind), []
    for block in [*denoiser.network.up_blocks, denoiser.network.conv_out]:
        block.register_forward_hook(lambda *_: ran.append(1))
    denoiser.features(*inputs(kind))
    assert not ran


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_features_have_the_width_of_the_deepest_block(kind):
    assert tiny.denoiser(kind).features(*inputs(kind)).shape == (3, 16, 4, 4)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradient_flows_through_features_into_the_image(kind):
    denoiser = tiny.denoiser(kind).requires_grad_(False)
    x_t, t, cond = inputs(kind)
    denoiser.features(x_t.requires_grad_(), t, cond).square().sum().backward()
    assert (x_t.grad != 0).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "edm-unlabelled"])
def test_features_depend_on_the_condition(kind):
    denoiser, (x_t, t, cond) = tiny.denoiser(kind), inputs(kind)
    other = denoiser.features(x_t, t, tiny.null(kind).expand(3))
    assert not torch.allclose(denoiser.features(x_t, t, cond), other)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_features_depend_on_the_time(kind):
    denoiser, (x_t, t, cond) = tiny.denoiser(kind), inputs(kind)
    assert not torch.allclose(denoiser.features(x_t, t, cond), denoiser.features(x_t, t.flip(0), cond))


def test_features_of_a_bf16_network_are_float32():
    denoiser = tiny.denoiser("eps-text")
    denoiser.network.to(torch.bfloat16)
    assert denoiser.features(*inputs("eps-text")).dtype == torch.float32


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_joined_pass_predicts_for_the_first_samples_and_gives_the_features_of_the_others(kind):
    denoiser, (x_t, t, cond) = tiny.denoiser(kind), inputs(kind)
    prediction, features = denoiser.joined(x_t, t, cond, 2)
    torch.testing.assert_close(prediction, denoiser(x_t, t, cond)[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features, denoiser.features(x_t, t, cond)[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", UNETS)
def test_joined_pass_runs_the_decoder_on_the_first_samples_only(kind):
    denoiser, ran = tiny.denoiser(kind), []
    denoiser.network.conv_out.register_forward_hook(lambda module, args, out: ran.append(len(out)))
    denoiser.joined(*inputs(kind), 1)
    assert ran == [1]
