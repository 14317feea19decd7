"""Named protocols: everything a published number depends on besides the images, as data (protocols.yaml)."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from dmd2.core.errors import UserError, did_you_mean
from dmd2.experiment.eval_config import Patch
from dmd2.experiment.section import Strict

RANKS = re.compile(r"-on-([1-9]\d*)-ranks$")
# Keys that a base takes from its protocol. Its metrics are its own: they have the names of the paper's tables.
IN_A_BASE = {"detector", "geometry", "reference", "images", "labels", "rounding", "covariance_init", "patch", "clip"}


class NamedProtocol(Strict):
    """One entry of protocols.yaml; labels and classes are None where images follow captions.

    A base measures by `patch` and `clip` besides the distance: the distance of patches, and the CLIP score.
    """

    name: str
    detector: str
    geometry: str = "none"
    reference: str
    reference_is: str
    images: Annotated[int, Field(ge=2)]
    labels: str | None = None
    classes: Annotated[int, Field(ge=1)] | None = None
    rounding: Literal["round", "trunc"]
    covariance_init: str = "zeros"
    patch: Patch | None = None
    clip: str | None = None
    metrics: Annotated[tuple[str, ...], Field(strict=False)]

    @property
    def ranks(self) -> int:
        """Processes of the official evaluator that put ones into the covariance; 0 is the correct covariance."""
        return ranks_of(self.covariance_init)

    def title(self, changed: Mapping[str, Any]) -> str:
        """Name of the protocol and the values that differ from it: ``coco10k, but images 2000``."""
        shown = [f"{k} {','.join(v) if isinstance(v, tuple) else v}" for k, v in changed.items()]
        return self.name + (f", but {', '.join(shown)}" if shown else "")

    def for_a_base(self) -> dict[str, Any]:
        """Values of the eval section of a base that names this protocol."""
        values = self.model_dump(mode="json", include=IN_A_BASE, exclude_none=True)
        return {"protocol": self.name, **values, "labels": self.labels or "cyclic"}


def of_record(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol in a metrics.json or in a row of a table; records without a precision were sampled in fp32."""
    return {"precision": "fp32", **metrics["protocol"]}


def ranks_of(rule: str) -> int:
    """P of a rule ``...-on-P-ranks``; 0 for any other rule."""
    match = RANKS.search(rule)
    return int(match[1]) if match else 0


@cache
def known_protocols() -> dict[str, NamedProtocol]:
    """Every protocol by name."""
    listed = yaml.safe_load(Path(__file__).with_name("protocols.yaml").read_text(encoding="utf-8"))
    return {name: NamedProtocol(name=name, **values) for name, values in listed.items()}


def named(name: str) -> NamedProtocol:
    """The protocol `name`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in known_protocols():
        hint = did_you_mean(name, known_protocols(), f": choose one of {', '.join(known_protocols())}")
        raise UserError(f"there is no protocol {name}{hint}")
    return known_protocols()[name]
