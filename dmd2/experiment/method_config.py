"""The method of a run: the student's input and the terms of both losses, one section each."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dmd2.experiment.eval_config import Sampler
from dmd2.experiment.section import IndexRange, Positive, Precision, Scales, Section, Weight


class Lora(Section):
    """Low-rank student: W + (alpha / rank) up down for every convolution and projection (`dmd2.networks.lora`)."""

    rank: Annotated[Positive, Field(description="of the factors")]
    alpha: Annotated[float, Field(gt=0, description="their scale: alpha / rank")]


class Generator(Section):
    """The student's input, number of steps, and first time: a sigma of an edm teacher, a step of an eps teacher,
        1 of a flow teacher.

    conditions: ``drawn`` independently of the GAN's real batch (labels uniformly, captions from the real set), or those
        of that ``real`` batch, whose images are then also noised for ``noised_real`` (FastGen).
    lora: train low-rank factors on the teacher's weights instead of the weights; the critic is trained whole.
    sampler: of several steps, in ``backward_simulation``, too: ``renoise`` adds fresh noise to each predicted image;
        ``euler`` adds none and goes on along the velocity of a flow.
    isg: weight of intra-segment guidance: one step of the student should end where a step of the teacher and then one
        of the student end (SenseFlow, arXiv 2506.00523); 0 is off and costs nothing.
    isg_margin: distance in grid indices between the level where the two meet and both ends of the student's step.
    isg_guidance: smallest and largest guidance scale of the teacher there, drawn for each image; null:
        ``teacher.guidance``.
    """

    input: Annotated[
        Literal["noise", "noised_real", "backward_simulation"],
        Field(description="noise, noised real images, or what the student makes of noise in its first steps"),
    ]
    steps: Annotated[int, Field(ge=1, le=1000, description="of the student")]
    time: Annotated[float, Field(gt=0, description="noise level of the first step, see above")]
    conditions: Literal["drawn", "real"] = "drawn"
    lora: Lora | None = None
    sampler: Literal["renoise", "euler"] = "renoise"
    isg: Weight = 0.0
    isg_margin: Annotated[int, Field(ge=0, le=499)] = 50
    isg_guidance: Scales | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.input == "noise" and self.steps > 1:
            raise ValueError("input noise is for one step: use backward_simulation or noised_real for several")
        if self.isg > 0 and 2 * self.isg_margin > 1000 // self.steps:
            raise ValueError(
                f"isg_margin {self.isg_margin} leaves no level within a step of {1000 // self.steps} indices: lower it"
            )
        return self


# The one objective of distribution matching that reads the key.
OF_OBJECTIVE = {"divergence": "dmd", "renoise": "decoupled", "matching": "decoupled", "augmentation": "decoupled"}
OF_OBJECTIVE |= {"sid_alpha": "sid", "sid_weight": "sid", "alpha_factor": "dmd"}
Moments = Annotated[tuple[float, Annotated[float, Field(gt=0)]] | None, Field(strict=False)]


class DistributionMatching(Section):
    """The loss by which critic and teacher move the student (paper Eq. 1), and what came after it.

    index_range: noise levels, both ends included.
    logit_normal: mean and SD of the logit of the level on the grid, from 0, the least noise, to 1; null: uniform.
    normaliser_eps: added to the normaliser, which thus is never 0.
    alpha_factor: whether the gradient of ``dmd`` is multiplied by alpha_t.
    objective: ``dmd``; ``decoupled``, its two parts at levels of their own (arXiv 2511.22677); ``sid``, score identity
        distillation, whose gradient runs through teacher and critic (arXiv 2509.25127).
    matching, augmentation: weights of the two parts of ``decoupled``: distribution matching without guidance, and what
        guidance adds.
    renoise: levels of the two: ``shared`` by both, ``full`` and independent, not noisier than the student's own level
        in both (``constrained``) or in the augmentation alone (``hybrid``), and then drawn uniformly.
    sid_alpha: factor of the squared difference of teacher and critic in ``sid``.
    sid_weight: of ``sid``, of an image: alpha_t, or the inverse of the normaliser of ``dmd``.
    divergence: weights images by the head's estimate of how real they are (f-distill, arXiv 2502.15681); ``rkl`` is
        off: all weights are 1.
    moments_kl: weight of a divergence of each image's mean and variance from `moments`.
    moments: mean and variance of the data.
    guidance: smallest and largest guidance scale of the teacher, drawn for each image; null: ``teacher.guidance``.
    """

    weight: Annotated[Weight, Field(description="0 is off and costs nothing")]
    index_range: IndexRange
    logit_normal: Moments = None
    normaliser_eps: Weight = 0.0
    alpha_factor: bool = False
    objective: Literal["dmd", "decoupled", "sid"] = "dmd"
    matching: Weight = 1.0
    augmentation: Weight = 1.0
    renoise: Literal["shared", "full", "constrained", "hybrid"] = "shared"
    sid_alpha: Weight = 1.0
    sid_weight: Literal["alpha", "normaliser"] = "alpha"
    divergence: Literal["rkl", "kl", "js", "sf", "sh", "jf", "neyman"] = "rkl"
    moments_kl: Weight = 0.0
    moments: Moments = None
    guidance: Scales | None = None

    def weight_of(self, objective: str) -> float:
        """`weight` for the objective of the run, 0 for the others."""
        return self.weight if self.objective == objective else 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.moments_kl > 0 and self.moments is None:
            raise ValueError("moments_kl needs moments: the mean and the variance of the images of the data set")
        for key, objective in OF_OBJECTIVE.items():
            if self.objective != objective and (value := self.settings().get(key)) is not None:
                told = f"{key} {value} is of objective {objective}, and objective is {self.objective}: leave it out"
                raise ValueError(told)
        if self.renoise == "constrained" and self.logit_normal is not None:
            raise ValueError("renoise constrained draws its levels uniformly: leave out logit_normal")
        return self


class Critic(Section):
    """The critic K: every iteration updates it, and every `ratio`-th one, from iteration 0 on, the student too (TTUR).

    shares_iteration: false makes the turns exclusive: `ratio` - 1 of the critic, then one of the student (FastGen).
    index_range: noise levels of the denoising loss, both ends included.
    logit_normal: see `DistributionMatching`; flow teachers are trained with [0, 1].
    ida: share that the critic keeps of its weights after each update of the student, whose weights are the rest
        (implicit distribution alignment, arXiv 2506.00523); of a low-rank student they are its merged weights. 1 is off
        and costs nothing.
    """

    ratio: Annotated[Positive, Field(description="critic updates for each student update (TTUR)")]
    denoise_weight: Annotated[Weight, Field(description="weight of its denoising loss")]
    weighting: Annotated[Literal["edm", "eps", "x0", "v"], Field(description="of that loss over noise levels")]
    lr_multiplier: Annotated[float, Field(gt=0, description="its learning rate over that of the student")]
    shares_iteration: bool = True
    index_range: IndexRange = (0, 999)
    logit_normal: Moments = None
    ida: Annotated[float, Field(ge=0, le=1)] = 1.0

    def turns(self, it: int) -> tuple[bool, bool]:
        """Whether iteration `it`, counted from 0, updates the student and whether it updates the critic."""
        if self.shares_iteration:
            return it % self.ratio == 0, True
        student = it % self.ratio == self.ratio - 1
        return student, not student

    def student_updates(self, iterations: int) -> int:
        """Updates of the student in the first `iterations`."""
        return -(-iterations // self.ratio) if self.shares_iteration else iterations // self.ratio

    @model_validator(mode="after")
    def _gets_turns(self) -> Self:
        if self.ratio == 1 and not self.shares_iteration:
            raise ValueError("ratio 1 with shares_iteration false gives the critic no turn: use a ratio of 2 or more")
        return self


Block = Annotated[int, Field(ge=0)]


class Gan(Section):
    """The GAN: a head on the bottleneck of the critic or the teacher, of a transformer on the image tokens of a block.

    noise_range: noise levels of what it classifies; null: it classifies clean images.
    shares_noise: the student's GAN term takes the sample that L_DM noised, and the discriminator the student's images
        that L_K noised (FastGen); real images have a draw of their own. If false, all draws are independent.
    tap: that block, counted from 0, or several, each with a head of its own; null: the middle one.
    loss: ``logistic``, non-saturating, or ``hinge``.
    level_weight: whether images count by alpha^2 of the level at which the student made them, on a flow (1 - sigma)^2:
        nothing in the first step (SenseFlow).
    head: ``single`` ends in one logit; ``patches`` in the mean of those of patches, for the widths of transformers.
    """

    lambda_g: Annotated[Weight, Field(description="weight of the student's GAN loss; 0 is off")]
    lambda_d: Annotated[Weight, Field(description="weight of the discriminator's loss; 0 is off")]
    features_from: Annotated[Literal["critic", "teacher"], Field(description="whose bottleneck the head sees")]
    noise_range: IndexRange | None
    r1_weight: Annotated[Weight, Field(description="weight of the approximate R1 penalty")] = 0.0
    r1_alpha: Annotated[Weight, Field(description="noise that it adds to real images")] = 0.1
    shares_noise: bool = False
    tap: Block | Annotated[list[Block], Field(min_length=1)] | None = None
    head: Literal["single", "patches"] = "single"
    loss: Literal["logistic", "hinge"] = "logistic"
    level_weight: bool = False

    @property
    def taps(self) -> list[int]:
        """Blocks of `tap` in ascending order; none: the middle one."""
        return sorted({self.tap} if isinstance(self.tap, int) else set(self.tap or ()))

    @property
    def on(self) -> bool:
        """Whether any GAN term is active."""
        return self.lambda_g > 0 or self.lambda_d > 0


class Pairs(Section):
    """Pairs of noise and the teacher's image, sampled in `precision` (see `Eval`)."""

    count: Annotated[Positive, Field(description="number of pairs")]
    sampler: Annotated[Sampler, Field(description="of the teacher, deterministic")]
    shards: Annotated[Positive, Field(description="jobs that share the sampling")]
    precision: Annotated[Precision, Field(description="arithmetic of the sampling")] = "fp32"

    @model_validator(mode="after")
    def _filled(self) -> Self:
        if self.shards > self.count:
            raise ValueError(f"{self.shards} shards for {self.count} pairs would leave some empty: use fewer")
        if self.sampler.stochastic:
            raise ValueError("sampler is stochastic: pairs need a deterministic one (churn and eta 0, not ddpm)")
        return self


class Regression(Section):
    """Regression of the student on teacher pairs; with weight 0 no pairs are made.

    pairs: needed where the weight is above 0.
    decoder: turns latents into the images that lpips compares: the pipeline's autoencoder, or its tiny one (taesd).
    """

    weight: Annotated[Weight, Field(description="0 is off and costs nothing")]
    distance: Annotated[Literal["lpips", "l2"], Field(description="of the student's image to the teacher's")]
    pairs: Pairs | None = None
    decoder: Literal["vae", "vae_tiny"] = "vae"
