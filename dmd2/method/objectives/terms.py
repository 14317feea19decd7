"""The objectives of both turns, each with the weight that turns it on. An objective of your own is one line here."""

from collections.abc import Callable
from typing import NamedTuple

from dmd2.experiment.config import TrainConfig
from dmd2.method.objectives.decoupled import decoupled
from dmd2.method.objectives.denoising import critic_denoising
from dmd2.method.objectives.distribution_matching import distribution_matching
from dmd2.method.objectives.gan import discriminator, generator_gan
from dmd2.method.objectives.intra_segment import intra_segment
from dmd2.method.objectives.moments import moments
from dmd2.method.objectives.regression import regression
from dmd2.method.objectives.score_identity import score_identity
from dmd2.method.passes import Objective, Turn


class Term(NamedTuple):
    """One term of a turn's loss; `name` is what the log calls it."""

    name: str
    objective: Callable[[Turn], Objective]
    weight: Callable[[TrainConfig], float]


STUDENT = [
    Term("dm", distribution_matching, lambda cfg: cfg.dm.weight_of("dmd")),
    Term("decoupled", decoupled, lambda cfg: cfg.dm.weight_of("decoupled")),
    Term("sid", score_identity, lambda cfg: cfg.dm.weight_of("sid")),
    Term("moments", moments, lambda cfg: cfg.dm.moments_kl),
    Term("isg", intra_segment, lambda cfg: cfg.generator.isg),
    Term("gan", generator_gan, lambda cfg: cfg.gan.lambda_g),
    Term("regression", regression, lambda cfg: cfg.regression.weight),
]
CRITIC = [
    Term("denoise", critic_denoising, lambda cfg: cfg.critic.denoise_weight),
    Term("gan", discriminator, lambda cfg: cfg.gan.lambda_d),
]
