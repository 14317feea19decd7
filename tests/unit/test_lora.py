"""Low-rank students: which weights train, and what plain weights their snapshots hold."""

from copy import deepcopy

import pytest
import torch

from dmd2.data.sets import load_shard, save_shard
from dmd2.networks.lora import add_lora, lora_state, merged_state, snapshot_state, split
from dmd2.training.teachers import wrap
from tests import full_size, tiny

RANK, ALPHA = 3, 2.0


def with_factors(base, seed: int = 0):
    """A copy of a UNet with factors whose ``up`` is no longer zero, as after a training."""
    network = deepcopy(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_lora(network, RANK, ALPHA)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return network


def student(kind: str = "eps-sdxl", seed: int = 0):
    """A tiny UNet with factors, and the one without them."""
    base = tiny.network(kind, seed)
    return with_factors(base, seed), base


def output(network, kind: str = "eps-sdxl"):
    x = torch.randn(2, 4, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return wrap(network, "eps").eval()(x, torch.tensor([999.0, 249.0]), tiny.condition(kind, 2)).float()


def count(network):
    """Modules that have factors, and parameters of all these factors."""
    factors = [p for name, p in network.named_parameters() if ".lora_" in name]
    return len(factors) // 2, sum(p.numel() for p in factors)


def test_the_networks_of_stable_diffusion_have_the_published_sizes():
    for config, tensors, parameters in ((full_size.SD15, 686, 859_520_964), (full_size.SDXL, 1680, 2_567_463_684)):
        network = full_size.unet(config)
        assert (len(network.state_dict()), sum(p.numel() for p in network.parameters())) == (tensors, parameters)


def test_sdxls_factors_are_those_of_the_paper():
    network = full_size.unet(full_size.SDXL)
    with torch.device("meta"):
        add_lora(network, 64, 8.0)
    assert count(network) == (788, 196_751_360)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 196_751_360


@pytest.mark.parametrize("kind", ["eps-text", "eps-sdxl"])
def test_the_merged_weights_compute_what_the_factors_do(kind):
    network, base = student(kind)
    plain = deepcopy(base)
    before = tiny.weights(network)
    plain.load_state_dict(merged_state(network))
    assert tiny.same(before, network)
    torch.testing.assert_close(output(plain, kind), output(network, kind), rtol=1e-5, atol=1e-4)
    assert (output(base, kind) - output(network, kind)).abs().max() > 0.1


def test_new_factors_change_nothing_and_follow_from_the_seed():
    base = tiny.network("eps-sdxl", 0)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        network = deepcopy(base)
        add_lora(network, RANK, ALPHA)
        assert tiny.same(merged_state(network), base)
        made.append(lora_state(network))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not all(torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_only_factors_are_trained():
    network, _ = student()
    before = tiny.weights(network)
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    x, cond = torch.randn(2, 4, tiny.SIZE, tiny.SIZE), tiny.condition("eps-sdxl", 2)
    wrap(network, "eps")(x, torch.tensor([999.0, 249.0]), cond).square().mean().backward()
    optimiser.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_a_snapshot_keeps_plain_weights_and_factors(tmp_path):
    network, base = student()
    save_shard(tmp_path / "snapshot.safetensors", snapshot_state(network))
    weights, factors = split(load_shard(tmp_path / "snapshot.safetensors"))
    assert weights.keys() == base.state_dict().keys()
    assert factors.keys() == lora_state(network).keys() and len(factors) == 3 * count(network)[0]
    assert all(torch.equal(factors[name], value) for name, value in lora_state(network).items())
    assert all(torch.equal(weights[name], value) for name, value in merged_state(network).items())


def test_a_network_without_factors_is_its_own_snapshot():
    network = tiny.network("eps-text", 0)
    assert tiny.same(snapshot_state(network), network) and count(network) == (0, 0)
