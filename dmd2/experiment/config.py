"""The configuration of one run, in sections that are frozen pydantic models.

Hardware is not part of it (see workflow/cluster): the same config gives the same weights on one GPU or eight.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dmd2.core.files import digest_of
from dmd2.experiment.data_config import Data
from dmd2.experiment.eval_config import Eval, Sampler
from dmd2.experiment.inheritance import for_editors
from dmd2.experiment.section import IndexRange, Positive, Precision, Section, Weight
from dmd2.experiment.teacher_config import Teacher


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
    """

    input: Annotated[
        Literal["noise", "noised_real", "backward_simulation"],
        Field(description="noise, noised real images, or what the student makes of noise in its first steps"),
    ]
    steps: Annotated[int, Field(ge=1, le=1000, description="of the student")]
    time: Annotated[float, Field(gt=0, description="noise level of the first step, see above")]
    conditions: Literal["drawn", "real"] = "drawn"
    lora: Lora | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.input == "noise" and self.steps > 1:
            raise ValueError("input noise is for one step: use backward_simulation or noised_real for several")
        return self


class DistributionMatching(Section):
    """The distribution-matching loss of the student (paper Eq. 1).

    index_range: noise levels, both ends included.
    normaliser_eps: smallest value of the normaliser.
    alpha_factor: whether the gradient is multiplied by alpha_t.
    """

    weight: Annotated[Weight, Field(description="0 is off and costs nothing")]
    index_range: IndexRange
    normaliser_eps: Weight = 0.0
    alpha_factor: bool = False


class Critic(Section):
    """The critic K: every iteration updates it, and every `ratio`-th one, from iteration 0 on, the student too (TTUR).

    shares_iteration: false makes the turns exclusive: `ratio` - 1 of the critic, then one of the student (FastGen).
    index_range: noise levels of the denoising loss, both ends included.
    """

    ratio: Annotated[Positive, Field(description="critic updates for each student update (TTUR)")]
    denoise_weight: Annotated[Weight, Field(description="weight of its denoising loss")]
    weighting: Annotated[Literal["edm", "eps", "x0", "v"], Field(description="of that loss over noise levels")]
    lr_multiplier: Annotated[float, Field(gt=0, description="its learning rate over that of the student")]
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
    """The GAN: a head on the bottleneck of the critic or the teacher, of a transformer on the image tokens of a block.

    noise_range: noise levels of what it classifies; null: it classifies clean images.
    shares_noise: the student's GAN term takes the sample that L_DM noised, and the discriminator the student's images
        that L_K noised (FastGen); real images have a draw of their own. If false, all draws are independent.
    tap: that block, counted from 0; null: the middle one.
    head: ``single`` ends in one logit; ``patches`` in the mean of those of patches, for the widths of transformers.
    """

    lambda_g: Annotated[Weight, Field(description="weight of the student's GAN loss; 0 is off")]
    lambda_d: Annotated[Weight, Field(description="weight of the discriminator's loss; 0 is off")]
    features_from: Annotated[Literal["critic", "teacher"], Field(description="whose bottleneck the head sees")]
    noise_range: IndexRange | None
    r1_weight: Annotated[Weight, Field(description="weight of the approximate R1 penalty")] = 0.0
    r1_alpha: Annotated[Weight, Field(description="noise that it adds to real images")] = 0.1
    shares_noise: bool = False
    tap: Annotated[int, Field(ge=0)] | None = None
    head: Literal["single", "patches"] = "single"

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


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    """AdamW.

    ticks_per_iteration: how many of the `warmup` ticks one iteration counts.
    clip: largest gradient norm of the student and, unless clip_critic is false, of critic and head together.
    ema: decay per update of the student.
    states: how AdamW keeps its moments; 8bit quantises them in blocks.
    """

    lr: Annotated[float, Field(gt=0, description="learning rate of the student")]
    batch: Annotated[Positive, Field(description="images of one update over all processes")]
    warmup: Annotated[int, Field(ge=0, description="ticks until the full learning rate")]
    ticks_per_iteration: Positive
    clip: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[Weight, Field(description="of AdamW")]
    betas: Annotated[tuple[Beta, Beta], Field(strict=False, description="of AdamW")]
    ema: Annotated[float, Field(gt=0, lt=1)] | None
    clip_critic: Annotated[bool, Field(description="whether critic and head are clipped, too")] = True
    states: Literal["fp32", "8bit"] = "fp32"


