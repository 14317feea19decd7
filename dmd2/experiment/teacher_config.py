"""The teacher section of a run."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dmd2.experiment.section import FolderName, Positive, Precision, Section


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
    shift: of the levels of a flow teacher: 3 of SD3, Sana and Z-Image, 6 of Lumina2, 3.158 of FLUX at 1024 pixels.
    """

    name: Annotated[FolderName, Field(description="of its folder in data/teachers; shared by all bases that name it")]
    parameterisation: Annotated[
        Literal["edm", "eps", "flow"],
        Field(description="what the network predicts: EDM's preconditioned image, noise, or flow"),
    ]
    guidance: Annotated[
        float, Field(ge=1, description="classifier-free guidance u + s (c - u) of distillation; 1 is none")
    ]
    network: dict[str, Any] | None = None
    train: Annotated[TeacherTraining | None, Field(description="how it is trained here")] = None
    source: Annotated[str | None, Field(description="file that it is converted from")] = None
    shift: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train is not None and self.network is None:
            raise ValueError("train needs network: the architecture to train")
        if self.train is not None and self.source is not None:
            raise ValueError("train and source exclude each other: a teacher is trained here or converted from a file")
        if self.shift != 1 and self.parameterisation != "flow":
            raise ValueError(
                f"shift {self.shift:g} is of flow teachers, and parameterisation is {self.parameterisation}"
            )
        return self
