"""The data section of a run: its real images, their source, and the pipeline that encodes prompts and latents."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dmd2.experiment.section import FolderName, Positive, Section, Weight

CAPTIONED = ("webdataset", "emoji")  # kinds that always have captions; folders, hub sets and LMDBs may


class Source(Section):
    """Where real data comes from: the kind of source and, unless a package ships it, its path.

    split, image, label, caption: part of a hub set and names of its columns; by default train, image, label, text.
    resize: makes images of any size square as EDM's dataset tool does: central square, then Lanczos.
    """

    kind: Annotated[
        Literal["sklearn-digits", "idx", "lmdb", "image-folder", "cifar10", "hub", "webdataset", "emoji", "latents"],
        Field(description="what reads it"),
    ]
    path: Annotated[str | None, Field(description="file, folder or name of the hub set")] = None
    split: str | None = None
    image: str | None = None
    label: str | None = None
    caption: str | None = None
    resize: Literal["center-crop"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.path is None and self.kind not in ("sklearn-digits", "latents", "emoji"):
            raise ValueError(f"{self.kind} needs a path")
        if self.kind != "hub" and (self.split or self.image or self.label):
            raise ValueError(f"split, image and label are of kind hub, not of {self.kind}")
        if self.kind not in ("hub", "webdataset") and self.caption:
            raise ValueError(f"caption is of kinds hub and webdataset, not of {self.kind}")
        if self.kind not in ("hub", "image-folder", "webdataset") and self.resize:
            raise ValueError(f"resize is of kinds image-folder, hub and webdataset, not of {self.kind}")
        return self


class AutoencoderTraining(Section):
    """How a small autoencoder is trained on the images of the set: L1 plus `kl` times the KL divergence, per pixel."""

    steps: Annotated[Positive, Field(description="iterations")]
    batch: Annotated[Positive, Field(description="images of one update")]
    lr: Annotated[float, Field(gt=0, description="learning rate")]
    kl: Annotated[Weight, Field(description="weight of the KL divergence")]
    seed: Annotated[int, Field(description="of the training")] = 0


class Autoencoder(Section):
    """An AutoencoderKL that is trained here: its diffusers config and its training."""

    network: Annotated[dict[str, Any], Field(description="config of diffusers' AutoencoderKL")]
    train: Annotated[AutoencoderTraining, Field(description="how it is trained")]


class Pipeline(Section):
    """What encodes prompts and images: the diffusers pipeline in data/pipelines/`name`, made here or put there.

    encoder, tokens: make it here, with the text encoder that a package ships, cut to so many tokens.
    autoencoder: trained for it.
    max_sequence_length: tokens of the T5 or language model of a transformer's pipeline, by default as many as the
        pipeline of diffusers takes. What a caption takes on disk grows with it.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$", description="folder in data/pipelines")]
    encoder: Literal["all-minilm-l6-v2"] | None = None
    tokens: Positive = 77
    autoencoder: Autoencoder | None = None
    max_sequence_length: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.autoencoder is not None and self.encoder is None:
            raise ValueError("autoencoder is of a pipeline made here: name its text encoder in encoder")
        if self.max_sequence_length is not None and self.encoder is not None:
            raise ValueError("max_sequence_length is of a pipeline that is put there: of one made here it is tokens")
        return self


class Text(Section):
    """Prompts and what encodes them.

    latents: whether images are diffused in the latent space of the pipeline's autoencoder.
    prompts: file of the prompts of a one-step student's training; by default, and for several steps, the captions of
        the real set.
    jobs: how many share the encoding of the real set.
    keep_images: keep the images beside their latents, to evaluate against them.
    """

    pipeline: Annotated[Pipeline, Field(description="what encodes prompts and images")]
    latents: bool
    prompts: str | None = None
    jobs: Positive = 1
    keep_images: bool = False


class Data(Section):
    """Tensors that are diffused: images in [-1, 1], or latents times their scaling factor.

    Their shape is `channels` x `resolution` x `resolution`; the condition is one of `classes`, or `text`. With classes
    0 and no text there is none, and labels of the source are not read.
    """

    name: Annotated[FolderName, Field(description="of the set, in data/real; shared by all bases that name it")]
    source: Annotated[Source, Field(description="where the images come from")]
    resolution: Annotated[Positive, Field(description="height and width of what is diffused")]
    channels: Annotated[Positive, Field(description="of what is diffused")]
    classes: Annotated[int, Field(ge=0, description="number of classes; 0: none")]
    text: Annotated[Text | None, Field(description="prompts instead of classes")] = None

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if self.classes and self.text is not None:
            raise ValueError(f"classes {self.classes} and text exclude each other: give classes 0 with text")
        if self.text is None and self.source.kind in CAPTIONED:
            raise ValueError(f"source {self.source.kind} has captions, no labels: give data.text and classes 0")
        stock = self.text is not None and self.text.latents and self.text.pipeline.encoder is None
        if stock and self.channels not in (4, 16, 32):
            told = "latents of Stable Diffusion's autoencoders have 4, of SD3's and FLUX's 16, of Sana's 32"
            raise ValueError(f"channels {self.channels}: {told}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one diffused tensor."""
        return self.channels, self.resolution, self.resolution

    @property
    def labelled(self) -> bool:
        """Whether the condition is a class."""
        return self.classes > 0

    @property
    def latents(self) -> bool:
        """Whether the diffused tensors are latents."""
        return self.text is not None and self.text.latents