class Train(Section):
    """Length, precision and origin of a training.

    steps: iterations, which the paper counts in updates of the critic.
    precision: fp32 is IEEE float32. tf32 takes TF32 products on a GPU, and so do the others outside their bfloat16
        autocast. bf16 is that of the paper's runs: on text, passes without a gradient stay float32 (`EpsDenoiser`).
        bf16-all takes bfloat16 there, too, which is faster. bf16-body runs all passes in bfloat16 copies of the
        weights, norms included, with float32 weights in the optimiser: the fastest, and the arithmetic of the paper's
        ImageNet runs; a low-rank student and the head stay as in bf16-all.
    init_from: another run of the base, with whose weights the training starts.
    released: file with the student's weights as its authors published them; nothing is trained then, and `steps` is
        what they trained.
    """

    steps: Positive
    precision: Literal["fp32", "tf32", "bf16", "bf16-all", "bf16-body"]
    init_from: str | None
    snapshot_every: Annotated[Positive, Field(description="iterations between evaluated snapshots")]
    checkpoint_every: Annotated[Positive, Field(description="iterations between checkpoints, to go on from")]
    log_every: Annotated[Positive, Field(description="iterations between lines of the log")]
    released: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.released is not None and self.init_from is not None:
            raise ValueError("released and init_from exclude each other: a released student is not trained here")
        return self


# Keys that do not change the weights: how long a training is, how often it saves and logs, and how it is measured.
NOT_IDENTITY: dict[str, Any] = {"eval": True, "train": {"steps", "snapshot_every", "checkpoint_every", "log_every"}}


class TrainConfig(Section):
    """The sections of a run that its training reads."""

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
        """Whether the student is a released one and needs no weights of a teacher, as a LoRA (of text runs) does."""
        return self.train.released is not None and self.data.text is None

    @property
    def trains_critic(self) -> bool:
        """Whether the critic has a loss; a run of the regression alone needs none."""
        return self.critic.denoise_weight > 0 or self.gan.lambda_d > 0

    @property
    def prompts(self) -> str | None:
        """File of the prompts the student is trained on; None where conditions are labels or captions of real images.

        A student of several steps takes the captions of the real set, as in the paper.
        """
        text = self.data.text
        drawn = self.generator.input == "noise" and self.generator.conditions == "drawn"
        return text.prompts if text is not None and drawn else None

    @property
    def needs_real(self) -> bool:
        """Whether training reads the real set: for the GAN, for the student's input, or for conditions."""
        if self.train.released is not None:
            return False
        conditions = self.generator.conditions == "real" or (self.data.text is not None and self.prompts is None)
        return self.gan.on or self.generator.input != "noise" or conditions

    @property
    def needs_pairs(self) -> bool:
        """Whether training reads teacher pairs."""
        return self.regression.weight > 0 and self.train.released is None

    @property
    def pairs(self) -> Pairs:
        """The pairs of a run that needs them: those without were refused (`dmd2.experiment.checks.sections`)."""
        assert self.regression.pairs is not None
        return self.regression.pairs

    @property
    def pair_set(self) -> str:
        """``TEACHER/SOLVERSTEPS-COUNT-KEY``, the pair set this run would use; runs of equal settings share it."""
        key = digest_of({"teacher": self.teacher_identity(), "pairs": self.pairs.settings()})
        pairs = self.pairs
        return f"{self.teacher.name}/{pairs.sampler.solver}{pairs.sampler.steps}-{pairs.count}-{key}"

    def teacher_identity(self) -> dict[str, Any]:
        """What determines the teacher's weights."""
        teacher = self.teacher.settings(include={"name", "parameterisation", "network", "train", "source", "shift"})
        return {"data": self.data.settings(), **teacher}

    def identity(self) -> dict[str, Any]:
        """Everything that can change the student's weights, for `digest_of`."""
        unused = {} if self.needs_pairs else {"regression": True}
        return self.settings(exclude=NOT_IDENTITY | unused)


class RunConfig(TrainConfig):
    """A complete run: its training and how it is measured."""

    eval: Eval

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """The JSON Schema of a base, which may also be like another one."""
        return for_editors(super().model_json_schema(*args, **options))

    def training(self) -> TrainConfig:
        """The part that training reads."""
        return TrainConfig.model_construct(**{name: getattr(self, name) for name in TrainConfig.model_fields})


def digest(cfg: TrainConfig) -> str:
    """Identity of a run's training: equal for configs that train the same weights."""
    return digest_of(cfg.identity())
