"""The teacher section of a run."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dmd2.experiment.section import FolderName, Positive, Precision, Section

GUIDANCE_EMBED = 3.5  # that FLUX.1-dev's pipeline tells it
OF_FLOW = ("shift", "rescale", "guidance_embed")
# What a run may set for itself of a teacher that other runs share by its name.
OF_RUN = {"guidance", "rescale", "guidance_embed"}


class TeacherTraining(Section):
    """How a small teacher is trained from scratch: EDM's loss, uniform t for eps, or the velocity's loss for flow.

    p_mean, p_std: of ln sigma for edm; for flow of ln(u / (1 - u)), where sigma is u shifted.
    """

    steps: Annotated[Positive, Field(description="iterations")]
    batch: Annotated[Positive, Field(description="images of one update")]
    lr: Annotated[float, Field(gt=0, description="learning rate")]
    warmup: Annotated[int, Field(ge=0, description="iterations until the full learning rate")]
    ema: Annotated[float, Field(ge=0, lt=1, description="decay of the average of the weights, which is the teacher")]
    p_mean: Annotated[float, Field(description="mean of log sigma")] = -1.2
    p_std: Annotated[float, Field(gt=0, description="SD of log sigma")] = 1.2
    label_dropout: Annotated[
        float, Field(ge=0, lt=1, description="share of images trained without their condition, for guidance")
    ] = 0.0
    seed: Annotated[int, Field(description="of the training")] = 0
    precision: Annotated[Precision, Field(description="arithmetic of the training")] = "fp32"


class Teacher(Section):
    """The frozen denoiser R: trained here (`train`), converted from the file `source`, or a diffusers UNet of the user.

    network: its architecture as a diffusers config. `train` builds it; a network that is loaded must have it.
    shift: of the levels of a flow teacher: 3 of SD3 and Sana, 6 of Lumina2 and Z-Image, 3.158 of FLUX at 1024 pixels.
    rescale: scale a guided velocity to the norm of the conditional one, over a ``sample``, the ``channels`` of a place
        or a ``row`` of latents, as Lumina2's pipeline does.
    guidance_embed: the guidance that FLUX.1-dev, student and critic alike, is told through its embedder.
    """

    name: Annotated[FolderName, Field(description="of its folder in data/teachers; shared by all bases that name it")]
    parameterisation: Annotated[
        Literal["edm", "eps", "flow"],
        Field(description="what the network predicts: EDM's preconditioned image, noise, or flow"),
    ]
    guidance: Annotated[
        float,
        Field(ge=1, description="classifier-free guidance u + s (c - u) of distillation; 1 is none"),
    ]
    network: dict[str, Any] | None = None
    train: Annotated[TeacherTraining | None, Field(description="how it is trained here")] = None
    source: Annotated[
        str | None, Field(description="file that it is converted from, or diffusers folder, used where it lies")
    ] = None
    shift: Annotated[float, Field(gt=0)] = 1.0
    rescale: Literal["sample", "channels", "row"] | None = None
    guidance_embed: Annotated[float, Field(ge=0)] = GUIDANCE_EMBED

    @property
    def flow(self) -> dict[str, Any]:
        """Settings of the denoiser of a flow network; the others have none (`dmd2.training.teachers.wrap`)."""
        return {name: getattr(self, name) for name in OF_FLOW}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train is not None and self.network is None:
            raise ValueError("train needs network: the architecture to train")
        if self.train is not None and self.source is not None:
            raise ValueError("train and source exclude each other: a teacher is trained here or converted from a file")
        of_flow = self.settings(include=set(OF_FLOW))
        if of_flow and self.parameterisation != "flow":
            key, value = next(iter(of_flow.items()))
            raise ValueError(f"{key} {value} is of flow teachers, and parameterisation is {self.parameterisation}")
        return self
