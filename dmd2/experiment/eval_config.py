"""How a run is measured, and the samplers of teachers."""

import re
from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from dmd2.experiment.section import Distinct, Positive, Precision, Section, Weight

RANKS = r"(-on-[1-9]\d*-ranks)"
GEOMETRIES = r"^(none|square-crop\+lanczos-[1-9]\d*|patch-[1-9]\d*(-skip|-official)?)$"
IN_A_PROTOCOL = {"detector", "reference", "images", "labels", "rounding"}


def _word(value: str) -> str:
    if not re.fullmatch(r"\w+", value):
        raise ValueError("the name of a sampler has letters, digits and _ only")
    return value


SamplerName = Annotated[str, AfterValidator(_word)]


class Sampler(Section):
    """A sampler of a teacher.

    churn, s_min, s_max, s_noise: make Heun stochastic (EDM, Algorithm 2).
    eta: makes DDIM stochastic; DDPM always is.
    spacing: times of euler. SDXL's own scheduler has ``leading`` ones (981, 961, ..., 1 of 50 steps), the pairs of
        DMD2's authors were made with ``trailing`` ones (999, 979, ..., 19).
    """

    solver: Annotated[Literal["heun", "ddim", "ddpm", "pndm", "euler"], Field(description="the method")]
    steps: Annotated[Positive, Field(description="of the solver")]
    guidance: Annotated[float, Field(ge=1, description="classifier-free guidance; 1 is none")] = 1.0
    churn: Weight = 0.0
    s_min: Weight = 0.0
    s_max: Annotated[float, Field(gt=0)] = 1e9
    s_noise: Annotated[float, Field(gt=0)] = 1.0
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    spacing: Literal["trailing", "leading"] = "trailing"

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise on its way."""
        return self.churn > 0 or self.eta > 0 or self.solver == "ddpm"

    @property
    def network_calls(self) -> int:
        """Calls of the network for one image; guidance doubles each, and PNDM evaluates its second time twice."""
        steps = {"heun": 2 * self.steps - 1, "pndm": self.steps + 1}.get(self.solver, self.steps)
        return steps * (2 if self.guidance > 1 else 1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.solver == "heun" and self.steps < 2:
            raise ValueError("heun needs at least 2 steps: its grid runs from sigma_max to sigma_min")
        if self.solver == "pndm" and self.steps < 2:
            raise ValueError("pndm needs at least 2 steps: it visits its second time twice")
        if self.solver != "heun" and self.steps > 999:
            raise ValueError(f"{self.solver} takes at most 999 steps on a grid of 1000 levels")
        if self.solver == "euler" and self.spacing == "trailing" and ceil(1000 / (1000 / self.steps)) != self.steps:
            raise ValueError(f"diffusers rounds {self.steps} trailing steps to one more, beyond the grid: take another")
        if self.churn > 0 and self.solver != "heun":
            raise ValueError(f"churn belongs to heun, not {self.solver}")
        if self.eta > 0 and self.solver != "ddim":
            raise ValueError(f"eta belongs to ddim, not {self.solver}")
        if self.spacing != "trailing" and self.solver != "euler":
            raise ValueError(f"spacing belongs to euler, not {self.solver}")
        return self


def _complete_or_protocol(schema: dict[str, Any]) -> None:
    """Change the JSON Schema: keys that a protocol gives are required only where none is named."""
    required = schema["required"]
    schema["required"] = [key for key in required if key not in IN_A_PROTOCOL]
    schema["anyOf"] = [{"required": ["protocol"]}, {"required": sorted(IN_A_PROTOCOL)}]


class Patch(Section):
    """Geometry and reference of the second Frechet distance, of patches of the images (patch_fid, patch_fd)."""

    geometry: Annotated[str, Field(pattern=GEOMETRIES, description="crop or resizing before the detector")]
    reference: Annotated[str, Field(description="images to compare with")]


class Eval(Section):
    """How a run is measured.

    protocol: entry of dmd2/experiment/protocols.yaml that gives the values which a base leaves out.
    precision: of all sampling by students and teachers. fp32 is IEEE float32, tf32 takes TF32 products on a GPU, bf16
        also runs networks under bfloat16 autocast. Detectors run in IEEE float32.
    shards: jobs that share the features of a run.
    labels: how the classes of images are chosen; of no effect without classes, where one may write none.
    labels, covariance_init: ``-on-P-ranks`` is the rule of the official evaluator on P processes.
    prompts: of text runs, a file with a caption for each image; by default the captions of the real set, repeated.
    clip: model in data/weights that compares images with captions.
    """

    model_config = ConfigDict(json_schema_extra=_complete_or_protocol)

    protocol: str | None = None
    metrics: Annotated[
        Annotated[list[str], Field(min_length=1), Distinct], Field(description="names of the metrics to compute")
    ]
    detector: Annotated[str, Field(description="network of the features")]
    geometry: Annotated[
        str, Field(pattern=GEOMETRIES, description="crop or resizing of the images before the detector")
    ] = "none"
    reference: Annotated[str, Field(description="set of real images, or moments in data/refs, to compare with")]
    images: Annotated[int, Field(ge=2, description="generated images of one draw")]
    draws: Annotated[Positive, Field(description="independent draws whose numbers are averaged")]
    precision: Precision = "fp32"
    batch: Annotated[Positive, Field(description="images of one call of the networks")]
    shards: Positive = 1
    teacher_samplers: Annotated[
        dict[SamplerName, Sampler], Field(description="samplers of the teacher to measure beside the students, by name")
    ]
    labels: Annotated[str, Field(pattern=f"^(none|random|cyclic{RANKS}?)$")]
    rounding: Annotated[Literal["round", "trunc"], Field(description="how pixels become 8-bit")]
    covariance_init: Annotated[str, Field(pattern=f"^(zeros|ones{RANKS})$")] = "zeros"
    prompts: str | None = None
    clip: str | None = None
    patch: Annotated[Patch | None, Field(description="second distance, of patches")] = None

    @property
    def statistics(self) -> str:
        """Name of the reference's moments, which depend on the detector and on the geometry."""
        return self._moments(self.reference, self.geometry)

    @property
    def patch_statistics(self) -> str | None:
        """Name of the moments of the patches' reference."""
        return None if self.patch is None else self._moments(self.patch.reference, self.patch.geometry)

    def _moments(self, reference: str, geometry: str) -> str:
        return f"{reference}-{self.detector}" + ("" if geometry == "none" else f"-{geometry}")
