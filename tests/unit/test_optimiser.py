"""AdamW, warm-up and clipping (3.2)."""

import pytest
import torch
from torch import nn

from dmd2.training.optimiser import Optimiser
from tests import tiny


def optim(**changes):
    return tiny.config("edm", **{f"optim__{key}": value for key, value in changes.items()}).optim


def optimiser(*shapes, lr=1e-3, **changes):
    modules = []
    for shape in shapes or [(3,)]:
        module = nn.Module()
        module.weight = nn.Parameter(torch.ones(shape))
        modules.append(module)
    return Optimiser(modules, optim(lr=lr, **changes), lr), [m.weight for m in modules]


@pytest.mark.parametrize(("ticks", "end"), [(1, 500), (7, 72), (64, 8)])
def test_warm_up_of_500_ticks_ends_after_500_over_world_iterations(ticks, end):
    made, _ = optimiser(lr=2e-6, warmup=500, ticks_per_iteration=ticks)
    assert made.lr_at(0) == 0
    assert made.lr_at(1) == pytest.approx(2e-6 * ticks / 500)
    assert made.lr_at(end - 1) < 2e-6
    assert made.lr_at(end) == made.lr_at(100 * end) == 2e-6


def test_no_warm_up_starts_at_the_full_rate():
    assert optimiser(lr=1e-3, warmup=0)[0].lr_at(0) == 1e-3


def test_first_step_of_a_warm_up_moves_nothing_but_fills_the_moments():
    made, (weight,) = optimiser(warmup=10)
    weight.grad = torch.ones(3)
    made.step(0)
    assert weight.tolist() == [1, 1, 1]
    assert made.adamw.state[weight]["exp_avg"].tolist() == pytest.approx([0.1] * 3)


def test_clip_bounds_the_joint_norm_of_all_modules_and_reports_it():
    made, (a, b) = optimiser((1,), (1,), clip=10.0)
    a.grad, b.grad = torch.tensor([30.0]), torch.tensor([40.0])
    assert made.step(1).item() == pytest.approx(50)
    first_moments = [made.adamw.state[p]["exp_avg"].item() for p in (a, b)]
    assert first_moments == pytest.approx([0.6, 0.8], rel=1e-4)


def test_small_gradients_are_not_scaled_up():
    made, (weight,) = optimiser((1,), clip=10.0)
    weight.grad = torch.tensor([0.5])
    made.step(1)
    assert made.adamw.state[weight]["exp_avg"].item() == pytest.approx(0.05)


def test_decay_applies_to_every_parameter_including_norms_and_biases():
    network = tiny.network("edm", 0)
    before = tiny.weights(network)
    made = Optimiser([network], optim(weight_decay=0.1), 0.5)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    made.step(1)
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] * (1 - 0.5 * 0.1))


def test_adam_constants_are_those_of_the_paper():
    made, _ = optimiser(betas=[0.9, 0.999], weight_decay=0.01)
    defaults = made.adamw.defaults
    assert (defaults["betas"], defaults["eps"], defaults["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)


def test_step_equals_adamw_written_out():
    made, (weight,) = optimiser((1,), lr=0.1, weight_decay=0.01)
    expected, m, v = 1.0, 0.0, 0.0
    for k, g in enumerate([0.3, -0.2, 0.7], start=1):
        weight.grad = torch.tensor([g])
        made.step(k)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected -= 0.1 * 0.01 * expected + 0.1 * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)) ** 0.5 + 1e-8)
    assert weight.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_cleared_after_a_step():
    made, (weight,) = optimiser()
    weight.grad = torch.ones(3)
    made.step(1)
    assert weight.grad is None


def test_frozen_parameters_and_absent_modules_are_left_out():
    network = tiny.network("edm", 0).requires_grad_(False)
    trained = nn.Linear(2, 2)
    made = Optimiser([network, None, trained], optim(), 1e-3)
    assert len(made.parameters) == 2


def test_state_survives_saving_so_that_training_continues_bit_for_bit():
    def run(reload_after):
        made, (weight,) = optimiser((3,))
        for k in range(4):
            if k == reload_after:
                state, kept = made.state_dict(), weight.detach().clone()
                made, (weight,) = optimiser((3,))
                weight.data.copy_(kept)
                made.load_state_dict(state)
            weight.grad = torch.tensor([0.3, -0.1, 0.2]) * (k + 1)
            made.step(k)
        return weight

    assert torch.equal(run(reload_after=2), run(reload_after=None))
