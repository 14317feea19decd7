"""Every draw is a function of what it is for."""

from itertools import combinations

import pytest
import torch

from dmd2.core.rng import Draws, orders, sample_labels, sample_noise, stream


def draws(start=0, stop=12, total=12, seed=0, iteration=3):
    return Draws(seed, iteration, total, start, stop)


CUTS = [[(0, 12)], [(0, 4), (4, 8), (8, 12)], [(0, 5), (5, 12)], [(i, i + 1) for i in range(12)]]


@pytest.mark.parametrize("cuts", CUTS)
def test_draws_do_not_depend_on_slicing(cuts):
    parts = [draws(*cut) for cut in cuts]
    assert torch.equal(torch.cat([d.normal("x", (2, 3)) for d in parts]), draws().normal("x", (2, 3)))
    assert torch.equal(torch.cat([d.integers("t", 0, 999) for d in parts]), draws().integers("t", 0, 999))
    assert torch.equal(torch.cat([d.shuffled("s", 7) for d in parts]), draws().shuffled("s", 7))


def test_draws_do_not_depend_on_what_was_drawn_before():
    d = draws()
    expected = d.normal("x", (2,))
    torch.manual_seed(5)
    d.normal("y", (100,))
    assert torch.equal(d.normal("x", (2,)), expected)


def test_names_iterations_and_seeds_give_different_streams():
    variants = [
        draws().normal("x", (50,)), draws().normal("y", (50,)), draws(iteration=4).normal("x", (50,)),
        draws(seed=1).normal("x", (50,)),
    ]  # fmt: skip
    for a, b in combinations(variants, 2):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.15


def test_addresses_are_not_confused_by_moving_a_digit():
    assert stream("1/23/x").initial_seed() != stream("12/3/x").initial_seed()
    assert not torch.equal(draws(seed=1, iteration=23).normal("x", (9,)), draws(seed=12, iteration=3).normal("x", (9,)))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    d = draws()
    d.normal("x", (2,)), d.integers("t", 0, 9), d.shuffled("s", 5), d.shared_integer("k", 0, 3)
    sample_noise([1], (2,), "noise")
    assert torch.equal(before, torch.get_rng_state())


def test_a_stream_is_the_same_in_every_process_and_release():
    assert stream("0/1200/critic/noise").initial_seed() == 55771909958591367
    assert torch.randn(3, generator=stream("a")).tolist() == pytest.approx([-0.141766, -0.489386, -0.460293], abs=1e-5)


def test_normal_draws_are_standard_normal_float32():
    values = Draws(0, 0, 500, 0, 500).normal("x", (3, 8, 8))
    assert (values.dtype, values.shape) == (torch.float32, (500, 3, 8, 8))
    assert (values.mean().item(), values.std().item()) == pytest.approx((0, 1), abs=0.01)


def test_integers_are_uniform_and_include_both_ends():
    values = Draws(0, 0, 20000, 0, 20000).integers("t", 20, 29)
    counts = torch.bincount(values, minlength=30)[20:]
    assert (values.min(), values.max()) == (20, 29)
    assert ((counts - 2000).abs() < 250).all()


def test_shared_integer_is_one_for_all_slices_and_covers_its_range():
    values = [{draws(s, s + 4, iteration=i).shared_integer("k", 0, 3) for s in (0, 4, 8)} for i in range(60)]
    assert all(len(v) == 1 for v in values)
    assert set.union(*values) == {0, 1, 2, 3}


# Shuffling.
def epoch(size, total, count):
    return torch.cat([Draws(0, it, total, 0, total).shuffled("real", size) for it in range(count)]).tolist()


@pytest.mark.parametrize(("size", "total"), [(12, 4), (10, 4), (5, 12), (7, 7)])
def test_shuffled_is_a_permutation_within_each_epoch(size, total):
    indices = epoch(size, total, 3 * size)
    for start in range(0, len(indices) - size + 1, size):
        assert sorted(indices[start : start + size]) == list(range(size))


def by_the_definition(d, name, size):
    """A row's place in the run says its epoch, whose order is one permutation; computed anew for every row."""
    positions = range(d.iteration * d.total + d.start, d.iteration * d.total + d.stop)
    orders = [torch.randperm(size, generator=stream(f"{d.seed}/epoch{p // size}/{name}")) for p in positions]
    return [int(order[p % size]) for order, p in zip(orders, positions, strict=True)]


@pytest.mark.parametrize("size", [1, 3, 7, 12, 50])
@pytest.mark.parametrize("cut", [(0, 12), (5, 12), (3, 4)])
def test_shuffled_is_what_its_definition_says_in_any_order_of_iterations(cut, size):
    for iteration in (9, 0, 4, 3, 10):
        d = draws(*cut, iteration=iteration)
        found = d.shuffled("real", size)
        assert found.dtype == torch.long and found.tolist() == by_the_definition(d, "real", size)


def test_the_order_of_a_set_is_computed_once_an_epoch_and_two_are_held(monkeypatch):
    computed, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda size, **options: computed.append(size) or randperm(size, **options))
    for iteration in range(30):  # three epochs, each of which begins within an iteration, of two sets
        draws(iteration=iteration, seed=77).shuffled("once", 125)
        draws(iteration=iteration, seed=77).shuffled("twice", 125)
    assert computed == [125] * 6
    orders(77, "once", 125)(0)
    assert len(computed) == 7  # dropped, and computed again
    assert orders(77, "once", 125)(2).dtype == torch.int32 and len(computed) == 7


def test_epochs_are_shuffled_differently():
    indices = epoch(20, 20, 3)
    assert indices[:20] != indices[20:40] != indices[40:]
    assert indices[:20] != list(range(20))


def test_names_shuffle_differently():
    assert not torch.equal(draws().shuffled("gan/real", 50), draws().shuffled("source", 50))


# Evaluation.
def test_sample_noise_belongs_to_its_seed_whatever_the_batch():
    together = sample_noise([4, 5, 6], (2, 3), "noise")
    assert torch.equal(together[1], sample_noise([5], (2, 3), "noise")[0])
    assert torch.equal(together.flip(0), sample_noise([6, 5, 4], (2, 3), "noise"))


def test_sample_noise_differs_by_seed_and_by_name():
    a, b, c = sample_noise([0], (50,), "noise"), sample_noise([1], (50,), "noise"), sample_noise([0], (50,), "step0")
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


def test_cyclic_labels_give_every_class_equally_often():
    labels = sample_labels(list(range(50)), 10, "cyclic")
    assert labels[:12].tolist() == [*range(10), 0, 1]
    assert torch.bincount(labels).tolist() == [5] * 10


def test_random_labels_belong_to_their_seed_and_cover_the_classes():
    labels = sample_labels(list(range(400)), 4, "random")
    assert torch.equal(labels[7:9], sample_labels([7, 8], 4, "random"))
    assert (torch.bincount(labels, minlength=4) > 60).all()
