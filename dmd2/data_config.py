"""The data section of a run: what its real images are and where they come from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dmd2.section import Positive, Section


class Source(Section):
    """Where real data comes from: a kind of source and, unless a package ships it, its path.

    `split`, `image`, `label`: part of a hub set and names of its columns, by default train, image, label.
    `resize` makes images of any size square as EDM's dataset tool does: central square, then Lanczos.
    """

    kind: Literal["sklearn-digits", "idx", "lmdb", "image-folder", "cifar10", "hub", "latents"]
    path: str | None = None
    split: str | None = None
    image: str | None = None
    label: str | None = None
    resize: Literal["center-crop"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.path is None and self.kind not in ("sklearn-digits", "latents"):
            raise ValueError(f"{self.kind} needs a path")
        if self.kind != "hub" and (self.split or self.image or self.label):
            raise ValueError(f"split, image and label are of kind hub, not of {self.kind}")
        if self.kind not in ("hub", "image-folder") and self.resize:
            raise ValueError(f"resize is of kinds image-folder and hub, not of {self.kind}")
        return self


class Data(Section):
    """Real images: value range [-1, 1], `channels` x `resolution` x `resolution`; classes 0 means text-conditioned."""

    name: str
    source: Source
    resolution: Positive
    channels: Positive
    classes: Annotated[int, Field(ge=0)]
