"""One run's configuration: frozen pydantic models, one complete base per dataset, no defaults hidden in code.

Hardware is not here (see workflow/cluster): the same config gives the same weights on one GPU or eight.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dmd2.core.files import digest_of
from dmd2.experiment.data_config import Data
from dmd2.experiment.eval_config import Eval, Sampler
from dmd2.experiment.section import IndexRange, Positive, Precision, Section, Weight
from dmd2.experiment.teacher_config import Teacher


class Lora(Section):
    """Low-rank student: W + (alpha / rank) up down on every convolution and projection (dmd2.networks.lora)."""

    rank: Positive
    alpha: Annotated[float, Field(gt=0)]


class Generator(Section):
    """What the student is fed: its input, number of steps and first time (a sigma for edm, a step for eps).

    conditions: drawn apart from the GAN's real batch (labels uniformly, captions from the real set), or those of that
    real batch, whose images then are also what ``noised_real`` starts from (FastGen).
    lora: only low-rank factors on the teacher's weights are trained; the critic is trained whole.
    """

    input: Literal["noise", "noised_real", "backward_simulation"]
    steps: Annotated[int, Field(ge=1, le=1000)]
    time: Annotated[float, Field(gt=0)]
    conditions: Literal["drawn", "real"] = "drawn"
    lora: Lora | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.input == "noise" and self.steps > 1:
            raise ValueError("input noise is for one step: use backward_simulation or noised_real for several")
        return self


class DistributionMatching(Section):
    """L_DM: inclusive index range of its noise level, optional floor of the normaliser and alpha_t factor."""

    weight: Weight
    index_range: IndexRange
    normaliser_eps: Weight = 0.0
    alpha_factor: bool = False


class Critic(Section):
    """K: in each iteration one update, in every `ratio`-th one of the student too (TTUR), from iteration 0 on.

    shares_iteration false makes the turns exclusive: `ratio` - 1 of the critic, then one of the student (FastGen).
    index_range: noise levels of the denoising loss, inclusive.
    """

    ratio: Positive
    denoise_weight: Weight
    weighting: Literal["edm", "eps", "x0"]
    lr_multiplier: Annotated[float, Field(gt=0)]
    shares_iteration: bool = True
    index_range: IndexRange = (0, 999)

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


class Gan(Section):
    """Head on a denoiser's bottleneck; noise_range null classifies clean images.

    shares_noise: the student's GAN term judges the very sample that L_DM noised, and the discriminator the student
    images that L_K noised (FastGen); real images keep a draw of their own. Otherwise all are noised independently.
    """

    lambda_g: Weight
    lambda_d: Weight
    features_from: Literal["critic", "teacher"]
    noise_range: IndexRange | None
    r1_weight: Weight = 0.0
    r1_alpha: Weight = 0.1
    shares_noise: bool = False

    @property
    def on(self) -> bool:
        """Whether any GAN term is active."""
        return self.lambda_g > 0 or self.lambda_d > 0


class Pairs(Section):
    """Teacher noise-image pairs, sampled in `precision` (see `Eval`)."""

    count: Positive
    sampler: Sampler
    shards: Positive
    precision: Precision = "fp32"

    @model_validator(mode="after")
    def _filled(self) -> Self:
        if self.shards > self.count:
            raise ValueError(f"{self.shards} shards for {self.count} pairs would leave some empty: use fewer")
        if self.sampler.stochastic:
            raise ValueError("sampler is stochastic: pairs need a deterministic one (churn and eta 0, not ddpm)")
        return self


class Regression(Section):
    """Regression of the student on teacher pairs; weight 0 is off and makes no pairs.

    decoder: what turns latents into the images that lpips compares, the pipeline's autoencoder or its tiny one (taesd).
    """

    weight: Weight
    distance: Literal["lpips", "l2"]
    pairs: Pairs
    decoder: Literal["vae", "vae_tiny"] = "vae"


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    """AdamW. An iteration makes ticks_per_iteration of the warmup's ticks; ema is the decay per student update.

    clip bounds the gradient norm of the student and, unless clip_critic is false, that of critic and head together.
    states: how AdamW keeps its moments; 8bit quantises them in blocks.
    """

    lr: Annotated[float, Field(gt=0)]
    batch: Positive
    warmup: Annotated[int, Field(ge=0)]
    ticks_per_iteration: Positive
    clip: Annotated[float, Field(gt=0)]
    weight_decay: Weight
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]
    ema: Annotated[float, Field(gt=0, lt=1)] | None
    clip_critic: bool = True
    states: Literal["fp32", "8bit"] = "fp32"


class Train(Section):
    """Length in iterations (the paper's count: critic updates), precision, another run's name to start weights from.

    fp32 is IEEE float32. tf32 takes TF32 products on a GPU, and so do the others outside their bfloat16 autocast. bf16
    is what the paper's runs do: on text, passes without a gradient stay float32 (`EpsDenoiser`); bf16-all takes
    bfloat16 there, too, which is faster. `released` names a file with this student's weights as its authors published
    them: nothing is trained then, and `steps` is what they trained.
    """

    steps: Positive
    precision: Literal["fp32", "tf32", "bf16", "bf16-all"]
    init_from: str | None
    snapshot_every: Positive
    checkpoint_every: Positive
    log_every: Positive
    released: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.released is not None and self.init_from is not None:
            raise ValueError("released and init_from exclude each other: a released student is not trained here")
        return self


# What may change without making other weights: how long and how often, and everything that only looks at the result.
NOT_IDENTITY: dict[str, Any] = {"eval": True, "train": {"steps", "snapshot_every", "checkpoint_every", "log_every"}}


class TrainConfig(Section):
    """All of a run that its training reads."""

    data: Data
    teacher: Teacher
    generator: Generator
    dm: DistributionMatching
    critic: Critic
    gan: Gan
    regression: Regression
    optim: Optim
    train: Train

    @property
    def released_whole(self) -> bool:
        """Whether the student is its authors' and needs no teacher's weights; a LoRA, of text runs, does."""
        return self.train.released is not None and self.data.text is None

    @property
    def trains_critic(self) -> bool:
        """Whether the critic has a loss; a regression alone, as before SDXL's one-step run, needs none."""
        return self.critic.denoise_weight > 0 or self.gan.lambda_d > 0

    @property
    def prompts(self) -> str | None:
        """File of the prompts the student is trained on; None where conditions are labels or captions of real images.

        Several steps start from the captions of the real set, with or without backward simulation, as in the paper's.
        """
        text = self.data.text
        drawn = self.generator.input == "noise" and self.generator.conditions == "drawn"
        return text.prompts if text is not None and drawn else None

    @property
    def needs_real(self) -> bool:
        """Whether training reads the real set: for the GAN, for multi-step inputs, or for its conditions."""
        if self.train.released is not None:
            return False
        conditions = self.generator.conditions == "real" or (self.data.text is not None and self.prompts is None)
        return self.gan.on or self.generator.input != "noise" or conditions

    @property
    def needs_pairs(self) -> bool:
        """Whether training reads teacher pairs."""
        return self.regression.weight > 0 and self.train.released is None

    @property
    def pair_set(self) -> str:
        """``TEACHER/SOLVERSTEPS-COUNT-KEY``, the pair set this run would use: shared by all runs that would make it."""
        key = digest_of({"teacher": self.teacher_identity(), "pairs": self.regression.pairs.settings()})
        pairs = self.regression.pairs
        return f"{self.teacher.name}/{pairs.sampler.solver}{pairs.sampler.steps}-{pairs.count}-{key}"

    def teacher_identity(self) -> dict[str, Any]:
        """What determines the teacher's weights."""
        teacher = self.teacher.settings(include={"name", "parameterisation", "network", "train", "source"})
        return {"data": self.data.settings(), **teacher}

    def identity(self) -> dict[str, Any]:
        """Everything that can change the student's weights, for `digest_of`."""
        unused = {} if self.needs_pairs else {"regression": True}
        return self.settings(exclude=NOT_IDENTITY | unused)


class RunConfig(TrainConfig):
    """A complete run: its training and how it is measured."""

    eval: Eval

    def training(self) -> TrainConfig:
        """The part that training reads."""
        return TrainConfig.model_construct(**{name: getattr(self, name) for name in TrainConfig.model_fields})


def digest(cfg: TrainConfig) -> str:
    """Identity of a run's training: equal for configs that train the same weights."""
    return digest_of(cfg.identity())
