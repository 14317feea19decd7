"""The global batch may be cut anyhow: the weights are those of the whole batch up to rounding."""

import pytest
import torch

from dmd2.method.step import train_step
from tests import tiny

ONE_RANGE = {"dm__index_range": [2, 998], "critic__index_range": [2, 998], "gan__noise_range": [2, 998]}
FASTGEN = {**ONE_RANGE, "gan__shares_noise": True, "critic__shares_iteration": False, "critic__ratio": 2}
SETTINGS = {
    "full method": ("edm", {}),
    "regression": ("edm", {"regression__weight": 0.25}),
    "guided text": ("eps-text", {"teacher__guidance": 3.0}),
    "backward simulation": ("eps-text", {"generator": {"input": "backward_simulation", "steps": 4, "time": 999.0}}),
    "noised real": ("eps-sdxl", {"generator": {"input": "noised_real", "steps": 4, "time": 999.0}}),
    "R1": ("edm", {"gan__r1_weight": 10.0}),
    "FastGen": (
        "edm",
        {**FASTGEN, "generator__conditions": "real", "gan__features_from": "teacher", "optim__clip_critic": False},
    ),
}


def updates(setting, micro_batch, iterations=2):
    """Change of the weights of student, critic and head after some iterations, each as one vector."""
    kind, changes = SETTINGS[setting]
    cfg = tiny.config(kind, **{"optim__batch": 16, "critic__ratio": 1, **changes})
    m, b = tiny.models(kind, cfg), tiny.batches(kind, cfg, micro_batch)
    modules = (m.student, m.critic, m.head)
    before = [torch.cat([p.detach().flatten() for p in module.parameters()]).clone() for module in modules]
    for it in range(iterations):
        train_step(m, b.at(it), it, cfg)
    after = [torch.cat([p.detach().flatten() for p in module.parameters()]) for module in modules]
    return [b - a for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_even_and_uneven_micro_batches_give_the_same_weights(setting):
    whole = updates(setting, 16)
    for micro_batch in (4, 7):
        for one, cut in zip(whole, updates(setting, micro_batch), strict=True):
            assert one.norm() > 0
            assert (one - cut).norm() / one.norm() < 5e-3


def test_losses_in_the_log_are_those_of_the_global_batch():
    cfg = tiny.config("edm", optim__batch=16, regression__weight=0.25)
    whole, cut = (train_step(tiny.models("edm", cfg), tiny.batches("edm", cfg, n).at(0), 0, cfg) for n in (16, 5))
    for name in ("student/dm", "student/gan", "student/regression", "critic/denoise", "critic/gan", "student/brightness",
                 "student/grad_norm", "critic/grad_norm", "dm/g_abs", "gan/p_real"):  # fmt: skip
        assert cut[name].item() == pytest.approx(whole[name].item(), rel=1e-3), name


def test_64_samples_in_one_or_in_uneven_parts():
    cfg = tiny.config("edm", optim__batch=64, critic__ratio=1)
    gradients = []
    for micro_batch in (64, 16, 24):
        m = tiny.models("edm", cfg)
        train_step(m, tiny.batches("edm", cfg, micro_batch).at(0), 0, cfg)
        state = m.student_optimiser.adamw.state
        gradients.append(torch.cat([state[p]["exp_avg"].flatten() for p in m.student.parameters() if p in state]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-6)


def test_the_same_seed_repeats_bit_for_bit_and_another_does_not():
    def run(seed):
        cfg = tiny.config("edm")
        m = tiny.models("edm", cfg)
        for it in range(3):
            train_step(m, tiny.batches("edm", cfg, seed=seed).at(it), it, cfg)
        return tiny.weights(m.student), m.student

    (first, _), (_, repeated), (_, other) = run(0), run(0), run(1)
    assert tiny.same(first, repeated)
    assert not tiny.same(first, other)
