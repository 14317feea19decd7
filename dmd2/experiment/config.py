"""The configuration of one run, in sections that are frozen pydantic models.

Hardware is not part of it (see workflow/cluster): the same config gives the same weights on one GPU or eight.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dmd2.core.files import digest_of
from dmd2.experiment.data_config import Data
from dmd2.experiment.eval_config import Eval
from dmd2.experiment.inheritance import for_editors
from dmd2.experiment.method_config import Critic, DistributionMatching, Gan, Generator, Pairs, Regression
from dmd2.experiment.section import Positive, Section, Weight
from dmd2.experiment.teacher_config import Teacher

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
        autocast. bf16 is that of the paper's runs: passes of an eps network without a gradient stay float32
        (`EpsDenoiser`). bf16-all takes bfloat16 there, too, which is faster; of other networks it is the same.
        bf16-body runs all passes in bfloat16 copies of the weights, norms included, with float32 weights in the
        optimiser: the fastest, and the arithmetic of the paper's ImageNet runs; a low-rank student and the head stay as
        in bf16-all.
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
    def guidance(self) -> dict[str, float]:
        """The largest guidance scale of the teacher in training, by the key that sets it, where its term is on."""
        dm, generator = self.dm, self.generator
        ranges = {
            "dm.guidance": dm.guidance if dm.weight > 0 else None,
            "generator.isg_guidance": generator.isg_guidance if generator.isg > 0 else None,
        }
        drawn = {key: scales[1] for key, scales in ranges.items() if scales is not None}
        return {"teacher.guidance": self.teacher.guidance, **drawn}

    @property
    def guided(self) -> bool:
        """Whether the teacher is ever guided in training."""
        return max(self.guidance.values()) > 1

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
        """What determines the teacher's images but the strength of guidance, which is the sampler's."""
        teacher = self.teacher.settings(exclude={"guidance"})
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

    def measured(self, sampler: str | None = None) -> Self:
        """What measuring the student, or the teacher by this sampler, reads: its other samplers are none of it."""
        samplers = {} if sampler is None else {sampler: self.eval.teacher_samplers[sampler]}
        return self.model_copy(update={"eval": self.eval.model_copy(update={"teacher_samplers": samplers})})

    def training(self) -> TrainConfig:
        """The part that training reads."""
        return TrainConfig.model_construct(**{name: getattr(self, name) for name in TrainConfig.model_fields})


def digest(cfg: TrainConfig) -> str:
    """Identity of a run's training: equal for configs that train the same weights."""
    return digest_of(cfg.identity())
