"""What one iteration consumes."""

import gc
import threading

import pytest
import torch

from dmd2.core import distributed
from dmd2.core.errors import UserError
from dmd2.data.sets import TensorSet
from dmd2.method.batches import Batches
from tests import tiny


def labels(kind, cfg, iterations, micro_batch=1 << 30):
    b = tiny.batches(kind, cfg, micro_batch)
    return torch.cat([part.cond.labels for it in range(iterations) for part in b.at(it)])


@pytest.mark.parametrize("micro_batch", [64, 16, 24, 7, 1])
def test_shares_of_micro_batches_sum_to_one_and_follow_their_size(micro_batch):
    cfg = tiny.config(optim__batch=64)
    parts = list(tiny.batches("edm", cfg, micro_batch).at(3))
    sizes = [len(part.cond.labels) for part in parts]
    assert sum(sizes) == 64
    assert max(sizes) <= micro_batch
    assert [part.share for part in parts] == pytest.approx([size / 64 for size in sizes])


@pytest.mark.parametrize("micro_batch", [16, 24])
def test_micro_batches_are_slices_of_the_global_batch(micro_batch):
    cfg = tiny.config(optim__batch=64, regression__weight=1.0)
    (whole,) = tiny.batches("edm", cfg).at(5)
    parts = list(tiny.batches("edm", cfg, micro_batch).at(5))
    assert torch.equal(whole.cond.labels, torch.cat([part.cond.labels for part in parts]))
    assert torch.equal(whole.real[0], torch.cat([part.real[0] for part in parts]))
    assert torch.equal(whole.pairs[0], torch.cat([part.pairs[0] for part in parts]))


def test_micro_batches_of_all_processes_are_slices_of_the_global_batch(monkeypatch):
    cfg = tiny.config(optim__batch=7)
    whole, parts = tiny.one_batch("edm", cfg, 2), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts += tiny.batches("edm", cfg, micro_batch=2).at(2)
    assert [len(part.cond.labels) for part in parts] == [2, 1, 2, 2]
    assert [part.share for part in parts] == pytest.approx([2 / 7, 1 / 7, 2 / 7, 2 / 7])
    assert torch.equal(whole.cond.labels, torch.cat([part.cond.labels for part in parts]))
    assert torch.equal(whole.real[0], torch.cat([part.real[0] for part in parts]))


def test_student_labels_are_uniform_and_independent_of_the_real_batch():
    cfg = tiny.config(optim__batch=64)
    drawn = labels("edm", cfg, 30)
    counts = torch.bincount(drawn, minlength=tiny.CLASSES)
    assert len(counts) == tiny.CLASSES
    assert (counts > 1920 / tiny.CLASSES * 0.85).all()
    assert not torch.equal(drawn[:64], tiny.one_batch("edm", cfg).real[1].labels)


def test_real_images_come_with_their_own_labels():
    cfg = tiny.config(optim__batch=16)
    real = tiny.tensors("edm", 32, seed=9)
    images, cond = tiny.one_batch("edm", cfg).real
    for image, label in zip(images, cond.labels, strict=True):
        row = next(i for i in range(32) if torch.equal(real["images"][i], image))
        assert real["labels"][row] == label


def test_multi_step_runs_are_conditioned_as_the_images_they_start_from():
    cfg = tiny.config("eps-text", optim__batch=16, generator={"input": "noised_real", "steps": 4, "time": 999.0})
    real, batch = tiny.tensors("eps-text", 32, seed=9), tiny.one_batch("eps-text", cfg)
    for image, text in zip(batch.source, batch.cond.text, strict=True):
        row = next(i for i in range(32) if torch.equal(real["images"][i], image))
        assert torch.equal(real["text"][row], text)


def test_gan_images_are_drawn_apart_from_the_images_the_student_starts_from():
    cfg = tiny.config("eps-text", optim__batch=16, generator={"input": "noised_real", "steps": 4, "time": 999.0})
    batch = tiny.one_batch("eps-text", cfg)
    assert not torch.equal(batch.real[0], batch.source)


def test_pairs_keep_noise_image_and_label_together():
    cfg = tiny.config(optim__batch=8, regression__weight=1.0)
    pairs = tiny.tensors("edm", 32, seed=9)
    noise, images, cond = tiny.one_batch("edm", cfg).pairs
    for i in range(8):
        row = next(j for j in range(32) if torch.equal(pairs["noise"][j], noise[i]))
        assert torch.equal(pairs["images"][row], images[i])
        assert pairs["labels"][row] == cond.labels[i]


def test_what_a_run_does_not_use_is_not_read():
    cfg = tiny.config(gan__lambda_g=0.0, gan__lambda_d=0.0)
    (batch,) = Batches(cfg, 0, torch.device("cpu"), 64, real=None, pairs=None).at(0)
    assert (batch.real, batch.source, batch.pairs) == (None, None, None)


def test_a_text_conditioned_run_without_gan_still_says_that_it_needs_real_data():
    cfg = tiny.config("eps-text", gan__lambda_g=0.0, gan__lambda_d=0.0)
    assert cfg.needs_real  # its prompts come from the real set


def test_iterations_and_seeds_give_different_batches():
    cfg = tiny.config(optim__batch=64)
    first, later, other = (
        next(tiny.batches("edm", cfg, seed=seed).at(it)).cond.labels for seed, it in ((0, 0), (0, 1), (1, 0))
    )
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)


