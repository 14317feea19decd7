"""Objectives state what they need; the step joins it, whatever the objectives are."""

import pytest
import torch

import dmd2.method.step
from dmd2.method.objectives.terms import STUDENT, Term
from dmd2.method.passes import Pass, Turn, evaluate, run_passes
from dmd2.method.step import student_loss, train_step
from tests import tiny


def turn_of(kind, **changes):
    cfg = tiny.config(kind, **changes)
    images = torch.randn(4, tiny.channels(kind), 8, 8, generator=torch.Generator().manual_seed(0))
    return Turn(tiny.models(kind, cfg), images, tiny.one_batch(kind, cfg), cfg, tiny.GIVEN[1])


def passes_of(turn, network="critic"):
    """A prediction, features of as many other samples, and a guided prediction of the teacher."""
    one, two = (turn.noised(turn.x, name, (20, 980)) for name in ("one", "two"))
    cond = turn.batch.cond
    return [
        Pass(network, *one, cond, features=True),
        Pass(network, *two, cond),
        Pass("teacher", *one, cond, gradient=False, guidance=turn.guidance()),
        Pass("teacher", *two, cond, gradient=False),
    ]


@pytest.mark.parametrize("kind", ["edm", "eps-text", "eps-sdxl", "flow-sd3"])
@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_joined_passes_give_what_each_gives_by_itself(kind, guidance):
    turn = turn_of(kind, **({} if kind == "edm" else {"teacher__guidance": guidance}))
    together, alone = run_passes(turn, passes_of(turn)), [run_passes(turn, [one])[0] for one in passes_of(turn)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_levels_of_dm_and_critic_may_be_logit_normal_on_the_grid():
    turn = turn_of("flow-sd3", dm__logit_normal=[0.7, 1.6], critic__logit_normal=[100.0, 1.0])
    draws, of_index = turn.batch.draws, turn.m.teacher.schedule.time
    found = [turn.noised(turn.x, name, (20, 980))[1] for name in ("dm", "critic", "gan/real")]
    drawn = 1000 / (1 + (-0.7 - 1.6 * draws.normal("dm/level", ())).exp())
    assert torch.equal(found[0], of_index(drawn.long().clamp(20, 980))) and found[0].unique().numel() == 4
    assert torch.equal(found[1], of_index(torch.full((4,), 980)))
    assert torch.equal(found[2], of_index(draws.integers("gan/real/level", 20, 980)))


def test_real_images_have_levels_like_those_of_the_critic_where_it_shares_its_noise():
    """By the distribution of levels alone the head could otherwise tell them apart."""
    for shares in (True, False):
        levels = {"gan__shares_noise": shares, "gan__noise_range": [20, 980], "critic__index_range": [20, 980]}
        turn = turn_of("flow-sd3", critic__logit_normal=[100.0, 1.0], **levels)
        assert bool((turn.level("gan/real", (20, 980)) == 980).all()) == shares


def test_unlabelled_real_images_are_joined_with_labelled_generated_ones():
    cfg = tiny.config("edm-unlabelled")
    logs = train_step(tiny.models("edm-unlabelled", cfg), tiny.batches("edm-unlabelled", cfg).at(0), 0, cfg)
    assert all(torch.isfinite(value) for value in logs.values()) and "critic/gan" in logs


def test_gradient_flows_only_where_a_pass_asks_for_it():
    turn = turn_of("edm")
    with_gradient = [result.requires_grad for result in run_passes(turn, passes_of(turn))]
    assert with_gradient == [True, True, False, False]


def counting(turn):
    ran = []
    turn.m.critic.network.conv_in.register_forward_hook(lambda module, args, out: ran.append(len(out)))
    return ran


def test_objective_may_ask_again_for_what_follows_from_a_result():
    turn = turn_of("edm")

    def twice(turn):
        x_t, t = turn.noised(turn.x, "mine", (20, 980))
        (first,) = yield [Pass("critic", x_t, t, turn.batch.cond)]
        (second,) = yield [Pass("critic", first.detach(), t, turn.batch.cond)]
        return (second - first).square().mean(), {"mine/first": first.mean()}

    def once(turn):
        (found,) = yield [Pass("critic", *turn.noised(turn.x, "other", (20, 980)), turn.batch.cond)]
        return found.square().mean(), {}

    ran = counting(turn)
    found = evaluate(turn, {"twice": twice(turn), "once": once(turn)})
    assert ran == [8, 4]  # the first of both joined, then the second of one
    assert set(found) == {"twice", "once"} and set(found["twice"][1]) == {"mine/first"}


def total_variation(turn):
    """A loss that needs no network."""
    yield []
    down, right = turn.x.diff(dim=2).abs().mean(), turn.x.diff(dim=3).abs().mean()
    return down + right, {"tv/down": down}


OWN = Term("tv", total_variation, lambda cfg: 0.5)


def test_objective_of_ones_own_is_a_function_and_a_line(monkeypatch):
    cfg = tiny.config("edm")
    plain = train_step(tiny.models("edm", cfg), tiny.batches("edm", cfg).at(0), 0, cfg)
    monkeypatch.setattr(dmd2.method.step, "STUDENT", [*STUDENT, OWN])
    logs = train_step(tiny.models("edm", cfg), tiny.batches("edm", cfg).at(0), 0, cfg)
    assert {**logs, **plain} == {**plain, **{name: logs[name] for name in ("student/tv", "tv/down")}}
    assert all(
        torch.equal(logs[name], plain[name]) for name in plain if name != "student/grad_norm" and "critic" not in name
    )

    m, x = tiny.models("edm", cfg), torch.randn(4, 1, 8, 8, requires_grad=True)
    total, logs = student_loss(m, tiny.GIVEN, x, tiny.one_batch("edm", cfg), cfg, found := {}), found
    parts = [cfg.dm.weight * logs["student/dm"], cfg.gan.lambda_g * logs["student/gan"], 0.5 * logs["student/tv"]]
    assert total.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)
