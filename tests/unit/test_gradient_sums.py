"""Which buckets are sent, when and in which order; `tests/two_processes.py` sums real ones."""

import pytest
import torch
from torch import nn

from dmd2.core import distributed
from dmd2.core.distributed import GradientSums
from dmd2.training.optimiser import Optimiser
from tests import tiny


class Messages:
    """Stands in for torch.distributed: the other process has the same gradients, and process 0 has `order`."""

    def __init__(self):
        self.sent, self.order = [], None

    def all_reduce(self, flat, async_op):
        assert async_op
        self.sent.append(len(flat))
        flat.mul_(2)
        return self

    def wait(self):
        pass

    def broadcast(self, order, source):
        if self.order is not None:
            order.copy_(torch.tensor(self.order))


@pytest.fixture
def messages(monkeypatch):
    made = Messages()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "BUCKET", 6)
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(distributed.dist, name, getattr(made, name))
    return made


SIZES = [1, 2, 3, 4, 5]  # in buckets of at most 6: 5 | 4 | 3 2 1, in the order of a backward pass


def chain(passes=1):
    """Parameters that a backward pass completes from the last to the first."""
    parameters = [nn.Parameter(torch.full((size,), 1.0)) for size in SIZES]
    sums = GradientSums(parameters)
    sums.overlap(passes)
    return parameters, sums


def backward(parameters, used=range(5)):
    x = torch.ones(())
    for number in used:
        x = (x * parameters[number]).sum()
    x.backward()


def update(parameters, sums, used=range(5), passes=1):
    for p in parameters:
        p.grad = None
    for _ in range(passes):
        backward(parameters, used)
    early = sums.sent
    expected = [None if p.grad is None else p.grad.clone() for p in parameters]
    sums.finish()
    return early, expected


def test_after_the_first_update_all_are_sent_during_the_backward_pass(messages):
    parameters, sums = chain()
    assert update(parameters, sums)[0] == 0 and messages.sent == [5, 4, 6]
    assert update(parameters, sums)[0] == 3 and messages.sent == [5, 4, 6] * 2


def test_gradients_become_twice_what_both_processes_have(messages):
    parameters, sums = chain()
    alone = [p.detach().clone().requires_grad_() for p in parameters]
    backward(alone)
    for _ in range(2):
        update(parameters, sums)
        assert all(torch.equal(p.grad, 2 * own.grad) for p, own in zip(parameters, alone, strict=True))


def test_earlier_micro_batches_send_nothing_and_the_last_one_sends_their_sum(messages):
    parameters, sums = chain(passes=3)
    alone = [p.detach().clone().requires_grad_() for p in parameters]
    for _ in range(3):
        backward(alone)
    update(parameters, sums, passes=3)
    for p in parameters:
        p.grad = None
    backward(parameters), backward(parameters)
    assert sums.sent == 0
    backward(parameters)
    assert sums.sent == 3
    sums.finish()
    assert all(torch.equal(p.grad, 2 * own.grad) for p, own in zip(parameters, alone, strict=True))


def test_every_process_sends_in_the_order_of_process_0(messages):
    messages.order = [0, 1, 2, 3, 4]
    parameters, sums = chain()
    update(parameters, sums)
    assert sums.buckets == [[0, 1, 2], [3], [4]]
    early, _ = update(parameters, sums)  # the bucket that is completed last goes first
    assert early == 3 and messages.sent == [6, 4, 5] * 2


def test_a_parameter_without_a_gradient_delays_only_what_comes_after_it(messages):
    parameters, sums = chain()
    update(parameters, sums)
    early, _ = update(parameters, sums, used=[0, 1, 2, 4])
    assert early == 1 and messages.sent == [5, 4, 6, 5, 6]
    assert parameters[3].grad is None
    assert update(parameters, sums)[0] == 3


def test_a_parameter_that_the_first_update_does_not_reach_comes_last(messages):
    parameters, sums = chain()
    update(parameters, sums, used=[0, 1, 2, 3])
    assert sums.buckets == [[3], [2, 1, 0], [4]] and messages.sent == [4, 6]
    assert update(parameters, sums, used=[0, 1, 2, 3])[0] == 2


def test_another_backward_pass_than_was_said_is_an_error_and_no_wrong_sum(messages):
    parameters, sums = chain()
    update(parameters, sums)
    backward(parameters)
    with pytest.raises(RuntimeError, match="summed after 1 backward passes"):
        backward(parameters)


def test_summed_gradients_lie_in_memory_as_their_parameters_do(messages):
    weight = nn.Parameter(torch.randn(2, 3, 1, 1).expand(2, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    sums = GradientSums([weight])
    (weight * torch.arange(24.0).reshape(2, 3, 2, 2)).sum().backward()
    sums.finish()
    assert weight.grad.stride() == weight.stride()
    assert torch.equal(weight.grad, 2 * torch.arange(24.0).reshape(2, 3, 2, 2))


def test_gradients_of_a_bfloat16_copy_are_sent_during_its_backward_pass(messages, monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 500)
    denoiser = tiny.denoiser("edm")
    denoiser.hold_lowered()
    optimiser = Optimiser([denoiser], tiny.config("edm").optim, 1e-3)
    optimiser.overlap(1)
    sums, early = optimiser.sums, []
    for _ in range(2):
        denoiser.zero_grad()
        denoiser(torch.ones(2, 1, 8, 8), torch.ones(2), tiny.condition("edm", 2)).square().mean().backward()
        early.append(sums.sent)
        sums.finish()
    assert early == [0, len(sums.buckets)] and len(sums.buckets) > 3
    assert all(p.grad.dtype == torch.float32 for p in denoiser.parameters())