# What is read.
IMAGES, LABELS, TEXT = {"images", "labels"}, {"labels"}, {"text"}
FOUR = {"steps": 4, "time": 80.0}
BOTH, CRITIC = 0, 1  # iterations at ratio 5: of both turns, and of the critic alone


def read(kind, iteration, prompts=False, **changes):
    """Tensors that the set has and an iteration reads, by draw."""
    cfg, tensors = tiny.config(kind, regression__weight=1.0, **changes), tiny.tensors(kind, 32)
    rows = TensorSet(tensors)
    made = Batches(cfg, 0, torch.device("cpu"), 64, rows, rows, rows if prompts else None)
    return {name: names & tensors.keys() for name, names in made.reads(iteration).items()}


NO_GAN = {"gan__lambda_g": 0.0, "gan__lambda_d": 0.0}
SIMULATED = {"generator": {"input": "backward_simulation", **FOUR}}
NOISED = {"generator": {"input": "noised_real", **FOUR}}
AS_REAL = {"generator__conditions": "real"}
PAIRS = {"noise", "images"}


@pytest.mark.parametrize(
    ("kind", "changes", "each", "student"),
    [
        ("edm", {}, {"gan/real": IMAGES}, LABELS),
        ("edm", NO_GAN, {}, LABELS),
        ("edm", {"gan__lambda_d": 0.0}, {}, LABELS),
        ("edm", {"gan__lambda_g": 0.0}, {"gan/real": IMAGES}, LABELS),
        ("eps-text", NO_GAN, {"source": TEXT}, TEXT),
        ("eps-text", {"prompts": True}, {"gan/real": {"images", "text"}, "student/prompts": TEXT}, TEXT),
        ("edm", {**NO_GAN, **SIMULATED}, {"source": LABELS}, LABELS),
        ("edm", {**NO_GAN, **NOISED}, {"source": IMAGES}, LABELS),
        ("edm", AS_REAL, {"gan/real": IMAGES}, LABELS),
        ("edm", {**NO_GAN, **AS_REAL}, {"gan/real": LABELS}, LABELS),
    ],
)
def test_an_iteration_reads_what_its_turns_need(kind, changes, each, student):
    assert read(kind, CRITIC, **changes) == each
    assert read(kind, BOTH, **changes) == {**each, "regression/pairs": PAIRS | student}


def test_exclusive_turns_read_real_images_for_the_critic_and_pairs_for_the_student():
    exclusive = {"critic__shares_iteration": False, **AS_REAL}
    assert read("edm", 0, **exclusive) == {"gan/real": IMAGES}
    assert read("edm", 4, **exclusive) == {"gan/real": LABELS, "regression/pairs": PAIRS | LABELS}


def test_a_pass_that_needs_what_is_not_read_would_fail_and_none_does():
    for it in range(6):
        batch = tiny.one_batch("edm", tiny.config(regression__weight=1.0), it)
        assert (batch.pairs is not None) == (it % 5 == 0) and batch.real is not None


# One iteration ahead.
def rows_of(parts):
    return [(draws.start, draws.stop, sorted(found)) for draws, found in parts]


def tensors_of(parts):
    return [row for _, found in parts for one in found.values() for row in one.values()]


def ahead(**changes):
    cfg = tiny.config(optim__batch=7, regression__weight=1.0, train__steps=20, **changes)
    return tiny.batches("edm", cfg, micro_batch=3)


def test_rows_gathered_ahead_are_those_of_any_iteration_that_is_asked_for():
    made, plain = ahead(), ahead()
    for it in (0, 1, 2, 7, 3, 4, 4, 5, 19):
        found, expected = made.ahead(it), list(plain._gathered(it))
        assert rows_of(found) == rows_of(expected)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(found), tensors_of(expected), strict=True))


def test_the_next_iteration_has_been_begun_and_nothing_after_the_last(monkeypatch):
    made, asked = ahead(), []
    reads = Batches.reads

    def listed(self, it):
        if self is made:  # the thread of another test may still be reading
            asked.append((it, threading.current_thread().name))
        return reads(self, it)

    monkeypatch.setattr(Batches, "reads", listed)
    made.ahead(17)
    made._begun[18].result()
    assert {it for it, name in asked if name.startswith("inputs")} == {18}
    made.ahead(18), made.ahead(19)
    assert not made._begun
    assert {it for it, name in asked if not name.startswith("inputs")} == {17}


def test_what_goes_wrong_in_the_thread_is_raised_when_its_iteration_is_asked_for(monkeypatch):
    made, tensor = ahead(), TensorSet.tensor
    made.ahead(0)
    made._begun[1].result()

    def missing(self, name, *rest):
        raise UserError("the shard is missing")

    monkeypatch.setattr(TensorSet, "tensor", missing)
    made.ahead(1)  # it was there, and 2 fails
    with pytest.raises(UserError, match="the shard is missing"):
        made.ahead(2)
    monkeypatch.setattr(TensorSet, "tensor", tensor)
    assert rows_of(made.ahead(3)) == rows_of(ahead()._gathered(3))


def test_its_thread_ends_with_the_batches():
    made = ahead()
    made.ahead(0)
    (thread,) = made._thread._threads
    del made
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_the_cpu_gathers_when_it_needs_them():
    made = ahead()
    list(made.at(0))
    assert not made._begun and "_thread" not in vars(made)
