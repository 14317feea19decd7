"""Published formulas of the methods after DMD2, at made-up tensors; float64 values from their definitions."""

import pytest
import torch

from dmd2.method.objectives.decoupled import decoupled_gradient
from dmd2.method.objectives.distribution_matching import distribution_matching_loss
from dmd2.method.objectives.divergence import WEIGHTS, normalised
from dmd2.method.objectives.gan import discriminator_loss, generator_gan_loss
from dmd2.method.objectives.intra_segment import charbonnier
from dmd2.method.objectives.moments import moments_divergence
from dmd2.method.objectives.score_identity import score_identity_loss
from dmd2.networks.denoisers import Denoiser
from dmd2.networks.schedules import FlowSchedule, move

N = torch.arange(24, dtype=torch.float64)
X, R, F, U = (v.reshape(2, 3, 2, 2) for v in (N.sin(), N.cos(), (2 * N).sin(), (N / 2).cos()))
COND, UNCOND = (3 * N).sin().reshape(X.shape), (3 * N).cos().reshape(X.shape)
SIGMA = torch.tensor([0.9, 0.25], dtype=torch.float64)
SCALE = 3


def listed(values, count=4):
    return values.flatten()[:count].tolist()


def near(*values):
    return pytest.approx(values, rel=1e-8, abs=1e-9)


def test_decoupled_at_equal_levels_is_the_guided_gradient():
    g = decoupled_gradient(X, R, F, (SCALE - 1) * (R - U))
    assert listed(g) == near(-0.4501918916, 0.4698002844, 0.7078108819, 1.2749598217)
    assert distribution_matching_loss(X, g).item() == pytest.approx(0.6948412870)
    parts = [decoupled_gradient(X, R, F, (SCALE - 1) * (R - U), *weights) for weights in ((1.0, 0.0), (0.0, 1.0))]
    assert torch.allclose(sum(parts), g, rtol=0, atol=1e-14)


def test_decoupled_at_levels_of_their_own():
    excess = (SCALE - 1) * (COND - UNCOND)
    g = decoupled_gradient(X, R, F, excess)
    normaliser = (X - R - excess).abs().mean(dim=(1, 2, 3))
    assert normaliser.tolist() == near(2.5023800840, 1.2544734039)
    assert listed(g) == near(0.3996195488, -0.7565716737, 0.8545927633, -0.7736316750)
    assert distribution_matching_loss(X, g).item() == pytest.approx(0.6847374266)
    assert g.norm().item() == pytest.approx(5.7330093737)


class Weights(Denoiser):
    """Weights alone."""

    kind = FlowSchedule

    def __init__(self, *values):
        network = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))])
        super().__init__(network)

    @property
    def values(self):
        return self.network[0].tolist()


def test_implicit_distribution_alignment():
    critic, student = Weights(1, -2, 3), Weights(2, 0, -1)
    critic.approach(student, 1 - 0.97)
    assert critic.values == near(1.03, -1.94, 2.88)
    for _ in range(9):
        critic.approach(student, 1 - 0.97)
    assert critic.values == near(1.2625758731, -1.4748482538, 1.9496965076)
    assert student.values == [2, 0, -1]


def test_intra_segment_guidance():
    """A teacher of velocity cos n and a student of velocity x / 2 + sigma, from level 0.9 over 0.6 to 0.5."""
    schedule, times = FlowSchedule(), [torch.full((2,), t, dtype=torch.float64) for t in (0.9, 0.6, 0.5)]
    start, middle, end = times

    def student(y, t):
        return y - t[0] * (y / 2 + t[0])

    x_mid = move(schedule, X, X - 0.9 * R, start, middle)
    target = move(schedule, x_mid, student(x_mid, middle), middle, end)
    x = move(schedule, X, student(X, start), start, end)
    assert listed(x_mid, 3) == near(-0.3, 0.679380293, 1.0341414778)
    assert listed(target, 3) == near(-0.345, 0.5854112784, 0.9224344039)
    assert listed(x, 3) == near(-0.36, 0.3131767878, 0.3674379415)
    assert (x - target).square().mean().item() == pytest.approx(0.1484701739)
    assert charbonnier(x, target).item() == pytest.approx(0.3146875788)
    assert charbonnier(x, x).item() == pytest.approx(0, abs=1e-15)


def test_the_divergence_of_mean_and_variance():
    assert moments_divergence(X, 0.075, 0.81).tolist() == near(0.0512847562, 0.0610887451)


def test_a_head_counts_for_nothing_in_the_first_step():
    levels = torch.tensor([1, 0.9, 0.75, 0.5], dtype=torch.float64)
    weight = FlowSchedule().alpha_sigma(levels, torch.float64)[0].square()
    assert weight.tolist() == near(0, 0.01, 0.0625, 0.25)
    logits = torch.zeros(4, 1, dtype=torch.float64)
    ln2 = torch.tensor(2.0).log().item()
    assert generator_gan_loss(logits, weight=weight[:, None]).item() == pytest.approx(ln2 * weight.mean().item())
    assert discriminator_loss(logits, logits, weight=weight[:, None]).item() == pytest.approx(
        2 * ln2 * weight.mean().item()
    )


def test_hinge_losses():
    fake, real = torch.tensor([[0.5], [-2.0]]), torch.tensor([[0.5], [3.0]])
    assert discriminator_loss(fake, real, "hinge").item() == pytest.approx((1.5 + 0.5) / 2)
    assert generator_gan_loss(fake, "hinge").item() == pytest.approx(0.75)


RATIOS = torch.tensor([0.1, 0.5, 1, 2, 20], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("js", (0.1787234043, 0.6553191489, 0.9829787234, 1.3106382979, 1.8723404255)),
        ("kl", (0.0211864407, 0.1059322034, 0.2118644068, 0.4237288136, 4.2372881356)),
        ("sh", (0.1998991132, 0.4469880057, 0.6321364999, 0.8939760114, 2.8270003697)),
    ],
)
def test_weights_of_divergences_over_their_mean(kind, weights):
    assert normalised(WEIGHTS[kind](RATIOS)).tolist() == near(*weights)


def test_weights_of_divergences():
    shown = {kind: weight(torch.tensor(4.0)).item() for kind, weight in WEIGHTS.items()}
    assert shown == pytest.approx({"kl": 4, "js": 0.8, "sf": 0.2, "sh": 2, "jf": 5, "neyman": 0.25})
    assert WEIGHTS["js"](RATIOS).tolist() == near(0.0909090909, 1 / 3, 0.5, 2 / 3, 0.9523809524)


@pytest.mark.parametrize(
    ("a", "mean", "weighted"),
    [
        (1.0, -0.5240924909, -0.2354912341),
        (0.5, -0.0411446860, -0.0161933237),
        (1.2, -0.7172716129, -0.3232103982),
    ],
)
def test_score_identity(a, mean, weighted):
    one, alpha = torch.ones(2, 1, 1, 1), (1 - SIGMA).reshape(2, 1, 1, 1)
    assert score_identity_loss(X, R, F, one, a).item() == pytest.approx(mean, rel=1e-6)
    assert score_identity_loss(X, R, F, alpha, a).item() == pytest.approx(weighted, rel=1e-6)
